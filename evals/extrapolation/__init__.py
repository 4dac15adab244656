"""Extrapolation: what contexts beyond the training length are worth, and what they cost."""
