"""What a run reports: one console line, one row of metrics.jsonl, TensorBoard. Rank 0 only.

Throughput is tokens that entered the model per second, padding included. MFU is train FLOPs per
token (convention in plan.py: 3 x forward, no recomputation) x tokens per second and rank, over the
dense bf16 peak of the device; no number is printed for a device whose peak is not listed.
"""

import json
import math
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.files import replace_text

# Dense bf16 FLOP/s by part of the device's name, from NVIDIA's data sheets; the first match counts.
PEAK_BF16_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "H200 NVL": 835e12,
    "H200": 989.4e12,
    "A100": 312e12,
}


@dataclass(frozen=True)
class CorpusFacts:
    """What training needs to know about the text besides its batches.

    Attributes:
        bytes_per_token: UTF-8 bytes of the corpus over its tokens, turns nats into bits per byte;
            None where targets are not the text, but what a denoising objective makes of it.
        tokenizer: the tokenizer's fingerprint; a checkpoint resumes only with its own.
        target_length: tokens of a row's targets in encoder-decoder training, else 0.
    """

    bytes_per_token: float | None
    tokenizer: str
    target_length: int = 0


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Bits per UTF-8 byte from a mean loss in nats per token."""
    return loss / math.log(2) / bytes_per_token


def bits_per_byte_of(loss: float, bytes_per_token: float | None) -> dict[str, float]:
    """The metric by its name, where there is one."""
    if bytes_per_token is None:
        return {}
    return {"bits_per_byte": bits_per_byte(loss, bytes_per_token)}


def means_over_ranks(sums_and_counts: dict[str, Tensor]) -> dict[str, float]:
    """Means of all ranks' terms together, by name; called by all ranks with the same names.

    Args:
        sums_and_counts: (2,) float64 each: the sum of this rank's terms, and how many they are.

    Returns:
        No mean of what no rank has any of, as gap sentences have no sentinels to write.
    """
    means = {}
    for name in sorted(sums_and_counts):
        dist.all_reduce(sums_and_counts[name])
        total, count = sums_and_counts[name].tolist()
        if count:
            means[name] = total / count
    return means


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of the device in FLOP/s, if known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_BF16_FLOPS.items() if key in name), None)


def memory_gib(device: torch.device) -> float:
    """Peak memory in GiB: allocated on the accelerator, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 2**30


def speed(
    tokens_per_second: float, ranks: int, train_flops: float, device: torch.device
) -> dict[str, float]:
    """Throughput and memory of a rank.

    Args:
        tokens_per_second: of all ranks together.
        ranks: how many.
        train_flops: forward and backward FLOPs per token.
        device: of this rank.
    """
    per_rank = tokens_per_second / ranks
    values = {
        "tokens_per_second": tokens_per_second,
        "tokens_per_second_per_rank": per_rank,
        "tflops_per_rank": per_rank * train_flops / 1e12,
        "memory_gib": memory_gib(device),
    }
    peak = peak_flops(device)
    return values if peak is None else {**values, "mfu": per_rank * train_flops / peak}


def drop_rows_after(path: Path, step: int) -> None:
    """Removes the rows of metrics.jsonl that a resumed run writes again, and a torn last one."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the process died while writing it
        if row["step"] <= step:
            kept.append(line + "\n")
    replace_text(path, "".join(kept))


def say(run_dir: Path, text: str) -> None:
    """Prints to the console and appends to the run's train.log."""
    print(text, flush=True)
    with open(run_dir / "train.log", "a", encoding="utf-8") as file:
        print(text, file=file)


class Stopwatch:
    """Wall-clock seconds and the part of them spent waiting for data, since the last `read`."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.waited = 0.0

    def read(self) -> tuple[float, float]:
        """Returns (seconds, seconds waiting for data) and starts again."""
        now = time.perf_counter()
        elapsed, waited = now - self.began, self.waited
        self.began, self.waited = now, 0.0
        return elapsed, waited


class MetricLog:
    """Appends rows to the run directory and prints the console line.

    Args:
        run_dir: where metrics.jsonl, tensorboard/ and train.log live.
        step: resumed from, -1 for a new start; later rows of an earlier process are dropped.
        tensorboard: write event files too.
    """

    def __init__(self, run_dir: Path, step: int, *, tensorboard: bool) -> None:
        self.run_dir = run_dir
        drop_rows_after(run_dir / "metrics.jsonl", step)
        self.rows = open(run_dir / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self.board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def say(self, text: str) -> None:
        """Prints to the console and to train.log."""
        say(self.run_dir, text)

    def row(self, step: int, tokens: int, values: dict[str, float]) -> None:
        """Records scalars at a step in metrics.jsonl and TensorBoard."""
        record: dict[str, Any] = {"step": step, "tokens": tokens, **values, "time": time.time()}
        print(json.dumps(record), file=self.rows, flush=True)
        if self.board is not None:
            for key, value in values.items():
                self.board.add_scalar(key, value, step)

    def histograms(self, step: int, values: dict[str, Tensor]) -> None:
        """Records distributions at a step; TensorBoard only."""
        if self.board is not None:
            for key, value in values.items():
                self.board.add_histogram(key, value, step)

    def close(self) -> None:
        """Flushes everything to disk."""
        self.rows.close()
        if self.board is not None:
            self.board.close()


def console_line(step: int, total_steps: int, tokens: int, values: dict[str, float]) -> str:
    """The line of one log step: step tokens loss bpb gnorm lr tok/s mfu mem data% eta.

    A denoising objective has in the place of bpb its loss on sentinels and on all other tokens.
    """
    losses = f"loss {values['loss']:.4f}  "
    for name, key in (
        ("bpb", "bits_per_byte"),
        ("sentinel", "loss/sentinel"),
        ("other", "loss/other"),
    ):
        if key in values:
            losses += f"{name} {values[key]:.4f}  "
    mfu = f"mfu {values['mfu']:.1%}  " if "mfu" in values else ""
    return (
        f"step {step:>6}/{total_steps}  tokens {short(tokens):>6}  {losses}"
        f"gnorm {values['grad_norm']:.3f}  "
        f"lr {values['lr']:.2e}  tok/s {short(values['tokens_per_second']):>6}  {mfu}"
        f"mem {values['memory_gib']:.2f}G  data {values['data_fraction']:.1%}  "
        f"eta {duration(values['eta_seconds'])}"
        + (f"  skipped {values['skipped_steps']:.0f}" if values["skipped_steps"] else "")
    )


def short(number: float) -> str:
    """1234567 -> 1.23M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """3725 -> 1h02m."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
