"""Any number of processes, killed or not, give one token store and one result."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist

from evals.perplexity import suite as perplexity
from evals.perplexity.suite import PerplexityOptions
from evals.scoring import passes, processes
from evals.scoring.processes import Processes, ProcessLost
from evals.scoring.score import batches
from evals.scoring.store import TokenTable
from tests.evals.toy_models import Bigram, markov_documents

DOCUMENTS, TRANSITIONS = markov_documents([420, 150, 333, 290, 601, 75], vocab_size=12)
OPTIONS = PerplexityOptions(
    contexts=(16, 64), protocols=perplexity.PROTOCOLS, stride_tokens=8, segment_tokens=48
)


class Rounding(Bigram):
    """Its losses depend on the batch in their last digits, as those of real matmuls do."""

    def nll(self, tokens, state=None, *, score_from=0):
        nll, after = super().nll(tokens, state, score_from=score_from)
        return nll + 1e-6 * len(tokens), after


class Broken(Bigram):
    def nll(self, tokens, state=None, *, score_from=0):
        raise RuntimeError("out of memory")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Many batches in many parts."""
    monkeypatch.setattr(passes, "batches", partial(batches, batch_tokens=300))
    monkeypatch.setattr(passes, "PART_TOKENS", 1000)


def evaluate(out_dir, among=None, kind=Rounding):
    return perplexity.run(
        kind(TRANSITIONS),
        DOCUMENTS,
        OPTIONS,
        out_dir,
        name="toy",
        train_length=32,
        processes=among,
        progress=False,
    )


def by_ranks(size, out_dir):
    """Evaluates in threads that share nothing but a store; real processes are launched below."""
    store = dist.HashStore()
    with ThreadPoolExecutor(size) as pool:
        ranks = [pool.submit(evaluate, out_dir, Processes(r, size, store)) for r in range(size)]
    return [rank.result() for rank in ranks]


def contents(out_dir: Path):
    """result.json and the token store without time stamps and costs."""
    result = perplexity.rebuild(out_dir)
    tables = {}
    for path in sorted((out_dir / "tokens").iterdir()):
        table = TokenTable.load(path)
        columns = {key: getattr(table, key).tobytes() for key in ("doc", "position", "context")}
        columns |= {"nll": table.nll.tobytes(), "n_bytes": table.n_bytes.tobytes()}
        tables[path.name] = columns | {"meta": {**table.meta, "cost": None}}
    return {k: v for k, v in result.items() if k not in ("created", "command", "cost")}, tables


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One process, uninterrupted."""
    out_dir = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "batches", partial(batches, batch_tokens=300))
        evaluate(out_dir)
    return contents(out_dir)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_write_what_one_alone_writes(size, whole, tmp_path):
    results = by_ranks(size, tmp_path)
    assert contents(tmp_path) == whole
    assert all(result == results[0] for result in results)


def test_one_process_evaluates_one_after_the_other(whole, tmp_path):
    alone = Processes()
    for _ in range(2):
        evaluate(tmp_path, alone)
        assert contents(tmp_path) == whole
        shutil.rmtree(tmp_path / "tokens")


@pytest.mark.parametrize("size", [1, 3])
def test_interrupted_and_resumed_equals_uninterrupted(size, whole, tmp_path, monkeypatch):
    save, scored = TokenTable.save, passes.score
    kept, again = [], []

    def save_until_interrupted(table, path):
        if len(kept) == 3:
            raise KeyboardInterrupt
        kept.append(table.meta["identity"])
        save(table, path)

    def score_and_tell(*arguments, identity, **options):
        again.append(identity)
        return scored(*arguments, identity=identity, **options)

    with monkeypatch.context() as patch:
        patch.setattr(TokenTable, "save", save_until_interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate(tmp_path)
    assert not (tmp_path / "result.json").exists()
    monkeypatch.setattr(passes, "score", score_and_tell)
    by_ranks(size, tmp_path)
    assert contents(tmp_path) == whole
    assert again
    assert not set(kept) & set(again), "parts that were there are not scored again"
    assert not (tmp_path / "tokens/parts").exists()


def test_parts_of_other_weights_are_scored_anew(whole, tmp_path):
    class Other(Rounding):
        """Another class is another fingerprint."""

    evaluate(tmp_path, kind=Other)
    (tmp_path / "tokens").rename(tmp_path / "other")
    parts = tmp_path / "tokens" / "parts"
    parts.mkdir(parents=True)
    for path in (tmp_path / "other").iterdir():
        path.rename(parts / f"{path.stem}-00000.npz")
    evaluate(tmp_path)
    assert contents(tmp_path) == whole


def test_who_waits_for_a_dead_process_gives_up_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "STALL_SECONDS", 0.2)
    for rank in (0, 1):
        with pytest.raises(ProcessLost, match="a process died or hangs; start the same command"):
            evaluate(tmp_path, Processes(rank, 2))
    assert not (tmp_path / "result.json").exists()


def test_a_rank_that_fails_ends_the_others(tmp_path):
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as pool:
        ranks = [
            pool.submit(evaluate, tmp_path, Processes(rank, 2, store), kind)
            for rank, kind in enumerate((Rounding, Broken))
        ]
    with pytest.raises(ProcessLost, match="rank 1: out of memory"):
        ranks[0].result()


def test_a_folder_that_is_not_shared_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Processes, "wait_until", lambda self, ready: None)
    with pytest.raises(ValueError, match="on a file system that they share"):
        evaluate(tmp_path, Processes(0, 2))
