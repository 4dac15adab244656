"""Cuts a save off before each of its file operations in turn, in one process; prints what is left.

    interrupted_saves.py RUN.json

`Cut` is no Exception, so nothing in the code under test handles it: what is on disk is what a kill
would have left (a half-written file differs from a missing one in nothing that a manifest would
accept). One JSON line per save: its step, the cut operation, and the newest complete checkpoint.
"""

import contextlib
import hashlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from torch import Tensor

from pretrain.training.engine import start_process_group
from pretrain.training.load import load_weights
from pretrain.training.manifest import newest_complete
from tests.distributed.tiny_run import Run, build_trainer, config_of

FILE_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}


class Cut(BaseException):
    """Raised in place of a kill."""


def weights_hash(weights: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].detach().numpy().tobytes())
    return digest.hexdigest()


def main(specification: str) -> None:
    run = Run(**json.loads(Path(specification).read_text()))
    world = start_process_group(config_of(run, 1))
    trainer = build_trainer(run, world)
    root = trainer.saver.root
    batches = trainer.loader.steps(0)
    seen, cut_at = 0, 0
    operation = ""

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen, operation
        if event in FILE_EVENTS and str(root) in str(arguments[0]):
            seen += 1
            if seen == cut_at:
                operation = f"{event} {Path(str(arguments[0])).relative_to(root)}"
                raise Cut

    sys.addaudithook(hook)
    hashes: dict[int, str] = {}

    def save(cut: int) -> str:
        """Trains a step and saves; returns the operation that was cut, empty if none."""
        nonlocal seen, cut_at, operation
        trainer._train_step(next(batches))
        trainer.step += 1
        hashes[trainer.step] = weights_hash(trainer.engine.module.state_dict())
        seen, cut_at, operation = 0, cut, ""
        with contextlib.suppress(Cut):
            trainer._save()
        cut_at = 0
        newest, passed_over = newest_complete(root)
        assert newest is not None, operation
        step = int(newest.name[5:])
        found = {
            "step": trainer.step,
            "operation": operation,
            "newest": step,
            "right_weights": weights_hash(load_weights(newest)) == hashes[step],
            "passed_over": passed_over,
            "latest": (root / "latest").read_text().strip(),
            "folders": sorted(path.name for path in root.iterdir() if path.is_dir()),
        }
        print(json.dumps(found), flush=True)
        return operation

    save(cut=0)
    save(cut=0)
    for number in range(1, 200):
        if not save(cut=number):  # the save had fewer operations: all have been cut
            return
        save(cut=0)  # a whole one, which finds what the cut one left
    raise AssertionError("a save never ended")


if __name__ == "__main__":
    main(sys.argv[1])
