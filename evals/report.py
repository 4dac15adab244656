"""The report of one or several evaluated runs: a self-contained page, and the same as Markdown.

`report.html` needs no network and no file beside it: figures are inline SVG, fonts the system's.
It shows what was measured whatever it says: curves with intervals, a verdict at each context, the
n-gram's line, gates, cost per length, and where everything came from.
"""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evals import plots
from evals.compare import NO_DIFFERENCE, EvalRun, Verdict, compare
from evals.stats import sign_of
from evals.store import write_bytes

_CSS = """
:root { color-scheme: light; }
body { font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #1f2328;
  background: #fff; max-width: 1120px; margin: 2.5rem auto 4rem; padding: 0 1.5rem; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.12rem; margin: 2.4rem 0 .6rem; }
p.lead { color: #57606a; margin: 0 0 1.2rem; } p.note { color: #57606a; font-size: 13px; }
ul.summary { padding-left: 1.1rem; } ul.summary li { margin: .25rem 0; }
figure { margin: 1.2rem 0; } figure svg { width: 100%; height: auto; }
figcaption { color: #57606a; font-size: 13px; }
div.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .75rem; border-bottom: 1px solid #e5e7eb; text-align: right;
  white-space: nowrap; }
th { color: #57606a; font-weight: 600; border-bottom: 2px solid #d0d7de; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
td.wrap { white-space: normal; text-align: left; }
.ci { color: #6e7781; font-size: 12px; } .good { color: #1a7f4b; } .bad { color: #c4321c; }
.even { color: #6e7781; }
code { font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, monospace; background: #f6f8fa;
  padding: .1rem .3rem; border-radius: 4px; overflow-wrap: anywhere; white-space: normal; }
"""


def write(runs: Sequence[EvalRun], out_dir: Path, ngram: EvalRun | None = None) -> Path:
    """Writes report.html and report.md.

    Args:
        runs: one or several; the first is what the others are compared with.
        out_dir: where the files go.
        ngram: the n-gram evaluated on the same targets.

    Returns:
        The path of report.html.

    Raises:
        ValueError: runs cannot be compared, have the same name, or a gate of theirs failed.
    """
    names = [run.name for run in runs]
    if not runs or len(set(names)) != len(names):
        raise ValueError(f"runs={','.join(names) or 'none'}: at least one, each with its own name")
    failed = [run.name for run in runs if not all(g["passed"] for g in run.result["gates"])]
    if failed:
        raise ValueError(f"gates failed in {', '.join(failed)}: there is nothing to report")
    comparisons = _comparisons(runs, ngram)
    summary = findings(runs, ngram)
    figure = plots.curve_figure(
        [run.result for run in runs], _reference(ngram), _differences(comparisons[: len(runs) - 1])
    )
    sections = [
        ("Bits per byte by context", *_level_table(runs, ngram)),
        *(
            (f"Verdict: {a.name} against {b.name}", *_verdict_table(a, b, verdicts))
            for a, b, verdicts in comparisons
        ),
        ("Gains from context", *_gain_table(runs)),
        ("Gates", *_gate_table(runs)),
        ("Cost", *_cost_table(runs)),
        ("Provenance", *_provenance_table(runs)),
    ]
    title = "Perplexity against context length: " + ", ".join(names)
    page = _page(title, _lead(runs), summary, plots.to_svg(figure), sections)
    write_bytes(out_dir / "report.html", page.encode())
    write_bytes(out_dir / "report.png", plots.to_png(figure))
    write_bytes(out_dir / "report.md", _markdown(title, _lead(runs), summary, sections).encode())
    return out_dir / "report.html"


_CAPTION = (
    "Shaded: 95 % over documents; for gains a band that holds all contexts at once. "
    "Dotted: the training length."
)

Comparison = tuple[EvalRun, EvalRun, list[Verdict]]
Row = list[str]
Section = tuple[str, str, Row, list[Row]]


def _lead(runs: Sequence[EvalRun]) -> str:
    data = runs[0].result["data"]
    return (
        f"{data['n_docs']} held-out documents, {data['n_tokens']:,} tokens, "
        f"{data['n_bytes']:,} bytes; every interval is 95 % over documents."
    )


def _comparisons(runs: Sequence[EvalRun], ngram: EvalRun | None) -> list[Comparison]:
    """The first run against each other one, and every run against the n-gram."""
    pairs = [(runs[0], other) for other in runs[1:]]
    pairs += [(run, ngram) for run in runs if ngram]
    return [(a, b, compare(a, b)) for a, b in pairs]


def findings(runs: Sequence[EvalRun], ngram: EvalRun | None = None) -> list[str]:
    """What was found, in words, one line each."""
    lines = []
    for a, b, verdicts in _comparisons(runs, ngram):
        fixed = [v for v in verdicts if v.metric == "bpb" and v.protocol.startswith("fixed")]
        groups: dict[str, list[str]] = {}
        for verdict in fixed:
            groups.setdefault(verdict.verdict, []).append(f"{verdict.context:,}")
        found = "; ".join(f"{what} at {', '.join(at)}" for what, at in groups.items())
        if found:
            lines.append(f"{a.name} against {b.name}, by context: {found}.")
    for run in runs:
        beyond = plots.series(run.result, "gain_beyond_training")
        if beyond:
            last = beyond[-1]
            lines.append(
                f"{run.name}, trained at {run.result['model']['train_length']:,}: "
                f"{last['context']:,} tokens of context instead of {last['baseline_context']:,} "
                f"change the loss by {-last['value']:+.4f} nat per token "
                f"({_gain_words(last)})."
            )
    n_gates = sum(len(run.result["gates"]) for run in runs)
    lines.append(f"All {n_gates} gates passed.")
    if any(m["n_docs_low"] for run in runs for m in run.result["metrics"]):
        lines.append("Some numbers rest on fewer than 20 documents; they are marked (few).")
    return lines


def _gain_words(metric: dict[str, Any]) -> str:
    words = {1: "it gains", -1: "it degrades", 0: NO_DIFFERENCE}
    return words[sign_of(metric["value"], metric["band95"])]


def _reference(ngram: EvalRun | None) -> dict[str, Any] | None:
    if ngram is None:
        return None
    levels = plots.series(ngram.result, "bpb")
    return {**levels[-1], "name": ngram.name} if levels else None


def _differences(comparisons: Sequence[Comparison]) -> list[plots.Difference]:
    """Bits per byte of the other run minus the first, by context."""
    differences = []
    for a, b, verdicts in comparisons:
        points = [
            {"context": v.context, "value": -v.difference.value, "ci95": interval}
            for v in verdicts
            if v.metric == "bpb" and v.protocol.startswith("fixed")
            for interval in [v.difference.ci95 and tuple(-x for x in v.difference.ci95[::-1])]
        ]
        if points:
            differences.append(plots.Difference(f"{b.name} - {a.name}", points))
    return differences


def _level_table(runs: Sequence[EvalRun], ngram: EvalRun | None) -> tuple[str, Row, list[Row]]:
    everyone = [*runs, *([ngram] if ngram else [])]
    rows = []
    for record in runs[0].result["protocols"]:
        row = [record["id"], _count(record["context"]), _count(record["n_tokens"])]
        for run in everyone:
            row.append(_cell(_metric(run, "bpb", record)))
        row += [_plain(_metric(run, "token_ppl", record)) for run in runs]
        rows.append(row)
    note = (
        "`fixed(T)`: the same target spans for every context, each preceded by exactly that many "
        "tokens of its document. The other protocols score other tokens: compare along a row."
    )
    header = ["protocol", "context", "tokens", *(f"{run.name} bpb" for run in everyone)]
    return note, header + [f"{run.name} token ppl" for run in runs], rows


def _verdict_table(a: EvalRun, b: EvalRun, verdicts: list[Verdict]) -> tuple[str, Row, list[Row]]:
    rows = []
    for v in verdicts:
        d = v.difference
        interval = f"{d.ci95[0]:+.4f} .. {d.ci95[1]:+.4f}" if d.ci95 else "one document"
        few = " (few)" if d.n_docs_low else ""
        rows.append(
            [
                v.protocol,
                _count(v.context),
                v.metric,
                f"{d.value:+.4f}",
                interval,
                f"{d.n_docs}{few}",
                v.verdict,
            ]
        )
    note = (
        f"Paired by document; negative: {a.name} is better. A winner is named only where the "
        "interval excludes zero and the difference is above rounding (1e-4). One training run "
        "each: the spread between seeds is not in it."
    )
    header = ["protocol", "context", "metric", "difference", "95 %", "documents", "verdict"]
    return note, header, rows


def _gain_table(runs: Sequence[EvalRun]) -> tuple[str, Row, list[Row]]:
    rows = []
    for run in runs:
        for name in ("gain", "gain_beyond_training"):
            for m in plots.series(run.result, name):
                band = m["band95"]
                rows.append(
                    [
                        run.name,
                        f"{_count(m['baseline_context'])} to {_count(m['context'])}",
                        f"{m['value']:+.4f}",
                        f"{band[0]:+.4f} .. {band[1]:+.4f}" if band else "one document",
                        _gain_words(m),
                    ]
                )
    note = (
        "Nats per token that more context saves on the same targets, with a band that holds all "
        "contexts of a run at once; first from the smallest context, then beyond training length."
    )
    return note, ["run", "context", "gain", "simultaneous 95 %", "reading"], rows


def _gate_table(runs: Sequence[EvalRun]) -> tuple[str, Row, list[Row]]:
    rows = []
    for run in runs:
        names = dict.fromkeys(gate["name"] for gate in run.result["gates"])
        for name in names:
            group = [gate for gate in run.result["gates"] if gate["name"] == name]
            worst = max(group, key=lambda gate: gate["value"])
            where = worst["detail"] if len(group) == 1 else f"{len(group)} passes"
            state = "passed" if all(gate["passed"] for gate in group) else "FAILED"
            value, bound = f"{worst['value']:.2g}", f"{worst['bound']:.2g}"
            rows.append([run.name, name, state, value, bound, where])
    note = "Checked before and after scoring; a failed gate means that no report is written."
    return note, ["run", "gate", "state", "value", "bound", "where"], rows


def _cost_table(runs: Sequence[EvalRun]) -> tuple[str, Row, list[Row]]:
    rows = []
    for run in runs:
        for cost in run.result["cost"]:
            memory = f"{cost['peak_memory_bytes'] / 2**20:,.0f} MiB ({cost['peak_memory_of']})"
            rows.append(
                [
                    run.name,
                    cost["pass"],
                    f"{cost['input_tokens']:,}",
                    f"{cost['seconds']:.2f}",
                    f"{cost['tokens_per_second']:,.0f}",
                    memory,
                ]
            )
    note = "Forward passes only, as scored; peak memory of a process never falls."
    return note, ["run", "pass", "input tokens", "seconds", "tokens/s", "peak memory"], rows


def _provenance_table(runs: Sequence[EvalRun]) -> tuple[str, Row, list[Row]]:
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


def _metric(run: EvalRun, name: str, record: dict[str, Any]) -> dict[str, Any] | None:
    for metric in run.result["metrics"]:
        if (metric["name"], metric["protocol"], metric["context"]) == (
            name,
            record["id"],
            record["context"],
        ):
            return metric
    return None


def _cell(metric: dict[str, Any] | None) -> str:
    if metric is None:
        return "-"
    few = " (few)" if metric["n_docs_low"] else ""
    if not metric["ci95"]:
        return f"{metric['value']:.4f}{few}"
    return f"{metric['value']:.4f} [{metric['ci95'][0]:.3f}, {metric['ci95'][1]:.3f}]{few}"


def _plain(metric: dict[str, Any] | None) -> str:
    return f"{metric['value']:.2f}" if metric else "-"


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _page(
    title: str, lead: str, summary: Sequence[str], svg: str, sections: Sequence[Section]
) -> str:
    items = "".join(f"<li>{html.escape(line)}</li>" for line in summary)
    figure = f"<figure>{svg}<figcaption>{_CAPTION}</figcaption></figure>"
    body = [
        f"<h1>{html.escape(title)}</h1><p class='lead'>{html.escape(lead)}</p>",
        f"<ul class='summary'>{items}</ul>{figure}",
    ]
    for heading, note, header, rows in sections:
        if rows:
            body.append(f"<h2>{html.escape(heading)}</h2>{_html_table(header, rows)}")
            body.append(f"<p class='note'>{_html_note(note)}</p>" if note else "")
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{_CSS}</style></head>"
        f"<body>{''.join(body)}</body></html>\n"
    )


def _html_note(note: str) -> str:
    parts = html.escape(note).split("`")
    return "".join(f"<code>{p}</code>" if k % 2 else p for k, p in enumerate(parts))


def _html_table(header: Row, rows: Sequence[Row]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    lines = ["<tr>" + "".join(_html_cell(cell) for cell in row) + "</tr>" for row in rows]
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f"<div class='scroll'>{table}</div>"


def _html_cell(cell: str) -> str:
    text = html.escape(cell)
    if cell in ("passed", "it gains") or cell.endswith(" better"):
        return f"<td class='text good'>{text}</td>"
    if cell in ("FAILED", "it degrades"):
        return f"<td class='text bad'>{text}</td>"
    if cell == NO_DIFFERENCE:
        return f"<td class='text even'>{text}</td>"
    if len(cell) > 60:
        return f"<td class='wrap'><code>{text}</code></td>"
    return f"<td>{text}</td>"


def _markdown(title: str, lead: str, summary: Sequence[str], sections: Sequence[Section]) -> str:
    lines = [f"# {title}", "", lead, "", *(f"- {line}" for line in summary), ""]
    lines += ["![curves](report.png)", ""]
    for heading, note, header, rows in sections:
        if not rows:
            continue
        lines += [f"## {heading}", ""]
        lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        lines += ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]
        lines += ["", note, ""] if note else [""]
    return "\n".join(lines)
