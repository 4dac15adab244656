"""The three splits of a task in a folder: generated or imported once, then memory-mapped."""

import hashlib
import json
import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from tqdm import tqdm

from data.folder_lock import lock_folder
from data.processes import leave_with_parent
from evals.lra.examples import Examples
from pretrain.files import write_json

SPLITS = ("train", "validation", "test")
RECORD = "data.json"
_CHUNK = 500  # examples from one state of a random generator


class Generator(Protocol):
    """A distribution over examples; a frozen dataclass, whose fields say which."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def sample(self, rng: np.random.Generator, n_examples: int) -> Examples: ...


class Importer(Protocol):
    """A published data set; a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def read(self, folder: Path, seed: int) -> dict[str, Examples]: ...


def prepare(
    task: Generator | Importer,
    folder: Path,
    *,
    sizes: tuple[int, ...],
    seed: int,
    source: Path | None,
    workers: int,
) -> dict[str, str]:
    """Fills `folder` with the splits, or finds them there.

    Args:
        task: where examples come from.
        folder: one folder per split below it, and `data.json`, written last.
        sizes: examples of each split, for generators.
        seed: of all examples, or of an importer's validation set.
        source: the folder that an importer reads.
        workers: processes; the examples are the same for any number.

    Returns:
        SHA-256 of each split, as `data.json` has them.

    Raises:
        ValueError: the folder holds other data, or another command is filling it; an importer
            without a source.
    """
    generated = hasattr(task, "sample")
    wanted: dict[str, Any] = {"task": type(task).__name__, **asdict(task), "seed": seed}
    if generated:
        wanted |= {"sizes": list(sizes)}
    wanted = json.loads(json.dumps(wanted))
    if not (folder / RECORD).exists():
        if not generated and source is None:
            raise ValueError(
                f"source= is missing: the folder of the published {wanted['task']} files"
            )
        taken = ValueError(f"data={folder}: another command is filling it; wait for it")
        with lock_folder(folder, taken):
            if not (folder / RECORD).exists():  # it may have come meanwhile, with its readers
                splits = (
                    generate(task, sizes, seed, workers)  # type: ignore[arg-type]
                    if generated
                    else task.read(source, seed)  # type: ignore[arg-type,union-attr]
                )
                hashes = {}
                for split, examples in splits.items():
                    examples.save(folder / split)
                    content = b"".join(part.tobytes() for part in examples)
                    hashes[split] = hashlib.sha256(content).hexdigest()
                write_json(folder / RECORD, {"settings": wanted, "sha256": hashes})
    record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    if record["settings"] != wanted:
        raise ValueError(
            f"data={folder} holds {record['settings']} and not {wanted}: use another data= or "
            f"delete it"
        )
    return record["sha256"]


def generate(
    task: Generator, sizes: tuple[int, ...], seed: int, workers: int
) -> dict[str, Examples]:
    """Splits of the given sizes in which no example comes twice, nor in two of them."""
    splits: dict[str, Examples] = {}
    seen: set[bytes] = set()
    with ProcessPoolExecutor(workers, get_context("spawn"), leave_with_parent) as pool:
        for index, (split, size) in enumerate(zip(SPLITS, sizes, strict=True)):
            parts: list[Examples] = []
            missing, chunk = size, 0
            hide = True if size < _CHUNK else None  # None: where stderr is no terminal
            with tqdm(total=size, desc=f"{split} examples", unit="ex", disable=hide) as bar:
                while missing > 0:
                    keys = [[seed, index, chunk + k] for k in range(math.ceil(missing / _CHUNK))]
                    chunk += len(keys)
                    drawn = map if workers == 1 else pool.map
                    for part in drawn(_draw, [task] * len(keys), keys):
                        new = part.take(_unseen(part, seen)[:missing])
                        parts.append(new)
                        missing -= len(new.labels)
                        bar.update(len(new.labels))
            splits[split] = Examples.join(parts)
    return splits


def _draw(task: Generator, key: list[int]) -> Examples:
    return task.sample(np.random.default_rng(key), _CHUNK)


def _unseen(examples: Examples, seen: set[bytes]) -> np.ndarray:
    """Indices of examples that are not in `seen`, to which they are added."""
    new = []
    for index in range(len(examples.labels)):
        digest = hashlib.blake2b(examples.sequence(index).tobytes(), digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            new.append(index)
    return np.array(new, np.int64)
