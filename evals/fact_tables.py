"""The tables that close every report: gates, cost and provenance of each training.

Each is a note, a header and rows, what `evals.page.Section` has behind its heading.
"""

from collections.abc import Sequence

from evals.compare import EvalRun
from evals.page import Row, count


def trainings(runs: Sequence[EvalRun]) -> list[EvalRun]:
    """What was evaluated: each seed of a row, and the runs that stand alone."""
    return [training for run in runs for training in run.trainings]


def gate_table(runs: Sequence[EvalRun]) -> tuple[str, Row, list[Row]]:
    rows = []
    for run in trainings(runs):
        names = dict.fromkeys(gate["name"] for gate in run.result["gates"])
        for name in names:
            group = [gate for gate in run.result["gates"] if gate["name"] == name]
            worst = max(group, key=lambda gate: gate["value"])
            where = worst["detail"] if len(group) == 1 else f"{len(group)} passes"
            state = "passed" if all(gate["passed"] for gate in group) else "FAILED"
            value, bound = f"{worst['value']:.2g}", f"{worst['bound']:.2g}"
            rows.append([run.name, name, state, value, bound, where])
    note = (
        "Checked before and after scoring; a failed gate means that no report is written. Models "
        "that round to codes are compared with their codes held; flips are codes that rounding "
        "decides, of keys as near to one code as to another."
    )
    return note, ["run", "gate", "state", "value", "bound", "where"], rows


def cost_table(runs: Sequence[EvalRun]) -> tuple[str, Row, list[Row]]:
    rows = []
    for run in trainings(runs):
        for cost in run.result["cost"]:
            memory = f"{cost['peak_memory_bytes'] / 2**20:,.0f} MiB ({cost['peak_memory_of']})"
            rows.append(
                [
                    run.name,
                    cost["pass"],
                    count(cost["context"]),
                    f"{cost['input_tokens']:,}",
                    f"{cost['seconds']:.2f}",
                    f"{cost['tokens_per_second']:,.0f}",
                    memory,
                ]
            )
    note = (
        "Forward passes only, as scored, beside whatever else the machine did; peak memory of a "
        "process never falls."
    )
    return (
        note,
        ["run", "pass", "context", "input tokens", "seconds", "tokens/s", "peak memory"],
        rows,
    )


def provenance_table(runs: Sequence[EvalRun]) -> tuple[str, Row, list[Row]]:
    runs = trainings(runs)
    facts: list[tuple[str, list[str]]] = []
    for section in ("model", "tokenizer", "data", "policy", "env"):
        keys = dict.fromkeys(key for run in runs for key in run.result[section])
        for key in keys:
            values = [str(run.result[section].get(key, "")) for run in runs]
            facts.append((f"{section}.{key}", values))
    facts.append(("created", [run.result["created"] for run in runs]))
    facts.append(("command", [run.result["command"] for run in runs]))
    rows = [[name, *values] for name, values in facts]
    return "", ["fact", *(run.name for run in runs)], rows
