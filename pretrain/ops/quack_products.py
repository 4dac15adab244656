"""Products that quack (Dao-AILab/quack; extra `flash`) makes faster than cuBLAS.

Shapes: M rows, K inner width, N columns.

A product whose inner width is short, as that of a projection from the model's width, spends much of
a tile on its way out of the registers; quack's ping-pong kernels multiply the next tile meanwhile.
On an H100, 65,536 tokens, inner width 1,024: outputs of 3,072 0.57 ms where cuBLAS takes 0.60 to
0.65, of 1,024 0.20 and 0.22; 4,096 tokens' logits of 32,128 pieces 0.34 and 0.40; with inner widths
of 2,752 to 5,504 0 to 3 %, and sums over tokens (a weight's gradient) none, so that these stay
cuBLAS's.
"""

import torch
from torch import Tensor

from pretrain.ops.kernel_packages import aligned
from pretrain.ops.swiglu_quack import QUACK_INSTALLED

ENOUGH_TILES = 1320  # ten for each of 132 multiprocessors: the last round may be half empty
SHORT = 1536


def quack_is_faster(a: Tensor, b: Tensor) -> bool:
    """Whether to take quack's product of (M, K) and (K, N): on Hopper, where quack is installed, in
    bf16, for many rows, short and contiguous, in units of 16 bytes, and columns that fill tiles.
    Blackwell was not measured."""
    rows, inner, columns = *a.shape, b.shape[1]
    tile = tile_of(columns)
    return (
        QUACK_INSTALLED
        and a.dtype == b.dtype == torch.bfloat16
        and a.stride() == (inner, 1)
        and b.stride() in ((columns, 1), (1, inner))
        and inner <= SHORT
        and inner % 8 == 0
        and columns % 8 == 0
        and tile is not None
        and rows // tile[0] * (columns // tile[1]) >= ENOUGH_TILES
        and a.is_cuda
        and torch.cuda.get_device_capability(a.device)[0] == 9
    )


def tile_of(columns: int) -> tuple[int, int] | None:
    """Rows and columns of a tile, the fastest for 3,072 and 32,128 and for 1,024 columns. The last
    one may be half empty where there are a hundred."""
    for rows, width in ((128, 192), (192, 128)):
        if columns % width == 0 or columns >= 100 * width:
            return rows, width
    return None


@torch.library.custom_op("longspan::write_product", mutates_args=("y",))
def write_product(a: Tensor, b: Tensor, y: Tensor) -> None:
    """Fills `y` (M, N) with (M, K) times (K, N), where `quack_is_faster`. No derivative."""
    from quack.gemm_config import GemmConfig
    from quack.gemm_interface import gemm_tuned

    tile = tile_of(b.shape[1])
    assert tile is not None
    config = GemmConfig(
        tile_m=tile[0], tile_n=tile[1], pingpong=True, cluster_m=2, is_dynamic_persistent=False
    )
    gemm_tuned.fn(aligned(a), aligned(b), y, config=config)


@torch.library.custom_op("longspan::product", mutates_args=())
def product(a: Tensor, b: Tensor) -> Tensor:
    """Of `write_product`, in memory of its own: a compiled graph has its own derivatives."""
    y = a.new_empty(a.shape[0], b.shape[1])
    write_product(a, b, y)
    return y


@write_product.register_fake
def _(a: Tensor, b: Tensor, y: Tensor) -> None:
    return None


@product.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])
