"""Any number of processes, killed or not, give one token store and one result."""

import multiprocessing
import os
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from toy_models import random_documents

from evals import passes, perplexity, processes
from evals.models import LanguageModelScorer
from evals.perplexity import PerplexityOptions
from evals.processes import Processes, ProcessLost
from evals.score import batches
from evals.store import TokenTable
from pretrain.models import LanguageModel, LanguageModelConfig, LayersConfig

DOCUMENTS = random_documents([420, 150, 333, 290, 601, 75])
OPTIONS = PerplexityOptions(
    contexts=(16, 64), protocols=perplexity.PROTOCOLS, stride_tokens=8, segment_tokens=48
)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Many batches in many parts, of shapes in which a BST's losses depend on the batch size."""
    monkeypatch.setattr(passes, "batches", partial(batches, batch_tokens=300))
    monkeypatch.setattr(passes, "PART_TOKENS", 1000)


def scorer():
    torch.manual_seed(0)
    config = LanguageModelConfig(
        vocab_size=32,
        d_model=16,
        n_layers=2,
        layers=LayersConfig(default="bst"),
        mixers={"bst": {"n_heads": 2, "block_size": 16, "chunk_size": 8}},
        init_std=0.2,
    )
    return LanguageModelScorer(LanguageModel(config), torch.device("cpu"))


def evaluate(out_dir, among=None):
    return perplexity.run(
        scorer(),
        DOCUMENTS,
        OPTIONS,
        out_dir,
        name="bst",
        train_length=32,
        processes=among,
        progress=False,
    )


def in_processes(size, out_dir):
    """Evaluates in forked processes that meet at a store of this one's; their exit codes."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def work(rank):
        client = dist.TCPStore("127.0.0.1", store.port, is_master=False)
        evaluate(out_dir, Processes(rank, size, client))

    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=work, args=(rank,)) for rank in range(size)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    return [worker.exitcode for worker in workers]


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
def test_processes_write_what_one_alone_writes(size, whole, tmp_path):
    assert in_processes(size, tmp_path) == [0] * size
    assert contents(tmp_path) == whole


def test_other_batches_change_last_bits(tmp_path, monkeypatch, whole):
    """Why the batch size is no option: were this to pass, it could be one."""
    monkeypatch.setattr(passes, "batches", partial(batches, batch_tokens=1000))
    evaluate(tmp_path)
    tables = contents(tmp_path)[1]
    one, other = (
        [np.frombuffer(table["nll"], np.float32) for table in result.values()]
        for result in (whole[1], tables)
    )
    assert any(not np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2])
def test_killed_and_resumed_equals_uninterrupted(size, whole, tmp_path, monkeypatch):
    save, n_saved = TokenTable.save, 0

    def save_until_killed(table, path):
        nonlocal n_saved
        n_saved += 1
        if n_saved == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        save(table, path)

    with monkeypatch.context() as patch:
        patch.setattr(TokenTable, "save", save_until_killed)
        assert -signal.SIGKILL in in_processes(1, tmp_path)
    assert not (tmp_path / "result.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "tokens/parts").iterdir()}
    assert len(kept) == 3
    seen = []
    join = passes._join

    def see_parts(parts, identity, documents):
        seen.extend(
            path for path in kept if path.exists() and path.stat().st_mtime_ns == kept[path]
        )
        return join(parts, identity, documents)

    monkeypatch.setattr(passes, "_join", see_parts)
    if size == 1:
        evaluate(tmp_path)
        assert set(seen) == set(kept), "parts that were there are not scored again"
    else:
        assert in_processes(size, tmp_path) == [0] * size
    assert contents(tmp_path) == whole
    assert not (tmp_path / "tokens/parts").exists()


def test_parts_of_other_weights_are_scored_anew(whole, tmp_path):
    parts = tmp_path / "tokens" / "parts"
    other = scorer()
    with torch.no_grad():
        other.model.embedding.weight.mul_(1.5)
    perplexity.run(other, DOCUMENTS, OPTIONS, tmp_path, name="bst", train_length=32, progress=False)
    assert contents(tmp_path)[1] != whole[1]
    tokens = sorted((tmp_path / "tokens").iterdir())
    parts.mkdir()
    for path in tokens:
        path.rename(parts / f"{path.stem}-00000.npz")
    evaluate(tmp_path)
    assert contents(tmp_path) == whole


def test_who_waits_for_a_dead_process_gives_up_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "STALL_SECONDS", 0.2)
    with pytest.raises(ProcessLost, match="start the same command again"):
        evaluate(tmp_path, Processes(0, 2))
    with pytest.raises(ProcessLost, match="a process died or hangs"):
        evaluate(tmp_path, Processes(1, 2))
    assert not (tmp_path / "result.json").exists()


def test_a_folder_that_is_not_shared_is_named(tmp_path, monkeypatch):
    store = dist.HashStore()
    among = Processes(0, 2, store).scope(str(tmp_path))
    monkeypatch.setattr(Processes, "wait_until", lambda self, ready: None)
    with pytest.raises(ValueError, match="on a file system that they share"):
        evaluate(tmp_path, Processes(0, 2, store))
    assert among.count("parts") > 0


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_work_is_dealt_out_once_and_evenly(size, tmp_path):
    (scoring,) = perplexity.plan(DOCUMENTS.lengths, PerplexityOptions((16,), ("position",)), 32)
    parts = passes._parts(scoring, "", tmp_path)
    parts += [passes.Part(scoring, k, [], 100 * k, tmp_path, "") for k in range(1, 20)]
    hands = passes.deal(parts, size)
    assert sorted(id(part) for hand in hands for part in hand) == sorted(map(id, parts))
    loads = [sum(part.n_inputs for part in hand) for hand in hands]
    assert max(loads) - min(loads) <= max(part.n_inputs for part in parts)
