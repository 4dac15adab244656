"""Metrics of a result.json as TensorBoard scalars, in OUT/tensorboard beside it.

The step of a curve over contexts is the context, that of a curve over positions where its bucket
ends, both in tokens; that of a single number is the trained step. `tensorboard --logdir runs` shows
them beside the training's, under the name of the result's folder.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evals.scoring.protocols import family


def write(metrics: Sequence[dict[str, Any]], out_dir: Path, trained_steps: int) -> None:
    """Writes the scalars; those of an earlier evaluation go.

    Args:
        metrics: records with `name`, `protocol`, `value` and, where they have one, `context` or
            `position`; a value of None is left out.
        out_dir: their folder becomes OUT/tensorboard.
        trained_steps: of the model.
    """
    from torch.utils.tensorboard import SummaryWriter

    clear(out_dir)
    with SummaryWriter(str(out_dir / "tensorboard")) as board:
        for metric in metrics:
            step = metric.get("context") or trained_steps
            step = metric["position"][1] if "position" in metric else step
            if metric["value"] is not None:
                tag = f"eval/{family(metric['protocol'])}/{metric['name']}"
                board.add_scalar(tag, metric["value"], step)


def clear(out_dir: Path) -> None:
    """Removes what an earlier evaluation wrote."""
    shutil.rmtree(out_dir / "tensorboard", ignore_errors=True)
