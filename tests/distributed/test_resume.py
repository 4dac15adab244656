"""Ten steps, a kill, ten steps: the same bits as twenty; another world size: the same to rounding.

Four launches for everything: two processes save and are killed, one process does and moves runs of
two processes on by some steps, then each resumes its own and trains the uninterrupted twins.
"""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pretrain.training.load import load_weights
from tests.distributed.launching import (
    KILLED,
    checkpoints,
    largest_difference,
    train,
    trajectory,
)
from tests.distributed.tiny_run import EXIT_PREEMPTED, Run

pytestmark = pytest.mark.distributed

RESHARD_TOLERANCE = 1e-5  # sums in another order for part of the run
COMBINATIONS = [(stage, precision) for precision in ("fp32", "bf16") for stage in (1, 3)]
MOVED_STAGES = (0, 1, 2, 3)  # stage 0 replicates everything and needs no resharding


def interrupted(folder: Path, world: int, stage: int, precision: str) -> Run:
    """Saves after 10 steps, runs on to 13, and is gone."""
    name = f"{precision}_zero{stage}"
    out_dir = str(folder / f"world{world}")
    return Run(name, out_dir, stage, precision, grad_accum=2, save_every=10, abandon_at=13)


def resumed(run: Run) -> Run:
    return replace(run, resume="must", abandon_at=None, signals={})


def uninterrupted(run: Run) -> Run:
    return replace(run, name=f"{run.name}_uninterrupted", save_every=0, abandon_at=None, signals={})


def moving(folder: Path, stage: int) -> Run:
    """Told by SIGTERM to stop, after 7 steps by default."""
    return Run(f"moving{stage}", str(folder), stage, grad_accum=2, signals={"SIGTERM": 6})


def walking_back(folder: Path) -> Run:
    """Its newest checkpoint is damaged before it resumes."""
    return replace(interrupted(folder, 2, 3, "fp32"), name="walking_back", save_every=5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    cut = {w: [interrupted(folder, w, s, p) for s, p in COMBINATIONS] for w in (1, 2)}
    away = [moving(folder, stage) for stage in MOVED_STAGES]
    back = [replace(run, resume="must", reshard=run.stage > 0) for run in away]
    # The last run of a launch is really killed; for the others the process forgets them.
    killed = {
        w: [*r[:-1], replace(r[-1], abandon_at=None, signals={"SIGKILL": 13})]
        for w, r in cut.items()
    }
    train(folder, [*away, walking_back(folder), *killed[2]], processes=2, code=KILLED)
    flip_a_bit(next((checkpoints(walking_back(folder)) / "step_00000010").rglob("*_optim_*.pt")))
    train(folder, killed[1], processes=1, code=-9)
    halfway = [replace(run, signals={"SIGTERM": 13}) for run in back]
    whole = [uninterrupted(run) for run in cut[1]]
    train(folder, [*halfway, *map(resumed, cut[1]), *whole], processes=1, code=EXIT_PREEMPTED)
    home = [replace(run, signals={}) for run in back]
    whole = [uninterrupted(run) for run in (*cut[2], away[2])]
    train(folder, [*home, *map(resumed, (*cut[2], walking_back(folder))), *whole], processes=2)
    return folder


@pytest.mark.parametrize(("stage", "precision"), COMBINATIONS)
@pytest.mark.parametrize("world", [1, 2])
def test_resumed_run_is_bit_identical(
    trained: Path, world: int, stage: int, precision: str
) -> None:
    run = interrupted(trained, world, stage, precision)
    whole = uninterrupted(run)
    assert len(trajectory(whole)) == 20
    assert trajectory(run) == trajectory(whole)
    assert_equal_weights(run, whole)


@pytest.mark.parametrize("stage", MOVED_STAGES)
def test_two_to_one_to_two_processes_equals_the_uninterrupted_run(
    trained: Path, stage: int
) -> None:
    run = moving(trained, stage)
    assert sorted(p.name for p in checkpoints(run).glob("step_*")) == [
        "step_00000014",
        "step_00000020",
    ]
    whole = {
        0: uninterrupted(interrupted(trained, 2, 1, "fp32")),
        1: uninterrupted(interrupted(trained, 2, 1, "fp32")),
        2: uninterrupted(moving(trained, 2)),
        3: uninterrupted(interrupted(trained, 2, 3, "fp32")),
    }[stage]
    assert largest_difference(trajectory(run), trajectory(whole)) < RESHARD_TOLERANCE
    ours, theirs = final_weights(run), final_weights(whole)
    assert ours.keys() == theirs.keys()
    assert ours["codes.updates"] == 20  # a buffer, which the universal form forgets
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=RESHARD_TOLERANCE, atol=1e-6)


def test_buffer_matters_to_the_trajectory(trained: Path) -> None:
    """The comparison above would notice a lost codebook: it has moved far from its start."""
    weights = final_weights(moving(trained, 1))
    initial = load_weights(checkpoints(moving(trained, 1)) / "step_00000014")
    assert (weights["codes.codebook"] - initial["codes.codebook"]).abs().max() > 1e-2


def test_damaged_checkpoint_is_passed_over_and_the_older_one_gives_the_same_run(
    trained: Path,
) -> None:
    run = walking_back(trained)
    log = (checkpoints(run).parent / "train.log").read_text()
    assert re.search(r"passed over: step_00000010 is not complete: deepspeed/\S+ is damaged", log)
    assert re.search(r"resumed from \S+/step_00000005\n", log)
    assert trajectory(run) == trajectory(uninterrupted(interrupted(trained, 2, 3, "fp32")))


def test_no_temporary_folders_are_left(trained: Path) -> None:
    assert not list(trained.rglob("tmp.*"))


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), COMBINATIONS)
@pytest.mark.parametrize("world", [1, 2])
def test_each_combination_killed_in_its_own_launch(
    tmp_path: Path, world: int, stage: int, precision: str
) -> None:
    run = interrupted(tmp_path, world, stage, precision)
    kill = replace(run, abandon_at=None, signals={"SIGKILL": 13}, fault_rank=world - 1)
    train(tmp_path, [kill], processes=world, code=KILLED if world > 1 else -9)
    train(tmp_path, [resumed(run), uninterrupted(run)], processes=world)
    assert trajectory(run) == trajectory(uninterrupted(run))
    assert_equal_weights(run, uninterrupted(run))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def final_weights(run: Run) -> dict[str, torch.Tensor]:
    return load_weights(checkpoints(run) / "step_00000020")


def assert_equal_weights(run: Run, other: Run) -> None:
    ours, theirs = final_weights(run), final_weights(other)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name
