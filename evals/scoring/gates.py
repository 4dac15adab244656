"""Validity gates: what must hold before any number of a model is believed.

A leak of the future, a kernel that depends on the length, a state that is not reset or a pass that
scores a token twice all show up as a *better* perplexity. So these run on the real model and on
real documents, before and after scoring, and a failed one means that no report is written.

    future_perturbation    other tokens after i move nothing at or before i (equal shapes)
    prefix_consistency     a prefix alone scores like the same prefix inside a longer input
    padding_invariance     padding behind a prefix moves nothing in it (equal shapes)
    step_equals_parallel   any split with the state handed on scores like one forward
    document_isolation     a document scores the same alone, after and beside other documents
    coverage               every (document, position) asked for was scored once, finite and >= 0
    unchanged_model        evaluation changed no weight and no buffer

Bounds are maximal differences of one token's NLL in nats. fp32: 1e-4 on losses around 10, an order
above what summing in another order does and two below any leak that would matter. The same for
future perturbation: causal sums over equal shapes are bit-equal, convolutions by FFT are not. bf16:
0.1, a few units in the last place of a logit around 10, and a mean difference of at most 0.01.

Of a quantised model these are differences with its codes held; that a code is another one is
reported apart, as a flip, and no fault only where its key is as near to both (`held_codes`).
"""

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.tokenizer import PAD_ID
from evals.scoring.documents import EvalDocuments
from evals.scoring.held_codes import TIES, Flips, Reference
from evals.scoring.protocols import Pass, scored_positions
from evals.scoring.score import ScoredModel
from evals.scoring.store import TokenTable

BOUNDS = {"fp32": (1e-4, 1e-4), "bf16": (0.1, 0.01)}
"""precision -> (largest, mean) difference of a token's NLL in nats."""


@dataclass(frozen=True)
class GateResult:
    """One gate's outcome.

    Attributes:
        name: the gate.
        passed: whether value <= bound.
        value: the worst difference seen (nats), or a count of violations, or a flip's margin.
        bound: what was allowed.
        detail: where the worst was seen.
    """

    name: str
    passed: bool
    value: float
    bound: float
    detail: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class GateFailure(Exception):
    """A gate did not hold; the evaluation is void and nothing is reported."""

    def __init__(self, failed: Sequence[GateResult]) -> None:
        self.failed = list(failed)
        lines = [
            f"gate {gate.name} failed: {gate.value:.3g} > {gate.bound:.3g} ({gate.detail})"
            for gate in failed
        ]
        super().__init__("\n".join([*lines, "no report was written"]))


def check_model(
    model: ScoredModel, documents: EvalDocuments, max_tokens: int, seed: int = 0
) -> list[GateResult]:
    """Runs the gates that need a model, on the longest documents.

    Args:
        model: the model.
        documents: at least one; where none is half as long as the longest, the longest one's two
            halves are used: a gate on a few tokens would pass whatever the model does.
        max_tokens: the longest input tried; well beyond the training length, where a kernel of
            fixed length would cut the memory off.
        seed: of the perturbed positions and replacement tokens.
    """
    with torch.inference_mode():
        tokens_a, tokens_b = _two_inputs(documents, max_tokens)
        first, second = (torch.from_numpy(t)[None].to(model.device) for t in (tokens_a, tokens_b))
        alone = Reference(model, first)
        return [
            _future_perturbation(alone, first, np.random.default_rng(seed)),
            _prefix_consistency(alone, first),
            _padding_invariance(alone, first),
            _step_equals_parallel(alone, first),
            _document_isolation(alone, first, second),
        ]


def longest_input(model: ScoredModel, train_length: int) -> int:
    """Tokens for `check_model`: well beyond the training length, as far as the model sees."""
    return min(max(2048, 4 * train_length), model.max_tokens or sys.maxsize)


def check_coverage(scoring: Pass, table: TokenTable, *, finite: bool = True) -> GateResult:
    """Compares the store of a pass with what its items ask for.

    Args:
        scoring: the pass.
        table: its store.
        finite: count losses that are not finite as violations.
    """
    docs, positions = scored_positions(scoring.items)
    asked = np.stack([docs, positions])
    scored = np.stack([table.doc.astype(np.int64), table.position.astype(np.int64)])
    unique = np.unique(asked, axis=1).shape[1]
    wrong = abs(asked.shape[1] - scored.shape[1]) + (asked.shape[1] - unique)
    if asked.shape == scored.shape:
        wrong += int((asked != scored).any(axis=0).sum())
    wrong += int((table.nll < 0).sum())
    if finite:
        wrong += int((~np.isfinite(table.nll)).sum())
    return GateResult(
        "coverage", wrong == 0, float(wrong), 0.0, f"{scoring.name}: {asked.shape[1]} tokens asked"
    )


def check_unchanged(before: str, after: str) -> GateResult:
    """Compares the model's fingerprint before the gates with the one after the last pass."""
    changed = before != after
    return GateResult(
        "unchanged_model", not changed, float(changed), 0.0, f"{before[:12]} -> {after[:12]}"
    )


def require(gates: Sequence[GateResult]) -> None:
    """Raises:
    GateFailure: any of them failed.
    """
    failed = [gate for gate in gates if not gate.passed]
    if failed:
        raise GateFailure(failed)


def _two_inputs(documents: EvalDocuments, max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Two inputs of equal length with different content: as long as the documents allow."""
    longest, *others = np.argsort(documents.lengths)[::-1].tolist()
    half = documents.lengths[longest] // 2
    if others and documents.lengths[others[0]] >= half:
        n = min(documents.lengths[others[0]], max_tokens)
        a, b = (documents.slice(doc, -1, n) for doc in (longest, others[0]))
    else:
        n = min(half, max_tokens)
        a = documents.slice(longest, -1, n)
        b = np.concatenate([a[:1], documents.slice(longest, n, 2 * n)])
    if n < 4:
        raise ValueError(
            f"documents: the longest has {documents.lengths[longest]} tokens; the gates need 8"
        )
    return a, b


def difference(a: Tensor, b: Tensor) -> Tensor:
    """Absolute differences; equal infinities differ by 0, anything with NaN by infinity."""
    return torch.where(a == b, 0.0, torch.nan_to_num((a - b).abs(), nan=float("inf")))


def _cuts(n: int, grid: int) -> list[int]:
    """Odd places in (0, n), some beside the edges of the model's grid."""
    middle = n // 2 // grid * grid
    wanted = [n // 7, middle - 1, middle, middle + 1, 3 * n // 4 | 1, n - 1]
    return sorted({cut for cut in wanted if 0 < cut < n})


def worst_of(
    name: str,
    alone: Reference,
    compare: Callable[[int], Tensor],
    places: Sequence[int],
    place: str = "cut",
) -> GateResult:
    """Worst of several differences against the bounds of the model's precision.

    Args:
        name: the gate.
        alone: what is compared with; gives the precision, and counts flips.
        compare: absolute differences in nats for a place.
        places: where to look.
        place: what one of them is called.
    """
    bound, mean_bound = BOUNDS[alone.model.precision]
    worst, worst_mean, where = -1.0, 0.0, 0
    if alone.flips is not None:
        alone.flips = Flips()
    for at in places:
        found = compare(at)
        if float(found.max()) > worst:
            worst, where = float(found.max()), at
        worst_mean = max(worst_mean, float(found.mean()))
    detail = f"largest at {place} {where} of {len(places)}; largest mean {worst_mean:.2g} nat"
    passed = worst <= bound and worst_mean <= mean_bound
    if alone.flips is not None:
        detail = f"{detail}; {alone.flips}"
        tie = TIES[alone.model.precision]
        if passed and alone.flips.margin > tie:
            return GateResult(
                name, False, alone.flips.margin, tie, f"a flip that is no tie; {detail}"
            )
    return GateResult(name, passed, worst, bound, detail)


def _future_perturbation(alone: Reference, tokens: Tensor, rng: np.random.Generator) -> GateResult:
    n, vocab_size = tokens.shape[1] - 1, alone.model.vocab_size

    def compare(cut: int) -> Tensor:
        changed = tokens.clone()
        noise = rng.integers(1, vocab_size, size=n - cut)
        # Adding 1 .. V-1 modulo V changes every token after the cut for certain.
        changed[0, cut + 1 :] += torch.from_numpy(noise).to(tokens.device)
        changed[0, cut + 1 :] %= vocab_size
        return difference(alone.again(changed, stop=cut)[0][:, :cut], alone.nll[:, :cut])

    return worst_of("future_perturbation", alone, compare, _cuts(n, alone.model.reset_grid))


def _prefix_consistency(alone: Reference, tokens: Tensor) -> GateResult:
    def compare(cut: int) -> Tensor:
        return difference(alone.again(tokens[:, : cut + 1])[0], alone.nll[:, :cut])

    n = tokens.shape[1] - 1
    return worst_of("prefix_consistency", alone, compare, _cuts(n, alone.model.reset_grid))


def _padding_invariance(alone: Reference, tokens: Tensor) -> GateResult:
    """A batch pads shorter documents on the right. Nothing here does, but a model that counts pads
    or reads lengths off them would score otherwise in training or elsewhere."""

    def compare(cut: int) -> Tensor:
        padded = tokens.clone()
        padded[0, cut + 1 :] = PAD_ID
        return difference(alone.again(padded, stop=cut)[0][:, :cut], alone.nll[:, :cut])

    n = tokens.shape[1] - 1
    return worst_of("padding_invariance", alone, compare, _cuts(n, alone.model.reset_grid))


def _step_equals_parallel(alone: Reference, tokens: Tensor) -> GateResult:
    """At each cut: a prefix, up to four single tokens, and the rest, with the state handed on."""
    n = tokens.shape[1] - 1

    def compare(cut: int) -> Tensor:
        edges = [0, *range(cut, min(cut + 5, n)), n]
        parts, state = [], None
        for start, stop in itertools.pairwise(edges):
            part, state = alone.again(tokens[:, start : stop + 1], state, start=start)
            parts.append(part)
        return difference(torch.cat(parts, dim=1), alone.nll)

    return worst_of("step_equals_parallel", alone, compare, _cuts(n, alone.model.reset_grid)[:4])


def _document_isolation(alone: Reference, first: Tensor, second: Tensor) -> GateResult:
    """The first document again, after the second one (0), and beside it in a batch (1, 2)."""

    def compare(case: int) -> Tensor:
        if case == 0:
            alone.model.nll(second)
            return difference(alone.again(first)[0], alone.nll)
        pair = [first, second] if case == 1 else [second, first]
        together, _ = alone.again(torch.cat(pair), lane=case - 1)
        return difference(together[case - 1 : case], alone.nll)

    return worst_of("document_isolation", alone, compare, [0, 1, 2])
