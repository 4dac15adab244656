"""Which folders count as checkpoints, and which ones retention removes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.training import manifest
from pretrain.training.checkpoint import CheckpointSaver
from pretrain.training.manifest import SavedCheckpoint


def make_checkpoint(root: Path, step: int) -> Path:
    folder = root / f"tmp.{manifest.checkpoint_name(step)}"
    (folder / "deepspeed").mkdir(parents=True)
    (folder / "deepspeed" / "weights.pt").write_bytes(bytes([step]) * 1000)
    (folder / "training.json").write_text("{}")
    files = manifest.file_entries(folder, manifest.content_files(folder))
    final = root / manifest.checkpoint_name(step)
    manifest.publish(folder, final, {"step": step, "tokens": 100 * step, "files": files})
    return final


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit_manifest(checkpoint: Path, edit: Callable[[Any], object]) -> None:
    content = json.loads((checkpoint / "manifest.json").read_text())
    edit(content)
    (checkpoint / "manifest.json").write_text(json.dumps(content))


DAMAGE = {
    "no manifest": (lambda c: (c / "manifest.json").unlink(), "manifest.json is missing"),
    "cut manifest": (lambda c: (c / "manifest.json").write_text('{"st'), "unreadable"),
    "another key": (
        lambda c: edit_manifest(c, lambda m: m["files"]["training.json"].pop("bytes")),
        "unreadable",
    ),
    "a list": (lambda c: (c / "manifest.json").write_text("[]"), "unreadable"),
    "no files": (lambda c: edit_manifest(c, lambda m: m.update(files=[])), "unreadable"),
    "other step": (lambda c: edit_manifest(c, lambda m: m.update(step=3)), "that of step 3"),
    "missing file": (lambda c: (c / "deepspeed" / "weights.pt").unlink(), "is missing"),
    "cut file": (lambda c: (c / "deepspeed" / "weights.pt").write_bytes(b"x"), "has 1 bytes"),
    "flipped bit": (lambda c: flip_a_bit(c / "deepspeed" / "weights.pt"), "is damaged"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_walk_back_passes_over_a_damaged_checkpoint_and_says_why(kind: str, tmp_path: Path) -> None:
    older, newer = make_checkpoint(tmp_path, 1), make_checkpoint(tmp_path, 2)
    assert manifest.newest_complete(tmp_path) == (newer, [])
    damage, reason = DAMAGE[kind]
    damage(newer)
    path, passed_over = manifest.newest_complete(tmp_path)
    assert path == older
    assert len(passed_over) == 1
    assert "step_00000002" in passed_over[0]
    assert reason in passed_over[0]


def test_folder_being_written_is_never_a_checkpoint(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 1)
    shutil.copytree(tmp_path / "step_00000001", tmp_path / "tmp.step_00000002")
    path, passed_over = manifest.newest_complete(tmp_path)
    assert path is not None
    assert (path.name, passed_over) == ("step_00000001", [])
    manifest.remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000001"]


def test_a_copy_that_somebody_made_is_neither_read_nor_removed(tmp_path: Path) -> None:
    original = make_checkpoint(tmp_path, 1)
    shutil.copytree(original, tmp_path / "step_00000001_backup")
    shutil.copytree(original, tmp_path / "step_2")
    assert manifest.newest_complete(tmp_path) == (original, [])
    assert [saved.path for saved in manifest.saved_checkpoints(tmp_path)] == [original]


def test_checkpoints_are_ordered_by_their_steps(tmp_path: Path) -> None:
    for step in (10**8, 99_999_999):
        shutil.copytree(make_checkpoint(tmp_path, 1), tmp_path / f"step_{step:08d}")
    folders = [saved.path.name for saved in manifest.saved_checkpoints(tmp_path)]
    assert folders == ["step_00000001", "step_99999999", "step_100000000"]


def test_latest_names_the_published_checkpoint(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 1)
    make_checkpoint(tmp_path, 2)
    assert (tmp_path / "latest").read_text() == "step_00000002\n"


def test_broken_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    broken = make_checkpoint(tmp_path, 3)
    (broken / "training.json").unlink()
    assert manifest.problem_of(make_checkpoint(tmp_path, 3)) is None


def saved_at(steps: list[int]) -> list[SavedCheckpoint]:
    return [SavedCheckpoint(Path(f"step_{step:08d}"), step, 100 * step) for step in steps]


def test_retention_keeps_the_last_and_the_first_of_every_stretch() -> None:
    removed = manifest.superseded(saved_at([1, 2, 3, 4, 5, 6, 7]), keep_last=2, keep_every=200)
    kept = {1, 2, 3, 4, 5, 6, 7} - {int(path.name[5:]) for path in removed}
    assert kept == {2, 4, 6, 7}


def test_without_milestones_only_the_last_stay() -> None:
    removed = manifest.superseded(saved_at([1, 2, 3]), keep_last=1, keep_every=0)
    assert [path.name for path in removed] == ["step_00000001", "step_00000002"]


@given(
    steps=st.lists(st.integers(1, 200), min_size=1, max_size=30, unique=True),
    keep_last=st.integers(1, 4),
    keep_every=st.integers(0, 3000),
)
def test_retention_during_a_run_keeps_what_retention_at_its_end_keeps(
    steps: list[int], keep_last: int, keep_every: int
) -> None:
    def survivors(checkpoints: list[SavedCheckpoint]) -> list[SavedCheckpoint]:
        removed = set(manifest.superseded(checkpoints, keep_last, keep_every))
        return [checkpoint for checkpoint in checkpoints if checkpoint.path not in removed]

    everything, kept = saved_at(sorted(steps)), saved_at([])
    for checkpoint in everything:
        kept = survivors([*kept, checkpoint])
    assert kept == survivors(everything)
    assert kept[-1] == everything[-1]


def test_removal_takes_the_name_away_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    doomed = make_checkpoint(tmp_path, 1)

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        manifest.remove_checkpoint(doomed)
    assert not list(tmp_path.glob("step_*"))


def test_unwritable_folder_and_full_disk_are_found_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"out_dir: cannot write to .*Not a directory"):
        manifest.check_room(tmp_path / "file" / "checkpoints", 0)
    full = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(ValueError, match=r"0\.00 GB free, one checkpoint .* takes about 2\.00 GB"):
        manifest.check_room(tmp_path, 2 * 10**9)
    manifest.check_room(tmp_path, 10**5)
    assert not list(tmp_path.glob("tmp.*"))


def test_what_was_passed_over_crowds_out_nothing(tmp_path: Path) -> None:
    """A damaged checkpoint of step 10, from which a run went back to 5, when it saves step 8."""
    for step in (5, 8, 10):
        make_checkpoint(tmp_path, step)
    keep = SimpleNamespace(keep_last=2, keep_every_tokens=0)
    saver = SimpleNamespace(root=tmp_path, config=SimpleNamespace(checkpoint=keep))
    CheckpointSaver._remove_old(saver, 8)  # type: ignore[arg-type]
    assert [saved.step for saved in manifest.saved_checkpoints(tmp_path)] == [5, 8, 10]
    CheckpointSaver._remove_old(saver, 10)  # type: ignore[arg-type]
    assert [saved.step for saved in manifest.saved_checkpoints(tmp_path)] == [8, 10]
