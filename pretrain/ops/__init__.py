"""Kernels: every fast op beside its naive twin, one signature, single device, plain PyTorch."""
