"""From results to the table, the CSV, the sentences below it, and the plot.

MFU is train FLOPs per token x tokens/s over the dense bf16 peak of the device's data sheet.
"""

import csv
import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from evals.plots import COLOURS, STYLE
from evals.throughput.processes import Result
from pretrain.training.metrics import PEAK_BF16_FLOPS

Row = dict[str, Any]


def row_of(result: Result) -> Row:
    """The figures of one result; None where there are none."""
    settings = result["settings"]
    row: Row = {
        "model": result["name"],
        "loop": settings["loop"],
        "precision": settings["precision"],
        "checkpointing": settings["checkpointing"],
        "residual_in_fp32": settings["residual_in_fp32"],
        "length": settings["length"],
        "batch_size": settings["batch_size"],
        **dict.fromkeys(
            ("parameters", "ms", "ms_q1", "ms_q3", "ms_mean", "tokens_per_second", "tflops", "mfu")
        ),
        "memory_gib": result.get("memory_gib"),
        "ready_seconds": result.get("ready_seconds"),
        "status": result["status"],
    }
    if result["status"] != "ok":
        return row
    ms = 1e3 * np.quantile(result["step_seconds"], (0.25, 0.5, 0.75))
    rate = 1e3 * settings["batch_size"] * settings["length"] / ms[1]
    name = result["machine"]["device"]
    peak = next((peak for key, peak in PEAK_BF16_FLOPS.items() if key in name), None)
    flops = rate * result["train_flops"]
    row |= {"parameters": result["parameters"], "tokens_per_second": float(rate)}
    row |= {"ms_q1": float(ms[0]), "ms": float(ms[1]), "ms_q3": float(ms[2])}
    row |= {"ms_mean": float(1e3 * np.mean(result["step_seconds"]))}
    row |= {"tflops": flops / 1e12, "mfu": flops / peak if peak else None}
    return row


def best(rows: Sequence[Row]) -> list[Row]:
    """Per model, loop and length the fastest row; where none is "ok", the last one tried."""
    chosen: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = row["model"], row["loop"], row["length"]
        held = chosen.get(key, {}).get("tokens_per_second") or 0
        if key not in chosen or (row["tokens_per_second"] or 0) >= held:
            chosen[key] = row
    return list(chosen.values())


def markdown(rows: Sequence[Row]) -> str:
    """The table."""
    header = [
        *("model", "loop", "micro-batch", "ms per step [quartiles]", "tokens/s", "TFLOP/s", "MFU"),
        *("peak GiB", "ready after s"),
    ]
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)]]
    for row in rows:
        head = [row["model"], row["loop"], f"{row['batch_size']} x {row['length']:,}"]
        if row["status"] != "ok":
            lines.append([*head, row["status"].replace("|", "/"), *[""] * (len(header) - 4)])
            continue
        lines.append([*head, *_cells(row)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def brief(row: Row) -> str:
    """The row in words, as soon as it is measured."""
    if row["status"] != "ok":
        return str(row["status"])
    ms, rate, _, mfu, memory, _ = _cells(row)
    return ", ".join(
        [f"{ms} ms", f"{rate} tokens/s", *([f"MFU {mfu}"] if mfu else []), f"{memory} GiB"]
    )


def _cells(row: Row) -> list[str]:
    return [
        "{ms:,.1f} [{ms_q1:,.1f}, {ms_q3:,.1f}]".format(**row),
        f"{row['tokens_per_second']:,.0f}",
        f"{row['tflops']:,.1f}",
        "" if row["mfu"] is None else f"{row['mfu']:.1%}",
        f"{row['memory_gib']:.1f}",
        f"{row['ready_seconds']:.0f}",
    ]


def sentences(rows: Sequence[Row]) -> list[str]:
    """What a loop adds to the one before it, memory over tokens, and speed over length."""
    found = []
    timed = [row for row in rows if row["status"] == "ok"]
    by_key = {(row["model"], row["loop"], row["length"], row["batch_size"]): row for row in timed}
    for (model, loop, length, batch), row in by_key.items():
        for other, name in (("plain", "DeepSpeed"), ("deepspeed", "the trainer")):
            base = by_key.get((model, other, length, batch))
            if base and loop == {"plain": "deepspeed", "deepspeed": "trainer"}[other]:
                # Means: a median would leave out what the trainer does every ten steps.
                share = row["ms_mean"] / base["ms_mean"] - 1
                found.append(
                    f"{model}, {batch} x {length:,}: {name} adds {share:+.1%} to the {other} loop "
                    f"(mean step {base['ms_mean']:,.1f} to {row['ms_mean']:,.1f} ms)"
                )
    for model, loop, length in dict.fromkeys((model, loop, n) for model, loop, n, _ in by_key):
        own = [row for key, row in by_key.items() if key[:3] == (model, loop, length)]
        least, most = (f(own, key=lambda row: row["batch_size"]) for f in (min, max))
        if least is not most:
            tokens = [length * row["batch_size"] for row in (least, most)]
            grown = 2**20 * (most["memory_gib"] - least["memory_gib"]) / (tokens[1] - tokens[0])
            found.append(
                f"{model}, {loop}: {grown:,.1f} KiB of peak memory per token between micro-batches "
                f"of {tokens[0]:,} and {tokens[1]:,}"
            )
    fastest = [row for row in best(rows) if row["status"] == "ok"]
    for model, loop in dict.fromkeys((row["model"], row["loop"]) for row in fastest):
        own = [row for row in fastest if (row["model"], row["loop"]) == (model, loop)]
        shortest = min(own, key=lambda row: row["length"])
        ratios = [
            f"{row['tokens_per_second'] / shortest['tokens_per_second']:.2f} at {row['length']:,}"
            for row in own
            if row is not shortest
        ]
        if ratios:
            found.append(f"{model}, {loop}: {', '.join(ratios)} of {shortest['length']:,}'s speed")
    return found


def to_csv(rows: Sequence[Row]) -> str:
    """One line per measurement."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def figure(rows: Sequence[Row], title: str) -> Figure:
    """Tokens/s over length, a line per model and loop."""
    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=(7, 4.2), layout="constrained")
        axis = drawn.subplots()
        timed = [row for row in rows if row["status"] == "ok"]
        names = dict.fromkeys((row["model"], row["loop"]) for row in timed)
        for k, (model, loop) in enumerate(names):
            own = [row for row in timed if (row["model"], row["loop"]) == (model, loop)]
            own.sort(key=lambda row: row["length"])
            label = model if loop == "plain" else f"{model}, {loop}"
            axis.plot(
                [row["length"] for row in own],
                [row["tokens_per_second"] for row in own],
                "o-" if k < len(COLOURS) else "s--",
                color=COLOURS[k % len(COLOURS)],
                label=label,
            )
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("tokens per sequence")
        axis.set_ylabel("tokens per second")
        axis.set_title(title)
        if names:
            axis.legend(fontsize=8)
    return drawn
