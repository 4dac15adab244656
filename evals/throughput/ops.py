"""Times single operators on the device alone, with their error against fp64.

    python -m evals.throughput.ops ssm lengths=2048,65536
    python -m evals.throughput.ops bst_layer
    python -m evals.throughput.ops window_attention window=512

Keys and their defaults are the options at the top of op_ssm.py, op_bst_layer.py and
op_window_attention.py; besides, device=auto and out=runs/throughput. Writes out/OP.md and
out/OP.json; exit code 2 for bad input. Every row is kept in out/operators: the same command, with
more lengths or after an interruption, goes on.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import fields, make_dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from evals.throughput import op_bst_layer, op_ssm, op_window_attention
from evals.throughput.machine import describe_machine
from evals.throughput.op_jobs import Job, record_of, rows_of
from evals.throughput.op_rows import OpRow, markdown
from evals.throughput.settings import installed_versions, source_digest
from pretrain.command_line import first_device, numbers, parse

BAD_INPUT = 2
# Options that say which rows there are, and nothing about one of them.
SELECTION = {"lengths", "compile", "unrolled_blocks", "timeout_s", "device", "out"}
OPS: dict[str, tuple[type, Any]] = {
    "ssm": (op_ssm.SSMOptions, op_ssm.jobs),
    "bst_layer": (op_bst_layer.BSTLayerOptions, op_bst_layer.jobs),
    "window_attention": (op_window_attention.WindowAttentionOptions, op_window_attention.jobs),
}


def main(argv: list[str]) -> int:
    """Runs a command line; the exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(__doc__)
        return 0 if argv else BAD_INPUT
    name, *words = argv
    try:
        if name not in OPS:
            raise ValueError(f"{name}: no operator; use {', '.join(OPS)}")
        kind, jobs = OPS[name]
        options = parse(_with_common(kind), words)
        device = first_device(options.device)
        machine = describe_machine(device)
        lengths = numbers("lengths", options.lengths)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    print(machine.describe(), flush=True)
    # Dynamo runs what it has compiled in eight kinds uncompiled from then on, for good.
    torch._dynamo.config.recompile_limit = 64
    circumstances = {
        "operator": name,
        "options": {key: value for key, value in vars(options).items() if key not in SELECTION},
        "device": machine.device,
        "versions": installed_versions(),
        "source": source_digest(),
    }
    out_dir = Path(options.out)
    rows: list[OpRow] = []
    lines: list[str] = []
    found = _measure(jobs(options, lengths, device), out_dir / "operators", circumstances)
    for _, of_length in groupby(found, key=lambda row: row.length):
        begin = len(rows)
        for row in of_length:
            print(markdown([row]).splitlines()[-1], flush=True)
            rows.append(row)
        if name == "bst_layer":
            verdict = [f"- {line}" for line in op_bst_layer.ratios(rows[begin:])]
            print(*verdict, sep="\n", flush=True)
            lines += verdict
    sizes = ", ".join(f"{f.name}={getattr(options, f.name)}" for f in fields(kind))
    text = f"{machine.describe()}; {sizes}\n\n{markdown(rows)}\n"
    text += "".join(f"{line}\n" for line in lines)
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / f"{name}.md").write_text(text, encoding="utf-8")
    records = [record_of(row) for row in rows]
    content = {"machine": vars(machine), "options": vars(options), "rows": records}
    (out_dir / f"{name}.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    print(f"\n{text}", end="")
    return 0


def _measure(jobs: Iterator[Job], folder: Path, circumstances: dict[str, Any]) -> Iterator[OpRow]:
    """Rows as they come; what was not compiled in time is not tried at greater lengths."""
    too_long: dict[str, int] = {}
    for job in jobs:
        form, length = job.row.form, job.row.length
        if length > too_long.get(form, length):
            yield job.row._replace(note="not compiled at fewer tokens")
            continue
        for row in rows_of(job, folder, circumstances):
            if row.note.startswith("not compiled"):
                too_long[form] = length
            yield row


def _with_common(kind: type) -> type:
    """The operator's options and those of every operator."""
    common = [("device", str, "auto"), ("out", str, "runs/throughput")]
    return make_dataclass("OpArguments", common, bases=(kind,))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
