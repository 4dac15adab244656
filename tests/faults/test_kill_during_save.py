"""A kill at any moment of a save neither loses the previous checkpoint nor leaves a broken one."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pretrain.training.manifest import newest_complete
from tests.distributed.launching import (
    KILLED,
    checkpoints,
    finish,
    start,
    start_runs,
    train,
    trajectory,
)
from tests.distributed.tiny_run import Run

pytestmark = pytest.mark.distributed

TEMPORARY = "tmp.step_00000010"

# Where in the second of two saves, and on which of two ranks.
KILL_POINTS = [
    (0, "os.mkdir", f"{TEMPORARY}/deepspeed"),
    (0, "open", f"{TEMPORARY}/deepspeed/mp_rank_00_model_states.pt"),
    (0, "open", f"{TEMPORARY}/deepspeed/zero_pp_rank_0_mp_rank_00_optim_states.pt"),
    (1, "open", f"{TEMPORARY}/deepspeed/zero_pp_rank_1_mp_rank_00_optim_states.pt"),
    (1, "open", f"{TEMPORARY}/carried_00004_00008.pt"),
    (0, "open", f"{TEMPORARY}/buffers.pt"),
    (0, "open", f"{TEMPORARY}/tmp.training.json"),
    (0, "open", f"{TEMPORARY}/tmp.manifest.json"),
    (0, "os.rename", TEMPORARY),
    (0, "os.rename", "step_00000005"),  # after the save, where retention removes the older one
]


def killed_run(folder: Path, number: int, stage: int) -> Run:
    rank, event, path = KILL_POINTS[number]
    return Run(
        f"point{number}_zero{stage}",
        str(folder),
        stage,
        steps=15,
        save_every=5,
        keep_last=1,
        kill_before=(event, path),
        fault_rank=rank,
    )


def check_killed_runs(folder: Path, runs: list[Run], at_once: int) -> None:
    """Kills each run in a launch of its own, then resumes all of them in one."""
    for first in range(0, len(runs), at_once):
        for launch in [start_runs(folder, [r], processes=2) for r in runs[first : first + at_once]]:
            code, output = finish(launch)
            assert code in KILLED, output[-4000:]
    for run in runs:
        newest, passed_over = newest_complete(checkpoints(run))
        assert newest is not None
        survived_rename = run.kill_before == KILL_POINTS[-1][1:]
        assert newest.name == ("step_00000010" if survived_rename else "step_00000005")
        assert passed_over == []
    stages = sorted({run.stage for run in runs})
    whole = {s: Run(f"whole_zero{s}", str(folder), s, steps=15, save_every=5) for s in stages}
    resumed = [replace(run, kill_before=None, resume="must") for run in runs]
    train(folder, [*resumed, *whole.values()], processes=2)
    for run in runs:
        assert trajectory(run) == trajectory(whole[run.stage])
        assert [path.name for path in checkpoints(run).glob("*step_*")] == ["step_00000015"]


def test_killed_saves_of_two_processes_resume_from_the_previous_checkpoint(tmp_path: Path) -> None:
    runs = [killed_run(tmp_path, number=3, stage=1), killed_run(tmp_path, number=8, stage=3)]
    check_killed_runs(tmp_path, runs, at_once=2)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("stage", [1, 3])
def test_each_of_ten_kill_points(tmp_path: Path, stage: int) -> None:
    names = (
        KILL_POINTS
        if stage < 3
        else [
            (rank, event, path.replace("mp_rank_00_model", "zero_pp_rank_0_mp_rank_00_model"))
            for rank, event, path in KILL_POINTS
        ]
    )
    runs = [
        replace(killed_run(tmp_path, number, stage), kill_before=point[1:])
        for number, point in enumerate(names)
    ]
    check_killed_runs(tmp_path, runs, at_once=2)


def test_every_file_operation_of_a_save_can_be_the_last(tmp_path: Path) -> None:
    specification = tmp_path / "run.json"
    specification.write_text(json.dumps(asdict(Run("cut", str(tmp_path), keep_last=2))))
    script = Path(__file__).with_name("interrupted_saves.py")
    code, output = finish(start(script, [str(specification)], processes=1))
    assert code == 0, output[-4000:]
    saves = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    cut = [save for save in saves if save["operation"]]
    assert len(cut) >= 20  # a save has that many operations: the cuts really happened
    whole = 0
    for save in saves:
        assert save["passed_over"] == []  # nothing broken ever bears a checkpoint's name
        assert save["right_weights"]
        assert save["newest"] in (whole, save["step"])
        assert save["latest"] in save["folders"]
        if not save["operation"]:
            whole = save["step"]
            assert save["newest"] == whole
            expected = [f"step_{whole:08d}"]
            assert [f for f in save["folders"] if f.startswith("tmp")] == []
            assert save["folders"][-1:] == expected
        else:
            assert whole in {int(f[5:]) for f in save["folders"] if f.startswith("step_")}
