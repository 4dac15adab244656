"""Mixers with `causal=False`, for encoders: pads on either side are as if they were not there.

Shapes: B batch, T time, D width. W is the window and block size.
"""

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_definitions import attend, ema, heads, mimo, nplr, quantised, rotated, scaled, ssm
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain import mixers
from pretrain.mixers.base import TokenMixer
from pretrain.ops import masked_attention

D_MODEL, W, BATCH, LENGTH = 8, 8, 2, 27

# The same sums in another order, fp64.
SAME = 1e-10


def averages(p: Any, x: Tensor) -> Tensor:
    """Two EMAs; the one for the future reads the input from the next token on."""
    ahead = torch.cat([torch.zeros_like(x[:, :1]), x.flip(1)[:, :-1]], 1)
    return ema(p, x) + ema(p.reverse, ahead).flip(1)


def ema_both_ways(mixer: Any, x: Tensor) -> Tensor:
    y = averages(mixer.ssm, x)
    value, gate = (F.gelu(y) @ mixer.out_proj.weight.T).chunk(2, -1)
    return value * gate.sigmoid()


class Reverse:
    """A filter's parameters with the C of the flipped input, and no skip connection."""

    def __init__(self, p: Any) -> None:
        self.p = p

    def __getattr__(self, name: str) -> Any:
        if name == "D":
            return torch.zeros_like(self.p.D)
        return getattr(self.p, "C_reverse" if name == "C" else name)


def both_sides(filters: Callable[[Any, Tensor], Tensor], p: Any, x: Tensor) -> Tensor:
    """A kernel over the past and the present, another over the future from the next token on."""
    y = filters(p, x)
    future = filters(Reverse(p), x.flip(1)).flip(1)  # token i: from itself on
    return y + torch.cat([future[:, 1:], torch.zeros_like(y[:, :1])], 1)


def both_ways(filters: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    def layer(mixer: Any, x: Tensor) -> Tensor:
        y = both_sides(filters, mixer.ssm, x)
        value, gate = (F.gelu(y) @ mixer.out_proj.weight.T).chunk(2, -1)
        return value * gate.sigmoid()

    return layer


def longvq(mixer: Any, x: Tensor) -> Tensor:
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    block = torch.arange(LENGTH) // W
    exact = (block[:, None] - block).abs() <= 1
    memory = averages if hasattr(mixer.ssm, "delta") else partial(both_sides, ssm)
    # Of T5's 16 buckets a side the first 8 have one distance each, then come 8..11 and 12..15.
    size = distance.abs()
    near = torch.where(size < 8, size, 8 + (size >= 12).long()) + 16 * (distance < 0)
    return quantised(mixer, x, memory(mixer.ssm, x), torch.ones_like(exact), exact, near)


def window(mixer: Any, x: Tensor) -> Tensor:
    """The heads' outputs, (B, T, D)."""
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    q, k, v = heads(x, mixer.qkv_proj.weight, 3, mixer.n_heads)
    q, k = scaled(mixer, q, k)
    bias: Tensor | float = 0.0
    if mixer.position_bias is None:
        q, k = rotated(q, mixer.rotary_base), rotated(k, mixer.rotary_base)
    else:  # distances below 8 have a bucket each, keys ahead the second half of the table
        near = distance.abs().clamp(max=7) + 16 * (distance < 0)
        bias = mixer.position_bias.table[:, near]
    return attend(q, k, v, distance.abs() < W, bias).flatten(2)


def swa(mixer: Any, x: Tensor) -> Tensor:
    return window(mixer, x) @ mixer.out_proj.weight.T


def attention(mixer: Any, x: Tensor) -> Tensor:
    q, k, v = heads(x, mixer.qkv_proj.weight, 3, mixer.n_heads)
    q, k = scaled(mixer, q, k)
    bias: Tensor | float = 0.0
    if mixer.position_bias is None:
        q, k = rotated(q, mixer.rotary_base), rotated(k, mixer.rotary_base)
    else:
        q = q * mixer.head_dim**0.5  # these scores are not scaled
        bias = mixer.position_bias.table[:, both_sided_buckets()]
    everything = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    return attend(q, k, v, everything, bias).flatten(2) @ mixer.out_proj.weight.T


def both_sided_buckets() -> Tensor:
    """(T, T): of T5's 16 buckets a side the first 8 have one distance each, wider ones follow."""
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    size = distance.abs()
    wider = sum((size >= edge).long() for edge in (12, 16, 23))  # 8 (128 / 8)^(k / 8)
    return torch.where(size < 8, size, 8 + wider) + 16 * (distance < 0)


def spade(mixer: Any, x: Tensor) -> Tensor:
    g = both_sides(nplr if hasattr(mixer.ssm, "P") else ssm, mixer.ssm, x)
    if mixer.combine == "stack":
        return window(mixer, g) @ mixer.out_proj.weight.T
    a = window(mixer, x) @ mixer.heads_proj.weight.T
    g, a = (
        w * b / (b.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        for b, w in ((g, mixer.ssm_norm), (a, mixer.attention_norm))
    )
    return torch.cat([g, a], -1) @ mixer.out_proj.weight.T + mixer.out_proj.bias


def fsat(mixer: Any, x: Tensor) -> Tensor:
    """Our reconstruction of Zhuang et al. 2022: pair by pair, and with a dense attention matrix."""
    a, b = (x @ mixer.pool_proj.weight.T).chunk(2, -1)
    sums = [x.new_zeros(BATCH, mixer.d_pool) for _ in range(2 * LENGTH)]
    pairs = [0] * (2 * LENGTH)
    for t in range(LENGTH):
        for s in range(LENGTH):
            sums[t + s], pairs[t + s] = sums[t + s] + a[:, t] * b[:, s], pairs[t + s] + 1
    pooled = torch.stack(
        [total / max(1, n) ** 0.5 for total, n in zip(sums, pairs, strict=True)], 1
    )
    pooled = torch.cat([pooled[:, ::2], pooled[:, 1::2]], -1)
    p = x + F.gelu(pooled) @ mixer.cross_proj.weight.T
    predicted = (p @ mixer.places.proj.weight.T).unflatten(-1, (mixer.n_heads, -1))
    own = ((torch.arange(LENGTH, dtype=x.dtype) + 0.5) / LENGTH).logit()[:, None, None]
    logits = predicted + mixer.places.bias + mixer.places.follow * own
    places = (LENGTH - 1) * logits.sigmoid()  # (B, T, H, J)

    q, k, v = heads(x, mixer.qkv_proj.weight, 3, mixer.n_heads)
    q, k = (rotated(part, mixer.rotary_base) for part in (q, k))
    scores = torch.einsum("bthk,bshk->bths", q, k).exp() ** (mixer.head_dim**-0.5)
    away = torch.arange(LENGTH) - places.unsqueeze(-1)  # (B, T, H, J, T)
    near = (away > -1) & (away <= 1)  # the integers at or below, and above
    kernel = (-(away**2) / (2 * mixer.log_width.exp().unsqueeze(-1) ** 2)).exp() * near
    weights = kernel.sum(3) * scores
    y = torch.einsum("bths,bshk->bthk", weights / weights.sum(-1, keepdim=True), v)
    return y.flatten(2) @ mixer.out_proj.weight.T


LONGVQ = {"block_size": W, "chunk_size": 4, "n_heads": 2, "d_shared": 8, "n_codes": 5, "n_modes": 3}
WINDOW = {"n_heads": 2, "window_size": W}
SPADE = WINDOW | {"chunk_size": 4, "n_modes": 3}
ROWS: dict[str, tuple[str, dict[str, Any], Callable[[Any, Tensor], Tensor]]] = {
    "attention": ("attention", {"n_heads": 2, "qk_norm": True}, attention),
    "attention t5": (
        "attention",
        {"n_heads": 2, "head_dim": 6, "position": "t5", "scale_scores": False},
        attention,
    ),
    "ema": ("ema", {"n_modes": 3, "chunk_size": 4}, ema_both_ways),
    "fsat": ("fsat", {"n_heads": 2, "n_places": 4, "rotary_base": 100.0}, fsat),
    "longvq": ("longvq", LONGVQ, longvq),
    "longvq ema": (
        "longvq",
        LONGVQ | {"memory": "ema", "position": "rotary", "n_heads": 1},
        longvq,
    ),
    "s4": ("s4", {"n_modes": 3, "chunk_size": 4}, both_ways(nplr)),
    "s4d": ("s4d", {"n_modes": 3, "chunk_size": 4}, both_ways(ssm)),
    "s5": ("s5", {"n_modes": 5, "chunk_size": 4}, both_ways(mimo)),
    "spade": ("spade", SPADE | {"ssm": "s4", "position": "t5"}, spade),
    "spade stack": ("spade", SPADE | {"combine": "stack"}, spade),
    "swa": ("swa", WINDOW, swa),
    "swa t5": ("swa", WINDOW | {"position": "t5", "qk_norm": True}, swa),
}
every_row = pytest.mark.parametrize("row", ROWS)


def build(row: str) -> TokenMixer:
    torch.manual_seed(0)
    name, options, _ = ROWS[row]
    mixer = mixers.build(name, d_model=D_MODEL, causal=False, **options).double()
    with torch.no_grad():
        for parameter in mixer.parameters():  # initial values are equal over heads and channels
            parameter.add_(0.2 * torch.randn_like(parameter))
    return mixer


def inputs(length: int = LENGTH, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, length, D_MODEL, generator=generator, dtype=torch.float64)


def test_every_two_sided_mixer_has_a_row() -> None:
    assert sorted({name for name, *_ in ROWS.values()}) == mixers.names(causal=False)


@every_row
def test_mixer_equals_its_definition(row: str) -> None:
    mixer, x = build(row), inputs().requires_grad_()
    output, want = mixer(x), ROWS[row][2](mixer, x)
    got = output.y if output.gate is None else output.gate * (output.y - x)
    torch.testing.assert_close(got, want, rtol=0, atol=SAME)
    weights, leaves = inputs(seed=2), [x, *mixer.parameters()]
    for a, b in zip(
        *(torch.autograd.grad((y * weights).sum(), leaves) for y in (got, want)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=10 * SAME * b.abs().max().item())


@every_row
@pytest.mark.parametrize("front", [0, 3, W, W + 3])
@pytest.mark.parametrize("behind", [0, 1, W + 1])
def test_pads_on_either_side_change_nothing(row: str, front: int, behind: int) -> None:
    mixer, x = build(row), inputs()
    lanes = []
    for scale in (1.0, 1e3):  # whatever stands on the pads
        padded = scale * inputs(front + LENGTH + behind, seed=5)
        padded[:, front : front + LENGTH] = x
        padding = torch.ones(BATCH, padded.shape[1], dtype=torch.bool)
        padding[:, front : front + LENGTH] = False
        lanes.append(mixer(padded, padding=padding).y[:, front : front + LENGTH])
    for got in lanes:
        torch.testing.assert_close(got, mixer(x).y, rtol=0, atol=SAME)


@every_row
def test_lanes_of_other_lengths_do_not_disturb_one_another(row: str) -> None:
    """Each lane has its own pads, one in front and one behind, and no gradient comes from them."""
    mixer, x = build(row), inputs().requires_grad_()
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[0, 20:], padding[1, :5] = True, True
    y = mixer(x, padding=padding).y
    alone = [mixer(x[:1, :20]).y[0], mixer(x[1:, 5:]).y[0]]
    together = [y[0, :20], y[1, 5:]]
    for got, want in zip(together, alone, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=SAME)
    (gradient,) = torch.autograd.grad(sum(part.square().sum() for part in together), x)
    assert (gradient.abs().amax(-1) > 0).equal(~padding)


@every_row
def test_both_sides_are_seen(row: str) -> None:
    mixer, x = build(row), inputs().requires_grad_()
    (gradient,) = torch.autograd.grad(mixer(x).y[:, W].square().sum(), x)
    assert (gradient[:, 1 : 2 * W].abs().amax((0, 2)) > 0).all()


@every_row
def test_every_parameter_gets_a_gradient(row: str) -> None:
    mixer = build(row)
    mixer(inputs(3 * W)).y.square().sum().backward()
    for key, parameter in mixer.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 0, key


@every_row
@pytest.mark.parametrize("length", [2 * W, LENGTH])
def test_flops_are_those_counted(row: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # The counter has no formula for the CPU's flash kernel.
    monkeypatch.setattr(masked_attention, "SAFE_WITH_MASKS", [SDPBackend.MATH])
    mixer, x = build(row).float(), inputs(length).float()[:1]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        mixer(x)
    assert counter.get_total_flops() == pytest.approx(mixer.executed_flops(length), rel=0.02)
    # A third of the three blocks that are multiplied is out of reach, and the ends have no
    # neighbours.
    assert mixer.flops_per_token(length) * length <= mixer.executed_flops(length)
    assert mixer.flops_per_token(length) * length >= mixer.executed_flops(length) * 0.3


@every_row
def test_state_and_resets_are_refused(row: str) -> None:
    mixer, x = build(row), inputs()
    assert mixer(x).state is None
    with pytest.raises(ValueError, match="no state to carry"):
        mixer(x, resets=torch.zeros(BATCH, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="no state to carry"):
        mixer(x, object())


@every_row
def test_padding_or_all_of_it_is_refused_in_causal_use(row: str) -> None:
    name, options, _ = ROWS[row]
    if mixers.MIXERS[name].encoder_only:
        with pytest.raises(ValueError, match="no causal form"):
            mixers.build(name, d_model=D_MODEL, **options)
        return
    mixer = mixers.build(name, d_model=D_MODEL, **options).double()
    with pytest.raises(ValueError, match="padding is for causal=False"):
        mixer(inputs(), padding=torch.zeros(BATCH, LENGTH, dtype=torch.bool))


@every_row
def test_declared_parameters_exist(row: str) -> None:
    mixer = build(row)
    declared = mixer.no_decay_parameters() | mixer.ssm_parameters()
    assert declared <= {key for key, _ in mixer.named_parameters()}


# Lowering costs seconds. Of most mixers it is tested in causal use, where the same ops run.
@pytest.mark.parametrize("row", mixers.names(causal=False))
def test_compiles_without_a_graph_break(row: str) -> None:
    mixer, x = build(row), inputs().requires_grad_()
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[0, -3:] = True
    torch._dynamo.reset()
    backend = "aot_eager" if row in ("attention", "fsat", "swa") else "eager"
    compiled = torch.compile(mixer, fullgraph=True, backend=backend, dynamic=False)
    got, want = (f(x, padding=padding).y for f in (compiled, mixer))
    torch.testing.assert_close(got, want, rtol=0, atol=SAME)
    weights, leaves = inputs(seed=2), [x, *mixer.parameters()]
    for a, b in zip(
        *(torch.autograd.grad((y * weights).sum(), leaves) for y in (got, want)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=10 * SAME * b.abs().max().item())


@every_row
def test_weights_survive_saving(row: str) -> None:
    mixer, x, file = build(row), inputs(), io.BytesIO()
    torch.save(mixer.state_dict(), file)
    file.seek(0)
    other = build(row)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x).y, mixer(x).y)


@every_row
def test_autocast_stays_close(row: str) -> None:
    mixer, x = build(row).float(), inputs().float()
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x).y
    want = mixer(x).y
    # bf16 has 8 bits; a few roundings in a row.
    assert (y.float() - want).norm() < 3e-2 * want.norm()
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())


@every_row
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_forward_mutates_nothing(row: str, training: bool) -> None:
    mixer, x = build(row).train(training), inputs()
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[0, -3:] = True
    held = [x, padding, *mixer.state_dict().values()]
    before = [t.detach().clone() for t in held]
    mixer(x, padding=padding)
    assert all(torch.equal(a, b) for a, b in zip(held, before, strict=True))


# On a GPU, as in test_gpu.py. fp32: the same sums in another order. bf16: 8 bits, over a few
# roundings in a row; one parameter's gradient may be a sum that cancels, together they do not.
FP32, BF16, BF16_ALONE = 1e-4, 2e-2, 1e-1


@pytest.mark.gpu
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["s4", "s4d", "s5"])
def test_filters_on_a_gpu_equal_fp64(name: str, bf16: bool) -> None:
    """Values and gradients, over whole chunks and a shorter one, with pads on either side."""
    torch.manual_seed(0)
    width, length = 64, 150
    mixer = mixers.build(name, d_model=width, causal=False, chunk_size=32, n_modes=16)
    x = torch.randn(BATCH, length, width).bfloat16()
    weights = torch.randn(BATCH, length, width)
    padding = torch.zeros(BATCH, length, dtype=torch.bool)
    padding[0, 130:], padding[1, :21] = True, True

    def found(device: str, dtype: torch.dtype) -> dict[str, Tensor]:
        mixer.to(device, dtype)
        on, leaf = padding.to(device), x.to(device, dtype).requires_grad_()
        with torch.autocast(device, torch.bfloat16, enabled=bf16 and dtype != torch.float64):
            y = mixer(leaf, padding=on).y.masked_fill(on.unsqueeze(-1), 0)
        parameters = dict(mixer.named_parameters())
        loss = (y.double() * weights.to(device)).sum()
        gradients = torch.autograd.grad(loss, [leaf, *parameters.values()])
        values = {"y": y, **dict(zip(["x", *parameters], gradients, strict=True))}
        values["parameters"] = torch.cat([values[key].flatten() for key in parameters])
        return {key: value.detach().double().cpu() for key, value in values.items()}

    got, want = found("cuda", torch.float32), found("cpu", torch.float64)
    errors = {key: ((got[key] - b).norm() / b.norm()).item() for key, b in want.items()}
    bounds = dict.fromkeys(want, BF16_ALONE if bf16 else FP32)
    bounds |= dict.fromkeys(("y", "x", "parameters"), BF16 if bf16 else FP32)
    assert all(errors[key] < bound for key, bound in bounds.items()), errors  # NaN fails


def test_spade_has_no_two_sided_chunks() -> None:
    with pytest.raises(ValueError, match="choose window"):
        mixers.build("spade", d_model=D_MODEL, causal=False, **SPADE, attention="chunk")
