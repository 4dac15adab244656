"""The report of one or several evaluated runs: a self-contained page, and the same as Markdown.

`report.html` needs no network and no file beside it: figures are inline SVG, fonts the system's.
It shows what was measured whatever it says: what the runs are, curves with intervals, a verdict at
each context, the n-gram's line, gates, cost per length, what each metric is, and where everything
came from.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evals import fact_tables, page, plots
from evals.compare import (
    NO_DIFFERENCE,
    WITHIN_SEEDS,
    Comparison,
    EvalRun,
    Verdict,
    allowed,
)
from evals.page import Picture, Row, Section, count
from evals.scoring.store import write_bytes
from evals.stats import RESOLUTION, sign_of

_CAPTION = (
    "Shaded: 95 % over documents; over contexts a band that holds all of them at once. Dotted: the "
    "training length. Bands of single curves overlap because books differ; whether two models "
    "differ is read from the paired difference, which removes that; of more than three they are "
    "left out."
)

DEFINITIONS = {
    "nll": "summed loss over tokens, natural logarithm, fp32 log-softmax; EOS included",
    "bpb": "bits per byte: summed loss of the tokens that stand for text over ln 2 and their bytes",
    "token ppl": "exp(nll); compares under one tokenizer only",
    "word ppl": "exp of the loss of text per word; words as lm-eval counts them, white-space runs "
    "plus one",
    "gain": "nll behind the smallest context minus nll behind this one, of the same targets",
    "fixed(T)": "the same target spans of T tokens for every context, each preceded by exactly "
    "that many tokens of its document",
    "position": "one forward from the start of each document",
    "stream": "state carried through the document in segments; every token scored once",
    "nonoverlap(L)": "windows of L tokens, each seeing only itself: lm-eval's rolling windows",
    "sliding(S)": "windows of `context` tokens, each S further, scoring what none before it did",
    "truncate(L)": "the first L tokens of each document alone",
    "95 %": "over documents: clustered, Student's t; of a difference paired by document",
    "simultaneous 95 %": "a band that holds all contexts of a protocol, and all pairs of models "
    "that are compared, at once: the 95 % quantile of the largest |t| over bootstrap draws of "
    "documents (Bonferroni's below 20 documents)",
    "between seeds": "Welch's 95 % interval of the difference over trainings, the documents held "
    "fixed; of one context and pair alone (`within seeds` is read from a wider one, Bonferroni's "
    "over all pairs)",
}


def write(
    runs: Sequence[EvalRun],
    out_dir: Path,
    comparisons: Sequence[Comparison] = (),
    allow: Sequence[str] = (),
    more: Sequence[Picture] = (),
) -> Path:
    """Writes report.html, report.md and report.png.

    Args:
        runs: one or several, the n-gram among them.
        out_dir: where the files go.
        comparisons: what `compare` said of them.
        allow: what was let pass there.
        more: further pictures, such as heat maps.

    Returns:
        The path of report.html.

    Raises:
        ValueError: a gate failed.
    """
    failed = [
        t.name
        for t in fact_tables.trainings(runs)
        if not all(g["passed"] for g in t.result["gates"])
    ]
    if failed:
        raise ValueError(f"gates failed in {', '.join(failed)}: there is nothing to report")
    models = [run for run in runs if run.charges_specials]
    results = [run.result for run in models]
    reference = _reference([run for run in runs if not run.charges_specials])
    panels = plots.curve_panels(results, reference, _differences(comparisons, models[0]))
    pictures = [
        Picture(plots.to_svg(plots.draw([panel], results)), panel.title) for panel in panels
    ]
    sections: list[Section] = [
        ("Runs", *_runs_table(models)),
        ("Bits per byte by context", *level_table(runs, comparisons)),
        ("Perplexity", *_perplexity_table(models)),
        ("Paired differences", *_verdict_table(comparisons)),
        ("Seeds", *_seed_table(models)),
        ("Gains from context", *_gain_table(models)),
        ("Gates", *fact_tables.gate_table(models)),
        ("Cost", *fact_tables.cost_table(models)),
        ("Definitions", "", ["term", "meaning"], [[k, v] for k, v in DEFINITIONS.items()]),
        ("Provenance", *fact_tables.provenance_table(runs)),
    ]
    title = "Perplexity against context length: " + ", ".join(run.name for run in runs)
    lead, summary = _lead(models), findings(runs, comparisons, allow)
    content = page.to_html(title, lead, summary, [*pictures, *more], sections, _CAPTION)
    write_bytes(out_dir / "report.html", content.encode())
    write_bytes(out_dir / "report.png", plots.to_png(plots.draw(panels, results)))
    write_bytes(out_dir / "report.md", page.to_markdown(title, lead, summary, sections).encode())
    return out_dir / "report.html"


def _lead(runs: Sequence[EvalRun]) -> str:
    data = runs[0].result["data"]
    trained_on = [
        run.name
        for run in runs
        if (data.get("path"), data["split"])
        == (run.result["model"].get("training_path"), run.result["model"].get("training_split"))
    ]
    seen = f"TRAINING TEXT of {', '.join(trained_on)}" if trained_on else "held out"
    return (
        f"{data['n_docs']} documents of the split {data['split']} ({seen}; {data['n_tokens']:,} "
        f"tokens, {data['n_bytes']:,} bytes). Every interval is 95 % over documents."
    )


def findings(
    runs: Sequence[EvalRun], comparisons: Sequence[Comparison], allow: Sequence[str] = ()
) -> list[str]:
    """What was found, in words, one line each."""
    lines = [f"ALLOWED although it differs: {difference}." for difference in allowed(runs, allow)]
    for a, b, verdicts in comparisons:
        bpb = [v for v in verdicts if v.metric == "bpb"]
        groups: dict[str, list[Verdict]] = {}
        for v in bpb:
            if v.protocol.startswith("fixed"):
                groups.setdefault(v.verdict, []).append(v)
        found = [
            f"{what} at {', '.join(count(v.context) for v in at)}{_by(at)}"
            for what, at in groups.items()
        ]
        found += [f"{v.verdict} in stream{_by([v])}" for v in bpb if v.protocol == "stream"]
        if found:
            lines.append(f"{a.name} against {b.name}, by context: {'; '.join(found)}.")
    models = [run for run in runs if run.charges_specials]
    for run in models:
        beyond = plots.series(run.result, "gain_beyond_training")
        if beyond:
            lines.append(_gain_sentence(run, beyond[-1]))
        if not run.result["tokenizer"]["lossless"]:
            lines.append(
                f"{run.name}: its tokenizer loses text; its losses are of what is left of it."
            )
    n_gates = sum(len(training.result["gates"]) for training in fact_tables.trainings(models))
    lines.append(f"All {n_gates} gates passed.")
    if any(m["n_docs_low"] for run in runs for m in run.result["metrics"]):
        lines.append("Some numbers rest on fewer than 20 documents; they are marked (few).")
    return lines


def _by(verdicts: Sequence[Verdict]) -> str:
    """How much better the better one is; nothing where none is."""
    sizes = [abs(v.difference.value) for v in verdicts if v.sign]
    if not sizes:
        return ""
    low, high = f"{min(sizes):.4f}", f"{max(sizes):.4f}"
    return f" (by {low} bits per byte)" if low == high else f" (by {low} to {high} bits per byte)"


def _gain_sentence(run: EvalRun, gain: dict[str, Any]) -> str:
    size, more = abs(gain["value"]), gain["value"] > 0
    change = f"{size:.4f} nat per token {'lower' if more else 'higher'}"
    if size < RESOLUTION:
        change = f"the same to {RESOLUTION:g} nat per token"
    return (
        f"{run.name}, trained on segments of {run.result['model']['train_length']:,} tokens: "
        f"behind {gain['context']:,} tokens of context instead of {gain['baseline_context']:,} its "
        f"loss is {change} ({_gain_words(gain)})."
    )


def _gain_words(metric: dict[str, Any]) -> str:
    words = {1: "it gains", -1: "it degrades", 0: NO_DIFFERENCE}
    return words[sign_of(metric["value"], metric["band95"])]


def _reference(references: Sequence[EvalRun]) -> dict[str, Any] | None:
    """The n-gram's line."""
    for run in references:
        if levels := plots.series(run.result, "bpb"):
            return {**levels[-1], "name": run.name}
    return None


def _differences(comparisons: Sequence[Comparison], first: EvalRun) -> list[plots.Difference]:
    """Bits per byte of the first run minus each other one, by context: the sign of the tables."""
    differences = []
    for a, b, verdicts in comparisons:
        points = [
            {
                "context": v.context,
                "value": v.difference.value,
                "ci95": v.difference.ci95,
                "band95": v.band95,
            }
            for v in verdicts
            if v.metric == "bpb" and v.protocol.startswith("fixed")
        ]
        if points and a is first and b.charges_specials:
            differences.append(plots.Difference(f"{a.name} - {b.name}", points))
    return differences


def _runs_table(runs: Sequence[EvalRun]) -> tuple[str, Row, list[Row]]:
    """What was compared: empty for runs that were evaluated without these facts."""
    rows = []
    for run in runs:
        model = run.result["model"]
        if "layers" in model:
            rows.append(
                [
                    run.name,
                    ", ".join(str(t.result["model"].get("seed", "")) for t in run.trainings),
                    count(model["parameters"]),
                    count(model["trained_tokens"]),
                    count(model["train_length"]),
                    model["training_mode"] + (", state carried" if model["carried_state"] else ""),
                    model["layers"],
                ]
            )
    header = ["run", "seeds", "parameters", "trained tokens", "segment", "data order", "layers"]
    return "Losses are means over the seeds, token by token.", header, rows


def level_table(
    runs: Sequence[EvalRun], comparisons: Sequence[Comparison] = (), *, brief: bool = False
) -> tuple[str, Row, list[Row]]:
    """Note, header and rows: every run's bits per byte, and who is better, one row per pass.

    Args:
        runs: the columns.
        comparisons: between them.
        brief: for the terminal: no intervals, the spread between seeds only, verdicts last.
    """
    rows = []
    for record in runs[0].result["protocols"]:
        row = [record["id"], count(record["context"]), count(record["n_tokens"])]
        for run in runs:
            metric = _metric(run, "bpb", record)
            row.append((_plain(metric, 4) if brief else _cell(metric)) + _spread(run, record))
        if comparisons:
            row.insert(len(row) if brief else 3, _ranking(comparisons, record["pass"]))
        rows.append(row)
    note = (
        "`fixed(T)`: the same target spans for every context, each preceded by exactly that many "
        "tokens of its document. The other protocols score other tokens: compare along a row."
    )
    if any(run.seeds for run in runs):
        note += " Behind ±: the standard deviation between seeds."
    if len({run.result["tokenizer"]["sha256"] for run in runs}) > 1:
        note += " Tokenizers differ: rows of `fixed` score other text in each column."
    note += _phase_note([run for run in runs if run.charges_specials])
    header = ["protocol", "context", "tokens", *(f"{run.name} bpb" for run in runs)]
    if comparisons:
        header.insert(len(header) if brief else 3, "verdict")
    return note, header, rows


def _ranking(comparisons: Sequence[Comparison], pass_name: str) -> str:
    """Who is better than whom in a pass, in words."""
    beaten: dict[tuple[str, str], list[str]] = {}
    for a, b, verdicts in comparisons:
        for v in verdicts:
            if (v.pass_name, v.metric) == (pass_name, "bpb") and v.sign:
                better, worse = (a, b) if v.sign < 0 else (b, a)
                doubt = WITHIN_SEEDS if v.verdict.endswith(WITHIN_SEEDS) else ""
                beaten.setdefault((better.name, doubt), []).append(worse.name)
    found = [f"{name} better than {', '.join(w)}{doubt}" for (name, doubt), w in beaten.items()]
    return "; ".join(found) or NO_DIFFERENCE


def _perplexity_table(runs: Sequence[EvalRun]) -> tuple[str, Row, list[Row]]:
    names = [
        name
        for name in ("token_ppl", "word_ppl")
        if any(metric["name"] == name for run in runs for metric in run.result["metrics"])
    ]
    columns = [(run, name) for run in runs for name in names]
    rows = [
        [record["id"], count(record["context"])]
        + [_plain(_metric(run, name, record), 2) for run, name in columns]
        for record in runs[0].result["protocols"]
    ]
    header = [f"{run.name} {name.replace('_', ' ')}" for run, name in columns]
    note = "Word perplexity only where all of the text was scored; its words are lm-eval's."
    return note, ["protocol", "context", *header], rows


def _seed_table(runs: Sequence[EvalRun]) -> tuple[str, Row, list[Row]]:
    """Each seed's own numbers; empty where every run is one training."""
    rows = []
    for run in runs:
        for record in run.result["protocols"] if run.seeds else []:
            values = [seed.level(record["pass"], "bpb") for seed in run.seeds]
            listed = ", ".join(f"{value:.4f}" for value in values)
            spread = f"{np.std(values, ddof=1):.4f}"
            rows.append([run.name, record["id"], count(record["context"]), listed, spread])
    note = "Of trainings that differ in the seed alone, on the same documents."
    return note, ["run", "protocol", "context", "bpb of each seed", "standard deviation"], rows


def _phase_note(runs: Sequence[EvalRun]) -> str:
    """Which places of a block the spans lie at, where that is not all of them."""
    spans = [
        r["settings"]["span_tokens"]
        for r in runs[0].result["protocols"]
        if r["context"] and r["id"].startswith("fixed")
    ]
    grid = max(run.result["model"]["reset_grid"] for run in runs)
    if not spans or spans[0] % grid == 0:
        return ""
    return (
        f" A span begins right behind its context, so its {spans[0]} tokens lie at the same few "
        f"places of the model's blocks (grid {grid}) for every context; `stream` sees all places."
    )


def _verdict_table(comparisons: Sequence[Comparison]) -> tuple[str, Row, list[Row]]:
    rows = []
    for a, b, verdicts in comparisons:
        for v in verdicts:
            d = v.difference
            rows.append(
                [
                    f"{a.name} - {b.name}",
                    v.protocol,
                    count(v.context),
                    v.metric,
                    f"{d.value:+.4f}",
                    _interval(d.ci95) or "one document",
                    _interval(v.band95),
                    _interval(v.between_seeds),
                    f"{d.n_docs}{' (few)' if d.n_docs_low else ''}",
                    v.verdict,
                ]
            )
    pairs = len(comparisons)
    seeds = any(v.between_seeds for _, _, verdicts in comparisons for v in verdicts)
    note = (
        "Paired by document; negative: the first of the pair is better. A winner is named only "
        "where the simultaneous band, which holds all contexts of the protocol"
        f"{f' and all {pairs} pairs' if pairs > 1 else ''} at once, excludes zero and the "
        "difference is above rounding (1e-4). "
    )
    note += (
        "`within seeds`: these trainings differ, but seeds differ as much."
        if seeds
        else "One training each: the spread between seeds is not in it."
    )
    header = ["pair", "protocol", "context", "metric", "difference", "95 %", "simultaneous 95 %"]
    header += ["between seeds", "documents", "verdict"]
    if not seeds:
        header.remove("between seeds")
        rows = [row[:7] + row[8:] for row in rows]
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
                        f"{count(m['baseline_context'])} to {count(m['context'])}",
                        f"{m['value']:+.4f}",
                        _interval(band) or "one document",
                        _gain_words(m),
                    ]
                )
    note = (
        "Positive: the loss of the same targets falls by so many nats per token when the context "
        "grows. The band holds all contexts of a run at once. First from the smallest context, "
        "then from the largest one within the training length."
    )
    return note, ["run", "context", "gain", "simultaneous 95 %", "reading"], rows


def _metric(run: EvalRun, name: str, record: dict[str, Any]) -> dict[str, Any] | None:
    """The metric of a pass, if the run has that pass with the same settings."""
    passes = [(other["pass"], other["settings"]) for other in run.result["protocols"]]
    if (record["pass"], record["settings"]) not in passes:
        return None
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


def _spread(run: EvalRun, record: dict[str, Any]) -> str:
    """Standard deviation between seeds; nothing for one training."""
    if not run.seeds or record["pass"] not in run.tables:
        return ""
    return f" ±{np.std([seed.level(record['pass'], 'bpb') for seed in run.seeds], ddof=1):.4f}"


def _plain(metric: dict[str, Any] | None, digits: int) -> str:
    return f"{metric['value']:.{digits}f}" if metric else "-"


def _interval(edges: Sequence[float] | None) -> str:
    return f"{edges[0]:+.4f} .. {edges[1]:+.4f}" if edges else ""
