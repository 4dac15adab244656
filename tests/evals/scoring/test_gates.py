"""Each planted fault is caught by its gate, no report is written, and an honest model passes."""

from dataclasses import replace

import numpy as np
import pytest

from evals.perplexity import suite as perplexity
from evals.scoring import gates, protocols
from evals.scoring.score import score
from tests.evals.toy_models import Recurrent, Uniform, random_documents

DOCUMENTS = random_documents([300, 260, 240])
OPTIONS = perplexity.PerplexityOptions(contexts=(16, 64), stream_tokens=64, segment_tokens=32)


def run(model, out_dir):
    return perplexity.run(
        model, DOCUMENTS, OPTIONS, out_dir, name="toy", train_length=32, progress=False
    )


def failed_gates(model):
    return [gate.name for gate in gates.check_model(model, DOCUMENTS, 200) if not gate.passed]


def test_honest_models_pass_every_gate(tmp_path):
    assert failed_gates(Recurrent()) == []
    assert failed_gates(Uniform(32)) == []
    assert all(gate["passed"] for gate in run(Recurrent(), tmp_path)["gates"])


@pytest.mark.parametrize(
    ("fault", "gate"),
    [
        ("future", "future_perturbation"),
        ("length", "prefix_consistency"),
        ("padding", "padding_invariance"),
        ("stale", "document_isolation"),
        ("mutate", "unchanged_model"),
    ],
)
def test_planted_fault_is_named_and_nothing_is_reported(fault, gate, tmp_path):
    run(Recurrent(), tmp_path)
    with pytest.raises(gates.GateFailure, match=f"gate {gate} failed") as failure:
        run(Recurrent(fault=fault), tmp_path)
    assert gate in [result.name for result in failure.value.failed]
    assert not (tmp_path / "result.json").exists(), "an earlier result must not survive either"
    assert not (tmp_path / "curve.png").exists()


def test_state_that_is_dropped_between_calls_is_caught():
    class Forgetful(Recurrent):
        def log_p(self, inputs, state):
            return super().log_p(inputs, None)

    assert failed_gates(Forgetful()) == ["step_equals_parallel"]


def test_not_a_number_is_caught():
    class Broken(Uniform):
        def log_p(self, inputs, state):
            log_p, after = super().log_p(inputs, state)
            return log_p * float("nan"), after

    assert "prefix_consistency" in failed_gates(Broken(32))


@pytest.mark.parametrize("fault", ["missing", "twice", "negative", "nan"])
def test_coverage_counts_missing_repeated_and_impossible_losses(fault):
    (scoring,) = protocols.stream(DOCUMENTS.lengths, 50)
    table = score(Uniform(32), DOCUMENTS, scoring)
    assert gates.check_coverage(scoring, table).passed
    rows = np.arange(len(table.nll))
    if fault == "missing":
        rows = rows[1:]
    elif fault == "twice":
        rows[1] = rows[0]
    nll = table.nll.copy()
    nll[5] = {"negative": -0.1, "nan": np.nan}.get(fault, nll[5])
    damaged = replace(table, nll=nll)
    result = gates.check_coverage(scoring, damaged.select(rows))
    assert not result.passed
    assert result.value >= 1


def test_a_pass_that_asks_for_a_token_twice_fails_coverage():
    (scoring,) = protocols.stream([40], 20)
    doubled = scoring.__class__(
        scoring.name, scoring.protocol, None, {}, (*scoring.items, *scoring.items)
    )
    documents = random_documents([39])
    table = score(Uniform(32), documents, doubled)
    assert not gates.check_coverage(doubled, table).passed


@pytest.mark.parametrize("lengths", [[200], [5, 200, 9]])
def test_one_long_document_is_enough_and_short_ones_do_not_shorten_the_gates(lengths):
    documents = random_documents(lengths)
    model = Recurrent()
    assert all(gate.passed for gate in gates.check_model(model, documents, 90))
    assert max(length for _, length in model.calls) == 90
    with pytest.raises(ValueError, match="the longest has 6 tokens; the gates need 8"):
        gates.check_model(model, random_documents([5, 1]), 90)
