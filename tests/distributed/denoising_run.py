"""Trains tiny models, mostly encoder-decoders, as a JSON file says, by launch/train.py's set-up.

    denoising_run.py SPEC.json     SPEC: a list of [arguments of the command, abandon_at]; the runs
                                   are trained one after another in one process group

`abandon_at` is a step before which the process forgets a run, as a kill would; null: none.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.train import set_up
from pretrain.batch import EncoderDecoderBatch
from pretrain.training.leaving import leave

Steps = Callable[[int], Iterator[list[EncoderDecoderBatch]]]


class Abandoned(Exception):
    """Stands in for a kill."""


def until(steps: Steps, last: int | None) -> Steps:
    def some(start: int) -> Iterator[list[EncoderDecoderBatch]]:
        for step, batches in enumerate(steps(start), start):
            if step == last:
                raise Abandoned
            yield batches

    return some


def main(spec: str) -> int:
    torch.set_num_threads(1)
    for arguments, abandon_at in json.loads(Path(spec).read_text()):
        trainer = set_up(arguments)
        assert trainer is not None
        trainer.loader.steps = until(trainer.loader.steps, abandon_at)  # type: ignore[method-assign]
        with contextlib.suppress(Abandoned):
            trainer.fit()
        trainer.engine.destroy()
    return 0


if __name__ == "__main__":
    leave(main(next(a for a in sys.argv[1:] if not a.startswith("--local_rank"))))
