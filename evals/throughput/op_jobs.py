"""Jobs of an operator's table, one per form and length; what one has measured is kept as a file."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from evals.throughput.compile_limit import NotCompiledError
from evals.throughput.device_time import DeviceTime
from evals.throughput.op_rows import OpRow
from pretrain.files import write_json


class Job(NamedTuple):
    """row: the form, the length and the batch size, without times. measure: what fills it in."""

    row: OpRow
    measure: Callable[[], list[OpRow]]


def rows_of(job: Job, folder: Path, circumstances: dict[str, Any]) -> list[OpRow]:
    """The job's rows, from `folder` or from the device.

    A form that was not compiled in time is a row that says so, and is tried anew by the next call.

    Args:
        job: what to measure.
        folder: of the files.
        circumstances: everything besides the job that its rows depend on.
    """
    identity = json.dumps([job.row, circumstances], sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    path = folder / f"{circumstances['operator']}-{job.row.length}-{digest}.json"
    if path.exists():
        return [_row(record) for record in json.loads(path.read_text(encoding="utf-8"))["rows"]]
    try:
        rows = job.measure()
    except torch.OutOfMemoryError:
        rows = [job.row._replace(note="out of memory")]
    except NotCompiledError as error:
        return [job.row._replace(note=str(error))]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, {"circumstances": circumstances, "rows": [record_of(row) for row in rows]})
    return rows


def record_of(row: OpRow) -> dict[str, Any]:
    """JSON-able."""
    times = {"forward": row.forward, "both": row.both}
    return row._asdict() | {key: time and time._asdict() for key, time in times.items()}


def _row(record: dict[str, Any]) -> OpRow:
    times = {key: record[key] and DeviceTime(**record[key]) for key in ("forward", "both")}
    return OpRow(**record | times)
