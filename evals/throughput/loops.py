"""Three loops around one training step, so that what each adds can be told apart.

plain      forward, backward, clipping, fused AdamW, zero_grad: nothing but torch
deepspeed  the same through the engine of training and `take_step`
trainer    the whole `Trainer`, with batches from pinned memory instead of a corpus
"""

import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evals.throughput.candidates import Candidate, LongspanModel
from evals.throughput.clock import Say, StepClock
from evals.throughput.peers import Peer
from evals.throughput.settings import Measurement
from pretrain.batch import Batch
from pretrain.config import RunConfig
from pretrain.mixers.base import map_state
from pretrain.training.engine import build_engine, start_process_group, take_step
from pretrain.training.metrics import CorpusFacts
from pretrain.training.optim import parameter_groups
from pretrain.training.precision import autocast
from pretrain.training.trainer import Trainer

N_BATCHES = 8
# A uniform guess is ln V; random logits of unit variance would add half a nat.
LARGEST_EXCESS = 1.0


class CheckFailed(RuntimeError):
    """The step is not one that is worth timing."""


def check_first_step(loss: float, grad_norm: float, vocab_size: int) -> None:
    """Raises `CheckFailed` when a fresh model on random tokens gives anything but a guess's loss.

    Args:
        loss: mean, nats per token.
        grad_norm: of all parameters.
        vocab_size: V.
    """
    if not abs(loss - math.log(vocab_size)) < LARGEST_EXCESS:
        raise CheckFailed(
            f"the first loss is {loss:.3f}, where a guess among {vocab_size} has "
            f"{math.log(vocab_size):.3f}"
        )
    if not (math.isfinite(grad_norm) and grad_norm > 0):
        raise CheckFailed(f"the first gradient has the norm {grad_norm}")


def run_loop(measurement: Measurement, clock: StepClock, say: Say) -> dict[str, float]:
    """Builds the model and trains it until the clock ends.

    Returns:
        Numbers of `parameters`, and `train_flops` per token.

    Raises:
        CheckFailed: see `check_first_step`.
        ImportError: a peer is not installed, or cannot run here.
        ValueError: a compiled block computes something else.
    """
    loops = {"plain": plain, "deepspeed": through_deepspeed, "trainer": through_trainer}
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        return loops[measurement.loop](measurement, clock, say, Path(folder) / "run")


def build(m: Measurement, config: RunConfig, device: torch.device, say: Say) -> Candidate:
    """The model, its blocks compiled and checked; a peer is seen to be causal, ours are by test."""
    say("building")
    kind: Callable[..., Candidate] = Peer if m.is_peer else LongspanModel
    candidate = kind(m, config, device)
    if isinstance(candidate, Peer):
        say("checking that later tokens change nothing before them")
        with _precision(m, config, device):
            candidate.check_causal()
    if m.compile:
        say("compiling, and comparing compiled blocks with eager ones")
        with _precision(m, config, device):
            candidate.compile()
    return candidate


def plain(m: Measurement, clock: StepClock, say: Say, run_dir: Path) -> dict[str, float]:
    """Nothing but torch."""
    config = m.config(run_dir)
    candidate = build(m, config, clock.device, say)
    module = candidate.module
    groups = parameter_groups(module, config.optim)
    optimizer = torch.optim.AdamW(
        groups, betas=config.optim.betas, eps=config.optim.eps, fused=True
    )
    seen: list[Tensor] = []

    def check() -> None:
        check_first_step(seen[0].item() / m.tokens, seen[1].item(), m.vocab_size)

    for tokens in clock.steps(random_tokens(m, clock.device), check):
        with _precision(m, config, clock.device):
            loss = candidate.loss(tokens)
        (loss / m.tokens).backward()
        norm = nn.utils.clip_grad_norm_(module.parameters(), config.optim.grad_clip, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        candidate.after_step()
        seen = seen or [loss.detach(), norm]
    return _facts(module, candidate.train_flops)


def through_deepspeed(
    m: Measurement, clock: StepClock, say: Say, run_dir: Path
) -> dict[str, float]:
    """The engine of training in a bare loop."""
    config = m.config(run_dir)
    say("starting DeepSpeed, building, compiling and checking")
    world = start_process_group(config)
    model = LongspanModel(m, config, clock.device)
    facts = _facts(model.module, model.train_flops)
    engine = build_engine(config, model.module, world)
    model.forward = engine
    seen: list[Any] = []

    def check() -> None:
        check_first_step(seen[0].item() / m.tokens, float(seen[1]), m.vocab_size)

    for tokens in clock.steps(random_tokens(m, clock.device), check):
        loss = model.loss(tokens)
        engine.backward(loss / m.tokens)
        norm, _ = take_step(engine, config.optim.grad_clip)
        model.after_step()
        seen = seen or [loss.detach(), norm]
    return facts


def through_trainer(m: Measurement, clock: StepClock, say: Say, run_dir: Path) -> dict[str, float]:
    """The whole trainer."""
    config = m.config(run_dir)
    run_dir.mkdir(parents=True)
    say("starting DeepSpeed, building, compiling and checking")
    world = start_process_group(config)
    model = LongspanModel(m, config, clock.device)
    facts = _facts(model.module, model.train_flops)
    loader = _RandomLoader(m, clock)
    trainer = Trainer(config, model.module, loader, world, CorpusFacts(1.0, "random tokens"))

    def check() -> None:
        nll, _, valid = trainer.window.tolist()
        check_first_step(nll / valid, float(trainer.grad_norm), m.vocab_size)

    loader.check = check
    try:
        trainer.fit()
    except _ClockEndedError:
        return facts
    raise CheckFailed("the trainer came to its end before the clock")


class _ClockEndedError(Exception):
    """Ends the trainer where it would go on, without the gigabytes of a last checkpoint."""


class _RandomLoader:
    """A `StepLoader` whose batches wait in pinned memory."""

    def __init__(self, m: Measurement, clock: StepClock) -> None:
        self.clock = clock
        self.check: Callable[[], None]
        self.batches = []
        for tokens in random_tokens(m, torch.device("cpu")):
            mask = torch.ones(m.batch_size, m.length, dtype=torch.bool)
            batch = Batch(tokens, mask, resets=None, doc_id=torch.zeros_like(tokens))
            if clock.device.type == "cuda":
                batch = Batch(*map_state(Tensor.pin_memory, batch))
            self.batches.append([batch])

    def steps(self, start_step: int) -> Iterator[list[Batch]]:
        assert start_step == 0
        yield from self.clock.steps(self.batches, self.check)
        raise _ClockEndedError

    def state(self, step: int) -> dict[str, Any]:
        return {"step": step}

    def check_state(self, saved: dict[str, Any]) -> None:
        raise ValueError(f"random tokens have no position to go on from: {saved}")


def random_tokens(m: Measurement, device: torch.device) -> list[Tensor]:
    """Several micro-batches (B, T + 1) int64, so that no cache holds one."""
    shape = (m.batch_size, m.length + 1)
    return [torch.randint(0, m.vocab_size, shape, device=device) for _ in range(N_BATCHES)]


def _precision(m: Measurement, config: RunConfig, device: torch.device) -> torch.autocast:
    if m.precision == "bf16_weights":
        return torch.autocast(device.type, enabled=False)
    return autocast(config, device)


def _facts(module: nn.Module, train_flops: float) -> dict[str, float]:
    return {"parameters": sum(p.numel() for p in module.parameters()), "train_flops": train_flops}
