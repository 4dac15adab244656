"""How far compiled blocks are from themselves uncompiled, before training begins."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pretrain.config import RunConfig
from pretrain.config_problems import BOUNDARIES
from pretrain.mixers.base import map_state
from pretrain.models.block import Block
from pretrain.ops.numerics import matmul_dtype
from pretrain.training.precision import autocast

# bf16 keeps 8 bits and a compiled block rounds in other places: 0.01 of what a block adds.
COMPILED_ERROR, TINY = 0.05, 1e-12
SHARE = 1e-3  # of all gradients: smaller ones, as of a bias that softmax ignores, are noise


def verify_compiled(
    model: nn.Module, config: RunConfig, device: torch.device, target_length: int = 0
) -> None:
    """Compares one compiled block of each kind with itself uncompiled, as training calls it: with a
    state only where states are carried, with resets only where batches have them, inputs with
    gradients, a decoder's as long as targets.

    Training then compiles no block any more, except for what it alone passes and nothing checks: in
    an encoder-decoder the padding of an epoch's last window.

    Args:
        model: after `compile_blocks`, on `device`.
        config: gives the shape of a micro-batch, whether it has resets, and the precision.
        device: where training runs.
        target_length: tokens that a block which reads memory is given; 0: no block does.

    Raises:
        ValueError: when they differ by more than rounding.
    """
    rows, d_model = config.train.micro_batch_size, config.model.d_model
    whole = (rows, config.train.seq_len, d_model)  # an encoder's output, too
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    stacks = [[block for block in blocks if isinstance(block, Block)] for blocks in lists]
    alone = config.model.activation_checkpointing  # no block leaves anything to the next one
    kinds = {
        (block.kind, block.reads_memory, alone or block is stack[0]): block
        for stack in stacks
        for block in stack
    }
    segments = ("first", "second") if config.train.carry_state else ("first",)
    boundary = config.data.boundary or BOUNDARIES[config.data.mode][0]
    for (kind, reads_memory, takes_all), block in kinds.items():
        if config.model.dropout:
            block.eval()  # compiled code draws other masks
        assert target_length or not reads_memory, "a decoder's blocks take tokens of targets"
        shape = (rows, target_length, d_model) if reads_memory else whole
        states = [None, None]
        more: dict[str, Tensor] = {}
        if block.mixer.takes_counted and block.mixer.causal:  # two-sided ones are told of pads
            more["counted"] = torch.ones(shape[:2], dtype=torch.bool, device=device)
        if boundary in ("pad_block", "pad_segment"):  # as data/loader.py: then in every batch
            edges = len(range(0, config.train.seq_len, block.mixer.reset_grid))
            more["resets"] = _resets(rows, edges, device)
        for segment in segments:
            # As embeddings begin: beside larger x a narrow stream would round away what blocks add.
            x, added = config.model.init_std * torch.randn(2, *shape, device=device)
            with autocast(config, device):
                if not config.model.residual_in_fp32:
                    x = x.to(matmul_dtype(x))
                inputs = [x] if takes_all else [x, added.to(matmul_dtype(added))]
                if reads_memory:  # in the dtype of the norm behind the encoder
                    memory = torch.randn(whole, device=device)
                    more["memory"] = memory.to(matmul_dtype(memory)).requires_grad_()
                # Leaves with a gradient: a compiler distinguishes.
                inputs = [part.detach().requires_grad_() for part in inputs]
                if not takes_all:
                    more["added"] = inputs[1]
                want = block.forward(inputs[0], states[0], **more)
                got = block(inputs[0], states[1], **more)
            in_fp32 = config.train.precision == "fp32"
            error = compiled_error(
                block, inputs, want.stream, got.stream, memory=more.get("memory"), each=in_fp32
            )
            if not error < COMPILED_ERROR:
                raise ValueError(
                    f"train.compile=true: the compiled '{kind}' block differs from the same block "
                    f"uncompiled by {error:.3f} in an output or a gradient, in the {segment} "
                    f"segment (torch {torch.__version__}, {device.type}); use train.compile=false "
                    f"or another torch"
                )
            states = [map_state(Tensor.detach, output.state) for output in (want, got)]
        block.train()


def _resets(rows: int, edges: int, device: torch.device) -> Tensor:
    """(rows, edges) bool. In row 0 documents of 1, 4, 8, 16, ... edges, so that some end early and
    one goes on for long; in every next row they begin an edge earlier."""
    place = 2 + torch.arange(rows, device=device)[:, None] + torch.arange(edges, device=device)
    return (place & (place + 1)) == 0  # at 3, 7, 15, ...


def compiled_error(
    block: nn.Module,
    inputs: Sequence[Tensor],
    want: Tensor,
    got: Tensor,
    *,
    memory: Tensor | None = None,
    each: bool = False,
) -> float:
    """The relative difference of what a block adds to the sum of its inputs, or of its derivatives
    if that is larger.

    Inductor of torch 2.11 was seen to compute something else on an H200, in silence: relative
    errors of 0.16 to 0.25 for blocks that were right on a CPU with torch 2.13.

    Args:
        block: has the parameters.
        inputs: what it was given, with gradients, all of one shape.
        want: what it made uncompiled, of the same shape.
        got: what it made compiled.
        memory: what it read besides, with gradients, of any shape.
        each: compare each parameter's gradient by itself, as fp32 allows: inductor of torch 2.11
            was seen to make a single one wrong, 1 % of all. In bf16 single ones cancel, and all
            are compared as one.
    """
    read = [] if memory is None else [memory]
    wanted, found = (_gradients(block, [*inputs, *read], y) for y in (want, got))
    below = [
        [torch.cat([gradients.pop() for _ in given]) for gradients in (wanted, found)]
        for given in (read, inputs)  # the last ones first
        if given
    ]
    total = torch.cat(wanted)
    pairs = list(zip(wanted, found, strict=True)) if each else [(total, torch.cat(found))]
    least = SHARE * total.norm().item()
    errors = [((b - a).norm() / a.norm().clamp(min=max(least, TINY))).item() for a, b in pairs]
    errors += [((b - a).norm() / a.norm().clamp(min=TINY)).item() for a, b in below]
    # What the block adds, not the residual stream it is added to.
    errors.append(((got - want).norm() / (want - sum(inputs)).norm().clamp(min=TINY)).item())
    return torch.tensor(errors).max().item()  # NaN if one is; Python's max would pass over it


def _gradients(block: nn.Module, inputs: Sequence[Tensor], y: Tensor) -> list[Tensor]:
    """Those of a functional of y by each parameter and then by each input, flat; zeros where one
    has no part. The sum of squares alone would do for no norm: it is what that keeps constant."""
    by = [*(p for p in block.parameters() if p.requires_grad), *inputs]
    channels = torch.linspace(0.5, 1.5, y.shape[-1], device=y.device)
    loss = (channels * y.float().square()).sum()
    found = torch.autograd.grad(loss, by, allow_unused=True, materialize_grads=True)
    return [g.flatten().float() for g in found]
