"""A peer is as large as ours, does what it is taken for, and is refused where it does not."""

import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from evals.throughput import peer_models, peers, worker
from evals.throughput.peer_models import Backbone, ChunkedAttention, Shape, mlp_width
from evals.throughput.peers import Peer
from evals.throughput.settings import PEERS
from pretrain.training.precision import autocast
from tests.evals.throughput.tiny import measurement

PACKAGES = ["mega_pytorch", "block_recurrent_pytorch"]


class OneLayer(nn.Module):
    """An embedding, then a part that is compiled."""

    def __init__(self, part: nn.Module, mix: Callable[[Tensor], Tensor], shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab_size, shape.d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.part, self.mix = part, mix

    def forward(self, tokens: Tensor) -> Tensor:
        return self.part(self.mix(self.embedding(tokens)))


def pretend(
    monkeypatch: pytest.MonkeyPatch,
    part: type[nn.Linear] = nn.Linear,
    mix: Callable[[Tensor], Tensor] = torch.Tensor.clone,
) -> None:
    """Puts one layer in the place of Llama."""

    def build(shape: Shape) -> Backbone:
        module = OneLayer(part(shape.d_model, shape.d_model, bias=False), mix, shape)
        return Backbone(module, module.embedding, module, 0.0, [module.part])

    monkeypatch.setitem(peer_models.BUILDERS, "llama", build)


@pytest.mark.parametrize(
    "mix", [partial(torch.roll, shifts=-1, dims=1), lambda x: x + x.mean(1, keepdim=True)]
)
def test_a_peer_that_sees_what_is_to_come_is_refused(
    mix: Callable[[Tensor], Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    m = asdict(measurement(tmp_path, model="llama"))
    pretend(monkeypatch)
    assert worker.measure(m)["status"] == "ok"
    pretend(monkeypatch, mix=mix)
    assert worker.measure(m)["status"].startswith("wrong: llama sees what is to come: tokens from")


class WrongWhenCompiled(nn.Linear):
    """Compiled, it gives a fifth more."""

    def compile(self, **_: object) -> None:
        self._compiled_call_impl = lambda x: 1.2 * self.forward(x)


def test_a_part_that_computes_something_else_compiled_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, WrongWhenCompiled)
    for precision in ("fp32", "bf16"):
        m = measurement(tmp_path, model="llama", precision=precision, compile=True)
        status = worker.measure(asdict(m))["status"]
        assert status.startswith("wrong: llama's compiled WrongWhenCompiled differs")
        assert "use compile=false" in status


def test_a_peer_that_cannot_recompute_its_blocks_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch)
    result = worker.measure(asdict(measurement(tmp_path, model="llama", checkpointing=True)))
    assert result["status"].startswith("wrong: checkpointing=true: llama")


@pytest.mark.parametrize(
    ("peer", "module", "packages"),
    [
        ("mega_pytorch", "mega_pytorch", "Mega-pytorch=="),
        (
            "block_recurrent_pytorch",
            "block_recurrent_transformer_pytorch",
            "block-recurrent-transformer-pytorch==",
        ),
    ],
)
def test_a_peer_that_is_not_installed_says_how_to_install_it(
    peer: str, module: str, packages: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    status = worker.measure(asdict(measurement(tmp_path, model=peer)))["status"]
    assert status.startswith("cannot be imported: ")
    assert f"pip install --no-deps {packages}" in status
    assert "\n" not in status


def test_every_peer_can_be_named() -> None:
    assert set(PEERS) == set(peer_models.BUILDERS)


@pytest.mark.parametrize("peer", PACKAGES)
def test_lengths_of_broken_blocks_are_refused(peer: str, tmp_path: Path) -> None:
    status = worker.measure(asdict(measurement(tmp_path, model=peer, length=700)))["status"]
    assert status == f"wrong: lengths=700: {peer} works in blocks of 512; use a multiple of it"


def test_chunks_know_nothing_of_one_another() -> None:
    class Sums(nn.Module):
        def forward(self, x: Tensor, v_input: Tensor) -> Tensor:
            return torch.cat([x, v_input], -1).cumsum(1)

    x, v = torch.randn(2, 12, 3), torch.randn(2, 12, 5)
    want = torch.cat([Sums()(x[:, i : i + 4], v[:, i : i + 4]) for i in (0, 4, 8)], 1)
    torch.testing.assert_close(ChunkedAttention(Sums(), 4)(x, v), want)


def test_mlps_make_up_for_what_mixers_lack() -> None:
    shape = Shape(d_model=1024, n_layers=24, n_heads=16, d_ff=2752, vocab_size=64, length=64)
    assert mlp_width(shape, 24 * 4 * 1024**2, matrices=3) == shape.d_ff
    assert mlp_width(shape, 24 * (4 * 1024**2 + 2 * 1024 * 32), matrices=2) == 1.5 * shape.d_ff - 32


@pytest.mark.peers
@pytest.mark.parametrize("name", PACKAGES)
def test_packages_take_causal_steps_across_blocks(name: str, tmp_path: Path) -> None:
    m = measurement(tmp_path, model=name, length=1024, batch_size=1, precision="bf16")
    assert worker.measure(asdict(m))["status"] == "ok"


@pytest.mark.peers
def test_what_many_layers_make_of_a_rounding_is_no_look_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 other tokens later on change Mega-pytorch's hidden states by 0.7."""
    shape = Shape(d_model=64, n_layers=24, n_heads=2, d_ff=64, vocab_size=64, length=512)
    monkeypatch.setattr(peers, "shape_of", lambda config: shape)
    m = measurement(tmp_path, model="mega_pytorch", length=512, precision="bf16")
    peer = Peer(m, m.config(), torch.device("cpu"))
    with autocast(m.config(), torch.device("cpu")):
        peer.check_causal()
        peer.backbone = peer.backbone._replace(rounds_by_all=False)
        with pytest.raises(ValueError, match="sees what is to come"):
            peer.check_causal()


@pytest.mark.peers
@pytest.mark.parametrize("name", PACKAGES)
def test_packages_are_as_large_as_llama(name: str, tmp_path: Path) -> None:
    def size(model: str) -> int:
        m = measurement(tmp_path, model=model, like="swa_350m", vocab_size=32128, length=4096)
        peer = Peer(m, m.config(), torch.device("meta"))
        return sum(p.numel() for p in peer.module.parameters())

    # To half a step of 64 in the width of 24 MLPs of three matrices: 2.36M of 336M.
    assert math.isclose(size(name), size("llama"), rel_tol=0.0071)


@pytest.mark.peers
@pytest.mark.parametrize("name", PACKAGES)
def test_flops_of_weights_are_those_that_are_executed(name: str, tmp_path: Path) -> None:
    m = measurement(tmp_path, model=name, length=1024, batch_size=1)
    peer = Peer(m, m.config(), torch.device("cpu"))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        peer.backbone.hidden_states(torch.zeros(1, m.length, dtype=torch.int64))
    executed = counter.get_flop_counts()["Global"]
    weights = executed[torch.ops.aten.mm] + executed[torch.ops.aten.addmm]
    # MEGA's two bare matrices are counted with its mixing.
    bare = 2 * 2 * (32**2 + 32 * 64) if name == "mega_pytorch" else 0
    head = 2 * 64 * 32
    assert weights / m.length == peer.train_flops / 3 - head - peer.backbone.mixing + bare


@pytest.mark.peers
@pytest.mark.slow
@pytest.mark.parametrize("name", PACKAGES)
def test_packages_compute_the_same_compiled(name: str, tmp_path: Path) -> None:
    m = measurement(tmp_path, model=name, length=1024, batch_size=1, precision="bf16")
    peer = Peer(m, m.config(), torch.device("cpu"))
    with autocast(m.config(), torch.device("cpu")):
        peer.compile()


@pytest.mark.peers
def test_the_fft_of_mega_pytorch_takes_what_autocast_gives_it_on_a_gpu(tmp_path: Path) -> None:
    """A CPU's autocast would widen by itself, so without it."""
    m = measurement(tmp_path, model="mega_pytorch", length=512, batch_size=1)
    Peer(m, m.config(), torch.device("cpu"))
    from mega_pytorch.mega_pytorch import conv1d_fft

    x, weights = torch.randn(1, 16, 3, 4).bfloat16(), torch.randn(16, 3).bfloat16()
    got = conv1d_fft(x, weights, dim=-3, weight_dim=-2)
    assert got.dtype == torch.float32
    assert torch.equal(got, conv1d_fft(x.float(), weights.float(), dim=-3, weight_dim=-2))
