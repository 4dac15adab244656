"""Compiled blocks for encoders: every length of rows is compiled anew, so a training has few."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from evals.lra.examples import Examples
from pretrain.models import Encoder
from pretrain.ops.numerics import matmul_dtype
from pretrain.training.compiled_check import COMPILED_ERROR, compiled_error

# On ListOps, with 500 to 2,000 symbols, rows are 12 % longer than with any multiple of 64; the
# compiler takes about ten seconds for each.
N_LENGTHS = 5
_MULTIPLE = 128  # whole chunks of every mixer, whole tiles of every kernel


def bucket_lengths(splits: Iterable[Examples], count: int = N_LENGTHS) -> Sequence[int]:
    """At most `count` lengths for rows: about equally many examples need each of them.

    They depend on the examples alone, so that all models and seeds share what is compiled.

    Args:
        splits: the examples that rows will hold, whatever the batch.
        count: of lengths.

    Returns:
        In increasing order; the last one holds the longest example.
    """
    lengths = np.concatenate([split.lengths() for split in splits])
    quantiles = np.quantile(lengths, np.arange(1, count + 1) / count, method="higher")
    return np.unique(-(-quantiles // _MULTIPLE) * _MULTIPLE).tolist()


def verify_blocks(
    model: Encoder, lengths: Sequence[int], n_rows: int, *, autocast: bool = False
) -> None:
    """Compares one compiled block of each kind with itself uncompiled, at every length.

    These are the calls that training will make: afterwards no block is compiled any more.

    Args:
        model: after `compile_blocks`, on its device.
        lengths: of the rows.
        n_rows: of a batch.
        autocast: as in training.

    Raises:
        ValueError: when they differ by more than rounding.
    """
    device = model.norm.weight.device
    generator = torch.Generator(device).manual_seed(0)
    for length in lengths:
        # Inner blocks' inputs have a gradient; a compiler distinguishes.
        shape = (2, n_rows, length, model.config.d_model)
        drawn = torch.randn(shape, generator=generator, device=device)
        ends = torch.randint(1, length + 1, (n_rows, 1), generator=generator, device=device)
        padding = torch.arange(length, device=device) >= ends
        first = model.blocks[0]
        kinds = {(str(block.kind), block is first): block for block in model.blocks}
        for (kind, is_first), block in kinds.items():
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                dtype = matmul_dtype(drawn)  # of what the block before adds
                inputs = [drawn[0].clone(), drawn[1].to(dtype, copy=True)][: 1 if is_first else 2]
                inputs = [part.requires_grad_() for part in inputs]
                more = {} if is_first else {"added": inputs[1]}
                runs = [run(inputs[0], padding=padding, **more) for run in (block.forward, block)]
            # What stands in the place of a pad means nothing.
            given = sum(inputs)
            want, got = (torch.where(padding.unsqueeze(-1), given, run.stream) for run in runs)
            error = compiled_error(block, inputs, want, got, each=not autocast)
            if not error < COMPILED_ERROR:
                raise ValueError(
                    f"compile=true: the compiled '{kind}' block differs from the same block "
                    f"uncompiled by {error:.3f} in an output or a gradient, at {length} symbols "
                    f"(torch {torch.__version__}, {device.type}); use compile=false or another "
                    f"torch"
                )
