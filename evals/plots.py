"""Figures of the perplexity suite: loss and gain over context (log2), with 95 % bands.

Figures are drawn from `result.json` records, one or several runs on one plot; those of
`evals.extrapolation` and `evals.streaming` from their own. Heat maps are those of `evals.recall`.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from evals.scoring.protocols import family

COLOURS = ("#1f6feb", "#d1480f", "#1a7f4b", "#8250df", "#b0367a", "#6b7280")
REFERENCE_COLOUR = "#57606a"
MIN_GAIN_SPAN = 0.01  # nats
FEW = 3
"""Up to so many runs have shaded levels: books differ more than models, and bands overlap."""

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.8,
    "axes.edgecolor": "#9ca3af",
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "longspan",
}

Result = dict[str, Any]


def series(result: Result, name: str, protocol: str = "fixed") -> list[dict[str, Any]]:
    """The metrics of one name and protocol family, by context or position."""
    return [
        metric
        for metric in result["metrics"]
        if metric["name"] == name and family(metric["protocol"]) == protocol
    ]


class Difference(NamedTuple):
    """A paired difference over contexts: label, and `{context, value, ci95, band95}` for each."""

    label: str
    points: list[dict[str, Any]]


class Panel(NamedTuple):
    """One plot: what it shows in words, and what draws it."""

    title: str
    draw: Callable[[Axes], None]


def curve_panels(
    results: Sequence[Result],
    reference: dict[str, Any] | None = None,
    differences: Sequence[Difference] = (),
) -> list[Panel]:
    """Bits per byte, paired difference, gain, and loss by position: what the runs have of these.

    Args:
        results: one or several runs' result.json.
        reference: `{"name", "value", "ci95"}` of a model without a context axis (the n-gram), drawn
            as a horizontal line.
        differences: the first run minus each other one; single curves' intervals are far wider.
    """

    def any_has(name: str, *protocols: str) -> bool:
        return any(series(result, name, p) for result in results for p in protocols)

    panels = []
    if any_has("bpb", "fixed"):
        draw_bpb = partial(_draw_bpb, results=results, reference=reference)
        panels.append(Panel("Bits per byte over context", draw_bpb))
    if differences:
        draw_differences = partial(_draw_differences, differences=differences)
        panels.append(Panel("Paired differences over context", draw_differences))
    if any_has("gain", "fixed"):
        panels.append(Panel("Gain from context", partial(_draw_gain, results=results)))
    if any_has("nll_at_position", "stream", "position"):
        draw_positions = partial(_draw_position, results=results)
        panels.append(Panel("Loss by position in the document", draw_positions))
    return panels


def draw(panels: Sequence[Panel], results: Sequence[Result]) -> Figure:
    """The panels as one figure, the training length marked in each."""
    with matplotlib.rc_context(STYLE):
        columns = {4: 2, 5: 3, 6: 3}.get(len(panels), max(len(panels), 1))
        rows = -(-len(panels) // columns) or 1
        figure = Figure(figsize=(4.6 * columns, 3.7 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis, panel in zip(axes, panels, strict=False):
            panel.draw(axis)
            _mark_training_length(axis, results)
            if len(results) <= FEW:
                axis.legend(loc="best", fontsize=9)
            else:  # below, where it hides no curve
                axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=7.5)
        if not panels:
            axes[0].set_axis_off()
            axes[0].text(0.5, 0.5, "no curve: fixed, position and stream have one", ha="center")
    return figure


def curve_figure(
    results: Sequence[Result],
    reference: dict[str, Any] | None = None,
    differences: Sequence[Difference] = (),
) -> Figure:
    """All of `curve_panels` in one figure."""
    return draw(curve_panels(results, reference, differences), results)


def streaming_figure(models: Sequence[dict[str, Any]]) -> Figure:
    """Time per token over context and over training length, a line per model.

    Args:
        models: those of streaming.json; the ones with a growing state are dashed.
    """
    panels = (
        ("contexts", "seconds_per_token", "context (tokens)", "Reading a segment"),
        ("lengths", "training_seconds_per_token", "sequence (tokens)", "Training, parallel"),
    )
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.5, 4.6), layout="constrained")
        axes = figure.subplots(1, 2)
        for axis, (tokens, seconds, label, title) in zip(axes, panels, strict=True):
            for k, model in enumerate(models):
                axis.plot(
                    model[tokens],
                    [1e6 * s for s in model[seconds]],
                    "o-" if model["constant_state"] else "s--",
                    ms=3,
                    lw=1.3,
                    color=matplotlib.colormaps["tab20"](k % 20),
                    label=model["name"],
                )
            axis.set_yscale("log")
            _context_axis(axis, label)
            axis.set_ylabel("µs per token")
            axis.set_title(title)
        lines, names = axes[0].get_legend_handles_labels()
        figure.legend(lines, names, loc="outside right center", fontsize=8)
    return figure


def extrapolation_panels(result: Result) -> list[Panel]:
    """Loss and gains over context, loss by position, the joined stream, and what contexts cost.

    Args:
        result: result.json of `evals.extrapolation.suite`.
    """
    panels = curve_panels([result])
    if series(result, "gain_beyond_training"):
        panels.insert(2, Panel("Gain beyond the training length", partial(_draw_verdicts, result)))
    if any(w["excess"] is not None for w in (result["concat"] or {"windows": []})["windows"]):
        panels.append(Panel("Drift over joined documents", partial(_draw_concat, result)))
    return [*panels, Panel("Time per token", partial(_draw_cost, result))]


def extrapolation_figure(result: Result) -> Figure:
    """All of `extrapolation_panels` in one figure."""
    return draw(extrapolation_panels(result), [result])


def draw_heat_map(
    figure: Figure, axis: Axes, metrics: Sequence[dict[str, Any]], title: str, train_length: int
) -> None:
    """Accuracy over depth and length: white at chance, blue above it, red below.

    Args:
        figure: gets the colour bar, on which chance is marked.
        axis: lengths to the right, depths downwards, as one reads.
        metrics: of one probe: `length`, `depth`, `value`, `ci95_by_trial`, `chance`. Values whose
            interval holds chance are grey and slanted.
        title: of the panel.
        train_length: a dotted line parts the lengths beyond it from the others.
    """
    lengths = sorted({metric["length"] for metric in metrics})
    depths = sorted({metric["depth"] for metric in metrics})
    chance = metrics[0]["chance"]
    values = np.full((len(depths), len(lengths)), np.nan)
    for metric in metrics:
        y, x = depths.index(metric["depth"]), lengths.index(metric["length"])
        values[y, x] = metric["value"]
        low, high = metric["ci95_by_trial"]
        undecided = low <= chance <= high
        strong = abs(metric["value"] - chance) > 0.6 * (1 - chance)
        colour = REFERENCE_COLOUR if undecided else "white" if strong else "#111827"
        style = "italic" if undecided else "normal"
        percent = f"{100 * metric['value']:.0f}"
        axis.text(x, y, percent, ha="center", va="center", color=colour, style=style)
    norm = TwoSlopeNorm(chance, vmin=0.0, vmax=1.0)
    image = axis.imshow(values, cmap="RdBu", norm=norm, aspect="auto")
    bar = figure.colorbar(image, ax=axis, ticks=[0.0, chance, 0.25, 0.5, 0.75, 1.0])
    bar.ax.set_yticklabels(["0", f"chance {100 * chance:.0f}", "25", "50", "75", "100"])
    bar.ax.axhline(chance, color="#111827", linewidth=1.2)
    within = sum(length <= train_length for length in lengths)
    axis.axvline(within - 0.5, color="#f59e0b", linestyle=":", linewidth=2.2)
    axis.set_xticks(range(len(lengths)), [_short(length) for length in lengths])
    axis.set_yticks(range(len(depths)), [f"{100 * depth:g} %" for depth in depths])
    axis.grid(False)
    axis.set_xlabel("context (tokens)")
    axis.set_ylabel("depth: text before it")
    axis.set_title(title)


def draw_losses(
    axis: Axes, lines: Mapping[str, Sequence[dict[str, Any]]], title: str, train_length: int
) -> None:
    """Losses over length, a labelled line with its 95 % intervals each."""
    for colour, (label, metrics) in zip(COLOURS, lines.items(), strict=False):
        _line(axis, [metric["length"] for metric in metrics], metrics, label, colour)
    axis.axvline(
        train_length, color="#111827", linestyle=":", linewidth=1.2, label="training length"
    )
    _context_axis(axis, "distance (tokens)")
    axis.set_ylabel("nats per token")
    axis.set_title(title)
    axis.legend(loc="best", fontsize=9)


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file's content."""
    content = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(content, format="png", dpi=130)
    return content.getvalue()


def to_svg(figure: Figure) -> str:
    """The figure as an SVG element to put into HTML: text as paths, no fonts needed."""
    text = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _draw_bpb(
    axis: Axes, results: Sequence[Result], reference: dict[str, Any] | None = None
) -> None:
    for result, colour in zip(results, _colours(results), strict=True):
        metrics = series(result, "bpb")
        contexts = [m["context"] for m in metrics]
        _line(axis, contexts, metrics, result["name"], colour, shaded=len(results) <= FEW)
    _context_axis(axis, "context (tokens)")
    axis.set_ylabel("bits per byte")
    tokenizers = {result["tokenizer"]["sha256"] for result in results}
    same = "same target tokens" if len(tokenizers) == 1 else "each tokenizer's own target tokens"
    axis.set_title(f"Loss over context, {same}")
    if reference:
        _draw_reference(axis, reference)


def _draw_differences(axis: Axes, differences: Sequence[Difference]) -> None:
    for k, difference in enumerate(differences):
        colour = COLOURS[(k + 1) % len(COLOURS)]  # that of the run in the other panels
        contexts = [point["context"] for point in difference.points]
        _line(axis, contexts, difference.points, difference.label, colour)
    axis.axhline(0.0, color=REFERENCE_COLOUR, linewidth=0.8)
    _context_axis(axis, "context (tokens)")
    axis.set_ylabel("bits per byte")
    axis.set_title("Paired difference, below 0: the first is better")


def _draw_gain(axis: Axes, results: Sequence[Result]) -> None:
    baseline = None
    for result, colour in zip(results, _colours(results), strict=True):
        metrics = series(result, "gain")
        if metrics:
            baseline = metrics[0]["baseline_context"]
        _line(axis, [m["context"] for m in metrics], metrics, result["name"], colour)
    axis.axhline(0.0, color=REFERENCE_COLOUR, linewidth=0.8)
    low, high = axis.get_ylim()
    # A model that cannot see further gains 1e-6: show that as the flat line it is.
    axis.set_ylim(min(low, -MIN_GAIN_SPAN), max(high, MIN_GAIN_SPAN))
    _context_axis(axis, "context (tokens)")
    axis.set_ylabel("nats per token")
    axis.set_title(f"Gain over {baseline} tokens, above 0: context helps")


def _draw_position(axis: Axes, results: Sequence[Result]) -> None:
    for result, colour in zip(results, _colours(results), strict=True):
        protocol = "stream" if series(result, "nll_at_position", "stream") else "position"
        # The first token's bucket [0, 1) has no place on a log axis and its loss no context.
        metrics = [m for m in series(result, "nll_at_position", protocol) if m["position"][0] > 0]
        middles = [(m["position"][0] * m["position"][1]) ** 0.5 for m in metrics]
        label = f"{result['name']} ({protocol})"
        _line(axis, middles, metrics, label, colour, shaded=len(results) <= FEW)
    _context_axis(axis, "position in the document (tokens)")
    axis.set_ylabel("nats per token")
    axis.set_title("Loss by position")


def _draw_verdicts(result: Result, axis: Axes) -> None:
    """Gains beyond the training length, their band and verdicts, and the margin of `flat`."""
    metrics = series(result, "gain_beyond_training")
    margin = result["options"]["flat_margin_nats"]
    axis.axhspan(-margin, margin, color=REFERENCE_COLOUR, alpha=0.12, linewidth=0, label="margin")
    axis.axhline(0.0, color=REFERENCE_COLOUR, linewidth=0.8)
    _line(axis, [m["context"] for m in metrics], metrics, result["name"], COLOURS[0])
    axis.margins(x=0.12)
    words = {row["context"]: row["verdict"] for row in result["verdicts"]}
    for metric in metrics:
        axis.annotate(
            words[metric["context"]],
            (metric["context"], metric["value"]),
            xytext=(-3, 6),
            textcoords="offset points",
            fontsize=8,
            rotation=35,
        )
    _context_axis(axis, "context (tokens)")
    axis.set_ylabel("nats per token")
    axis.set_title(f"Gain over the training length {result['model']['train_length']:,}")


def _draw_concat(result: Result, axis: Axes) -> None:
    windows = result["concat"]["windows"]
    middles = [sum(w["position"]) / 2 for w in windows]
    # A stretch that the other pass has not scored is a gap in the line.
    excess = [np.nan if w["excess"] is None else w["excess"] for w in windows]
    axis.plot(middles, excess, "o-", ms=3, lw=1.2, color=COLOURS[1], label=result["name"])
    axis.set_title("concat: excess over a fresh state per document")
    axis.axhline(0.0, color=REFERENCE_COLOUR, linewidth=0.8)
    low, high = axis.get_ylim()
    axis.set_ylim(min(low, -MIN_GAIN_SPAN), max(high, MIN_GAIN_SPAN))
    end = windows[-1]["position"][1]
    axis.set_xticks([end * k / 4 for k in range(5)], [_short(end * k / 4) for k in range(5)])
    axis.set_xlabel("tokens since the joined stream began")
    axis.set_ylabel("nats per token")


def _draw_cost(result: Result, axis: Axes) -> None:
    fixed = [cost for cost in result["cost"] if cost["context"]]
    seconds = [1e6 * cost["seconds"] / cost["input_tokens"] for cost in fixed]
    axis.plot([cost["context"] for cost in fixed], seconds, "o-", ms=4, lw=1.6, color=COLOURS[0])
    axis.lines[-1].set_label("fixed, one forward")
    marks = result["concat"]["marks"] if result["concat"] else []
    seconds = [1e6 * mark["seconds_per_token"] for mark in marks]
    axis.plot([mark["tokens"] for mark in marks], seconds, "s--", ms=4, lw=1.2, color=COLOURS[1])
    axis.lines[-1].set_label("concat, state carried")
    axis.set_yscale("log")
    _context_axis(axis, "context (tokens)")
    axis.set_ylabel("µs per token")
    axis.set_title("Time per token read")


def _line(
    axis: Axes,
    x: Sequence[float],
    metrics: Sequence[dict[str, Any]],
    label: str,
    colour: str,
    *,
    shaded: bool = True,
) -> None:
    """A curve, shaded with its simultaneous band, or the interval of each point if it has none."""
    axis.plot(x, [m["value"] for m in metrics], "o-", ms=4, lw=1.6, color=colour, label=label)
    intervals = [m.get("band95") or m["ci95"] for m in metrics]
    if shaded and intervals and all(intervals):
        low, high = zip(*intervals, strict=True)
        axis.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)


def _mark_training_length(axis: Axes, results: Sequence[Result]) -> None:
    lengths = {result["model"]["train_length"] for result in results}
    for k, length in enumerate(sorted(lengths)):
        label = f"training length {length}" if len(lengths) > 1 else "training length"
        style = (0, (1, 2 + k))
        axis.axvline(length, color="#111827", linestyle=style, linewidth=1.2, label=label)


def _draw_reference(axis: Axes, reference: dict[str, Any]) -> None:
    axis.axhline(
        reference["value"],
        color=REFERENCE_COLOUR,
        linestyle="--",
        linewidth=1.4,
        label=f"{reference['name']} ({reference['value']:.3f})",
    )
    if reference.get("ci95"):
        axis.axhspan(*reference["ci95"], color=REFERENCE_COLOUR, alpha=0.08, linewidth=0)


def _context_axis(axis: Axes, label: str) -> None:
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axis.set_xlabel(label)


def _short(tokens: float) -> str:
    if tokens >= 1024:
        return f"{tokens / 1024:.4g}k"
    return f"{tokens:.4g}"


def _colours(results: Sequence[Result]) -> list[str]:
    return [COLOURS[k % len(COLOURS)] for k in range(len(results))]
