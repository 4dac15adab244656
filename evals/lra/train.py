"""Trains an encoder on one task; the weights with the best validation accuracy are tested, once.

A plain torch loop with the project's own parameter groups, clipping and schedule. A killed training
goes on at its last look at the validation set, on the same batches in the same order.
"""

import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evals.lra.compiled import bucket_lengths, verify_blocks
from evals.lra.examples import Examples
from pretrain.config import OptimConfig, ScheduleConfig
from pretrain.finetuning.order import batches
from pretrain.models import Encoder, EncoderConfig
from pretrain.training.compiled_blocks import compile_blocks
from pretrain.training.optim import parameter_groups, schedule_factor

_PAD_MULTIPLE = 64  # few different shapes, and whole chunks of every mixer


@dataclass(frozen=True)
class TrainOptions:
    """All of a run but its model, data, learning rate and seed.

    Attributes:
        steps: optimizer steps.
        batch_size: examples per step.
        check_every: steps from one look at the validation set to the next.
        weight_decay: of matrices; S4's configurations have 0.05.
        warmup_fraction: of the steps; then a cosine.
        solved: accuracy on the validation set that ends the search for a rate.
        autocast: matmuls in bfloat16.
        compiler: backend of `torch.compile` for the blocks, whose rows then have few lengths; "":
            not compiled.
    """

    steps: int
    batch_size: int
    check_every: int = 500
    weight_decay: float = 0.05
    warmup_fraction: float = 0.05
    solved: float = 0.995
    autocast: bool = False
    compiler: str = ""


def run(
    config: EncoderConfig,
    splits: dict[str, Examples],
    learning_rate: float,
    seed: int,
    options: TrainOptions,
    device: torch.device,
    progress: Path,
) -> dict[str, Any]:
    """Trains and tests one model.

    Args:
        config: of the encoder.
        splits: train, validation, test.
        learning_rate: of all but state-space parameters, which have the project's own.
        seed: of initial weights and of the order of examples.
        options: of the run.
        device: where it runs.
        progress: file that an interrupted training leaves and continues from.

    Returns:
        `validation`, the best accuracy; `step` that had it; `test`, the accuracy of those weights;
        `solved`; `diverged`; `history` of the checks; `parameters`; since the last interruption
        `seconds`, and `seconds_per_step` without checks, the median over them.

    Raises:
        ValueError: fewer training examples than a batch; a block that was compiled wrongly.
    """
    began = time.perf_counter()
    torch.manual_seed(seed)
    model = Encoder(config).to(device)
    optim = OptimConfig(learning_rate=learning_rate, weight_decay=options.weight_decay)
    schedule = ScheduleConfig(type="cosine", warmup_fraction=options.warmup_fraction)
    groups = parameter_groups(model, optim)
    optimizer = torch.optim.AdamW(groups, betas=optim.betas, eps=optim.eps, fused=True)
    history: list[dict[str, Any]] = []
    best: dict[str, Any] = {"validation": -1.0}
    done = 0
    if progress.exists():
        saved = torch.load(progress, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done, history, best = saved["step"], saved["history"], saved["best"]
    row_lengths = _choose_row_lengths(splits, options)
    if options.compiler:
        compile_blocks(model, options.compiler)
        n_rows = options.batch_size * config.n_inputs
        verify_blocks(model, row_lengths, n_rows, autocast=options.autocast)
        _report(
            progress, f"compiled for {row_lengths} symbols in {time.perf_counter() - began:.0f} s"
        )
    # By length: at ListOps' lengths that halves the pads.
    order = batches(splits["train"].lengths(), options.batch_size, seed, done)
    step_seconds: list[float] = []
    since, since_step = time.perf_counter(), done
    for step in range(done + 1, options.steps + 1):
        factor = schedule_factor(step, options.steps, schedule)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        batch = splits["train"].take(next(order))
        loss = _step(model, batch, optimizer, optim, options, row_lengths)
        if step % options.check_every == 0 or step == options.steps:
            value = loss.item()  # waits for the GPU, and so comes before the clock
            step_seconds.append((time.perf_counter() - since) / (step - since_step))
            accuracy = score(model, splits["validation"], options, row_lengths)
            history.append({"step": step, "loss": value, "validation": accuracy})
            _report(
                progress,
                f"step {step}/{options.steps} loss {value:.3f} validation {100 * accuracy:.1f} % "
                f"{1000 * step_seconds[-1]:.1f} ms/step",
            )
            if not math.isfinite(value):
                history[-1]["loss"] = None  # JSON has no NaN
                break
            if accuracy > best["validation"]:
                weights = {key: value.clone() for key, value in model.state_dict().items()}
                best = {"validation": accuracy, "step": step, "weights": weights}
            content = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "history": history,
                "best": best,
            }
            torch.save(content, progress.with_suffix(".partial"))
            os.replace(progress.with_suffix(".partial"), progress)
            since, since_step = time.perf_counter(), step
    if "weights" in best:
        model.load_state_dict(best["weights"])
    return {
        "validation": best["validation"],
        "step": best.get("step", 0),
        "test": score(model, splits["test"], options, row_lengths),
        "test_examples": len(splits["test"].labels),
        "solved": best["validation"] >= options.solved,
        "diverged": history[-1]["loss"] is None,
        "history": history,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.perf_counter() - began, 1),
        "seconds_per_step": round(statistics.median(step_seconds), 4) if step_seconds else None,
    }


def score(
    model: Encoder, examples: Examples, options: TrainOptions, row_lengths: Sequence[int]
) -> float:
    """Share of the examples whose most probable class is their label."""
    model.eval()
    # By length: rows of a batch then have few pads.
    by_length = np.argsort(examples.lengths(), kind="stable")
    right = 0
    for start in range(0, len(by_length), options.batch_size):
        chosen = by_length[start : start + options.batch_size]
        # Compiled blocks know one number of rows: the last example comes as often as that takes.
        part = examples.take(np.pad(chosen, (0, options.batch_size - len(chosen)), mode="edge"))
        inputs, ends, labels = _tensors(part, model, row_lengths)
        # And they are compiled for training: without gradients all of them would be, once more.
        with (
            torch.set_grad_enabled(bool(options.compiler)),
            torch.autocast(inputs.device.type, torch.bfloat16, enabled=options.autocast),
        ):
            logits = model(inputs, ends).logits.detach()
        right += (logits.argmax(-1) == labels)[: len(chosen)].sum()
    return int(right) / len(by_length)


def _choose_row_lengths(splits: dict[str, Examples], options: TrainOptions) -> Sequence[int]:
    """The lengths that rows may have, in increasing order."""
    if options.compiler:
        return bucket_lengths(splits.values())
    longest = max(int(split.lengths().max()) for split in splits.values())
    return range(_PAD_MULTIPLE, longest + _PAD_MULTIPLE, _PAD_MULTIPLE)


def _report(progress: Path, text: str) -> None:
    """A line of the log, named after the training's file; the table alone goes to stdout."""
    print(f"{progress.stem}: {text}", file=sys.stderr, flush=True)


def _step(
    model: Encoder,
    batch: Examples,
    optimizer: torch.optim.Optimizer,
    optim: OptimConfig,
    options: TrainOptions,
    row_lengths: Sequence[int],
) -> Tensor:
    """One optimizer step; the loss before it, nats per example. Nothing here waits for a GPU."""
    model.train()
    inputs, lengths, labels = _tensors(batch, model, row_lengths)
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=options.autocast):
        output = model(inputs, lengths)
    loss = F.cross_entropy(output.logits.float(), labels)
    auxiliary = [value for name, value in output.aux.items() if name.endswith("_loss")]
    total = loss + torch.stack(auxiliary).sum() / len(batch.symbols) if auxiliary else loss
    total.backward()
    nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip)
    optimizer.step()
    optimizer.zero_grad()
    model.update_buffers({k: v for k, v in output.aux.items() if not k.endswith("_loss")})
    return loss.detach()


def _tensors(
    batch: Examples, model: Encoder, row_lengths: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """inputs (B, T) or (B, 2, T), lengths (B,) or (B, 2), labels (B,) on the model's device."""
    device = next(model.parameters()).device
    rows, lengths = batch.padded(row_lengths)
    inputs, ends, labels = (
        _moved(torch.from_numpy(array), device) for array in (rows, lengths, batch.labels)
    )
    inputs = inputs.long() if model.config.vocab_size else inputs.float() / 127.5 - 1
    if batch.per_example > 1:
        inputs = inputs.unflatten(0, (-1, batch.per_example))
        ends = ends.unflatten(0, (-1, batch.per_example))
    return inputs, ends, labels


def _moved(array: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        array = array.pin_memory()  # from pageable memory the copy would wait for the GPU
    return array.to(device, non_blocking=True)
