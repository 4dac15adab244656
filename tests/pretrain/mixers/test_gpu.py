"""On a GPU every mixer computes what it computes in fp64 on a CPU.

Run with `pytest -m "gpu and not slow"`, or `-m gpu` to compile every mixer too.

Other kernels run there (blocked SDPA instead of matmuls, cuBLAS, inductor), so the CPU suite says
nothing about them. Shapes: B batch, T time, D width; W is the window, block or chunk.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain import mixers
from pretrain.mixers.base import TokenMixer, map_state
from pretrain.models import LanguageModel, LanguageModelConfig, LayersConfig
from pretrain.models.block import Block
from pretrain.training.loop_barriers import add_loop_barriers

DEVICE, D_MODEL, BATCH = "cuda", 128, 3

# fp32 without TF32: the same sums in another order. bf16: 8 bits, over a few roundings in a row.
FP32, BF16, BF16_ALONE = 1e-4, 2e-2, 1e-1

WINDOWS, HEAD_WIDTHS = (64, 128), (32, 64)
SHAPES = [(window, width) for window in WINDOWS for width in HEAD_WIDTHS]


# Of window and head width, by a mixer's name, behind which may stand that of a variant.
OPTIONS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "attention": lambda w, k: {"n_heads": D_MODEL // k},
    "block_recurrent": lambda w, k: {"n_heads": D_MODEL // k, "block_size": w, "n_states": k},
    "bst": lambda w, k: {"n_heads": D_MODEL // k, "block_size": w, "chunk_size": 32},
    "bst mh": lambda w, k: OPTIONS["bst"](w, k) | {"variant": "mh"},
    "bst mf": lambda w, k: OPTIONS["bst"](w, k) | {"variant": "mf", "n_filters": k // 4},
    "ema": lambda w, k: {"chunk_size": w, "n_modes": k // 4},
    "gss": lambda w, k: {"chunk_size": w, "n_modes": k // 4, "reduce": 2},
    "longvq": lambda w, k: {"block_size": w, "d_shared": k, "n_codes": 8, "n_modes": k // 4},
    "mamba2": lambda w, k: {"chunk_size": w, "head_dim": k, "d_state": 32},
    "mega": lambda w, k: {"chunk_size": w, "ema_chunk_size": 32, "d_shared": k},
    "s4": lambda w, k: {"chunk_size": w, "n_modes": k // 4},
    "s4d": lambda w, k: {"chunk_size": w, "n_modes": k // 4},
    "s5": lambda w, k: {"chunk_size": w, "n_modes": k // 2},
    "spade": lambda w, k: {"n_heads": D_MODEL // k, "window_size": w, "n_modes": k // 4},
    "swa": lambda w, k: {"n_heads": D_MODEL // k, "window_size": w, "qk_norm": k == 64},
    "transformer_ls": lambda w, k: {"n_heads": D_MODEL // k, "window_size": w, "kept_chunks": 8},
    "transformer_xl": lambda w, k: {"n_heads": D_MODEL // k, "window_size": w},
}
# A code that flips under rounding makes another function: of these only the outputs are compared,
# in which the few flips of a call drown.
QUANTISED = ("longvq",)

# Inductor takes 10 s and more for each.
COMPILED_FIRST = ("attention", "bst", "s4d", "swa")

every_mixer = pytest.mark.parametrize("name", OPTIONS)
every_compiled = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in COMPILED_FIRST else pytest.mark.slow)
        for name in OPTIONS
    ],
)
every_shape = pytest.mark.parametrize(("window", "width"), SHAPES)


def build(name: str, window: int, width: int) -> TokenMixer:
    torch.manual_seed(0)
    mixer = mixers.build(name.split()[0], d_model=D_MODEL, **OPTIONS[name](window, width))
    mixer.reset_grid = math.lcm(mixer.block_size, window)
    return mixer


def problem(window: int) -> tuple[Tensor, Tensor, list[int]]:
    """x rounded to bf16, flags, and segments that end on, before and after grid edges."""
    sizes = [window + 17, 2 * window - 17, 1, window + 4]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, sum(sizes), D_MODEL, generator=generator).bfloat16().float()
    resets = torch.zeros(BATCH, len(range(0, sum(sizes), window)), dtype=torch.bool)
    resets[0, 1] = resets[0, 3] = resets[1, 2] = True
    return x, resets, sizes


def run(
    mixer: TokenMixer, x: Tensor, resets: Tensor, sizes: list[int], precision: str = "wide"
) -> dict[str, Tensor]:
    """Outputs, final state, and the gradients of a fixed functional of both, on x's device."""
    x = x.detach().requires_grad_()
    outputs, state, start = [], None, 0
    with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
        for size in sizes:
            edges = range(resets.shape[1])
            inside = [i for i in edges if start <= i * mixer.reset_grid < start + size]
            flags = resets[:, inside[0] : inside[-1] + 1] if inside else None
            out = mixer(x[:, start : start + size], state, resets=flags)
            y = out.y
            if out.gate is not None:  # what the block adds to the stream
                y = out.gate * (y - x[:, start : start + size])
            outputs.append(y)
            state, start = out.state, start + size
    found = {"y": torch.cat(outputs, 1)} | {
        f"state.{key}": value for key, value in state._asdict().items() if value.numel()
    }
    generator = torch.Generator().manual_seed(2)
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for value in found.values():
        if value.is_floating_point():
            weights = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            total = total + (value.double() * weights.to(x.device)).sum()
    parameters = dict(mixer.named_parameters())
    gradients = torch.autograd.grad(total, [x, *parameters.values()])
    return found | {
        f"d {key}": value for key, value in zip(["x", *parameters], gradients, strict=True)
    }


@cache
def reference(name: str, window: int, width: int) -> dict[str, Tensor]:
    x, resets, sizes = problem(window)
    return run(build(name, window, width).double(), x.double(), resets, sizes)


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got.double().cpu() - want).norm() / want.norm().clamp(min=1e-30)).item()


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Any wait of the host for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@every_mixer
@every_shape
def test_fp32_equals_the_fp64_reference(name: str, window: int, width: int) -> None:
    mixer, (x, resets, sizes) = build(name, window, width), problem(window)
    want = reference(name, window, width)
    got = run(mixer.to(DEVICE), x.to(DEVICE), resets.to(DEVICE), sizes)
    errors = {key: relative_error(got[key], want[key].double()) for key in want}
    bounds = {"y": BF16} if name in QUANTISED else dict.fromkeys(errors, FP32)
    assert all(errors[key] < bound for key, bound in bounds.items()), errors
    assert {value.device.type for value in got.values()} == {DEVICE}


@pytest.mark.gpu
@every_mixer
@every_shape
def test_bf16_stays_close_to_the_fp64_reference(name: str, window: int, width: int) -> None:
    mixer, (x, resets, sizes) = build(name, window, width), problem(window)
    want = reference(name, window, width)
    got = run(mixer.to(DEVICE), x.to(DEVICE), resets.to(DEVICE), sizes, "bf16")
    assert all(value.isfinite().all() for value in got.values())
    assert all(got[f"d {key}"].dtype == torch.float32 for key, _ in mixer.named_parameters())
    errors = {key: relative_error(got[key], want[key].double()) for key in want}
    # A single parameter's gradient may be a sum of terms that cancel; together they do not.
    parameters = [f"d {key}" for key, _ in mixer.named_parameters()]
    together = [torch.cat([found[key].flatten() for key in parameters]) for found in (got, want)]
    errors["parameters"] = relative_error(*together)
    bounds = dict.fromkeys(errors, BF16) | dict.fromkeys(parameters, BF16_ALONE)
    if name in QUANTISED:
        bounds = {"y": BF16}
    assert all(errors[key] < bound for key, bound in bounds.items()), errors


@pytest.mark.gpu
@every_mixer
def test_initial_state_is_the_start_of_a_document(name: str) -> None:
    mixer, (x, _, _) = build(name, 64, 32).to(DEVICE), problem(64)
    x = x.to(DEVICE)
    state = mixer.init_state(BATCH, device=x.device, dtype=x.dtype)
    assert relative_error(mixer(x, state).y, mixer(x).y.double().cpu()) < FP32


def test_every_registered_mixer_has_options() -> None:
    assert sorted({name.split()[0] for name in OPTIONS}) == mixers.names()


@pytest.mark.gpu
@every_compiled
def test_compiled_block_equals_eager(name: str) -> None:
    """Inductor, no graph break, with a carried state and resets, forward and backward.

    Gradients matter: with the scan's complex numbers in the graph, inductor computed a BST block's
    outputs rightly and the gradients of its A and dt wrong by a third, on a CPU too (torch 2.13).
    """
    torch._dynamo.reset()
    add_loop_barriers()
    mixer = build(name, 64, 32)
    block = Block(name, mixer, d_model=D_MODEL, d_ff=256, mlp="swiglu").to(DEVICE)
    compiled = torch.compile(block, fullgraph=True, dynamic=False)
    x, resets, _ = problem(64)
    x, resets = x[:, :128].to(DEVICE).requires_grad_(), resets[:, 2:4].to(DEVICE)
    added = torch.randn_like(x, requires_grad=True)  # by the block before
    state = map_state(Tensor.detach, block(torch.randn_like(x)).state)
    weights = torch.randn_like(x)
    results = []
    for form in (block, compiled):
        out = form(x, state, resets, added=added)
        leaves = [x, added, *block.parameters()]
        gradients = torch.autograd.grad((out.stream * weights).sum(), leaves)
        results.append([out.x, out.added, *gradients])
    parameters = (f"d {key}" for key, _ in block.named_parameters())
    names = ["x", "added", "d x", "d added", *parameters]
    pairs = zip(names, *results, strict=True)
    errors = {key: relative_error(got, want.double().cpu()) for key, want, got in pairs}
    assert all(error < FP32 for error in errors.values()), errors


@pytest.mark.gpu
@pytest.mark.parametrize("width", HEAD_WIDTHS)
@pytest.mark.parametrize("window", WINDOWS)
def test_training_in_bf16_stays_finite_and_learns(window: int, width: int) -> None:
    """A BST layer on top of windows once met NaN gradients in its first steps, through cuDNN.

    State is carried over segments with resets among them; no step but the first, which loads
    kernels, may make the host wait.
    """
    vocabulary, steps = 64, 30
    heads = {"n_heads": D_MODEL // width}
    torch.manual_seed(0)
    config = LanguageModelConfig(
        vocab_size=vocabulary,
        d_model=D_MODEL,
        n_layers=4,
        layers=LayersConfig(default="swa", at={3: "bst"}),
        mixers={
            "swa": heads | {"window_size": window, "qk_norm": True},
            "bst": heads | {"block_size": window, "chunk_size": 64},
        },
    )
    model = LanguageModel(config).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    # Three tokens in four follow from the one before: there is something to learn at once.
    follows, length = torch.randperm(vocabulary), 4 * window
    tokens = torch.randint(0, vocabulary, (4, steps * length + 1))
    for t in range(1, tokens.shape[1]):
        if t % 4:
            tokens[:, t] = follows[tokens[:, t - 1]]
    resets = (torch.rand(steps, 4, 4) < 0.2).to(DEVICE)
    tokens = tokens.to(DEVICE)

    def step(index: int, state: Any) -> tuple[Tensor, Any, Tensor]:
        part = tokens[:, index * length : (index + 1) * length + 1]
        with torch.autocast(DEVICE, torch.bfloat16):
            out = model(part[:, :-1], state, resets=resets[index], targets=part[:, 1:])
        (out.loss_sum / part[:, 1:].numel()).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        optimizer.step()
        optimizer.zero_grad()
        return out.loss_sum.detach() / 4 / length, map_state(Tensor.detach, out.state), norm

    loss, state, norm = step(0, None)
    losses, norms = [loss], [norm]
    for index in range(1, steps):
        if index < 3:  # shapes with a carried state are met for the first time
            loss, state, norm = step(index, state)
        else:
            with no_synchronisation():
                loss, state, norm = step(index, state)
        losses.append(loss)
        norms.append(norm)
    assert torch.stack(norms).isfinite().all()
    assert torch.stack(losses).isfinite().all()
    assert losses[-1] < losses[0] - 0.5, [loss.item() for loss in losses]
