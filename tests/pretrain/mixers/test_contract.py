"""The contract that every token mixer keeps; a mixer without a row here does not exist.

Shapes: B batch, T time, D width. W is the mixers' window and block size, G the reset grid.
"""

import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain import mixers
from pretrain.mixers.base import MixerOutput, TokenMixer, cat_states, index_state, map_state

D_MODEL, W, BATCH = 8, 8, 2
RAGGED = 3 * W + 3  # ends inside a block

BST = {"n_heads": 2, "block_size": W, "chunk_size": 4, "n_modes": 3}
LONGVQ = {"block_size": W, "chunk_size": 4, "n_heads": 2, "d_shared": 8, "n_codes": 5, "n_modes": 3}
MAMBA2 = {"head_dim": 4, "d_state": 3, "chunk_size": 4}
MEGA = {"chunk_size": W, "ema_chunk_size": 4, "d_shared": 4, "n_modes": 3}
LONG_SHORT = {"n_heads": 2, "window_size": W, "chunk_size": 4, "kept_chunks": 3}
SPADE = {"n_heads": 2, "window_size": W, "chunk_size": 4, "n_modes": 3}
TABLE: dict[str, dict[str, dict[str, Any]]] = {
    "attention": {
        "rotary": {"n_heads": 2},
        "qk_norm": {"n_heads": 2, "qk_norm": True},
        "t5": {"n_heads": 2, "head_dim": 6, "position": "t5", "scale_scores": False},
    },
    "block_recurrent": {
        "rotary": {"n_heads": 2, "block_size": W, "n_states": 3},
        "t5": {"n_heads": 2, "block_size": W, "n_states": 5, "position": "t5"},
    },
    "bst": {
        "own_and_previous": BST,
        "own": BST | {"self_attention": "own"},
        "t5": BST | {"position": "t5"},
        "multi-head": BST | {"variant": "mh"},
        "multi-filter": BST | {"variant": "mf", "n_filters": 5},
        "multi-filter, own, t5": BST
        | {"variant": "mf", "n_filters": 3, "self_attention": "own", "position": "t5"},
    },
    "ema": {
        "damped": {"n_modes": 3, "chunk_size": 4},
    },
    "gss": {
        # Not narrower: a LayerNorm over two numbers has little but their order to pass on.
        "full width": {"n_modes": 3, "chunk_size": 4, "reduce": 1},
        "half width": {"n_modes": 3, "chunk_size": W, "init": "legs", "expand": 2, "reduce": 2},
    },
    "longvq": {
        "s4d": LONGVQ,
        "ema": LONGVQ | {"memory": "ema", "position": "rotary", "n_heads": 1},
    },
    "mamba2": {
        "one group": MAMBA2,
        "two groups": MAMBA2 | {"n_groups": 2, "conv_taps": 3, "chunk_size": W},
    },
    "mega": {
        "chunk": MEGA,
        "laplace": MEGA | {"weighting": "laplace", "bias": "t5"},
        "full": MEGA | {"chunk_size": 0, "weighting": "laplace"},
    },
    "s4": {
        "legs": {"n_modes": 3, "chunk_size": 4},
    },
    "s4d": {
        "lin": {"n_modes": 3, "chunk_size": 4},
        "legs": {"n_modes": 3, "chunk_size": 4, "init": "legs"},
        "real": {"n_modes": 3, "chunk_size": W, "init": "real"},
    },
    "s5": {
        "legs": {"n_modes": 5, "chunk_size": 4},
    },
    "spade": {
        "concat": SPADE,
        "add, chunks": SPADE | {"combine": "add", "attention": "chunk"},
        "stack": SPADE | {"combine": "stack", "qk_norm": True},
        "s4, chunks": SPADE | {"ssm": "s4", "attention": "chunk", "position": "t5"},
        "none": SPADE | {"ssm": "none"},
    },
    "swa": {
        "rotary": {"n_heads": 2, "window_size": W},
        "qk_norm": {"n_heads": 2, "window_size": W, "qk_norm": True},
        "t5": {"n_heads": 2, "window_size": W, "position": "t5"},
    },
    "transformer_ls": {
        "rank 1": LONG_SHORT,
        # Chunks of whole blocks, of which one is forgotten within the test.
        "rank 2": LONG_SHORT | {"chunk_size": W, "rank": 2, "kept_chunks": 2},
    },
    "transformer_xl": {
        "plain": {"n_heads": 2, "window_size": W},
        "qk_norm": {"n_heads": 2, "window_size": W, "qk_norm": True},
    },
}
ROWS = [(name, variant) for name, variants in TABLE.items() for variant in variants]

# The same sum in another order: what rounding allows, with room for cancellation: MEGA's rotary
# bias has a gradient of 1e-2 of its terms, and is off by 1.2e-5 on some processors in fp32.
SAME = {torch.float64: 1e-10, torch.float32: 5e-5}

# What the state-space mixers call their decays, frequencies, step sizes and skips.
RATES = ("log_dt", "log_A_real", "A_imag", "A_log", "dt_bias", "delta", "D")

SPLITS = {
    "single tokens": [1] * RAGGED,
    "odd points": [3, 1, 4, 1, 5, 9, 2, 2],
    "around block edges": [W - 1, 2, W - 1, W + 1, 2],
    "blocks and a tail": [W, 2 * W, 3],
}

every_row = pytest.mark.parametrize(("name", "variant"), ROWS, ids=lambda value: value)
# For what costs seconds and hardly differs between the variants of one mixer.
FIRST = [(name, next(iter(TABLE[name]))) for name in TABLE]
first_rows = pytest.mark.parametrize(("name", "variant"), FIRST, ids=lambda v: v)
other_rows = pytest.mark.parametrize(
    ("name", "variant"), [row for row in ROWS if row not in FIRST], ids=lambda v: v
)


def build(name: str, variant: str, dtype: torch.dtype = torch.float64) -> TokenMixer:
    torch.manual_seed(0)
    mixer = mixers.build(name, d_model=D_MODEL, **TABLE[name][variant]).to(dtype)
    mixer.reset_grid = math.lcm(mixer.block_size, W)
    mixer.register_forward_hook(residual)
    return mixer


def residual(mixer: TokenMixer, arguments: tuple[Any, ...], output: MixerOutput) -> MixerOutput:
    """What the block adds to the stream, so that a gate is held to the contract too."""
    if output.gate is None:
        return output
    # Not by _replace: torch 2.11 compiles that into an empty tuple.
    return MixerOutput(output.gate * (output.y - arguments[0]), output.state, output.aux)


def inputs(length: int = RAGGED, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, length, D_MODEL, generator=generator, dtype=dtype)


def run_split(
    mixer: TokenMixer, x: Tensor, sizes: list[int], state: Any = None, resets: Tensor | None = None
) -> tuple[Tensor, Any]:
    """Runs `x` in calls of the given sizes, each with the flags of the edges inside it."""
    assert sum(sizes) == x.shape[1]
    outputs, start = [], 0
    for size in sizes:
        flags = None
        if resets is not None:
            inside = [
                i for i in range(resets.shape[1]) if start <= i * mixer.reset_grid < start + size
            ]
            flags = resets[:, inside]
        output = mixer(x[:, start : start + size], state, resets=flags)
        outputs.append(output.y)
        state, start = output.state, start + size
    return torch.cat(outputs, 1), state


def gradients(mixer: TokenMixer, x: Tensor, y: Tensor, state: Any) -> list[Tensor]:
    """Of a fixed random functional of the outputs and of the final state."""
    generator = torch.Generator().manual_seed(2)
    leaves = [t for t in flat(state) if t.is_floating_point() and t.numel()]
    total = y.new_zeros(())
    for t in [y, *leaves]:
        total = total + (t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum()
    return list(torch.autograd.grad(total, [x, *mixer.parameters()]))


def flat(state: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_state(found.append, state)
    return found


def assert_close(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Largest difference relative to the largest wanted value."""
    assert got.shape == want.shape
    if want.numel():
        error = (got - want).abs().max() / want.abs().max().clamp(min=1e-30)
        assert error <= tolerance, f"relative error {error:.1e} > {tolerance:.0e}"


def test_every_registered_mixer_has_a_row() -> None:
    assert sorted(TABLE) == mixers.names()


@every_row
@pytest.mark.parametrize("scale", [1.0, 1e3])
@pytest.mark.parametrize("carried", [False, True], ids=["fresh", "carried"])
def test_the_future_changes_no_bit_of_the_past(
    name: str, variant: str, scale: float, carried: bool
) -> None:
    mixer = build(name, variant, torch.float32)
    x = inputs(dtype=torch.float32)
    # A state after an odd number of tokens shifts all block edges inside the call.
    state = mixer(inputs(W + 3, torch.float32, seed=5)).state if carried else None
    y = mixer(x, state).y
    for last in (0, W - 4, W - 1, W, W + 1, 2 * W, RAGGED - 2):
        redrawn = x.clone()
        redrawn[:, last + 1 :] = scale * inputs(RAGGED - last - 1, torch.float32, seed=last)
        assert torch.equal(mixer(redrawn, state).y[:, : last + 1], y[:, : last + 1])


@every_row
@pytest.mark.parametrize("edges", [1, 2])
def test_on_the_grid_a_state_has_its_first_sizes_but_where_it_was_empty(
    name: str, variant: str, edges: int
) -> None:
    """By which a run that continues knows the states that it finds for its model's."""
    mixer = build(name, variant)
    first = mixer.init_state(BATCH, device=torch.device("cpu"), dtype=torch.float64)
    state = mixer(inputs(edges * mixer.reset_grid)).state
    for now, before in zip(flat(state), flat(first), strict=True):
        assert now.dim() == before.dim()
        assert all(size in (0, n) for n, size in zip(now.shape, before.shape, strict=True))


@every_row
@pytest.mark.parametrize("dtype", SAME, ids=str)
@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
def test_any_split_gives_the_same_outputs_gradients_and_state(
    name: str, variant: str, sizes: list[int], dtype: torch.dtype
) -> None:
    mixer = build(name, variant, dtype)
    x = inputs(dtype=dtype).requires_grad_()
    y, state = run_split(mixer, x, [RAGGED])
    got_y, got_state = run_split(mixer, x, sizes)
    assert_close(got_y, y, SAME[dtype])
    for got, want in zip(flat(got_state), flat(state), strict=True):
        assert_close(got.to(dtype), want.to(dtype), SAME[dtype])
    wanted = gradients(mixer, x, y, state)
    for got, want in zip(gradients(mixer, x, got_y, got_state), wanted, strict=True):
        assert_close(got, want, SAME[dtype])


@every_row
def test_initial_state_is_the_start_of_a_document(name: str, variant: str) -> None:
    mixer, x = build(name, variant), inputs()
    state = mixer.init_state(BATCH, device=x.device, dtype=x.dtype)
    assert_close(mixer(x, state).y, mixer(x).y, SAME[torch.float64])


@every_row
@pytest.mark.parametrize("blocks", [1, 2], ids=["own grid", "coarser grid"])
@pytest.mark.parametrize("sizes", [[RAGGED], *SPLITS.values()], ids=["one call", *SPLITS])
def test_resets_separate_documents(name: str, variant: str, sizes: list[int], blocks: int) -> None:
    mixer = build(name, variant)
    mixer.reset_grid = blocks * mixer.block_size
    grid, x = mixer.reset_grid, inputs().requires_grad_()
    edges = range(0, RAGGED, grid)
    resets = torch.rand(BATCH, len(edges), generator=torch.Generator().manual_seed(3)) < 0.4
    resets[0, 0], resets[1, 0] = True, False  # at the start of a stream both mean the same
    resets[1, -1] = True
    y, state = run_split(mixer, x, sizes, resets=resets)

    documents, lengths = [], []
    for lane in range(BATCH):
        starts = [0, *(edge for i, edge in enumerate(edges) if i and resets[lane, i])]
        parts = [
            mixer(x[lane : lane + 1, a:b])
            for a, b in zip(starts, [*starts[1:], RAGGED], strict=True)
        ]
        documents.append(torch.cat([part.y for part in parts], 1))
        lengths.append(RAGGED - starts[-1])
    want = torch.cat(documents)
    assert_close(y, want, SAME[torch.float64])
    assert state.position.tolist() == lengths
    weights = inputs(seed=4)
    leaves = [x, *mixer.parameters()]
    got = torch.autograd.grad((y * weights).sum(), leaves)
    wanted = torch.autograd.grad((want * weights).sum(), leaves)
    for a, b in zip(got, wanted, strict=True):
        assert_close(a, b, SAME[torch.float64])
    # The state goes on with the last document and knows nothing of the ones before it.
    more = inputs(W, seed=6)
    inside = [i for i in range(W) if (state.phase.shape[1] + i) % grid == 0]
    after = mixer(more, state, resets=torch.zeros(BATCH, len(inside), dtype=torch.bool)).y
    for lane in range(BATCH):
        document = x[lane : lane + 1, RAGGED - lengths[lane] :]
        whole = mixer(torch.cat([document, more[lane : lane + 1]], 1)).y
        assert_close(after[lane : lane + 1], whole[:, -W:], SAME[torch.float64])


@every_row
def test_a_wrong_number_of_reset_flags_is_refused(name: str, variant: str) -> None:
    mixer, x = build(name, variant), inputs()
    flags = len(range(0, RAGGED, mixer.reset_grid)) + 1
    with pytest.raises(ValueError, match="edges of the reset grid"):
        mixer(x, resets=torch.zeros(BATCH, flags, dtype=torch.bool))


@every_row
def test_lanes_of_a_state_can_be_taken_apart_and_joined(name: str, variant: str) -> None:
    mixer, x = build(name, variant), inputs()
    state = mixer(inputs(W + 3, seed=5)).state
    lanes = [
        mixer(x[lane : lane + 1], index_state(state, slice(lane, lane + 1)))
        for lane in range(BATCH)
    ]
    whole = mixer(x, state)
    assert_close(torch.cat([lane.y for lane in lanes]), whole.y, SAME[torch.float64])
    joined = cat_states([lane.state for lane in lanes])
    for got, want in zip(flat(joined), flat(whole.state), strict=True):
        assert_close(got.double(), want.double(), SAME[torch.float64])


@every_row
def test_state_size_is_constant_unless_the_mixer_says_otherwise(name: str, variant: str) -> None:
    mixer = build(name, variant)
    sizes = [
        sum(t.numel() for t in flat(mixer(inputs(n * mixer.reset_grid)).state)) for n in (2, 4, 8)
    ]
    assert (len(set(sizes)) == 1) == mixer.constant_state


@every_row
@pytest.mark.parametrize("sizes", [[8 * W], [4 * W + 3, 4 * W - 3]], ids=["fresh", "carried"])
def test_a_state_keeps_no_memory_but_its_own(name: str, variant: str, sizes: list[int]) -> None:
    """A view of the last tokens would keep the projections of the whole segment alive."""
    mixer = build(name, variant)
    if not mixer.constant_state:
        return
    with torch.no_grad():
        _, state = run_split(mixer, inputs(sum(sizes)), sizes)
    for tensor in flat(state):
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@every_row
def test_initial_state_needs_no_parameters(name: str, variant: str) -> None:
    """Outside of a forward ZeRO-3 leaves them empty, and resuming asks for the state there."""
    mixer = build(name, variant)
    want = mixer.init_state(BATCH, device=torch.device("cpu"), dtype=torch.float32)
    for parameter in mixer.parameters():
        parameter.data = parameter.data.new_empty(0)
    got = mixer.init_state(BATCH, device=torch.device("cpu"), dtype=torch.float32)
    assert [t.shape for t in flat(got)] == [t.shape for t in flat(want)]


@every_row
def test_every_parameter_gets_a_gradient(name: str, variant: str) -> None:
    mixer = build(name, variant)
    mixer(inputs()).y.square().sum().backward()
    for key, parameter in mixer.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 0, key


@every_row
def test_gradients_flow_through_the_carried_state(name: str, variant: str) -> None:
    mixer = build(name, variant)
    x = inputs(W - 3).requires_grad_()
    mixer(inputs(W, seed=5), mixer(x).state).y.square().sum().backward()
    assert x.grad is not None
    # The first token of `x` too is within everyone's reach of the second call.
    assert (x.grad.abs().amax((0, 2)) > 0).all()


@every_row
def test_declared_parameters_exist(name: str, variant: str) -> None:
    mixer = build(name, variant)
    declared = mixer.no_decay_parameters() | mixer.ssm_parameters()
    assert declared <= {key for key, _ in mixer.named_parameters()}
    # Rates and step sizes are among them, whoever forgets to say so.
    named = {key for key, _ in mixer.named_parameters()}
    assert {key for key in named if key.rsplit(".", 1)[-1] in RATES} <= mixer.ssm_parameters()
    # Whoever trains at the state-space rate is not decayed either.
    assert mixer.ssm_parameters() <= mixer.no_decay_parameters()


@every_row
@pytest.mark.parametrize("length", [2 * W, 8 * W, RAGGED])
def test_flops_are_those_counted(name: str, variant: str, length: int) -> None:
    mixer = build(name, variant, torch.float32)
    x = inputs(length, torch.float32)[:1]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        mixer(x)
    executed = mixer.executed_flops(length)
    assert counter.get_total_flops() == pytest.approx(executed, rel=0.02)
    # The convention leaves out masked entries only.
    assert mixer.flops_per_token(length) * length <= executed * 1.0001
    assert mixer.flops_per_token(length) * length >= executed * 0.4


@first_rows
def test_compiles_without_a_graph_break(name: str, variant: str) -> None:
    mixer = build(name, variant, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager", dynamic=False)
    state = map_state(lambda t: t.detach(), mixer(inputs(W, torch.float32, seed=5)).state)
    x = inputs(2 * W, torch.float32).requires_grad_()
    resets = torch.zeros(BATCH, 2 * W // mixer.reset_grid, dtype=torch.bool)
    resets[1, -1] = True
    for before, flags in ((None, None), (state, resets)):
        outputs = [f(x, before, resets=flags) for f in (compiled, mixer)]
        got, want = ([o.y, *gradients(mixer, x, o.y, o.state)] for o in outputs)
        for a, b in zip(got, want, strict=True):
            assert_close(a, b, SAME[torch.float32])


@other_rows
def test_variants_are_traced_without_a_graph_break(name: str, variant: str) -> None:
    mixer = build(name, variant, torch.float32)
    torch._dynamo.reset()
    traced = torch.compile(mixer, fullgraph=True, backend="eager", dynamic=False)
    x = inputs(2 * W, torch.float32)
    resets = torch.zeros(BATCH, 2 * W // mixer.reset_grid, dtype=torch.bool)
    resets[1, -1] = True
    with torch.no_grad():
        state = mixer(inputs(W, torch.float32, seed=5)).state
        got, want = (f(x, state, resets=resets).y for f in (traced, mixer))
    assert_close(got, want, SAME[torch.float32])


@every_row
def test_weights_and_states_survive_saving(name: str, variant: str) -> None:
    mixer, x = build(name, variant), inputs()
    output = mixer(x)
    file = io.BytesIO()
    torch.save((mixer.state_dict(), tuple(t.detach() for t in output.state)), file)
    file.seek(0)
    weights, state = torch.load(file)
    other = build(name, variant)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    other.load_state_dict(weights)
    continued = other(x, type(output.state)(*state))
    assert torch.equal(continued.y, mixer(x, output.state).y)


@every_row
def test_autocast_stays_close_and_keeps_wide_states(name: str, variant: str) -> None:
    mixer = build(name, variant, torch.float32)
    x = inputs(dtype=torch.float32)
    want = mixer(x).y
    with torch.autocast("cpu", torch.bfloat16):
        first = mixer(x[:, : W + 3])
        second = mixer(x[:, W + 3 :], first.state)
        y = torch.cat([first.y, second.y], 1)
    # bf16 has 8 bits; a few roundings in a row.
    error = (y.float() - want).norm() / want.norm()
    assert error < 3e-2
    if hasattr(first.state, "ssm"):
        assert second.state.ssm.dtype == torch.float32
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())


@every_row
def test_a_narrow_residual_stream_stays_narrow(name: str, variant: str) -> None:
    """One wide addend would widen the stream of all layers above, in silence."""
    mixer = build(name, variant, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert mixer(inputs(dtype=torch.bfloat16)).y.dtype == torch.bfloat16


@every_row
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_forward_mutates_nothing(name: str, variant: str, training: bool) -> None:
    mixer, x = build(name, variant).train(training), inputs()
    state = mixer(inputs(W + 3, seed=5)).state
    held = [x, *mixer.state_dict().values(), *flat(state)]
    before = [t.detach().clone() for t in held]
    mixer(x, state)
    assert all(torch.equal(a, b) for a, b in zip(held, before, strict=True))


@first_rows
def test_two_sided_use_is_refused_without_a_two_sided_form(name: str, variant: str) -> None:
    if mixers.MIXERS[name].two_sided:
        mixers.build(name, d_model=D_MODEL, causal=False, **TABLE[name][variant])
    else:
        with pytest.raises(ValueError, match="no two-sided form"):
            mixers.build(name, d_model=D_MODEL, causal=False, **TABLE[name][variant])
