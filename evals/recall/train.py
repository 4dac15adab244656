"""Trains a small model on a recall task and tests it: read whole, streamed, beyond its length.

Shapes: B examples, T tokens, D model width.

A plain torch loop with the project's own parameter groups, clipping and schedule: a run of a minute
needs no engine, but state-space parameters keep their own rate.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evals.recall.tasks import Examples, RecallTask, generator
from pretrain.config import OptimConfig, ScheduleConfig
from pretrain.models import LanguageModel, LanguageModelConfig
from pretrain.training.optim import parameter_groups, schedule_factor

EVAL_BATCH = 250


@dataclass(frozen=True)
class TrainOptions:
    """All of a run but its model, task, learning rate and seed.

    Attributes:
        steps: optimizer steps; training ends before at a check that finds the task solved.
        batch_size: examples per step, fresh ones every time.
        check_every: steps from one look at the validation set to the next.
        solved: accuracy on the validation set that ends training and the search for a rate.
        validation_examples: rates are chosen on these.
        test_examples: of each test, drawn apart, looked at once.
        segment_tokens: of the streamed test; no divisor of a window, so that blocks are cut too.
        test_lengths: of further tests, in trained lengths.
        long_segment_tokens: of these, which are streamed too; as odd, and longer to be faster.
    """

    steps: int
    batch_size: int = 64
    check_every: int = 50
    solved: float = 0.99
    validation_examples: int = 500
    test_examples: int = 1000
    segment_tokens: int = 24
    test_lengths: tuple[int, ...] = (4,)
    long_segment_tokens: int = 248

    def long_examples(self, factor: int) -> int:
        """Examples of a test `factor` times as long: as many tokens as in four times the trained
        length, but 50 at least."""
        return min(self.test_examples, max(50, 4 * self.test_examples // factor))


def run(
    config: LanguageModelConfig,
    task: RecallTask,
    learning_rate: float,
    seed: int,
    options: TrainOptions,
    device: torch.device,
) -> dict[str, Any]:
    """Trains and tests one model.

    Returns:
        `validation`, the accuracy that decides; `solved`; `steps` taken; `diverged`; `history` of
        the checks; `tests`: for `whole`, `stream` (the same examples in segments, the state handed
        on) and `4x` and so on for longer ones, `correct` of `answers` in `documents` of `tokens`;
        `parameters`; `state_floats` by layer after a document of the trained length; `seconds`.
    """
    began = time.perf_counter()
    torch.manual_seed(seed)
    model = LanguageModel(config).to(device)
    validation = task.sample(generator(seed, "validation"), options.validation_examples)
    history: list[dict[str, Any]] = []
    accuracy = 0.0
    for step, loss in train(model, task, learning_rate, seed, options):
        if step % options.check_every == 0 or step == options.steps:
            accuracy = float(score(model, validation).mean())
            value = loss.item() if math.isfinite(loss) else None  # JSON has no NaN
            history.append({"step": step, "loss": value, "validation": accuracy})
            if accuracy >= options.solved or value is None:
                break
    test = task.sample(generator(seed, "test"), options.test_examples)
    tests = {
        "whole": _counts(test, score(model, test)),
        "stream": _counts(test, score(model, test, options.segment_tokens)),
    }
    for factor in options.test_lengths:
        longer = task.stretched(factor).sample(
            generator(seed, "long", factor), options.long_examples(factor)
        )
        right = score(model, longer, options.long_segment_tokens)
        tests[f"{factor}x"] = _counts(longer, right)
    return {
        "validation": accuracy,
        "solved": accuracy >= options.solved,
        "steps": history[-1]["step"],
        "diverged": history[-1]["loss"] is None,
        "history": history,
        "tests": tests,
        "parameters": sum(p.numel() for p in model.parameters()),
        "state_floats": state_floats(model, task.seq_len),
        "seconds": round(time.perf_counter() - began, 1),
    }


def _counts(examples: Examples, right: np.ndarray) -> dict[str, int]:
    documents, tokens = examples.tokens.shape
    return {
        "correct": int(right.sum()),
        "answers": len(right),
        "documents": documents,
        "tokens": tokens,
    }


def train(
    model: LanguageModel,
    task: RecallTask,
    learning_rate: float,
    seed: int,
    options: TrainOptions,
) -> Iterator[tuple[int, Tensor]]:
    """Takes the steps; yields the number of each and the loss it began with, nats per answer.

    Nothing here waits for a GPU.
    """
    optim, schedule = OptimConfig(learning_rate=learning_rate), ScheduleConfig()
    groups = parameter_groups(model, optim)
    optimizer = torch.optim.AdamW(groups, betas=optim.betas, eps=optim.eps, fused=True)
    rng = generator(seed, "train")
    for step in range(1, options.steps + 1):
        factor = schedule_factor(step, options.steps, schedule)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        model.train()
        tokens, asked, answers = _tensors(task.sample(rng, options.batch_size), model)
        # Without a loss_mask: it marks pads, and codebooks learn from all other tokens.
        output = model(tokens)
        loss = F.cross_entropy(model.logits(output.hidden.flatten(0, 1)[asked]), answers)
        auxiliary = [value for name, value in output.aux.items() if name.endswith("_loss")]
        total = loss + torch.stack(auxiliary).sum() / tokens.numel() if auxiliary else loss
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        statistics = {k: v for k, v in output.aux.items() if not k.endswith("_loss")}
        model.update_buffers(statistics)
        yield step, loss.detach()


@torch.inference_mode()
def score(model: LanguageModel, examples: Examples, segment_tokens: int = 0) -> np.ndarray:
    """Which answers the model gives right, by the most probable token.

    Args:
        model: the model.
        examples: any number.
        segment_tokens: read documents in segments of so many tokens, the state handed on from one
            to the next; 0: whole.

    Returns:
        (answers,) bool, batch by batch and segment by segment.
    """
    model.eval()
    length = examples.tokens.shape[1]
    right = []
    for start in range(0, len(examples.tokens), EVAL_BATCH):
        state = None
        part = Examples(*(array[start : start + EVAL_BATCH] for array in examples))
        for first in range(0, length, segment_tokens or length):
            segment = Examples(
                *(array[:, first : first + (segment_tokens or length)] for array in part)
            )
            tokens, asked, answers = _tensors(segment, model)
            output = model(tokens, state)
            state = output.state
            guess = model.logits(output.hidden.flatten(0, 1)[asked]).argmax(-1)
            right.append(guess == answers)
    return torch.cat(right).cpu().numpy()


@torch.inference_mode()
def state_floats(model: LanguageModel, length: int) -> list[int]:
    """Numbers that each layer carries after `length` tokens of one document, bottom layer first."""
    model.eval()
    tokens = torch.zeros(1, length, dtype=torch.int64, device=_device(model))
    return [_count(layer) for layer in model(tokens).state.layers]


def _count(state: Any) -> int:
    """Entries of a mixer's state, of all lanes, without its place on the reset grid."""
    parts = state._asdict() if hasattr(state, "_asdict") else dict(enumerate(state))
    return sum(
        value.numel() if isinstance(value, Tensor) else _count(value)
        for name, value in parts.items()
        if name not in ("position", "phase")
    )


def _tensors(examples: Examples, model: LanguageModel) -> list[Tensor]:
    """tokens (B, T), places of the answers among B * T tokens, and the answers."""
    asked = np.flatnonzero(examples.loss_mask)
    arrays = (examples.tokens, asked, examples.targets.ravel()[asked])
    return [torch.from_numpy(array).to(_device(model), non_blocking=True) for array in arrays]


def _device(model: LanguageModel) -> torch.device:
    return model.embedding.weight.device
