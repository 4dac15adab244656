"""What a trained language model remembers, by the likelihood of right and wrong continuations.

Shapes: B lanes, L tokens of context, K candidates.

Every cell, a probe at one length and depth, asks the same number of questions (evals/recall/
probes.py says which) and leaves one file, whichever process scored it; a second start scores only
what has none. Contexts are read in segments with the state carried on, beyond the training length
as within it, and the state behind one is handed to all of its candidates. A candidate's score is
the summed loss of its tokens; a tie counts as the mean over the ways to break it.

    accuracy   share of trials in which the right candidate is the likeliest; chance 1 / K
    mrr        mean of 1 / rank of the right one; chance (1 + 1/2 + ... + 1/K) / K
    nll        of the induction probe, per token of `first` copy, `second` and `control` (other
               random tokens in the second's place), a span's first token left out, which nothing
               announces; `gain` is first - second, `copied` control - second

Intervals: by document (clustered), since trials share documents, and of accuracy also by trial
(Wilson), where the answers at several depths, which share needle and passage, count as one trial.
"""

import hashlib
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from evals import stats
from evals.recall import probes
from evals.recall.probes import DoesNotFit, Encode, Trial
from evals.scoring.documents import EvalDocuments
from evals.scoring.gates import GateResult
from evals.scoring.processes import Processes
from evals.scoring.score import BATCH_TOKENS, ScoredModel
from evals.scoring.store import write_bytes
from pretrain.mixers.base import index_state

CELL_FORMAT = 1
RANKED = ("passkey", "phonebook")
PROBES = (*RANKED, "induction")


@dataclass(frozen=True)
class RecallOptions:
    """What to ask. Lengths in tokens.

    Attributes:
        lengths: L of every probe.
        depths: of the ranked probes, in [0, 1].
        probes: any of `PROBES`.
        trials: questions per cell.
        candidates: K.
        seed: of the questions.
        segment_tokens: how much of a context runs at once before the state is handed on.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    probes: tuple[str, ...] = PROBES
    trials: int = 100
    candidates: int = 10
    seed: int = 0
    segment_tokens: int = 2048

    def problems(self) -> list[str]:
        """One line per bad value; empty when all is well."""
        found = []
        if not self.lengths or min(self.lengths) < 1:
            found.append(f"lengths={list(self.lengths)}: at least one, each >= 1")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            found.append(f"depths={list(self.depths)}: at least one, each from 0 to 1")
        unknown = sorted(set(self.probes) - set(PROBES))
        if unknown or not self.probes:
            found.append(f"probes={','.join(self.probes)}: choose from {', '.join(PROBES)}")
        for name, least in (("trials", 1), ("candidates", 2), ("segment_tokens", 1)):
            if getattr(self, name) < least:
                found.append(f"{name}={getattr(self, name)}: must be at least {least}")
        return found


class Cell(NamedTuple):
    """A probe at one length and, if it has any, one depth."""

    probe: str
    length: int
    depth: float | None

    @property
    def name(self) -> str:
        depth = "" if self.depth is None else f"-{self.depth:g}"
        return f"{self.probe}-{self.length}{depth}"


class CellScores(NamedTuple):
    """What a cell's trials gave; arrays are empty where its questions could not be put.

    Attributes:
        doc: (n,) int64, the document of each trial.
        right: (n,) int64, the right candidate.
        nll: (n, K) float64 summed nats; of `induction` the columns are first copy, second copy and
            control, each but its first token.
        identity: of what decided the numbers.
        seconds: that it took.
        skipped: why there are none; "" if there are.
    """

    doc: np.ndarray
    right: np.ndarray
    nll: np.ndarray
    identity: str = ""
    seconds: float = 0.0
    skipped: str = ""


def cells(options: RecallOptions) -> list[Cell]:
    """All cells, probe by probe, the shortest first."""
    return [
        Cell(probe, length, depth)
        for probe in options.probes
        for length in sorted(options.lengths)
        for depth in (options.depths if probe in RANKED else (None,))
    ]


def check(
    model: ScoredModel, documents: EvalDocuments, encode: Encode, options: RecallOptions
) -> None:
    """Raises:
    ValueError: an option is wrong, a length is more than the model reads, or no question fits.
    """
    if problems := options.problems():
        raise ValueError("; ".join(problems))
    longest = max(options.lengths)
    if model.max_tokens is not None and longest + probes.SPAN_TOKENS > model.max_tokens:
        raise ValueError(
            f"lengths={longest}: with {probes.SPAN_TOKENS} tokens behind it this is more than the "
            f"{model.max_tokens} that the model reads; use lengths up to "
            f"{model.max_tokens - probes.SPAN_TOKENS}"
        )
    reasons = []
    for cell in cells(replace(options, trials=1)):
        try:
            questions(cell, documents, encode, replace(options, trials=1))
        except DoesNotFit as error:
            reasons.append(f"lengths={cell.length}: no question fits; {cell.probe}: {error}")
        else:
            return
    raise ValueError(reasons[0])


def questions(
    cell: Cell, documents: EvalDocuments, encode: Encode, options: RecallOptions
) -> list[tuple[Trial, ...]]:
    """The cell's questions, of one trial each, or of two (induction).

    Raises:
        DoesNotFit: the question cannot be put at this length.
    """
    found: list[tuple[Trial, ...]] = []
    for k in range(options.trials):
        # Not by depth: needle and passage are the same at every depth.
        rng = np.random.default_rng([options.seed, PROBES.index(cell.probe), cell.length, k])
        if cell.probe == "induction":
            found.append(probes.induction(documents, cell.length, rng, k))
        else:
            assert cell.depth is not None
            ask = probes.passkey if cell.probe == "passkey" else probes.phonebook
            trial = ask(documents, encode, cell.length, cell.depth, options.candidates, rng, k)
            found.append((trial,))
    return found


def score_cells(
    model: ScoredModel,
    documents: EvalDocuments,
    encode: Encode,
    options: RecallOptions,
    folder: Path,
    *,
    model_id: str,
    processes: Processes,
    progress: bool = True,
) -> dict[Cell, CellScores]:
    """Scores every cell that `folder` does not hold.

    Args:
        model: the same one in every process.
        documents: the passages of contexts.
        encode: their tokenizer's.
        options: what to ask.
        folder: of the cells; the same one for all processes.
        model_id: its `model_identity`.
        processes: all of them have to call this.
        progress: rank 0 shows a bar.

    Returns:
        In rank 0 all cells; in others nothing.

    Raises:
        ValueError: no question fits.
        ProcessLost: the others' work stands still.
    """
    wanted = {cell: _identity(cell, model_id, documents, options) for cell in cells(options)}

    def find_missing() -> list[str]:
        return [cell.name for cell in wanted if load(folder, cell, wanted[cell]) is None]

    names = processes.from_main("missing", find_missing)
    # The longest first, so that no process is left with one of them at the end.
    missing = sorted((cell for cell in wanted if cell.name in names), key=lambda c: -c.length)
    # Not at once: where nothing fits, the reason is all there is to say.
    hide = None if progress and processes.is_main else True  # None: where stderr is no terminal
    bar = tqdm(total=len(missing), desc="recall", unit="cell", disable=hide, delay=1)
    for cell in missing[processes.rank :: processes.size]:
        began = time.perf_counter()
        try:
            scores = score(model, questions(cell, documents, encode, options), options)
        except DoesNotFit as error:
            nothing = np.zeros(0)
            scores = CellScores(nothing, nothing, nothing, skipped=str(error))
        seconds = round(time.perf_counter() - began, 2)
        _save(folder, cell, scores._replace(identity=wanted[cell], seconds=seconds))
        bar.update(processes.count("cells", 1) - bar.n)
    if not processes.is_main:
        return {}

    def all_done() -> bool:
        bar.update(processes.count("cells") - bar.n)
        return processes.count("cells") == len(missing)

    processes.wait_until(all_done)
    bar.close()
    return load_all(folder, wanted)


def load_all(folder: Path, wanted: Mapping[Cell, str]) -> dict[Cell, CellScores]:
    """The cells of given identities.

    Raises:
        ValueError: one is missing or another, or none of them could be asked.
    """
    found: dict[Cell, CellScores] = {}
    for cell, identity in wanted.items():
        scores = load(folder, cell, identity)
        if scores is None:
            raise ValueError(
                f"{folder / cell.name}.json: missing, or not what the results are about; evaluate "
                f"again, what is scored is kept"
            )
        found[cell] = scores
    if all(scores.skipped for scores in found.values()):
        cell, scores = next(iter(found.items()))
        raise ValueError(f"lengths={cell.length}: no question fits; {cell.probe}: {scores.skipped}")
    return found


def score(
    model: ScoredModel, asked: Sequence[tuple[Trial, ...]], options: RecallOptions
) -> CellScores:
    """Scores questions of one cell."""
    losses = [_candidate_nll(model, trials, options) for trials in zip(*asked, strict=True)]
    if len(losses) == 1:
        nll = [[float(each.sum()) for each in trial] for trial in losses[0]]
    else:
        nll = [
            [float(each[1:].sum()) for each in (*first, *second)]
            for first, second in zip(*losses, strict=True)
        ]
    return CellScores(
        np.array([trials[0].doc for trials in asked]),
        np.array([trials[0].right for trials in asked]),
        np.array(nll),
    )


def _candidate_nll(
    model: ScoredModel, trials: Sequence[Trial], options: RecallOptions
) -> list[list[np.ndarray]]:
    """Losses of each trial's candidates, token by token; contexts of equal length."""
    n_inputs = len(trials[0].context) - 1
    lanes = max(1, BATCH_TOKENS // max(1, min(n_inputs, options.segment_tokens)))
    found: list[list[np.ndarray]] = []
    with torch.inference_mode():
        for first in range(0, len(trials), lanes):
            found += batch_nll(model, trials[first : first + lanes], options.segment_tokens)
    return found


def batch_nll(
    model: ScoredModel, trials: Sequence[Trial], segment_tokens: int
) -> list[list[np.ndarray]]:
    """The same, of trials whose contexts are read side by side."""
    contexts = torch.from_numpy(np.stack([trial.context for trial in trials])).to(model.device)
    state, last = None, contexts.shape[1] - 1
    for start in range(0, last, segment_tokens):
        stop = min(start + segment_tokens, last)
        # Its own loss is of no interest: that of one token is the least that can be asked for.
        _, state = model.nll(contexts[:, start : stop + 1], state, score_from=stop - start - 1)
    found = [[np.empty(0)] * len(trial.candidates) for trial in trials]
    pairs = [(k, j) for k, trial in enumerate(trials) for j in range(len(trial.candidates))]
    pairs.sort(key=lambda pair: len(trials[pair[0]].candidates[pair[1]]))
    for _, group in itertools.groupby(pairs, lambda p: len(trials[p[0]].candidates[p[1]])):
        equal = list(group)
        # As many lanes as the contexts had: branching must not take more memory than reading.
        for first in range(0, len(equal), len(trials)):
            part = equal[first : first + len(trials)]
            ids = torch.from_numpy(np.stack([trials[k].candidates[j] for k, j in part]))
            at = torch.tensor([k for k, _ in part], device=model.device)
            tokens = torch.cat([contexts[at, last:], ids.long().to(model.device)], dim=1)
            nll, _ = model.nll(tokens, None if state is None else index_state(state, at))
            for (k, j), losses in zip(part, nll.double().cpu().numpy(), strict=True):
                found[k][j] = losses
    return found


def check_finite(scores: Mapping[Cell, CellScores]) -> GateResult:
    """Every loss is a finite number, and none is negative."""
    wrong = sum(int((~np.isfinite(s.nll) | (s.nll < 0)).sum()) for s in scores.values())
    total = sum(s.nll.size for s in scores.values())
    return GateResult("finite", wrong == 0, float(wrong), 0.0, f"{total} candidates scored")


def ranks(scores: CellScores) -> tuple[np.ndarray, np.ndarray]:
    """The right candidates' chance to be first and expected 1 / rank, (n,) each; ties are even."""
    own = scores.nll[np.arange(len(scores.nll)), scores.right][:, None]
    better = (scores.nll < own).sum(1)
    equal = (scores.nll == own).sum(1)  # itself among them
    reciprocal = [
        float(np.mean(1 / np.arange(b + 1, b + e + 1))) for b, e in zip(better, equal, strict=True)
    ]
    return (better == 0) / equal, np.array(reciprocal)


def derive(scores: Mapping[Cell, CellScores]) -> list[dict[str, Any]]:
    """Every metric, from the cells alone: of each, and of ranked probes also over all depths."""
    scores = {cell: found for cell, found in scores.items() if not found.skipped}
    metrics: list[dict[str, Any]] = []
    for cell, found in scores.items():
        metrics += _induction(cell, found) if cell.depth is None else _ranked(cell, found)
    for probe, length in dict.fromkeys((cell.probe, cell.length) for cell in scores):
        if probe in RANKED:
            own = [found for cell, found in scores.items() if cell[:2] == (probe, length)]
            pooled = CellScores(
                np.concatenate([found.doc for found in own]),
                np.concatenate([found.right for found in own]),
                np.concatenate([found.nll for found in own]),
            )
            metrics += _ranked(Cell(probe, length, None), pooled, len(own))
    return metrics


def _ranked(cell: Cell, scores: CellScores, depths: int = 1) -> list[dict[str, Any]]:
    first, reciprocal = ranks(scores)
    n, n_candidates = scores.nll.shape
    harmonic = float(np.mean(1 / np.arange(1, n_candidates + 1)))
    accuracy = _metric("accuracy", cell, scores.doc, first, 1 / n_candidates)
    by_trial = list(stats.wilson(float(first.sum()) / depths, n // depths))
    return [
        {**accuracy, "ci95_by_trial": by_trial},
        _metric("mrr", cell, scores.doc, reciprocal, harmonic),
    ]


def _induction(cell: Cell, scores: CellScores) -> list[dict[str, Any]]:
    first, second, control = scores.nll.T / (probes.SPAN_TOKENS - 1)
    values = {
        "nll_first": first,
        "nll_second": second,
        "nll_control": control,
        "gain": first - second,
        "copied": control - second,
    }
    return [_metric(name, cell, scores.doc, value, None) for name, value in values.items()]


def _metric(
    name: str, cell: Cell, doc: np.ndarray, values: np.ndarray, chance: float | None
) -> dict[str, Any]:
    n_docs = int(doc.max()) + 1
    estimate = stats.ratio(
        stats.per_document(doc, values, n_docs),
        stats.per_document(doc, np.ones(len(doc)), n_docs),
    )
    record = estimate.as_dict()
    record["n_trials"] = record.pop("n_tokens")
    return {
        "name": name,
        "probe": cell.probe,
        "length": cell.length,
        "depth": cell.depth,
        "chance": chance,
        **record,
    }


def load(folder: Path, cell: Cell, identity: str) -> CellScores | None:
    """The cell when its file was written for `identity`; None when absent, older or damaged."""
    try:
        content = json.loads((folder / f"{cell.name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if content["identity"] != identity:
        return None
    doc, right, nll = (np.array(content[key]) for key in ("doc", "right", "nll"))
    return CellScores(doc, right, nll, identity, content["seconds"], content["skipped"])


def _save(folder: Path, cell: Cell, scores: CellScores) -> None:
    content = {
        key: value.tolist() if isinstance(value, np.ndarray) else value
        for key, value in scores._asdict().items()
    }
    write_bytes(folder / f"{cell.name}.json", json.dumps(content).encode())


def _identity(cell: Cell, model_id: str, documents: EvalDocuments, options: RecallOptions) -> str:
    """sha256 over all that decides a cell's numbers; other cells do not."""
    settings = {
        key: value
        for key, value in asdict(options).items()
        if key not in ("lengths", "depths", "probes")
    }
    record = [CELL_FORMAT, cell, model_id, documents.identity, documents.lengths, settings]
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
