"""Many small trainings in a pool of processes, resumable one by one.

Every model and seed is one search: learning rates are tried in a given order until one solves the
task on the validation set, by the same rule for all models. Every training leaves one JSON file,
which appears when it is whole; a second start trains only what has none.
"""

import hashlib
import itertools
import json
import os
import shlex
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from data.folder_lock import lock_folder
from data.processes import leave_with_parent
from pretrain.training.environment import git_commit, visible_gpus

Result = dict[str, Any]


class Experiment(Protocol):
    """What is trained on what; picklable.

    Attributes:
        rows: names of the models.
        seeds: of each model.
        learning_rates: in the order in which they are tried.
    """

    @property
    def rows(self) -> tuple[str, ...]: ...

    @property
    def seeds(self) -> tuple[int, ...]: ...

    @property
    def learning_rates(self) -> tuple[float, ...]: ...

    def settings(self, row: str, seed: int, learning_rate: float) -> dict[str, Any]:
        """Everything that a training's result depends on, but the machine; `row`, `seed` and
        `learning_rate` among it."""
        ...

    def train(self, row: str, seed: int, learning_rate: float, progress: Path) -> Result:
        """One training: `solved`, and what the report needs. `progress` is a file for what it needs
        to go on after a kill; it is removed once the result is there."""
        ...


def run_all(experiment: Experiment, out_dir: Path, workers: int) -> list[Result]:
    """Trains what `out_dir` does not hold yet.

    Returns:
        One result per training, whenever it was done.

    Raises:
        ValueError: `out_dir` holds a training with other settings, or another command trains there.
    """
    taken = ValueError(
        f"{out_dir}: another command is training there; wait for it, or use another out="
    )
    with lock_folder(out_dir, taken):
        return _run_all(experiment, out_dir, workers)


def _run_all(experiment: Experiment, out_dir: Path, workers: int) -> list[Result]:
    searches = [(row, seed) for row in experiment.rows for seed in experiment.seeds]
    for row, seed in searches:
        for learning_rate in experiment.learning_rates:
            load(out_dir, experiment.settings(row, seed, learning_rate))
    results: list[Result] = []
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the workers' libraries when they are loaded
    # Spawned, because a forked process cannot use a GPU that its parent has used.
    context = get_context("spawn")
    gpus: SimpleQueue[str] = context.SimpleQueue()  # one name per worker, in turn
    n_workers = min(workers, len(searches))
    for gpu in itertools.islice(itertools.cycle(visible_gpus()), n_workers):
        gpus.put(gpu)
    pool = ProcessPoolExecutor(n_workers, context, _start_worker, (gpus,))
    try:
        futures = [pool.submit(search, experiment, row, seed, out_dir) for row, seed in searches]
        done = as_completed(futures)
        for future in tqdm(
            done, total=len(futures), desc="models x seeds", unit="search", disable=None
        ):
            results += future.result()
    finally:
        pool.shutdown(cancel_futures=True)
    return results


def _start_worker(gpus: "SimpleQueue[str]") -> None:
    """Ties a worker to its parent's life and gives it, which has not used CUDA yet, the next of the
    GPUs if there are any."""
    leave_with_parent()
    if not gpus.empty():
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus.get()


def search(experiment: Experiment, row: str, seed: int, out_dir: Path) -> list[Result]:
    """The trainings of one model and seed, up to the first that solves the task."""
    torch.set_num_threads(1)
    results: list[Result] = []
    for learning_rate in experiment.learning_rates:
        wanted = experiment.settings(row, seed, learning_rate)
        result = load(out_dir, wanted)
        if result is None:
            # Named by the settings: another training does not go on from this one's file.
            digest = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:8]
            progress = result_path(out_dir, wanted).with_suffix(f".{digest}.pt")
            result = {"settings": wanted} | experiment.train(row, seed, learning_rate, progress)
            save(out_dir, result)
            progress.unlink(missing_ok=True)
        results.append(result)
        if result["solved"]:
            break
    return results


def load(out_dir: Path, wanted: dict[str, Any]) -> Result | None:
    """The result of a training, if there is one.

    Raises:
        ValueError: there is one of the same name with other settings.
    """
    path = result_path(out_dir, wanted)
    if not path.exists():
        return None
    result: Result = json.loads(path.read_text(encoding="utf-8"))
    found = result["settings"]
    other = [key for key in wanted if found.get(key) != wanted[key]]
    if other:
        raise ValueError(
            f"out={out_dir}: {path.name} was trained with other settings "
            f"({', '.join(f'{key}={found.get(key)}' for key in other)}); delete it or use "
            f"another out="
        )
    return result


def save(out_dir: Path, result: Result) -> None:
    path = result_path(out_dir, result["settings"])
    temporary = path.with_suffix(".tmp")  # a kill leaves no half-written result
    temporary.write_text(json.dumps(result, indent=1), encoding="utf-8")
    os.replace(temporary, path)


def result_path(out_dir: Path, wanted: dict[str, Any]) -> Path:
    return out_dir / f"{wanted['row']}-seed{wanted['seed']}-lr{wanted['learning_rate']:g}.json"


def write_table(
    out_dir: Path,
    table: str,
    models: Sequence[dict[str, Any]],
    command: Sequence[str],
    **facts: Any,
) -> None:
    """Writes table.md, and results.json with the same numbers and where they come from."""
    about = {"command": shlex.join(command), "commit": git_commit(), "torch": torch.__version__}
    content = {"provenance": {**about, **facts}, "models": models}
    (out_dir / "table.md").write_text(table + "\n", encoding="utf-8")
    (out_dir / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def best(results: Sequence[Result], row: str, seed: int) -> Result:
    """The training with the best validation accuracy, the earlier one of equals."""
    own = [
        result
        for result in results
        if (result["settings"]["row"], result["settings"]["seed"]) == (row, seed)
    ]
    return max(own, key=lambda result: result["validation"])
