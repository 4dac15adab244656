"""Checkpoint folders on disk: complete or not, newest first, which to keep. No torch, no DeepSpeed.

    checkpoints/latest                 name of the newest complete checkpoint, for people and tools
    checkpoints/step_00001000/         appears by one rename, when everything in it is on disk
        manifest.json                  size and sha256 of every other file, written last
    checkpoints/tmp.step_00001000/     being written, or left by a killed process; never read

`latest` is a convenience: reading trusts manifests alone, so no moment of a kill can mislead it.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.files import TEMPORARY, replace_text, sync_folder, write_json

MANIFEST = "manifest.json"
# A flipped bit may leave JSON with other names or types.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, found or read; the message says what is safe."""


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint folder with a manifest."""

    path: Path
    step: int
    tokens: int


def checkpoint_name(step: int) -> str:
    """The folder of the checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def file_entries(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size in bytes and sha256 of each named file."""
    entries = {}
    for name in names:
        with open(folder / name, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        entries[name] = {"bytes": (folder / name).stat().st_size, "sha256": digest}
    return entries


def content_files(folder: Path) -> list[str]:
    """Every file of a checkpoint except its manifest, sorted, relative to it."""
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in files if name != MANIFEST)


def problem_of(folder: Path) -> str | None:
    """Why `folder` is not a complete checkpoint, or None when it is; reads and hashes all of it."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
        step = int(manifest["step"])
    except _UNREADABLE as error:
        return f"{MANIFEST} is missing or unreadable ({error!r})"
    if _step_of(folder) not in (None, step):
        return f"its {MANIFEST} is that of step {step}"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, its manifest says {size}"
    for name, actual in file_entries(folder, sizes).items():
        if actual != manifest["files"][name]:
            return f"{name} is damaged: its sha256 differs from the manifest's"
    return None


def _step_of(folder: Path) -> int | None:
    """By its name; None for any other, as that of a copy that somebody made."""
    found = re.fullmatch(r"step_(\d{8,})", folder.name)
    return int(found[1]) if found else None


def _folders(root: Path) -> list[Path]:
    """Those with the name of a checkpoint, oldest first."""
    steps = [(_step_of(path), path) for path in root.glob("step_*")]
    return [path for _, path in sorted((step, path) for step, path in steps if step is not None)]


def saved_checkpoints(root: Path) -> list[SavedCheckpoint]:
    """The folders under `root` that have a readable manifest, oldest first; contents unverified."""
    found = []
    for path in _folders(root):
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            found.append(SavedCheckpoint(path, int(manifest["step"]), int(manifest["tokens"])))
        except _UNREADABLE:
            continue
    return found


def newest_complete(root: Path) -> tuple[Path | None, list[str]]:
    """Walks back to the newest complete checkpoint.

    Returns:
        Its folder, or None; and one line for every newer folder that was passed over.
    """
    passed_over: list[str] = []
    for path in reversed(_folders(root)):
        problem = problem_of(path)
        if problem is None:
            return path, passed_over
        passed_over.append(f"{path.name} is not complete: {problem}")
    return None, passed_over


def publish(temporary: Path, final: Path, content: dict[str, Any]) -> None:
    """Turns a fully written folder into a checkpoint and points `latest` at it.

    Args:
        temporary: the folder, all of its files on disk.
        final: its name from now on; a broken checkpoint of that name is moved out of the way.
        content: of the manifest: step, tokens and files.
    """
    write_json(temporary / MANIFEST, content)
    if final.exists():
        broken = final.with_name(f"{TEMPORARY}replaced.{final.name}")
        shutil.rmtree(broken, ignore_errors=True)
        os.rename(final, broken)
    os.rename(temporary, final)
    sync_folder(final.parent)
    replace_text(final.parent / "latest", final.name + "\n")


def superseded(saved: list[SavedCheckpoint], keep_last: int, keep_every: int) -> list[Path]:
    """Which checkpoints retention removes: all but the last few and one per `keep_every` tokens.

    The one kept of each stretch of `keep_every` tokens is its first, so that the decision about a
    checkpoint never changes later.
    """
    by_age = sorted(saved, key=lambda checkpoint: checkpoint.step)
    keep = {checkpoint.path for checkpoint in by_age[-keep_last:]}
    milestones: set[int] = set()
    for checkpoint in by_age:
        milestone = checkpoint.tokens // keep_every if keep_every else 0
        if milestone and milestone not in milestones:
            milestones.add(milestone)
            keep.add(checkpoint.path)
    return [checkpoint.path for checkpoint in by_age if checkpoint.path not in keep]


def remove_leftovers(root: Path) -> None:
    """Deletes what killed saves left behind."""
    for path in root.glob(f"{TEMPORARY}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def remove_checkpoint(path: Path) -> None:
    """Deletes a checkpoint so that a kill halfway leaves no half checkpoint under its name."""
    doomed = path.with_name(f"{TEMPORARY}removed.{path.name}")
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def check_room(root: Path, needed_bytes: int) -> None:
    """Creates `root` and makes sure that a checkpoint can be written there.

    Raises:
        ValueError: when the folder cannot be written or its disk has too little room.
    """
    probe = root / f"{TEMPORARY}probe.{os.getpid()}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink(missing_ok=True)  # a rank on another node may have the same process id
    except OSError as error:
        raise ValueError(
            f"out_dir: cannot write to {root} ({error.strerror}); choose another out_dir= or fix "
            f"its permissions"
        ) from error
    free = shutil.disk_usage(root).free
    if free < needed_bytes:
        raise ValueError(
            f"out_dir: {root} has {free / 1e9:.2f} GB free, one checkpoint of this model takes "
            f"about {needed_bytes / 1e9:.2f} GB; free some space or choose another out_dir="
        )
