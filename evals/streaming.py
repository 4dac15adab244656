"""Do memory and time per token stay the same however long the context? One table over models.

Streaming: random tokens are read in segments, the state handed on. A forward changes no state, so
the state at each context is kept, and the segment after each is read again and again, all contexts
in turn: whatever slows the machine down for a while slows all of them down.

Training: forward and backward over one sequence of each length, again all lengths in turn; p of
seconds ~ length^p by least squares in logarithms, 1 for a cost per token that stays the same. On
Linux set MALLOC_MMAP_MAX_=0 and MALLOC_TRIM_THRESHOLD_=-1: otherwise the C library hands blocks of
long sequences back to the kernel after every use, and clearing their pages anew takes Mamba-2 as
long at 32k tokens as its work does, and next to nothing at 2k.

Weights are the initial ones: neither memory nor time depends on their values.

    OUT/streaming.json   everything, with the machine and the command
    OUT/streaming.csv    one row per model and context or length
    OUT/streaming.md     the table
    OUT/streaming.png    time per token over context and over length
"""

import csv
import io
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor

from evals import plots
from evals.live_bytes import LiveBytes
from evals.scoring.store import write_bytes
from pretrain.config import CONFIG_DIR, load_config
from pretrain.mixers.base import map_state
from pretrain.models import LanguageModel, ModelState

SCHEMA = "longspan.eval.streaming/1"
VOCABULARY = 256
LARGEST_RATIO = 1.1
"""A model is slower at the end when even the lower end of the interval is above this."""
LARGEST_EXPONENT = 1.1
"""A model is slower when even the round with the smallest is above this, 1.32 times as slow per
token at 32k as at 2k. Attention to everything tends to 2."""
FEWEST_ROUNDS = 6
"""With fewer there is no 95 % interval for a median without assumptions."""


def tiny_models() -> list[str]:
    """The names of all decoders among configs/model/*_tiny.yaml."""
    names = sorted(path.stem for path in (CONFIG_DIR / "model").glob("*_tiny.yaml"))
    return [name for name in names if not load_config([f"model={name}"]).model.has_encoder]


@dataclass(frozen=True)
class StreamingOptions:
    """What to measure. Lengths in tokens.

    Attributes:
        contexts: read before the segment that is measured; multiples of `segment_tokens`.
        lengths: of training sequences.
        growing_tokens: the longest context and length for models whose state grows.
        segment_tokens: read in one call.
        rounds: how often each context is timed.
        training_rounds: how often each length is timed.
    """

    contexts: tuple[int, ...]
    lengths: tuple[int, ...]
    growing_tokens: int = 8192
    segment_tokens: int = 2048
    rounds: int = 15
    training_rounds: int = 3

    def problems(self) -> list[str]:
        """One line per bad value; empty when all is well."""
        found = []
        segment = self.segment_tokens
        if segment < 1 or any(c < 1 or c % segment for c in self.contexts):
            found.append(
                f"contexts={list(self.contexts)}: each a multiple of segment_tokens={segment}"
            )
        for name in ("contexts", "lengths"):
            values = getattr(self, name)
            if len(values) < 2 or sorted(set(values)) != list(values) or values[0] < 1:
                found.append(f"{name}={list(values)}: at least two, rising, each >= 1")
            elif values[1] > self.growing_tokens:
                found.append(
                    f"growing_tokens={self.growing_tokens} leaves fewer than two of "
                    f"{name}={list(values)}: choose at least {values[1]}"
                )
        if self.rounds < FEWEST_ROUNDS:
            found.append(f"rounds={self.rounds}: an interval needs at least {FEWEST_ROUNDS}")
        if self.training_rounds < 1:
            found.append(f"training_rounds={self.training_rounds}: must be at least 1")
        return found


@dataclass(frozen=True)
class Measurement:
    """One model. The lists run over `contexts` and `lengths`.

    Attributes:
        name: of the model.
        parameters: with embeddings of `VOCABULARY` tokens.
        constant_state: what the model claims.
        contexts: tokens.
        state_bytes: what the state holds at each context.
        live_bytes: peak of what tensors hold while the next segment is read, weights excluded.
        seconds_per_token: of the next segment, median over rounds.
        ratio: time at the last context over that at the first, median over rounds.
        ratio_ci95: of that median, without assumptions on the noise.
        lengths: tokens.
        training_seconds_per_token: forward and backward, median over rounds.
        exponent: p of training seconds ~ length^p, median over rounds.
        exponent_range: smallest and largest of the rounds.
    """

    name: str
    parameters: int
    constant_state: bool
    contexts: list[int]
    state_bytes: list[int]
    live_bytes: list[int]
    seconds_per_token: list[float]
    ratio: float
    ratio_ci95: tuple[float, float]
    lengths: list[int]
    training_seconds_per_token: list[float]
    exponent: float
    exponent_range: tuple[float, float]

    def growing(self) -> list[str]:
        """What is not the same at all contexts, in words; empty when nothing grows."""
        found = []
        for name, sizes in (("state", self.state_bytes), ("live", self.live_bytes)):
            if len(set(sizes)) > 1:
                found.append(f"{name} bytes")
        if self.ratio_ci95[0] > LARGEST_RATIO:
            found.append("time per token")
        if self.exponent_range[0] > LARGEST_EXPONENT:
            found.append("training time per token")
        return found

    @property
    def passed(self) -> bool:
        """False when a model claims a constant state and something grows."""
        return not (self.constant_state and self.growing())

    def verdict(self) -> str:
        """What was found, beside what was claimed."""
        growing = self.growing()
        if not growing:
            return "constant"
        return f"{'grows' if not self.constant_state else 'FAILED, grows'}: {', '.join(growing)}"


def measure(name: str, model: LanguageModel, options: StreamingOptions) -> Measurement:
    """Runs one model through everything.

    Raises:
        ValueError: bad options.
    """
    if options.problems():
        raise ValueError("\n".join(options.problems()))
    longest = float("inf") if model.constant_state else options.growing_tokens
    contexts = [context for context in options.contexts if context <= longest]
    lengths = [length for length in options.lengths if length <= longest]
    segment = random_tokens(options.segment_tokens)
    with torch.inference_mode():
        states = read(model, contexts, options.segment_tokens)
        live_bytes = [peak_bytes(model, segment, state) for state in states]
        jobs = [partial(model, segment, state) for state in states]
        seconds = in_turn(jobs, options.rounds)
    ratios = seconds[:, -1] / seconds[:, 0]
    training = in_turn([partial(train, model, n) for n in lengths], options.training_rounds)
    exponents = np.polyfit(np.log(lengths), np.log(training).T, 1)[0]
    return Measurement(
        name=name,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        constant_state=model.constant_state,
        contexts=contexts,
        state_bytes=[held_bytes(state) for state in states],
        live_bytes=live_bytes,
        seconds_per_token=(np.median(seconds, 0) / options.segment_tokens).tolist(),
        ratio=median(ratios.tolist()),
        ratio_ci95=median_ci95(ratios),
        lengths=lengths,
        training_seconds_per_token=(np.median(training, 0) / lengths).tolist(),
        exponent=float(np.median(exponents)),
        exponent_range=(float(exponents.min()), float(exponents.max())),
    )


def read(model: LanguageModel, contexts: Sequence[int], segment_tokens: int) -> list[ModelState]:
    """Streams to the last context; the states at all of them."""
    state, states = model.init_state(1), []
    for stop in range(segment_tokens, contexts[-1] + 1, segment_tokens):
        state = model(random_tokens(segment_tokens, seed=stop), state).state
        if stop in contexts:
            states.append(state)
    return states


def train(model: LanguageModel, length: int) -> None:
    """Forward and backward over one sequence; the gradients are dropped."""
    tokens = random_tokens(length + 1)
    model(tokens[:, :-1], targets=tokens[:, 1:]).loss_sum.backward()
    model.zero_grad()


def random_tokens(length: int, seed: int = 0) -> Tensor:
    """(1, length) int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (1, length), generator=generator)


def held_bytes(state: ModelState) -> int:
    """Of the storages behind a state's tensors, each counted once."""
    storages: dict[int, int] = {}

    def add(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            storages[storage.data_ptr()] = storage.nbytes()

    map_state(add, state)
    return sum(storages.values())


def peak_bytes(model: LanguageModel, segment: Tensor, state: ModelState) -> int:
    """What tensors hold at most while a segment is read."""
    with LiveBytes() as memory:
        model(segment, state)
    return memory.peak


def in_turn(jobs: Sequence[Callable[[], Any]], rounds: int) -> np.ndarray:
    """(rounds, jobs) seconds: each job once in every round, in memory that the last, the largest,
    has touched before."""
    jobs[-1]()
    seconds = np.empty((rounds, len(jobs)))
    for row in seconds:
        for column, job in enumerate(jobs):
            start = time.perf_counter()
            job()
            row[column] = time.perf_counter() - start
    return seconds


def median_ci95(values: np.ndarray) -> tuple[float, float]:
    """The order statistics around the median that hold it with at least 95 %, whatever the
    distribution: as many of n values fall below it as heads among n coins."""
    ordered = sorted(values.tolist())
    k = int(binom.ppf(0.025, len(ordered), 0.5))
    return ordered[k - 1], ordered[-k]


def table(measurements: Sequence[Measurement]) -> str:
    """The Markdown table, one row per model; sizes and times at the first and the last context."""
    header = [
        "model",
        "contexts (tokens)",
        "state (KiB)",
        "live (MiB)",
        "µs per token",
        "ratio [95 %]",
        "training lengths",
        "exponent [range]",
        "verdict",
    ]
    rows = [
        [
            m.name,
            _ends([f"{n:,}" for n in m.contexts]),
            _ends([f"{n / 2**10:,.1f}" for n in m.state_bytes]),
            _ends([f"{n / 2**20:,.1f}" for n in m.live_bytes]),
            _ends([f"{1e6 * s:,.0f}" for s in m.seconds_per_token]),
            "{:.2f} [{:.2f}, {:.2f}]".format(m.ratio, *m.ratio_ci95),
            _ends([f"{n:,}" for n in m.lengths]),
            "{:.2f} [{:.2f}, {:.2f}]".format(m.exponent, *m.exponent_range),
            m.verdict(),
        ]
        for m in measurements
    ]
    lines = [header, ["---", *["---:"] * 7, "---"], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _ends(cells: Sequence[str]) -> str:
    """First and last, or the one thing that both are."""
    return cells[0] if cells[0] == cells[-1] else f"{cells[0]} to {cells[-1]}"


def write(
    measurements: Sequence[Measurement], options: StreamingOptions, out_dir: Path, command: str
) -> None:
    """Writes the four files."""
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "command": command,
        "machine": {
            "platform": platform.platform(),
            "processor": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "malloc": {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")},
        },
        "options": asdict(options),
        "models": [asdict(m) | {"passed": m.passed, "verdict": m.verdict()} for m in measurements],
    }
    write_bytes(out_dir / "streaming.json", json.dumps(result, indent=1).encode())
    write_bytes(out_dir / "streaming.csv", _csv(measurements).encode())
    write_bytes(out_dir / "streaming.md", table(measurements).encode())
    write_bytes(out_dir / "streaming.png", plots.to_png(plots.streaming_figure(result["models"])))


def _csv(measurements: Sequence[Measurement]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["model", "phase", "tokens", "seconds_per_token", "state_bytes", "live_bytes"])
    for m in measurements:
        columns = m.contexts, m.seconds_per_token, m.state_bytes, m.live_bytes
        writer.writerows((m.name, "stream", *row) for row in zip(*columns, strict=True))
        timed = zip(m.lengths, m.training_seconds_per_token, strict=True)
        writer.writerows((m.name, "train", *row, "", "") for row in timed)
    return text.getvalue()
