"""How the probes of a trained run are shown: findings, figure, page; all from its result.json."""

from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from evals import fact_tables, plots
from evals import page as html
from evals.compare import EvalRun
from evals.recall.likelihood import RANKED
from evals.recall.probes import SPAN_TOKENS

Result = dict[str, Any]

_CAPTION = (
    "Accuracy in % by length and depth: how often the right continuation is the likeliest. White "
    "is chance; grey and slanted: the 95 % interval by trial holds chance. Dotted: the training "
    "length. Losses are shaded with 95 % over documents."
)
_INDUCTION = {
    "nll_first": "first copy",
    "nll_second": "second copy",
    "nll_control": "other tokens in its place",
}


def select(result: Result, probe: str, name: str, *, pooled: bool = False) -> list[dict[str, Any]]:
    """A probe's metrics of one name, at each depth or, `pooled`, over all depths."""
    return [
        metric
        for metric in result["metrics"]
        if (metric["probe"], metric["name"]) == (probe, name)
        and (metric["depth"] is None) == (pooled or probe not in RANKED)
    ]


def findings(result: Result) -> list[str]:
    """One line per probe and length, and one per cell that could not be asked."""
    lines = []
    for probe in RANKED:
        for metric in select(result, probe, "accuracy", pooled=True):
            lines.append(
                f"{probe} at {metric['length']:,} tokens: {_cell(metric, _percent)} over all "
                f"depths, chance {_percent(metric['chance'])}"
            )
    for metric in select(result, "induction", "copied"):
        lines.append(
            f"induction over {metric['length']:,} tokens: a span that comes again saves "
            f"{_cell(metric, _decimal)} nats per token"
        )
    for cell in result["skipped"]:
        if cell["depth"] in (None, result["questions"]["depths"][0]):
            lines.append(
                f"{cell['probe']} at {cell['length']:,} tokens: not asked; {cell['reason']}"
            )
    return lines


def figure(result: Result) -> Figure:
    """Heat maps of the ranked probes, losses of the induction probe."""
    train_length = result["model"]["train_length"]
    maps = {probe: select(result, probe, "accuracy") for probe in RANKED}
    maps = {probe: metrics for probe, metrics in maps.items() if metrics}
    losses = {label: select(result, "induction", name) for name, label in _INDUCTION.items()}
    n_panels = len(maps) + any(losses.values())
    with matplotlib.rc_context(plots.STYLE):
        drawn = Figure(figsize=(5.2 * n_panels, 3.9), layout="constrained")
        axes = iter(drawn.subplots(1, n_panels, squeeze=False)[0])
        for probe, metrics in maps.items():
            title = f"{probe}: accuracy among {result['questions']['candidates']}, %"
            plots.draw_heat_map(drawn, next(axes), metrics, title, train_length)
        if any(losses.values()):
            title = f"induction: loss of {SPAN_TOKENS} random tokens"
            plots.draw_losses(next(axes), losses, title, train_length)
    return drawn


def page(result: Result) -> str:
    """The whole page."""
    questions, data = result["questions"], result["data"]
    lead = (
        f"{questions['trials']} questions per cell, {questions['candidates']} candidates, passages "
        f"of {data['n_docs']} documents of {data['split']}; trained on segments of "
        f"{result['model']['train_length']:,} tokens"
    )
    sections: list[html.Section] = []
    for probe in RANKED:
        for name, title in (("accuracy", "accuracy"), ("mrr", "mean reciprocal rank")):
            sections.append(_table(result, probe, name, title))
    run = EvalRun(result["name"], result, {})
    sections += [
        _losses(result),
        ("Gates", *fact_tables.gate_table([run])),
        ("Provenance", *fact_tables.provenance_table([run])),
    ]
    picture = html.Picture(plots.to_svg(figure(result)), "Recall by length and depth", wide=True)
    title = f"Recall: {result['name']}"
    return html.to_html(title, lead, findings(result), [picture], sections, _CAPTION)


def _table(result: Result, probe: str, name: str, title: str) -> html.Section:
    metrics = select(result, probe, name)
    pooled = {metric["length"]: metric for metric in select(result, probe, name, pooled=True)}
    shown = _percent if name == "accuracy" else _decimal
    rows = []
    for depth in dict.fromkeys(metric["depth"] for metric in metrics):
        cells = {metric["length"]: metric for metric in metrics if metric["depth"] == depth}
        rows.append([_percent(depth), *(_cell(cells[length], shown) for length in pooled)])
    note = ""
    if metrics:
        rows.append(["all", *(_cell(metric, shown) for metric in pooled.values())])
        unit = "trial (Wilson)" if name == "accuracy" else "document"
        note = f"Chance {shown(metrics[0]['chance'])}. 95 % intervals by {unit}."
    header = ["depth", *(f"{length:,} tokens" for length in pooled)]
    return f"{probe.capitalize()}: {title}", note, header, rows


def _cell(metric: dict[str, Any], shown: Callable[[float], str]) -> str:
    interval = metric.get("ci95_by_trial") or metric["ci95"]
    return f"{shown(metric['value'])}{_interval(interval, shown)}"


def _losses(result: Result) -> html.Section:
    names = {**_INDUCTION, "gain": "first - second", "copied": "other - second"}
    columns = {name: select(result, "induction", name) for name in names}
    rows = [
        [
            f"{cells[0]['length']:,}",
            *(_decimal(m["value"]) + _interval(m["ci95"], _decimal) for m in cells),
        ]
        for cells in zip(*columns.values(), strict=True)
    ]
    note = "Nats per token, 95 % by document. The first copy stands behind nothing."
    return "Induction: a repeated span", note, ["distance (tokens)", *names.values()], rows


def _interval(interval: list[float] | None, shown: Callable[[float], str]) -> str:
    return f" [{shown(interval[0])}, {shown(interval[1])}]" if interval else ""


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _decimal(value: float) -> str:
    return f"{value:.3f}"
