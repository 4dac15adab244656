"""Data that cannot be read, a full disk, what a step waits for, skipped steps and stops in what is
reported; all else about the trainer is in tests/distributed."""

import errno
import gc
import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.config import load_config
from pretrain.models import build_model
from pretrain.training import engine, trainer
from pretrain.training.engine import World, start_process_group
from pretrain.training.late_read import LateRead
from pretrain.training.metrics import CorpusFacts, MetricLog
from pretrain.training.trainer import AnyBatch, RankError, Trainer
from tests.distributed import tiny_run
from tests.distributed.tiny_run import Run


class Unreadable:
    """A loader whose hub has gone away."""

    def state(self, step: int) -> dict[str, object]:
        raise ValueError("hub: away")


def test_a_position_that_cannot_be_found_is_an_error_of_this_rank_and_no_traceback() -> None:
    trainer = object.__new__(Trainer)
    trainer.loader, trainer.step, trainer.last_step = Unreadable(), 7, LateRead()
    trainer.world = SimpleNamespace(rank=3)
    with pytest.raises(RankError, match="rank 3 cannot read the data behind step 7: hub: away"):
        trainer._save()


@pytest.mark.parametrize("stage", [0, 1])
def test_a_step_reads_nothing_of_the_device_and_collects_nothing_old(
    stage: int, tmp_path: Path
) -> None:
    """But DeepSpeed reads from ZeRO-1 on. In a process of its own: its group would stay for other
    tests."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        reads, frozen = pool.submit(_watch_steps, str(tmp_path), stage).result()
    assert (reads == 0) == (stage == 0)
    *in_steps, afterwards = frozen
    assert min(in_steps) > 100_000 > afterwards == 0  # what was there before is not looked through


def _watch_steps(folder: str, stage: int) -> tuple[int, list[int]]:
    class Reads(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.number += func == torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    class Watched(Trainer):
        def _train_step(self, micro_batches: list[AnyBatch]) -> None:
            frozen.append(gc.get_freeze_count())
            with reads:
                super()._train_step(micro_batches)

    reads, frozen = Reads(), []
    tiny_run.Trainer = Watched  # type: ignore[misc]
    run = Run("run", folder, stage, steps=6, carry_state=False, codebook=False, log_every=3)
    assert _fit(run)
    return reads.number, [*frozen, gc.get_freeze_count()]


@pytest.mark.parametrize("stage", [0, 1])
def test_a_skipped_step_is_not_in_the_mean_of_the_others(stage: int, tmp_path: Path) -> None:
    rows = _train(Run("run", str(tmp_path), stage, steps=8, log_every=4, poison=(5, 6)))
    assert [(row["step"], row["skipped_steps"]) for row in rows] == [(4, 0), (8, 1)]
    assert 0 < rows[1]["loss"] < 2 * rows[0]["loss"]
    told = "step 8: gradients not finite in 1 of the last 4 steps"
    assert told in (tmp_path / "run" / "train.log").read_text()


def test_a_run_that_is_stopped_where_it_saves_reports_what_it_trained(tmp_path: Path) -> None:
    run = Run("run", str(tmp_path), 0, carry_state=False, codebook=False, log_every=100)
    run.save_every, run.signals = 1, {"SIGTERM": 3}
    assert [row["step"] for row in _train(run)] == [4]


def test_a_full_disk_is_an_error_of_this_rank_and_no_traceback(tmp_path: Path) -> None:
    run = Run("run", str(tmp_path), 0, carry_state=False, codebook=False, log_every=3, save_every=2)
    expected = r"rank 0 cannot go on behind step 3: .*No space left.*last checkpoint: step 2"
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        training = pool.submit(_fit_on_a_full_disk, run)
        with pytest.raises(RankError, match=expected):
            training.result()


def _fit_on_a_full_disk(run: Run) -> bool:
    class FullLog(MetricLog):
        def row(self, step: int, tokens: int, values: dict[str, float]) -> None:
            if "loss" in values:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")

    trainer.MetricLog = FullLog  # type: ignore[misc]
    return _fit(run)


def _train(run: Run) -> list[dict[str, Any]]:
    """The rows that have a loss."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(_fit, run).result()
    lines = (Path(run.out_dir) / run.name / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def _fit(run: Run) -> bool:
    os.environ["DS_ACCELERATOR"] = "cpu"
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    world = start_process_group(tiny_run.config_of(run, 1))
    (Path(run.out_dir) / run.name).mkdir()
    return tiny_run.build_trainer(run, world).fit()


def test_a_decoder_is_checked_with_as_many_tokens_as_targets_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Checked(Exception):
        pass

    def check(*_: object, target_length: int) -> None:
        raise Checked(target_length)

    monkeypatch.setattr(trainer, "plan_resume", lambda *_: None)  # asks all ranks
    monkeypatch.setattr(engine, "compile_blocks", lambda _: None)
    monkeypatch.setattr(engine, "verify_compiled", check)
    config = load_config(["model=spade_t5_tiny", "model.vocab_size=16", "train.compile=true"])
    world, facts = World(0, 1, torch.device("cpu")), CorpusFacts(None, "", target_length=29)
    with pytest.raises(Checked, match="29"):
        Trainer(config, build_model(config.model), Unreadable(), world, facts)
