"""Packages with faster kernels for Hopper (extra `flash`), of which functions that are not public
are called: another version than the one below is not taken."""

import warnings
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

VERSIONS = {"flash-attn-4": "4.0.0b36", "quack-kernels": "0.6.5"}  # as in pyproject.toml
_INSTEAD = {
    "flash-attn-4": "windows take FlexAttention",
    "quack-kernels": "SwiGLU and short products take Triton and cuBLAS",
}


def is_installed(name: str) -> bool:
    """Whether the distribution is here in the version that is called; warns of any other.

    Its metadata say so. Asking whether its modules can be found would import what lies above them,
    and FlashAttention-2 has the same.
    """
    try:
        found = version(name)
    except PackageNotFoundError:
        return False
    if found != VERSIONS[name]:
        warnings.warn(
            f"{name} {found} is installed, and {VERSIONS[name]} is what this code calls: "
            f"{_INSTEAD[name]}; pip install {name}=={VERSIONS[name]}",
            stacklevel=2,
        )
    return found == VERSIONS[name]


def aligned(x: Tensor) -> Tensor:
    """`x`, or a copy where it does not begin at a multiple of 16 bytes, as these kernels read it.

    Only an operator can tell: while code is traced a tensor has no address.
    """
    return x if x.data_ptr() % 16 == 0 else x.clone()


def describe_missing(device: torch.device) -> list[str]:
    """One line for each package that would make training on this device faster."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return []
    return [
        f"{name} {wanted} is not installed: {_INSTEAD[name]}; install the extra `flash`"
        for name, wanted in VERSIONS.items()
        if not is_installed(name)
    ]
