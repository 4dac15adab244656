"""Paired verdicts between evaluated models: who is better at each context, if anyone is.

Models are scored on the same targets of the same documents; a difference is taken token by token,
summed by document, and its interval is over documents. A verdict names a winner only when that
interval excludes zero and the difference is above rounding. What cannot be compared is refused:
other data, other target spans, another boundary policy, other arithmetic, a failed gate. With
another tokenizer only bits per byte compare, and only where both scored the same bytes of every
document.

Surprising: pairing is what makes small gaps visible. On 50 documents the interval of a single
model's loss is some 0.09 nat wide each way; that of a paired difference can be 0.004.

Many contexts and many pairs of models are many tests: a verdict is read from one band that holds
all of a protocol's differences at once, over its contexts and over all pairs that are compared, so
that "better somewhere" is wrong 5 % of the time, however many there are (`stats.simultaneous_band`
resamples documents and takes all differences along, so that what they share costs nothing). One
training run is one seed, and no interval over documents covers the spread between seeds; where both
sides have several (`evals.seeds`), that spread has an interval of its own, and `within seeds` is
said unless one at 95 % over all pairs (Bonferroni) excludes zero: by each pair's own, five equal
models of three seeds had a winner without these words in 42 % of simulated comparisons, not 9 %.
"""

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evals import stats
from evals.perplexity.metrics import Sums, curve_bands
from evals.perplexity.suite import SCHEMA
from evals.scoring.store import TokenTable

NO_DIFFERENCE = "no difference shown"
WITHIN_SEEDS = " (within seeds)"
"""Behind a verdict that holds for these trainings, while the spread between seeds is as large."""

ALLOWANCES = {"policy": "policy", "precision": "model.precision"}
"""What `allow=` can let pass, and the key it is about; a report says that it was allowed."""


@dataclass(frozen=True)
class EvalRun:
    """One evaluated model: its result.json and its token store.

    Attributes:
        name: for tables and plots.
        result: the content of result.json.
        tables: pass name -> scored tokens.
        seeds: the trainings behind a mean over seeds; empty for one training.
    """

    name: str
    result: dict[str, Any]
    tables: dict[str, TokenTable]
    seeds: tuple["EvalRun", ...] = ()

    @property
    def trainings(self) -> tuple["EvalRun", ...]:
        """What was evaluated: itself, or one run per seed."""
        return self.seeds or (self,)

    @property
    def charges_specials(self) -> bool:
        """A byte model such as the n-gram gives no loss to EOS: its nats per token do not count."""
        return bool(self.result["model"].get("charges_specials", True))

    def level(self, name: str, metric: str) -> float:
        """Mean `nll` or `bpb` of one pass."""
        sums, weights = _sums(self.tables[name], metric)
        return float(sums.sum() / weights.sum())


@dataclass(frozen=True)
class Verdict:
    """The paired difference a - b of one metric in one pass; lower is better.

    Attributes:
        pass_name: of the pass.
        protocol: the pass's protocol id.
        context: its C or L.
        metric: `bpb` or `nll`.
        difference: with the interval of this pass and pair alone.
        band95: the edges here of the band over all contexts of the protocol and all pairs; None
            where there is one context and one pair, or one document.
        between_seeds: Welch's 95 % interval of the difference over seeds, of this pass and pair
            alone; None where a side has one seed.
        sign: -1 where a is better, 1 where b is, 0 where neither is shown to be.
        verdict: the sign in words, and whether the seeds' spread could account for it.
    """

    pass_name: str
    protocol: str
    context: int | None
    metric: str
    difference: stats.Estimate
    band95: tuple[float, float] | None
    between_seeds: tuple[float, float] | None
    sign: int
    verdict: str


class Comparison(NamedTuple):
    """Two models and the verdicts between them."""

    a: EvalRun
    b: EvalRun
    verdicts: list[Verdict]


def load(path: Path, name: str = "perplexity") -> EvalRun:
    """Reads an evaluation from its folder, or from its run's folder, where it has a name.

    Raises:
        ValueError: nothing was evaluated there, by another suite only, or the store lacks a pass or
            holds another one.
    """
    folders = [path, path / "eval" / name]
    found = [folder for folder in folders if (folder / "result.json").is_file()]
    if not found:
        raise ValueError(
            f"{path}: no result.json there or in eval/{name}; evaluate it first: "
            f"python launch/evaluate.py run={path} contexts=64..8192"
            + (f" name={name}" if name != "perplexity" else "")
        )
    try:
        result = json.loads((found[0] / "result.json").read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{found[0]}/result.json: cannot be read ({error}); evaluate again, what is scored is "
            "kept"
        ) from error
    if result.get("suite") != "perplexity":
        raise ValueError(
            f"{found[0]}/result.json: is of suite={result.get('suite')}; only results of "
            "suite=perplexity are compared"
        )
    if result["schema"] != SCHEMA:
        raise ValueError(
            f"{found[0]}/result.json: schema={result['schema']}, this code reads {SCHEMA}; "
            "evaluate it again"
        )
    tables = {}
    for record in result["protocols"]:
        stored = found[0] / "tokens" / f"{record['pass']}.npz"
        tables[record["pass"]] = table = TokenTable.load(stored)
        if table.meta["identity"] != record["identity"]:
            raise ValueError(
                f"{stored}: is not the pass that result.json is about; evaluate again, what is "
                "scored is kept"
            )
    return EvalRun(result["name"], result, tables)


def incomparable(a: EvalRun, b: EvalRun, allow: Sequence[str] = ()) -> list[str]:
    """Why two runs cannot be compared, one line per reason; empty when they can."""
    reasons = []
    for run in (a, b):
        failed = [gate["name"] for gate in run.result["gates"] if not gate["passed"]]
        if failed:
            reasons.append(f"{run.name}: gates failed: {', '.join(failed)}; mend the model first")
    same_tokenizer = _same_tokenizer(a, b)
    checks = {
        "data.split": "evaluate both with the same split=",
        "data.n_docs": "evaluate both with the same limit=",
    }
    if same_tokenizer:
        checks["data.fingerprint"] = "evaluate both with the same data="
    else:
        checks["data.text_sha256"] = "prepare the same text with each tokenizer"
    reasons += [f"{difference}; {checks[key]}" for key, difference in _differ(a, b, checks)]
    refused = [key for name, key in ALLOWANCES.items() if name not in allow]
    fixes = {
        "policy": "evaluate both with the same code, or say allow=policy",
        "model.precision": "evaluate both with the same precision=, or say allow=precision",
    }
    reasons += [f"{difference}; {fixes[key]}" for key, difference in _differ(a, b, refused)]
    spans = [_span_settings(run) for run in (a, b)]
    if all(spans) and spans[0] != spans[1]:
        reasons.append(
            f"fixed: other target spans, {spans[0]} of {a.name}, {spans[1]} of {b.name}; evaluate "
            "both with the same span_tokens, spans_per_document and largest context"
        )
    if not reasons and not shared_passes(a, b):
        reasons.append(
            f"no pass in common: {', '.join(a.tables)} of {a.name}, {', '.join(b.tables)} of "
            f"{b.name}; evaluate both with the same contexts and protocols"
        )
    return reasons


def check_allowances(allow: Sequence[str]) -> None:
    """Raises:
    ValueError: there is no such allowance.
    """
    unknown = sorted(set(allow) - set(ALLOWANCES))
    if unknown:
        raise ValueError(f"allow={','.join(unknown)}: choose from {', '.join(ALLOWANCES)}")


def allowed(runs: Sequence[EvalRun], allow: Sequence[str]) -> list[str]:
    """What differs between the first training and another, and was let pass; one line each."""
    keys = [ALLOWANCES[name] for name in allow]
    first, *others = (training for run in runs for training in run.trainings)
    return [line for other in others for _, line in _differ(first, other, keys)]


def compare(
    runs: Sequence[EvalRun], *, with_first_only: bool = False, allow: Sequence[str] = ()
) -> list[Comparison]:
    """Verdicts for every pass two runs share: bits per byte, and nats per token where they compare.

    Args:
        runs: at least one; of one there is nothing to say.
        with_first_only: compare the first with each other one, instead of all pairs: fewer tests,
            narrower bands.
        allow: names of `ALLOWANCES`.

    Raises:
        ValueError: an unknown allowance, two runs of one name, or runs that are not comparable;
            every reason is named.
    """
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"runs={','.join(names)}: each needs a name of its own")
    check_allowances(allow)
    pairs = list(itertools.combinations(runs, 2))
    if with_first_only:
        pairs = pairs[: len(runs) - 1]
    problems = []
    for a, b in pairs:
        if reasons := incomparable(a, b, allow):
            problems.append(f"{a.name} and {b.name} are not comparable: " + "; ".join(reasons))
    if problems:
        raise ValueError("\n".join(problems))
    passes = [(k, name) for k, (a, b) in enumerate(pairs) for name in shared_passes(a, b)]
    measured = [_differences(*pairs[k], name) for k, name in passes]
    bands = curve_bands([pairs[k][0].tables[name] for k, name in passes], measured)
    comparisons = [Comparison(a, b, []) for a, b in pairs]
    for (k, name), differences, band in zip(passes, measured, bands, strict=True):
        comparisons[k].verdicts.extend(
            _verdict(*pairs[k], name, metric, sums, band.get(metric), len(pairs))
            for metric, sums in differences.items()
        )
    return comparisons


def shared_passes(a: EvalRun, b: EvalRun) -> list[str]:
    """Names of the passes in which both scored the same text in the same way."""
    shared = []
    for name, table in a.tables.items():
        other = b.tables.get(name)
        if other is None or table.meta["settings"] != other.meta["settings"]:
            continue
        same_bytes = np.array_equal(table.bits_and_bytes()[1], other.bits_and_bytes()[1])
        if table.same_tokens(other) if _same_tokenizer(a, b) else same_bytes:
            shared.append(name)
    return shared


def _differences(a: EvalRun, b: EvalRun, name: str) -> dict[str, Sums]:
    """a - b in one pass, by metric: sums and weights per document."""
    metrics = ["bpb"] if a.tables[name].n_bytes.any() else []
    if _same_tokenizer(a, b) and a.charges_specials and b.charges_specials:
        metrics.append("nll")
    differences = {}
    for metric in metrics:
        sums, weights = _sums(a.tables[name], metric)
        differences[metric] = (sums - _sums(b.tables[name], metric)[0], weights)
    return differences


def _sums(table: TokenTable, metric: str) -> Sums:
    return table.bits_and_bytes() if metric == "bpb" else table.nats_and_tokens()


def _span_settings(run: EvalRun) -> dict[str, Any] | None:
    """What the target spans of `fixed` follow from: one choice for all contexts of a run."""
    for table in run.tables.values():
        if table.meta["protocol"].startswith("fixed"):
            return dict(table.meta["settings"])
    return None


def _same_tokenizer(a: EvalRun, b: EvalRun) -> bool:
    return bool(a.result["tokenizer"]["sha256"] == b.result["tokenizer"]["sha256"])


def _differ(a: EvalRun, b: EvalRun, keys: Iterable[str]) -> list[tuple[str, str]]:
    """Those of the keys in which the results differ, each with both values in words."""
    found = []
    for key in keys:
        section, _, name = key.partition(".")
        values = [run.result[section] for run in (a, b)]
        if name:
            values = [value.get(name) for value in values]
        unknown = section == "model" and None in values  # the n-gram has no precision
        if values[0] != values[1] and not unknown:
            found.append((key, f"{key}={values[0]} of {a.name}, {values[1]} of {b.name}"))
    return found


def _verdict(
    a: EvalRun,
    b: EvalRun,
    name: str,
    metric: str,
    sums: Sums,
    band95: tuple[float, float] | None,
    n_pairs: int,
) -> Verdict:
    table = a.tables[name]
    n_tokens = int(table.is_text.sum()) if metric == "bpb" else len(table.nll)
    difference = stats.ratio(*sums, n_tokens)
    sign = stats.sign_of(difference.value, band95 or difference.ci95)
    of_a, of_b = ([run.level(name, metric) for run in side.trainings] for side in (a, b))
    # Not over contexts too: a seed that is better at one is better at most.
    over_pairs = stats.welch(of_a, of_b, confidence=1 - 0.05 / n_pairs)
    words = {-1: f"{a.name} better", 1: f"{b.name} better", 0: NO_DIFFERENCE}[sign]
    if sign and over_pairs and stats.sign_of(difference.value, over_pairs) != sign:
        words += WITHIN_SEEDS
    return Verdict(
        pass_name=name,
        protocol=table.meta["protocol"],
        context=table.meta["context"],
        metric=metric,
        difference=difference,
        band95=band95,
        between_seeds=stats.welch(of_a, of_b),
        sign=sign,
        verdict=words,
    )
