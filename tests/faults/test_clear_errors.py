"""What goes wrong ends with one clear error, the right exit code, and nothing lost.

Each fault is a run of its own in a shared process group: that the next run still works also shows
that no rank was left waiting.
"""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pretrain.training.load import load_weights
from pretrain.training.manifest import newest_complete
from tests.distributed.launching import (
    checkpoints,
    largest_difference,
    rows_of,
    train,
    trajectory,
)
from tests.distributed.tiny_run import EXIT_PREEMPTED, Run

pytestmark = pytest.mark.distributed

FP32_TOLERANCE = 1e-5  # sums in another order


def short_run(folder: Path, name: str, stage: int = 1) -> Run:
    return Run(name, str(folder), stage, steps=8, save_every=4)


def refused(folder: Path) -> dict[str, tuple[Run, str]]:
    """Runs that must not continue the finished run `base`, and what they are told."""
    base = short_run(folder, "base")
    return {
        "another model": (
            replace(base, other_model=True),
            "another model: 'embedding.weight' is [32, 8] there and [33, 8] in this configuration",
        ),
        "another tokenizer": (replace(base, tokenizer="other"), "its tokenizer (other) is not"),
        "another data order": (replace(base, seed=1), "seed=1 here, 0 in the checkpoint"),
        "another ZeRO family": (
            replace(base, stage=3, reshard=True),
            "zero.stage=3: the checkpoint was written by 2 process(es) at zero.stage=1",
        ),
        "another layout": (replace(base, stage=2), "Set resume.reshard=true to convert it"),
        "overwriting": (replace(base, resume="never"), "already holds checkpoints"),
        "nothing to resume": (
            replace(base, name="nothing", resume="must"),
            "resume.mode=must: no checkpoint in",
        ),
    }


REFUSED = tuple(refused(Path()))
NAN_STAGES = (0, 1, 3)
SURVIVED_STAGES = (0, 1, 2, 3)
FULL_DISK_STAGES = (1, 3)


def poisoned(folder: Path, stage: int) -> Run:
    """A NaN in the loss of one rank from step 7 on, with checkpoints after 4 and 8."""
    return replace(short_run(folder, f"nan{stage}", stage), steps=20, poison=(6, 20))


def survived(folder: Path, stage: int) -> Run:
    """One step with a NaN, in the loss and in what would be carried on, under accumulation."""
    run = short_run(folder, f"survived{stage}", stage)
    return replace(run, grad_accum=2, poison=(5, 6), offload=stage == 2)


def ended_by_nan(folder: Path) -> Run:
    """Its last step is skipped."""
    return replace(short_run(folder, "ended"), save_every=0, grad_accum=2, poison=(7, 8))


def trained_further(run: Run) -> Run:
    return replace(run, steps=12, poison=(0, 0), signals={}, resume="must", learning_rate=2e-2)


def disk_full(folder: Path, stage: int) -> Run:
    """The disk of rank 1 is full when the checkpoint after step 8 is written."""
    run = short_run(folder, f"full{stage}", stage)
    return replace(run, steps=12, file_size_limit=1000, fault_rank=1)


def told_to_stop(folder: Path) -> Run:
    return replace(short_run(folder, "stopped"), signals={"SIGTERM": 5}, fault_rank=1)


def unwatched(run: Run) -> Run:
    """The host reads nothing in a step: no states and no buffers have to be kept from a NaN."""
    name = f"{run.name}, unwatched"
    return replace(run, name=name, carry_state=False, codebook=False, log_every=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, dict[str, Any]]:
    """Everything in one launch of two processes."""
    runs = {
        "base": short_run(folder, "base"),
        **{name: run for name, (run, _) in refused(folder).items()},
        **{f"nan{stage}": poisoned(folder, stage) for stage in NAN_STAGES},
        **{
            f"room{s}": replace(disk_full(folder, s), steps=4, file_size_limit=None) for s in (1, 3)
        },
        **{f"full{stage}": disk_full(folder, stage) for stage in FULL_DISK_STAGES},
        **{f"survived{stage}": survived(folder, stage) for stage in SURVIVED_STAGES},
        "ended": ended_by_nan(folder),
        "ended, again": replace(ended_by_nan(folder), evaluate_every=4),
        "ended, further": trained_further(ended_by_nan(folder)),
        "stopped": told_to_stop(folder),
        **{f"unwatched nan{stage}": unwatched(poisoned(folder, stage)) for stage in (0, 1)},
        **{f"unwatched survived{stage}": unwatched(survived(folder, stage)) for stage in (0, 1)},
        "unwatched stop": replace(unwatched(told_to_stop(folder)), stage=0, signals={"SIGTERM": 4}),
    }
    results = train(folder, list(runs.values()), processes=2, code=EXIT_PREEMPTED)
    return dict(zip(runs, results, strict=True))


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_resume_is_refused_with_its_reason(
    name: str, folder: Path, outcomes: dict[str, dict[str, Any]]
) -> None:
    _, message = refused(folder)[name]
    assert outcomes[name]["code"] == 2
    assert message in outcomes[name]["message"]
    newest, passed_over = newest_complete(checkpoints(short_run(folder, "base")))
    assert (newest.name if newest else None, passed_over) == ("step_00000008", [])


@pytest.mark.parametrize("stage", NAN_STAGES)
def test_not_finite_loss_skips_then_stops_and_keeps_the_last_good_checkpoint(
    stage: int, folder: Path, outcomes: dict[str, dict[str, Any]]
) -> None:
    assert outcomes[f"nan{stage}"]["code"] == 1
    message = outcomes[f"nan{stage}"]["message"]
    assert "gradients were not finite in 3 steps in a row, up to step 9" in message
    assert "last checkpoint: step 8" in message  # made while steps were being skipped
    newest, _ = newest_complete(checkpoints(poisoned(folder, stage)))
    assert newest is not None
    assert newest.name == "step_00000008"
    assert all(w.isfinite().all() for w in load_weights(newest).values())
    rows = trajectory(poisoned(folder, stage))
    assert all(math.isfinite(loss) for loss, _ in rows[:6])
    assert all(not math.isfinite(norm) for _, norm in rows[6:])


@pytest.mark.parametrize("stage", SURVIVED_STAGES)
def test_one_step_that_is_not_finite_leaves_no_nan_in_the_carried_state(
    stage: int, folder: Path, outcomes: dict[str, dict[str, Any]]
) -> None:
    assert outcomes[f"survived{stage}"] == {"code": 0, "message": ""}
    rows = trajectory(survived(folder, stage))
    assert [number for number, row in enumerate(rows) if not all(map(math.isfinite, row))] == [5]
    assert largest_difference(rows[6:], trajectory(survived(folder, 0))[6:]) < FP32_TOLERANCE


@pytest.mark.parametrize("stage", [0, 1])
def test_what_is_heard_of_a_step_later_is_counted_alike(
    stage: int, folder: Path, outcomes: dict[str, dict[str, Any]]
) -> None:
    assert outcomes[f"unwatched nan{stage}"]["code"] == 1
    message = outcomes[f"unwatched nan{stage}"]["message"]
    assert "gradients were not finite in 3 steps in a row, up to step 9" in message
    assert "last checkpoint: step 8" in message
    newest, _ = newest_complete(checkpoints(unwatched(poisoned(folder, stage))))
    assert newest is not None
    assert all(w.isfinite().all() for w in load_weights(newest).values())

    assert outcomes[f"unwatched survived{stage}"] == {"code": 0, "message": ""}
    rows, others = (rows_of(unwatched(survived(folder, s)), "loss") for s in (stage, 0))
    assert [(row["step"], row["skipped_steps"]) for row in rows] == [(6, 1), (8, 1)]
    assert rows[0]["grad_norm"] == math.inf
    for key in ("loss", "grad_norm"):
        assert rows[1][key] == pytest.approx(others[1][key], rel=FP32_TOLERANCE)


def test_a_stop_that_is_heard_of_a_step_later_loses_nothing(
    folder: Path, outcomes: dict[str, dict[str, Any]]
) -> None:
    assert outcomes["unwatched stop"] == {"code": EXIT_PREEMPTED, "message": ""}
    newest, _ = newest_complete(checkpoints(unwatched(told_to_stop(folder))))
    assert newest is not None
    assert newest.name == "step_00000006"  # asked before the fifth


def test_finished_run_is_saved_though_its_last_step_was_skipped_and_can_train_further(
    folder: Path, outcomes: dict[str, dict[str, Any]]
) -> None:
    run = ended_by_nan(folder)
    log = (checkpoints(run).parent / "train.log").read_text()
    assert outcomes["ended"]["code"] == outcomes["ended, further"]["code"] == 0
    assert log.count("resumed from") == 2
    assert re.search(r"resumed from \S+/step_00000008\nit had finished before", log)
    assert not rows_of(run, "val/loss")  # and was not evaluated once more
    done = json.loads((checkpoints(run).parent / "DONE").read_text())
    assert done["step"] == 12
    rows = rows_of(run, "lr/decay")
    finite = [row["step"] for row in rows if math.isfinite(row["loss"])]
    assert finite == [1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12]
    # wsd at 7/8 and at the end of 1e-2; then at 9/12 of 2e-2, still before its decay.
    assert [row["lr/decay"] for row in rows[6:9]] == pytest.approx([6.625e-3, 1e-3, 2e-2])


@pytest.mark.parametrize("stage", FULL_DISK_STAGES)
def test_full_disk_on_one_rank_fails_on_all_and_keeps_the_previous_checkpoint(
    stage: int, folder: Path, outcomes: dict[str, dict[str, Any]]
) -> None:
    assert outcomes[f"full{stage}"]["code"] == 1
    message = outcomes[f"full{stage}"]["message"]
    assert "rank 1: OSError" in message
    assert "The last complete checkpoint, step_00000004, is unharmed" in message
    root = checkpoints(disk_full(folder, stage))
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step_00000004"]


def test_sigterm_to_one_rank_saves_on_all_exits_with_75_and_resumes_exactly(
    folder: Path, outcomes: dict[str, dict[str, Any]]
) -> None:
    run = told_to_stop(folder)
    assert outcomes["stopped"]["code"] == EXIT_PREEMPTED
    newest, _ = newest_complete(checkpoints(run))
    assert newest is not None
    assert newest.name == "step_00000006"
    assert not (checkpoints(run).parent / "DONE").exists()
    train(folder, [replace(run, signals={}, resume="must")], processes=2)
    assert trajectory(run) == trajectory(short_run(folder, "base"))
    assert (checkpoints(run).parent / "DONE").exists()
