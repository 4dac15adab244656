"""The page of the extrapolation suite: verdicts, effective context, joined stream, cost, gates.

Like every report here, `report.html` is one file that needs no network.
"""

from pathlib import Path
from typing import Any

from evals import fact_tables, page, plots
from evals.compare import EvalRun
from evals.page import Picture, Row, Section
from evals.scoring.store import write_bytes
from evals.stats import RESOLUTION

_CAPTION = (
    "Shaded: 95 % over documents; over contexts a band that holds all of them at once. Dotted: the "
    "training length. Grey strip: differences that do not matter. The joined stream goes beyond "
    "any document's length and says nothing about gains."
)

_MEANING = {
    "gains": "the loss is lower than at the training length",
    "flat": "the loss is that of the training length, within the margin",
    "degrades": "the loss is higher than at the training length",
    "diverges": "the loss is not finite, or far above that behind the smallest context",
    "undecided": "no difference shown, and none that matters excluded",
    "n_docs_low": "left out: too few documents reach it",
}


def write(result: dict[str, Any], out_dir: Path) -> Path:
    """Writes report.html; its path.

    Args:
        result: of `extrapolation.run`.
        out_dir: where the page goes.
    """
    run = EvalRun(result["name"], result, {})
    sections: list[Section] = [
        ("Verdicts by multiple of the training length", *_verdict_table(result)),
        ("Loss and gain by context", *_context_table(result)),
        ("Effective context", *_effective_table(result)),
        ("Joined stream: stability", *_stability_table(result)),
        ("Joined stream: time and memory", *_marks_table(result)),
        ("Gates", *fact_tables.gate_table([run])),
        ("Cost", *fact_tables.cost_table([run])),
        ("Provenance", *fact_tables.provenance_table([run])),
    ]
    pictures = [
        Picture(plots.to_svg(plots.draw([panel], [result])), panel.title)
        for panel in plots.extrapolation_panels(result)
    ]
    data = result["data"]
    lead = (
        f"{data['n_docs']} documents of the split {data['split']} ({data['n_tokens']:,} tokens), "
        f"trained on segments of {result['model']['train_length']:,} tokens. Every interval is "
        "95 % over documents; one training run, from one seed."
    )
    title = f"Beyond the training length: {result['name']}"
    content = page.to_html(title, lead, findings(result), pictures, sections, _CAPTION)
    write_bytes(out_dir / "report.html", content.encode())
    return out_dir / "report.html"


def findings(result: dict[str, Any]) -> list[str]:
    """What was found, in words, one line each."""
    length = result["model"]["train_length"]
    lines = []
    for word, meaning in _MEANING.items():
        at = [f"{row['context']:,}" for row in result["verdicts"] if row["verdict"] == word]
        if at:
            lines.append(f"{word} at {', '.join(at)} tokens, against {length:,}: {meaning}.")
    lines.append(_effective_sentence(result["effective_context"]))
    if result["stream_non_finite_from"] is not None:
        lines.append(
            f"Streaming, losses are not finite from position {result['stream_non_finite_from']:,}."
        )
    if result["concat"]:
        lines.append(_concat_sentence(result["concat"]))
    lines.append(f"All {len(result['gates'])} gates passed.")
    if any(metric["n_docs_low"] for metric in result["metrics"]):
        lines.append("Some numbers rest on fewer than 20 documents; they are marked (few).")
    return lines


def _effective_sentence(effective: dict[str, Any]) -> str:
    bound = "at least " if effective["at_grid_end"] else ""
    bound = "at most " if effective["at_grid_start"] else bound
    interval = effective["ci95"]
    over = f" [{interval[0]:,}, {interval[1]:,}]" if interval else ""
    shown = effective["shown_context"]
    certain = f"a gain over the next smaller one is shown up to {shown:,} tokens" if shown else ""
    return (
        f"Effective context: {bound}{effective['value']:,} tokens{over}: no larger one gains more "
        f"than {effective['margin_nats']:g} nat per token; "
        f"{certain or 'no step from one context to the next is shown to gain'}."
    )


def _concat_sentence(record: dict[str, Any]) -> str:
    held = [mark["state_bytes"] for mark in record["marks"]]
    state = "the same" if held[0] == held[-1] else f"{held[-1] / held[0]:.3g} times"
    if record["non_finite_from"] is not None:
        loss = f"losses are not finite from token {record['non_finite_from']:,}"
    elif record["drift"]:
        loss = f"the loss drifts by {record['drift']['value']:+.4f} nat per token: "
        loss += record["verdict"]
    else:
        loss = "too few documents were joined to judge the loss"
    return (
        f"Joined stream (concat) of {record['tokens']:,} tokens, {record['n_docs']} documents: "
        f"{loss}; state {held[-1]:,} bytes, {state} as behind the first segment."
    )


def _verdict_table(result: dict[str, Any]) -> tuple[str, Row, list[Row]]:
    rows = [
        [
            f"{row['multiple']:g}",
            f"{row['context']:,}",
            "-" if row["value"] is None else f"{row['value']:+.4f}",
            _interval(row["band95"], "+.4f"),
            f"{row['n_docs']}{' (few)' if row['n_docs_low'] else ''}",
            row["verdict"],
        ]
        for row in result["verdicts"]
    ]
    options = result["options"]
    note = (
        "Gain in nats per token over the training length on the same targets, positive: more "
        "context helps. `flat`: the band that holds all contexts at once lies within "
        f"{options['flat_margin_nats']:g} of 0. `gains`, `degrades`: it does not, and excludes 0 "
        f"(differences below {RESOLUTION:g} are rounding). `diverges`: not finite, or worse than "
        f"behind the smallest context by more than {options['diverge_nats']:g}. `undecided`: none "
        "of these; "
        f"`n_docs_low`: fewer than {options['min_documents']} documents reach it. A window that "
        "sees no further is flat as well."
    )
    header = ["multiple", "context", "gain", "simultaneous 95 %", "documents", "verdict"]
    return note, header, rows


def _context_table(result: dict[str, Any]) -> tuple[str, Row, list[Row]]:
    columns: dict[int, dict[str, dict[str, Any]]] = {}
    for name in ("nll", "bpb", "gain"):
        for metric in plots.series(result, name):
            columns.setdefault(metric["context"], {})[name] = metric
    costs = {cost["context"]: cost for cost in result["cost"]}
    rows = []
    for context, at in columns.items():
        gain, cost = at.get("gain"), costs[context]
        band = gain["band95"] if gain else None
        rows.append(
            [
                f"{context / result['model']['train_length']:g}",
                f"{context:,}",
                f"{at['nll']['value']:.4f}",
                _interval(at["nll"]["ci95"], ".3f"),
                f"{at['bpb']['value']:.4f}" if "bpb" in at else "-",
                f"{gain['value']:+.4f}" if gain else "-",
                _interval(band, "+.4f"),
                f"{at['nll']['n_tokens']:,}",
                f"{1e6 * cost['seconds'] / cost['input_tokens']:.1f}",
                f"{cost['peak_memory_bytes'] / 2**20:,.0f}",
            ]
        )
    note = (
        "The same target spans for every context. Gain: over the smallest context, paired. Time "
        "per token read; batches hold fewer documents where contexts are longer."
    )
    header = ["multiple", "context", "nll", "95 %", "bpb", "gain", "simultaneous 95 %", "targets"]
    return note, [*header, "µs per token", "peak MiB"], rows


def _effective_table(result: dict[str, Any]) -> tuple[str, Row, list[Row]]:
    e = result["effective_context"]
    few = " (few)" if e["n_docs_low"] else ""
    ends = "end" if e["at_grid_end"] else "start" if e["at_grid_start"] else ""
    shown = f"{e['shown_context']:,}" if e["shown_context"] else "none"
    row = [f"{e['value']:,}", _interval(e["ci95"], ","), f"{e['margin_nats']:g}", ends]
    note = (
        "The smallest context of the grid from which no larger one gains more than the margin; "
        "interval by resampling documents, 95 % in name: in simulations it held the truth in 85 to "
        "99 %. At an end of the grid it is a bound. Shown: the largest "
        "context whose gain over the next smaller one excludes 0, all steps at once."
    )
    header = [
        "effective context",
        "nominal 95 %",
        "margin (nats)",
        "at the grid's",
        "shown",
        "documents",
    ]
    return note, header, [[*row, shown, f"{e['n_docs']}{few}"]]


def _stability_table(result: dict[str, Any]) -> tuple[str, Row, list[Row]]:
    record = result["concat"]
    header = ["tokens", "documents", "drift", "95 %", "not finite from", "verdict", "ends at"]
    if not record:
        return "", header, []
    drift, bad = record["drift"], record["non_finite_from"]
    interval = drift["ci95"] if drift else None
    row = [
        f"{record['tokens']:,}",
        f"{record['n_docs']}{' (few)' if not drift or drift['n_docs_low'] else ''}",
        f"{drift['value']:+.4f}" if drift else "-",
        _interval(interval, "+.4f"),
        "-" if bad is None else f"{bad:,}",
        record["verdict"],
        result["concat_ends_at"],
    ]
    note = (
        "Documents joined, the state never reset: `concat`, beyond any document's length. Drift in "
        "nats per token from the stream's start to its end, of each document's loss minus that "
        "behind a fresh state; positive: the loss rises."
    )
    return note, header, [row]


def _marks_table(result: dict[str, Any]) -> tuple[str, Row, list[Row]]:
    rows = [
        [
            f"{mark['tokens']:,}",
            f"{1e6 * mark['seconds_per_token']:.1f}",
            f"{mark['state_bytes'] / 2**10:,.1f}",
            f"{mark['peak_memory_bytes'] / 2**20:,.0f}",
        ]
        for mark in (result["concat"] or {"marks": []})["marks"]
    ]
    note = (
        "Time: median over the segments since the row before. Peak memory: of the device since the "
        "stream began, weights included; on a CPU of the whole process, which never falls."
    )
    return note, ["tokens", "µs per token", "state KiB", "peak MiB"], rows


def _interval(edges: list[float] | None, form: str) -> str:
    return f"{edges[0]:{form}} .. {edges[1]:{form}}" if edges else "-"
