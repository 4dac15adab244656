"""What training costs, run by run: speed, memory and losses, from what training wrote.

Reads config.yaml, environment.json and metrics.jsonl; nothing is run again. Losses compare between
runs of one input length only, and the lengths of inputs stand beside them: longer ones tell more
about what is missing, and are damaged in other places.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evals.curves import to_csv
from pretrain.config import load_saved_config
from pretrain.models import build_model

WARM = 0.5  # of the logged rows: speeds are medians and losses means of the others
VALIDATED = ("val/loss", "val/loss/sentinel", "val/loss/other")


def load(path: Path) -> dict[str, Any] | None:
    """The record of a run; None where training has not finished.

    Raises:
        ValueError: no such folder, or it logged too rarely to leave the first steps out.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; name run directories")
    if not (path / "DONE").exists():
        return None
    config = load_saved_config(path / "config.yaml")
    environment = json.loads((path / "environment.json").read_text(encoding="utf-8"))
    lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    logged = [row for row in rows if "tokens_per_second" in row]
    if len(logged) < 2:
        raise ValueError(
            f"{path}: it logged {len(logged)} times, and the first steps are not to be counted; "
            f"train with a smaller logging.every_steps"
        )
    warm = logged[round(WARM * len(logged)) :]
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_model(config.model).parameters())
    last = {key: value for row in rows for key, value in row.items()}
    return {
        "run": path.name,
        "gpus": ", ".join(environment["gpus"]) or environment["device"],
        "compiled": config.train.compile,
        "parameters": parameters,
        "input_tokens": config.train.seq_len,
        "micro_batch_size": config.train.micro_batch_size,
        "batch_tokens": config.train.global_batch_tokens,
        "steps": int(logged[-1]["step"]),
        "tokens_per_second": float(np.median([row["tokens_per_second"] for row in warm])),
        "tflops_per_rank": float(np.median([row["tflops_per_rank"] for row in warm])),
        "mfu": float(np.median([row["mfu"] for row in warm])) if "mfu" in last else None,
        "memory_gib": max(row["memory_gib"] for row in logged),
        "train_loss": float(np.mean([row["loss"] for row in warm])),
        **{name: last.get(name) for name in VALIDATED},
    }


def to_markdown(records: Sequence[dict[str, Any]]) -> str:
    """The records as a table; what is equal in all of them is said once."""
    lines = [
        "| run | parameters | input tokens | micro-batch | tokens/s | TFLOP/s | MFU | peak GiB "
        "| train loss | validation loss | sentinels | other tokens |",
        "|---" * 12 + "|",
    ]
    for r in records:
        losses = [r["train_loss"], *(r[name] for name in VALIDATED)]
        cells = [
            r["run"],
            f"{r['parameters'] / 1e6:.1f}M",
            f"{r['input_tokens']:,}",
            r["micro_batch_size"],
            f"{r['tokens_per_second']:,.0f}",
            f"{r['tflops_per_rank']:.0f}",
            "" if r["mfu"] is None else f"{r['mfu']:.1%}",
            f"{r['memory_gib']:.1f}",
            *("" if loss is None else f"{loss:.3f}" for loss in losses),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    shared = {
        "on": {r["gpus"] for r in records},
        "tokens per step": {f"{r['batch_tokens']:,}" for r in records},
        "steps": {f"{r['steps']:,}" for r in records},
        "compiled": {"yes" if r["compiled"] else "no" for r in records},
    }
    facts = "; ".join(f"{what}: {' or '.join(sorted(said))}" for what, said in shared.items())
    return "\n".join(
        [
            *lines,
            "",
            f"{facts}. Tokens are the encoder's where there is one. Speed: median, training loss: "
            f"mean (nats per target) of the latter half of the steps.",
        ]
    )


def write(paths: Sequence[Path], out_dir: Path) -> str:
    """Writes costs.csv and costs.md into `out_dir`; returns the latter.

    Raises:
        ValueError: nothing has finished; as `load`.
    """
    found = {path: load(path) for path in paths}
    records = [record for record in found.values() if record is not None]
    if not records:
        raise ValueError("none of the runs has finished; train them first")
    left_out = [f"Left out: {path} has not finished." for path, r in found.items() if r is None]
    text = "\n".join([to_markdown(records), *left_out])
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "costs.csv").write_text(to_csv(records), encoding="utf-8")
    (out_dir / "costs.md").write_text(text + "\n", encoding="utf-8")
    return text
