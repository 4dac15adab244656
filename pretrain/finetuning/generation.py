"""Greedy and beam search over a `PairModel`.

A text of n tokens, EOS included, scores  sum of log-probabilities / n^length_penalty.  One that has
no EOS after `max_tokens` competes as it is. The search of an input ends when no beam can reach the
best finished text any more: log-probabilities only fall, and n is at most `max_tokens`.

Shapes: B examples, K beams, V vocabulary; lane b K + k is beam k of example b.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.tokenizer import EOS_ID
from pretrain.finetuning.interface import PairModel


@dataclass(frozen=True)
class GenerationOptions:
    """How texts are written.

    Attributes:
        max_tokens: longest text, EOS included.
        beams: K; 1 is greedy.
        length_penalty: exponent of the length; 0 favours short texts, 1 is the mean.
        no_repeat_ngram_size: tokens in a row that no text has twice; 0: any may come again.
        lanes: texts that are written side by side, beams counted.
    """

    max_tokens: int
    beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    lanes: int = 64

    def __post_init__(self) -> None:
        for name in ("max_tokens", "beams"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.lanes < self.beams:
            raise ValueError(f"lanes={self.lanes}: one example needs beams={self.beams}; raise it")
        if not 0 <= self.length_penalty < math.inf:
            raise ValueError(f"length_penalty={self.length_penalty:g} must be at least 0")
        if self.no_repeat_ngram_size < 0:
            raise ValueError(
                f"no_repeat_ngram_size={self.no_repeat_ngram_size} must not be negative; 0 allows "
                f"repeats"
            )


@torch.inference_mode()
def generate(
    model: PairModel, inputs: Sequence[np.ndarray], options: GenerationOptions
) -> list[np.ndarray]:
    """Writes a text for each input; (n,) ids without EOS, in the order of the inputs."""
    model.module.eval()
    search = _greedy if options.beams == 1 else _beam_search
    texts: dict[int, np.ndarray] = {}
    for rows in batches(inputs, options.lanes // options.beams, one_length=model.one_length):
        texts |= zip(rows, search(model, [inputs[row] for row in rows], options), strict=True)
    return [texts[row] for row in range(len(inputs))]


def batches(inputs: Sequence[np.ndarray], size: int, *, one_length: bool) -> list[list[int]]:
    """Rows of at most `size` inputs of like, or of one, length; the longest first, so that a batch
    that does not fit is met at once."""
    batches: list[list[int]] = []
    for row in sorted(range(len(inputs)), key=lambda row: -len(inputs[row])):
        full = not batches or len(batches[-1]) == size
        if full or (one_length and len(inputs[batches[-1][0]]) != len(inputs[row])):
            batches.append([])
        batches[-1].append(row)
    return batches


def _greedy(
    model: PairModel, inputs: list[np.ndarray], options: GenerationOptions
) -> list[np.ndarray]:
    state = model.start(inputs)
    token = torch.full((len(inputs),), model.first_token, device=model.device)
    done = torch.zeros_like(token, dtype=torch.bool)
    text = token.new_zeros(len(inputs), 0)
    for _ in range(options.max_tokens):
        logits, state = model.step(token, state)
        logits = _without_repeats(logits, text, options.no_repeat_ngram_size)
        token = logits.argmax(-1).masked_fill(done, EOS_ID)
        text = torch.cat([text, token.unsqueeze(1)], 1)
        done |= token == EOS_ID
        if bool(done.all()):
            break
    return [_until_eos(row) for row in text.cpu().numpy()]


def _beam_search(
    model: PairModel, inputs: list[np.ndarray], options: GenerationOptions
) -> list[np.ndarray]:
    n, beams, device = len(inputs), options.beams, model.device
    first_lanes = torch.arange(n, device=device).unsqueeze(1) * beams
    lanes = torch.arange(n, device=device).repeat_interleave(beams)
    state = model.select(model.start(inputs), lanes)
    token = torch.full((n * beams,), model.first_token, device=device)
    text = token.new_zeros(n, beams, 0)
    scores = torch.full((n, beams), -torch.inf, device=device)
    scores[:, 0] = 0  # the beams are still one
    best_scores = torch.full((n,), -torch.inf, device=device)
    best: list[np.ndarray] = [np.zeros(0, np.int64)] * n
    for length in range(1, options.max_tokens + 1):
        logits, state = model.step(token, state)
        log_probs = _without_repeats(
            logits.log_softmax(-1), text.flatten(0, 1), options.no_repeat_ngram_size
        ).view(n, beams, -1)
        continued = (scores.unsqueeze(-1) + log_probs).flatten(1)
        # Of 2 K continuations at most K end here: K are left.
        kept, index = continued.topk(min(2 * beams, continued.shape[1]))
        beam, token = index // model.vocab_size, index % model.vocab_size
        ends = token == EOS_ID
        if length == options.max_tokens:
            ends = torch.ones_like(ends)
        finished = (kept / length**options.length_penalty).masked_fill(~ends, -torch.inf)
        ahead, which = finished.max(1)
        for row in torch.nonzero(ahead > best_scores).flatten().tolist():
            behind = text[row, beam[row, which[row]]]
            best[row] = torch.cat([behind, token[row, which[row]].view(1)]).cpu().numpy()
        best_scores = torch.maximum(best_scores, ahead)
        scores, chosen = kept.masked_fill(ends, -torch.inf).topk(beams)
        if bool((scores[:, 0] / options.max_tokens**options.length_penalty <= best_scores).all()):
            break
        beam, token = beam.gather(1, chosen), token.gather(1, chosen)
        text = torch.cat([_of_beams(text, beam), token.unsqueeze(-1)], -1)
        state = model.select(state, (first_lanes + beam).flatten())
        token = token.flatten()
    return [_until_eos(row) for row in best]


def _without_repeats(scores: Tensor, text: Tensor, size: int) -> Tensor:
    """scores (lanes, V) of what comes behind text (lanes, n), -inf where `size` tokens in a row
    would come again. An EOS never would: nothing comes behind one."""
    if size == 0 or text.shape[1] < size:
        return scores
    last = text[:, text.shape[1] - size + 1 :]  # (lanes, size - 1)
    before = text.unfold(1, size, 1)  # (lanes, n - size + 1, size)
    came = (before[..., :-1] == last.unsqueeze(1)).all(-1)
    times = torch.zeros_like(scores).scatter_add_(1, before[..., -1], came.to(scores.dtype))
    return scores.masked_fill(times > 0, -torch.inf)


def _of_beams(text: Tensor, beam: Tensor) -> Tensor:
    """text (B, K, n) of the beams (B, K)."""
    return text.gather(1, beam.unsqueeze(-1).expand(-1, -1, text.shape[2]))


def _until_eos(text: np.ndarray) -> np.ndarray:
    ends = np.flatnonzero(text == EOS_ID)
    return text[: ends[0]] if len(ends) else text
