"""Which dtype a computation runs in.

"fp32" in this code base means `wide_dtype(x)`: fp32 for bf16 and fp32 inputs, fp64 for fp64 inputs,
so that the fp64 tests reach every path.
"""

import torch
from torch import Tensor


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of losses, softmax, decays and carried states: at least fp32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def matmul_dtype(x: Tensor) -> torch.dtype:
    """What autocast would run a matmul of `x` in; ops that switch autocast off ask before."""
    if x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def no_autocast(x: Tensor) -> torch.autocast:
    """A context in which dtypes are what the code says."""
    return torch.autocast(x.device.type, enabled=False)
