"""Trains a model on pairs and keeps the weights that do best on validation.

A plain torch loop with the project's own parameter groups, clipping and schedule. A killed training
goes on at its last look at validation, with the same batches and masks of dropout: nothing else in
it is random.

Several ranks share each batch by rows and sum their gradients; the loss is a mean over all of the
batch's targets, so neither their number nor who has which row changes more than rounding; but
dropout's masks are each rank's own.
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.config import OptimConfig, ScheduleConfig
from pretrain.dealing import deal
from pretrain.finetuning.interface import Pairs, TrainableModel
from pretrain.finetuning.order import batches, micro_batches
from pretrain.finetuning.ranks import Ranks
from pretrain.training.manifest import CheckpointError
from pretrain.training.optim import parameter_groups, schedule_factor
from pretrain.training.random_state import step_seed

ALONE = Ranks()


@dataclass(frozen=True)
class TrainOptions:
    """All of a training but its model, data and seed.

    Attributes:
        steps: optimizer steps, unless it stops before.
        batch_size: examples per step.
        check_every: steps from one look at validation to the next.
        patience: looks without a better one after which training stops.
        learning_rate: of all parameters, state-space ones included.
        weight_decay: of matrices.
        warmup_fraction: of the steps; then a cosine to a tenth.
        micro_batch_tokens: that a rank reads at one time, pads counted; changes sums by rounding,
            and dropout's masks.
    """

    steps: int
    batch_size: int = 32
    check_every: int = 100
    patience: int = 3
    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    warmup_fraction: float = 0.05
    micro_batch_tokens: int = 65536

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate={self.learning_rate:g} must be a positive number")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay={self.weight_decay:g} must be at least 0")
        if not 0 <= self.warmup_fraction <= 1:
            raise ValueError(f"warmup_fraction={self.warmup_fraction:g} must lie between 0 and 1")
        if self.micro_batch_tokens < 1:
            raise ValueError(f"micro_batch_tokens={self.micro_batch_tokens} must be at least 1")


def train(
    model: TrainableModel,
    pairs: Pairs,
    validate: Callable[[], float],
    options: TrainOptions,
    seed: int,
    progress: Path,
    report: Callable[[dict[str, float]], None] = lambda check: None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Trains; the model then has the weights of the best look at validation.

    Args:
        model: to start from, the same in all ranks; changed, likewise.
        pairs: of training.
        validate: scores the model as it is, higher is better, in all ranks alike.
        options: of the training.
        seed: of the order of examples and of dropout's masks.
        progress: file that an interrupted training leaves and continues from; rank 0 writes it.
        report: is told of every look at validation.
        ranks: that train together, and all call this.

    Returns:
        `validation`, the best score, None if training diverged before; `step` that had it; `steps`
        taken; `diverged`; `history` of the looks, the loss None where it is no number; `seconds`
        and `tokens` read since the last interruption.

    Raises:
        ValueError: fewer training examples than a batch.
        SharedError: `progress` cannot be read, or rank 0 cannot write it.
        RankLost: another rank failed.
    """
    began, tokens = time.perf_counter(), 0
    optim = OptimConfig(
        learning_rate=options.learning_rate,
        ssm_learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
    )
    schedule = ScheduleConfig(type="cosine", warmup_fraction=options.warmup_fraction)
    groups = parameter_groups(model.module, optim)
    optimizer = torch.optim.AdamW(groups, betas=optim.betas, eps=optim.eps, fused=True)
    history: list[dict[str, Any]] = []
    best: dict[str, Any] = {"validation": -math.inf, "step": 0}
    done, worse = 0, 0
    if progress.exists():
        saved = ranks.everywhere(lambda: _load(progress, model.device))
        model.module.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done, worse = saved["step"], saved["worse"]
        history, best = saved["history"], saved["best"]
    lengths = pairs.lengths()
    order = batches(lengths, options.batch_size, seed, done)
    for step in range(done + 1, options.steps + 1):
        if worse >= options.patience:
            break
        factor = schedule_factor(step, options.steps, schedule)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        torch.manual_seed(step_seed(seed, step, ranks.rank))
        loss, read = _step(model, pairs.take(next(order)), optimizer, optim, options, ranks)
        tokens += read
        if step % options.check_every and step != options.steps:
            continue
        history.append({"step": step, "loss": loss.item(), "validation": validate()})
        report(history[-1])
        if not math.isfinite(history[-1]["loss"]):
            history[-1]["loss"] = None  # JSON has no NaN
            break
        worse += 1
        if history[-1]["validation"] > best["validation"]:
            weights = {key: value.clone() for key, value in model.module.state_dict().items()}
            best = {"validation": history[-1]["validation"], "step": step, "weights": weights}
            worse = 0
        content: dict[str, Any] = {
            "model": model.module.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "worse": worse,
            "history": history,
            "best": best,
        }
        ranks.on_main(partial(replace_file, progress, content))
    if "weights" in best:
        model.module.load_state_dict(best["weights"])
    return {
        "validation": best["validation"] if "weights" in best else None,
        "step": best["step"],
        "steps": history[-1]["step"],
        "diverged": history[-1]["loss"] is None,
        "history": history,
        "seconds": round(time.perf_counter() - began, 1),
        "tokens": sum(ranks.gather(tokens)),
    }


def _load(progress: Path, device: torch.device) -> dict[str, Any]:
    try:
        return torch.load(progress, map_location=device, weights_only=True)
    except Exception as error:  # of many kinds, by where the damage is
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{progress}: cannot be read ({reason}); if it is damaged, delete it, and this seed "
            f"begins anew"
        ) from error


def replace_file(path: Path, content: dict[str, Any]) -> None:
    """`torch.save` in one move: a kill leaves the old file or the new one."""
    temporary = path.with_suffix(".partial")
    torch.save(content, temporary)
    os.replace(temporary, path)


def _step(
    model: TrainableModel,
    batch: Pairs,
    optimizer: torch.optim.Optimizer,
    optim: OptimConfig,
    options: TrainOptions,
    ranks: Ranks,
) -> tuple[Tensor, int]:
    """One optimizer step: the loss before it, nats per target, and the tokens that this rank read.
    Nothing here waits for a GPU."""
    model.module.train()
    n_targets = model.n_targets(batch)
    n_tokens = int(batch.lengths().sum())
    mine = batch.take(deal(batch.lengths().tolist(), ranks.size)[ranks.rank])
    total, read = torch.zeros((), device=model.device), 0
    statistics: dict[str, Tensor] = {}
    for rows in micro_batches(mine.lengths(), options.micro_batch_tokens):
        loss = model.loss(mine.take(rows))
        objective = loss.loss_sum / n_targets
        for name, value in loss.aux.items():
            if name.endswith("_loss"):  # summed over tokens
                objective = objective + value / n_tokens
            else:
                statistics[name] = statistics.get(name, 0) + value
        objective.backward()
        total += loss.loss_sum.detach()
        read += loss.n_tokens
    parameters = dict(model.module.named_parameters())
    found = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    for name, gradient in ranks.sum(found, model.device).items():
        parameters[name].grad = gradient
    nn.utils.clip_grad_norm_(parameters.values(), optim.grad_clip)
    optimizer.step()
    optimizer.zero_grad()
    sums = ranks.sum({**statistics, "loss": total}, model.device)
    total = sums.pop("loss")
    model.update_buffers(sums)
    return total / n_targets, read
