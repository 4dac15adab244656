"""The `concat` stream: documents joined into one, read through the carried state without a reset.

It goes beyond the length of any document, so it measures stability, time and memory, and nothing
about the use of context: its numbers are labelled `concat` and never stand among gains. A document
is followed by its EOS and at once by the next document, in the corpus's order.

Stability. Documents differ in difficulty by far more than a state drifts, so every token's loss is
taken minus that of the same token behind a fresh state at the start of its document (`stream`):

    excess_d = (S_concat,d - S_stream,d) / N_d          of document d
    excess_d ~ a + b x_d                                x_d: the middle of d in the joined stream

by least squares weighted with N_d, the interval of b by documents (`stats.slope`). The first
document has no excess by construction and is left out. `drift` is b times the length of the stream:
by how much the loss moves from one end to the other. A verdict has the words of `judge` in
`evals.extrapolation.metrics`, for -drift.

Every segment's time, the bytes its state holds and the peak of memory are noted. A model that
claims a constant state whose state grows in the second half of the stream fails a gate; in the
first half a window may still fill.
"""

import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from evals import stats
from evals.scoring import protocols
from evals.scoring.documents import EvalDocuments
from evals.scoring.gates import GateResult
from evals.scoring.processes import Processes
from evals.scoring.protocols import Pass
from evals.scoring.score import ScoredModel, peak_memory, score
from evals.scoring.store import TokenTable, pass_identity
from evals.streaming import held_bytes

WINDOWS = 64
"""At most so many points of loss over the stream."""


@dataclass(frozen=True)
class Joined:
    """The first tokens of a split as one document.

    Attributes:
        document: it alone, behind what stands in front of the split's documents.
        lengths: tokens that each document gave; the last one can be cut.
    """

    document: EvalDocuments
    lengths: list[int]


def join(documents: EvalDocuments, n_tokens: int) -> Joined:
    """Joins documents in their order; fewer tokens where they hold fewer."""
    parts: list[np.ndarray] = []
    left = n_tokens
    for tokens in documents.tokens:
        parts.append(np.asarray(tokens[:left]))
        left -= len(parts[-1])
        if not left:
            break
    n_bytes = sum(documents.raw_bytes[: len(parts)])
    text_bytes = documents.text_bytes
    if text_bytes is not None:
        own = zip(text_bytes, parts, strict=False)
        text_bytes = [np.concatenate([n[: len(part)] for n, part in own])]
    joined = replace(
        documents,
        tokens=[np.concatenate(parts)],
        raw_bytes=[n_bytes],
        texts=None,
        text_bytes=text_bytes,
    )
    return Joined(joined, [len(part) for part in parts])


def concat_pass(n_tokens: int, segment_tokens: int) -> Pass:
    """The pass over a joined document."""
    (stream,) = protocols.stream([n_tokens], segment_tokens)
    return replace(
        stream,
        name=f"concat-{n_tokens}",
        protocol="concat",
        settings={"segment_tokens": segment_tokens, "n_tokens": n_tokens},
    )


class MeteredModel:
    """A `ScoredModel` that notes what each call takes, for models read on one lane.

    Attributes:
        segments: per call, in order: `seconds`, `state_bytes` after it, `peak_memory_bytes` so far.
    """

    def __init__(self, model: ScoredModel) -> None:
        self.model = model
        self.vocab_size, self.reset_grid = model.vocab_size, model.reset_grid
        self.precision, self.device = model.precision, model.device
        self.max_tokens, self.constant_state = model.max_tokens, model.constant_state
        self.segments: dict[str, list[Any]] = {
            "seconds": [],
            "state_bytes": [],
            "peak_memory_bytes": [],
        }

    def nll(self, tokens: Tensor, state: Any = None, *, score_from: int = 0) -> tuple[Tensor, Any]:
        self._synchronize()
        began = time.perf_counter()
        nll, after = self.model.nll(tokens, state, score_from=score_from)
        self._synchronize()
        self.segments["seconds"].append(time.perf_counter() - began)
        self.segments["state_bytes"].append(held_bytes(after))
        self.segments["peak_memory_bytes"].append(peak_memory(self.device))
        return nll, after

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def fingerprint(self) -> str:
        return self.model.fingerprint()


def load_or_score(
    model: ScoredModel,
    documents: EvalDocuments,
    scoring: Pass,
    folder: Path,
    *,
    model_id: str,
    processes: Processes,
    progress: bool,
) -> TokenTable:
    """The concat pass from the token store, or else scored in this process and stored.

    Args:
        model: the model.
        documents: to be joined.
        scoring: of `concat_pass`.
        folder: of the token store.
        model_id: its `model_identity`.
        processes: that wait for this one.
        progress: show a bar.

    Returns:
        Its meta also holds `segments`, what each of them took, and the `doc_lengths`.
    """
    path = folder / f"{scoring.name}.npz"
    identity = pass_identity(scoring, model_id, documents.identity)
    table = TokenTable.load_if_same(path, identity)
    if table is not None:
        return table
    n_tokens = scoring.settings["n_tokens"]
    joined, metered = join(documents, n_tokens), MeteredModel(model)
    hide = None if progress else True  # None: where stderr is no terminal
    bar = tqdm(total=n_tokens, desc=scoring.name, unit="tok", unit_scale=True, disable=hide)

    def advance(n: int) -> None:
        processes.count(scoring.name, n)  # those that wait see that this one works
        bar.update(n)

    with bar:
        table = score(metered, joined.document, scoring, identity=identity, advance=advance)
    measured = {"segments": metered.segments, "doc_lengths": joined.lengths}
    table = replace(table, meta={**table.meta, **measured})
    table.save(path)
    return table


def check_constant_state(model: ScoredModel, table: TokenTable) -> GateResult:
    """The state's growth in bytes over the second half of the stream, 0 where none is claimed.

    Between two ends of its blocks a layer holds a part of one more, so most is compared with most,
    and a shorter last segment, which may end elsewhere in a block than all others, is left out.
    """
    held = table.meta["segments"]["state_bytes"]
    whole = held[: len(table.nll) // table.meta["settings"]["segment_tokens"]] or held
    middle = len(whole) // 2
    more = max(whole[middle:]) - max(whole[: middle + 1])
    grown = max(0, more) if model.constant_state else 0
    return GateResult(
        "constant_state",
        grown == 0,
        float(grown),
        0.0,
        f"{held[-1]:,} bytes after {len(table.nll):,} tokens"
        + ("" if model.constant_state else "; the model does not claim a constant state"),
    )


def marks(table: TokenTable) -> list[dict[str, Any]]:
    """Time, state and memory behind 1, 2, 4, .. segments, and at the end.

    `seconds_per_token` is the median over the segments since the mark before: those of one call
    each, whatever the machine did meanwhile.
    """
    segments, length = table.meta["segments"], table.meta["settings"]["segment_tokens"]
    n_tokens, n = len(table.nll), len(segments["seconds"])
    rows = []
    for before, upto in pairwise([0, *(2**k for k in range((n - 1).bit_length())), n]):
        # The last segment can be shorter; it counts only where it is alone.
        sizes = [min(length, n_tokens - k * length) for k in range(before, upto)]
        timed = [
            s / size
            for s, size in zip(segments["seconds"][before:upto], sizes, strict=True)
            if size == max(sizes)
        ]
        rows.append(
            {
                "tokens": min(upto * length, n_tokens),
                "seconds_per_token": median(timed),
                "state_bytes": segments["state_bytes"][upto - 1],
                "peak_memory_bytes": segments["peak_memory_bytes"][upto - 1],
            }
        )
    return rows


def stability(table: TokenTable, stream: TokenTable) -> dict[str, Any]:
    """Loss over the joined stream.

    Args:
        table: the concat pass.
        stream: the same documents, or their first tokens, with a fresh state each.

    Returns:
        `non_finite_from`: the first token whose loss is not finite, or None. `windows`: for each
        stretch of the stream its `position`, `nll`, and over tokens that both scored `excess`.
        `drift`: an estimate in nats per token over the whole stream, None where fewer than
        three documents behind the first were scored.
    """
    lengths = table.meta["doc_lengths"]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    bad = np.flatnonzero(~np.isfinite(table.nll))
    n_tokens = int(bad[0]) if len(bad) else len(table.nll)
    nll = table.nll[:n_tokens].astype(np.float64)
    excess = np.full(n_tokens, np.nan)
    stream = stream.select(stream.doc < len(lengths))
    at = starts[stream.doc] + stream.position
    both = at < n_tokens
    excess[at[both]] = nll[at[both]] - stream.nll[both]
    known = np.isfinite(excess)
    doc = np.searchsorted(starts, np.arange(n_tokens), side="right") - 1
    segment = table.meta["settings"]["segment_tokens"]
    size = segment * max(1, -(-len(table.nll) // (WINDOWS * segment)))
    windows = []
    for low in range(0, n_tokens, size):
        rows = slice(low, min(low + size, n_tokens))
        inside = excess[rows][known[rows]]
        windows.append(
            {
                "position": [low, rows.stop],
                "nll": float(nll[rows].mean()),
                "excess": float(inside.mean()) if len(inside) else None,
            }
        )
    n_docs = len(lengths)
    tokens = np.bincount(doc[known], minlength=n_docs).astype(np.float64)
    sums = np.bincount(doc[known], weights=excess[known], minlength=n_docs)
    middle = np.bincount(doc[known], weights=np.flatnonzero(known), minlength=n_docs)
    behind = tokens > 0
    behind[0] = False
    drift = None
    if behind.sum() >= 3:
        x = middle[behind] / tokens[behind] / n_tokens
        drift = stats.slope(x, sums[behind], tokens[behind])
    return {
        "non_finite_from": int(bad[0]) if len(bad) else None,
        "windows": windows,
        "drift": drift.as_dict() if drift else None,
    }
