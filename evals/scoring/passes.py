"""Scores passes into a token store: any number of processes, interrupted at any time, one result.

A pass is cut into batches and these into parts, by its items alone: neither the number of processes
nor their order changes what is computed together with what. That is what makes results equal to the
last bit. A matmul of another shape may sum in another order, so losses from batches of other sizes
agree to 1e-6 nat only; hence the batch size is no option but part of a pass's identity, and is
never adapted to a machine. On another kind of machine, or with another number of threads, the last
bits may differ.

    FOLDER/parts/PASS-00003.npz   scored by some process; removed when all passes are whole
    FOLDER/PASS.npz               a whole pass, joined by rank 0

A part is what an interruption costs at most. No document's carried state crosses processes.
"""

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from evals.scoring.documents import EvalDocuments
from evals.scoring.processes import Processes
from evals.scoring.protocols import Pass
from evals.scoring.score import Batch, ScoredModel, batches, n_inputs, score
from evals.scoring.store import TokenTable, pass_identity
from pretrain.dealing import deal

PART_TOKENS = 2**18
REDRAW_SECONDS = 0.1


@dataclass(frozen=True)
class Part:
    """What one process scores and saves at a time.

    Attributes:
        scoring: the pass.
        index: of the part in its pass.
        batches: consecutive ones of the pass.
        n_inputs: tokens to feed.
        path: where it is saved.
        identity: of its losses.
    """

    scoring: Pass
    index: int
    batches: list[Batch]
    n_inputs: int
    path: Path
    identity: str


def score_passes(
    model: ScoredModel,
    documents: EvalDocuments,
    passes: Sequence[Pass],
    folder: Path,
    *,
    model_id: str,
    processes: Processes,
    progress: bool = True,
) -> dict[str, TokenTable]:
    """Scores what `folder` does not hold.

    Args:
        model: the same one in every process.
        documents: the passes' items index into these.
        passes: in any order, each under its own name.
        folder: of the token store; the same one for all processes.
        model_id: its `model_identity`.
        processes: all of them have to call this.
        progress: rank 0 shows a bar on a terminal, and a line for each finished pass, on stderr.

    Returns:
        By name of the pass: in rank 0 the tables, in others nothing.

    Raises:
        ProcessLost: the others' work stands still.
        ValueError: a part that another process scored is not in `folder`.
    """
    identities = {s.name: pass_identity(s, model_id, documents.identity) for s in passes}
    wanted = {s.name: _parts(s, identities[s.name], folder / "parts") for s in passes}

    def find_missing() -> list[list[str | int]]:
        whole = {name for name in wanted if _has(folder / f"{name}.npz", identities[name])}
        return [
            [name, part.index]
            for name, parts in wanted.items()
            for part in parts
            if name not in whole and not _has(part.path, part.identity)
        ]

    missing = [wanted[name][k] for name, k in processes.from_main("missing", find_missing)]
    shown = _Progress(missing, processes, show=bool(progress and missing and processes.is_main))
    for k in deal([part.n_inputs for part in missing], processes.size)[processes.rank]:
        part = missing[k]
        table = score(
            model,
            documents,
            part.scoring,
            chosen=part.batches,
            identity=part.identity,
            advance=lambda n, name=part.scoring.name: shown.advance(name, n),  # type: ignore[misc]
        )
        table.save(part.path)
        processes.count("parts", 1)
    if not processes.is_main:
        return {}

    def all_done() -> bool:
        shown.refresh()
        return processes.count("parts") == len(missing)

    processes.wait_until(all_done)
    shown.close()
    tables: dict[str, TokenTable] = {}
    for scoring in passes:
        path, identity = folder / f"{scoring.name}.npz", identities[scoring.name]
        whole = TokenTable.load_if_same(path, identity)
        if whole is None:
            whole = _join([_load(part) for part in wanted[scoring.name]], identity, documents)
            whole.save(path)
        tables[scoring.name] = whole
    shutil.rmtree(folder / "parts", ignore_errors=True)
    return tables


def _parts(scoring: Pass, identity: str, folder: Path) -> list[Part]:
    """Consecutive batches, of at least `PART_TOKENS` inputs but for the last."""
    groups: list[list[Batch]] = [[]]
    for batch in batches(scoring.items):
        if sum(map(n_inputs, groups[-1])) >= PART_TOKENS:
            groups.append([])
        groups[-1].append(batch)
    return [
        Part(
            scoring=scoring,
            index=k,
            batches=group,
            n_inputs=sum(map(n_inputs, group)),
            path=folder / f"{scoring.name}-{k:05d}.npz",
            identity=f"{identity}:{k}:{PART_TOKENS}",
        )
        for k, group in enumerate(groups)
    ]


def _has(path: Path, identity: str) -> bool:
    return TokenTable.load_if_same(path, identity) is not None


def _load(part: Part) -> TokenTable:
    table = TokenTable.load_if_same(part.path, part.identity)
    if table is None:
        raise ValueError(
            f"{part.path}: not there, although it was scored; all processes need the same results "
            "folder, on a file system that they share, and the same checkpoint, and no other "
            "evaluation may run in that folder (name= gives each its own)"
        )
    return table


def _join(parts: Sequence[TokenTable], identity: str, documents: EvalDocuments) -> TokenTable:
    """A whole pass; its seconds are those of all processes together."""
    costs = [part.meta["cost"] for part in parts]
    inputs, seconds = (sum(cost[key] for cost in costs) for key in ("input_tokens", "seconds"))
    cost = {
        **costs[0],
        "input_tokens": inputs,
        "seconds": seconds,
        "tokens_per_second": inputs / max(seconds, 1e-9),
        "peak_memory_bytes": max(cost["peak_memory_bytes"] for cost in costs),
    }
    meta = {**parts[0].meta, "identity": identity, "cost": cost}
    table = TokenTable.join(parts, meta)
    meta["n_words"] = documents.words_if_whole(table.doc, table.n_bytes)
    return table


class _Progress:
    """A bar over all passes, in tokens of all processes, and a line for each finished pass."""

    def __init__(self, parts: Sequence[Part], processes: Processes, *, show: bool) -> None:
        self.processes, self.show, self.began = processes, show, time.monotonic()
        self.tokens: dict[str, int] = {}
        self.documents: dict[str, set[int]] = {}
        for part in parts:
            name = part.scoring.name
            docs = {item.doc for batch in part.batches for chain in batch for item in chain}
            self.tokens[name] = self.tokens.get(name, 0) + part.n_inputs
            self.documents[name] = self.documents.get(name, set()) | docs
        self.drawn = self.began
        self.open = dict.fromkeys(self.tokens)
        self.bar = tqdm(
            total=sum(self.tokens.values()),
            unit="tok",
            unit_scale=True,
            disable=None if show else True,  # None: where stderr is no terminal
            file=sys.stderr,
        )

    def advance(self, name: str, n: int) -> None:
        """`n` more tokens of a pass were fed in this process."""
        self.processes.count(name, n)
        if time.monotonic() - self.drawn > REDRAW_SECONDS:
            self.refresh()

    def refresh(self) -> None:
        """Shows what all processes have done."""
        self.drawn = time.monotonic()
        if not self.show:
            return
        done = {name: self.processes.count(name) for name in self.tokens}
        for name in [name for name in self.open if done[name] >= self.tokens[name]]:
            del self.open[name]
            rate = sum(done.values()) / (self.drawn - self.began)
            self.bar.write(
                f"{name}: {len(self.documents[name])} documents, {done[name]:,} tokens done; "
                f"{rate:,.0f} tokens/s so far",
                file=sys.stderr,
            )
        self.bar.set_description(next(iter(self.open), "joining"), refresh=False)
        self.bar.update(sum(done.values()) - self.bar.n)

    def close(self) -> None:
        self.bar.close()
