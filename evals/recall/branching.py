"""The gate of recall: a candidate behind the carried state costs what it costs in one forward.

As in all gates, a quantised model's codes are held (`evals.scoring.held_codes`).
"""

from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from evals.recall.likelihood import RecallOptions, batch_nll, cells, questions
from evals.recall.probes import DoesNotFit, Encode, Trial
from evals.scoring import gates
from evals.scoring.documents import EvalDocuments
from evals.scoring.gates import GateResult
from evals.scoring.held_codes import Reference
from evals.scoring.score import ScoredModel


def check_branching(
    model: ScoredModel, documents: EvalDocuments, encode: Encode, options: RecallOptions
) -> list[GateResult]:
    """Of each probe, one question of the shortest cell that has any."""
    one = replace(options, trials=1)
    tried: dict[str, GateResult] = {}
    for cell in cells(one):
        if cell.probe not in tried:
            try:
                ((*_, trial),) = questions(cell, documents, encode, one)
            except DoesNotFit:
                continue
            result = _branching(model, trial, options.segment_tokens)
            tried[cell.probe] = replace(result, detail=f"{cell.name}: {result.detail}")
    return list(tried.values())


def _branching(model: ScoredModel, trial: Trial, segment_tokens: int) -> GateResult:
    last = len(trial.context) - 1
    # At most half of the context, so that there is a state to carry.
    segment_tokens = max(1, min(segment_tokens, last // 2))
    wholes = [
        torch.from_numpy(np.concatenate([trial.context, candidate]))[None].to(model.device)
        for candidate in trial.candidates
    ]

    def compare(place: int) -> Tensor:
        whole = Reference(model, wholes[place])
        whole.flips = alone.flips  # one count for all candidates
        pair = [trial._replace(candidates=[trial.candidates[place]])] * 2
        holding = cast(ScoredModel, _SecondLaneHeld(whole))
        _, (carried,) = batch_nll(holding, pair, segment_tokens)
        return gates.difference(torch.from_numpy(carried), whole.nll[0, last:].cpu())

    with torch.inference_mode():
        alone = Reference(model, wholes[0])
        return gates.worst_of(
            "candidates_equal_whole", alone, compare, range(len(wholes)), place="candidate"
        )


class _SecondLaneHeld:
    """What `batch_nll` needs of a model that reads a document on two lanes; the codes of the second
    are those of a reference. A state begins with the number of inputs read."""

    def __init__(self, reference: Reference) -> None:
        self.reference, self.device = reference, reference.model.device

    def nll(self, tokens: Tensor, state: Any = None, *, score_from: int = 0) -> tuple[Tensor, Any]:
        read, inner = state or (torch.zeros(2, dtype=torch.int64, device=self.device), None)
        nll, after = self.reference.again(tokens, inner, start=int(read[1]), lane=1)
        return nll[:, score_from:], (read + tokens.shape[1] - 1, after)
