"""What a recall experiment trains; `evals.trainings` runs it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from evals.recall.rows import ROWS
from evals.recall.tasks import RecallTask
from evals.recall.train import TrainOptions, run
from evals.trainings import Result


@dataclass(frozen=True)
class Experiment:
    """What is trained on what.

    Attributes:
        task: the task.
        rows: names of `ROWS`.
        seeds: of initial weights and of examples; each has a test set of its own.
        learning_rates: in the order in which they are tried.
        options: of every training.
        device: "cpu" or "cuda"; all processes share it.
    """

    task: RecallTask
    rows: tuple[str, ...]
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    options: TrainOptions
    device: str

    def train(self, row: str, seed: int, learning_rate: float, progress: Path) -> Result:
        """One training; a minute long, it starts anew after a kill and leaves no `progress`."""
        config = ROWS[row].config(self.task.vocab_size)
        device = torch.device(self.device)
        return run(config, self.task, learning_rate, seed, self.options, device)

    def settings(self, row: str, seed: int, learning_rate: float) -> dict[str, Any]:
        """Everything that a training's result depends on, but the machine."""
        config = ROWS[row].config(self.task.vocab_size)
        return {
            "row": row,
            "seed": seed,
            "learning_rate": learning_rate,
            "task": {"name": type(self.task).__name__, **asdict(self.task)},
            "options": asdict(self.options) | {"test_lengths": list(self.options.test_lengths)},
            "layers": list(config.layers.pattern),
            "mixers": config.mixers,
        }
