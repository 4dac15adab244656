"""Verdicts name a winner only where the paired interval says so; the incomparable is refused."""

import dataclasses
import json

import numpy as np
import pytest

from evals import compare
from evals.perplexity import baseline
from evals.perplexity import suite as perplexity
from evals.perplexity.suite import PerplexityOptions
from evals.scoring.documents import EvalDocuments
from tests.evals.toy_models import FIRST, Bigram, Recurrent, documents_of, markov_documents

OPTIONS = PerplexityOptions(
    contexts=(16, 64), spans_per_document=8, stream_tokens=120, segment_tokens=64
)
DOCUMENTS, TABLE = markov_documents([400] * 24, vocab_size=12)


def evaluate(model, out_dir, name, documents=DOCUMENTS, options=OPTIONS, train_length=32):
    perplexity.run(
        model, documents, options, out_dir, name=name, train_length=train_length, progress=False
    )
    return compare.load(out_dir)


def verdicts_of(*runs, **options):
    (comparison,) = compare.compare(runs, **options)
    return comparison.verdicts


def softened(share):
    """The oracle mixed with the uniform distribution: worse by construction."""
    return Bigram(TABLE * (1 - share) + share / len(TABLE))


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    return evaluate(Bigram(TABLE), tmp_path_factory.mktemp("oracle"), "oracle")


def test_better_model_wins_at_every_context_and_order_only_flips_the_sign(oracle, tmp_path):
    worse = evaluate(softened(0.2), tmp_path, "softened")
    verdicts = verdicts_of(oracle, worse)
    assert {(v.protocol, v.context) for v in verdicts} == {
        ("fixed(4)", 16),
        ("fixed(4)", 64),
        ("position", None),
        ("stream", None),
        ("nonoverlap(32)", 32),
    }
    assert {v.metric for v in verdicts} == {"bpb", "nll"}
    assert all(v.verdict == "oracle better" and v.difference.value < 0 for v in verdicts)
    for v, flipped in zip(verdicts, verdicts_of(worse, oracle), strict=True):
        assert flipped.difference.value == pytest.approx(-v.difference.value)
        assert flipped.verdict == "oracle better"


def test_no_winner_when_the_interval_contains_zero(oracle, tmp_path):
    # Tables jittered at random around the truth: some documents a little better, some worse.
    rng = np.random.default_rng(0)
    runs = []
    for k in range(2):
        table = TABLE * np.exp(rng.normal(0, 0.01, TABLE.shape))
        model = Bigram(table / table.sum(1, keepdims=True))
        model.fingerprint = lambda k=k: f"jittered-{k}"
        runs.append(evaluate(model, tmp_path / str(k), f"jittered-{k}"))
    for verdict in verdicts_of(*runs):
        low, high = verdict.difference.ci95
        assert (verdict.verdict == compare.NO_DIFFERENCE) == (
            low <= 0 <= high or abs(verdict.difference.value) < 1e-4
        )
    same = verdicts_of(oracle, dataclasses.replace(oracle, name="twin"))
    assert all(v.verdict == compare.NO_DIFFERENCE for v in same)


def by_chance(run, sd, rng, name):
    """The run with other losses, by `sd` nat: a draw for each document of each pass."""
    tables = {
        key: dataclasses.replace(
            table, nll=table.nll + rng.normal(0, sd, len(DOCUMENTS.tokens))[table.doc]
        )
        for key, table in run.tables.items()
    }
    return dataclasses.replace(run, name=name, tables=tables)


def test_better_at_some_context_is_not_one_of_many_tests(tmp_path):
    """Three equal models whose losses differ by chance, document by document, at 8 contexts."""
    options = dataclasses.replace(
        OPTIONS, contexts=(16, 24, 32, 48, 64, 96, 128, 192), protocols=("fixed",)
    )
    base = evaluate(Bigram(TABLE), tmp_path, "base", options=options)
    rng = np.random.default_rng(0)
    named, named_by_singles = 0, 0
    for _ in range(60):
        runs = [by_chance(base, 0.015, rng, name) for name in ("a", "b", "c")]
        comparisons = compare.compare(runs)
        assert [(a.name, b.name) for a, b, _ in comparisons] == [("a", "b"), ("a", "c"), ("b", "c")]
        verdicts = [v for _, _, vs in comparisons for v in vs if v.metric == "bpb"]
        for v in verdicts:
            assert v.band95[0] < v.difference.ci95[0] < v.difference.ci95[1] < v.band95[1]
            assert (v.verdict == compare.NO_DIFFERENCE) == (v.sign == 0)
        named += any(v.sign for v in verdicts)
        named_by_singles += any(v.difference.sign() for v in verdicts)
    assert named <= 6, "5 % of 60, and 1.8 standard deviations"
    assert named_by_singles >= 24, "1 - 0.95 ** 16 is 56 %"


def test_comparing_with_the_first_alone_asks_less_and_so_sees_more(oracle):
    rng = np.random.default_rng(1)
    runs = [oracle, *(by_chance(oracle, 0.01, rng, f"run{k}") for k in range(3))]
    all_pairs = compare.compare(runs)
    with_first = compare.compare(runs, with_first_only=True)
    assert [(a.name, b.name) for a, b, _ in with_first] == [("oracle", f"run{k}") for k in range(3)]
    for one, other in zip(with_first, all_pairs, strict=False):
        for v, same in zip(one.verdicts, other.verdicts, strict=True):
            assert v.difference == same.difference
            if v.protocol.startswith("fixed"):
                assert same.band95[0] < v.band95[0] < v.band95[1] < same.band95[1]


def test_what_is_allowed_is_compared_and_anything_else_is_not(oracle):
    other = altered(oracle, "model", precision="bf16")
    assert verdicts_of(oracle, other, allow=["precision"])
    (line,) = compare.allowed([oracle, other], ["precision"])
    assert line == "model.precision=fp32 of oracle, bf16 of other"
    with pytest.raises(ValueError, match=r"allow=data: choose from policy, precision"):
        verdicts_of(oracle, other, allow=["data"])


def altered(run, section, **changes):
    result = json.loads(json.dumps(run.result))
    result[section] = {**result[section], **changes}
    return dataclasses.replace(run, name="other", result=result)


@pytest.mark.parametrize(
    ("section", "changes", "reason"),
    [
        ("data", {"fingerprint": "x"}, "data.fingerprint=.* of oracle, x of other; .*same data="),
        (
            "data",
            {"split": "test"},
            "data.split=validation of oracle, test of other; .* split=",
        ),
        ("data", {"n_docs": 3}, "data.n_docs=24 of oracle, 3 of other; .*same limit="),
        (
            "policy",
            {"documents": "packed"},
            "policy=.*isolated.* of oracle, .*packed.*=policy",
        ),
        ("model", {"precision": "bf16"}, "model.precision=fp32 of oracle, bf16 .*allow=precision"),
        ("tokenizer", {"sha256": "x"}, None),
    ],
)
def test_what_differs_is_refused_by_name(oracle, section, changes, reason):
    other = altered(oracle, section, **changes)
    if reason:
        with pytest.raises(ValueError, match=reason):
            verdicts_of(oracle, other)
    else:
        # Another tokenizer over the same text: bits per byte only.
        assert {v.metric for v in verdicts_of(oracle, other)} == {"bpb"}


def test_other_text_under_another_tokenizer_is_refused(oracle):
    other = altered(oracle, "tokenizer", sha256="x")
    other.result["data"]["text_sha256"] = "y"
    with pytest.raises(ValueError, match=r"data.text_sha256=.* of oracle, y of other"):
        verdicts_of(oracle, other)


def test_equal_names_are_refused(oracle):
    with pytest.raises(ValueError, match="runs=oracle,oracle: each needs a name of its own"):
        compare.compare([oracle, oracle])


def test_failed_gate_is_refused(oracle):
    other = altered(oracle, "data")
    other.result["gates"][0]["passed"] = False
    with pytest.raises(ValueError, match="other: gates failed: future_perturbation"):
        verdicts_of(oracle, other)


@pytest.mark.parametrize("contexts", [(32,), (16, 64, 128)])
def test_other_target_spans_are_refused(oracle, tmp_path, contexts):
    """Even where other passes are the same: one plot would show both as if they could compare."""
    options = dataclasses.replace(OPTIONS, contexts=contexts, protocols=("fixed", "stream"))
    other = evaluate(Bigram(TABLE), tmp_path, "other", options=options)
    with pytest.raises(ValueError, match="fixed: other target spans"):
        verdicts_of(oracle, other)


def test_other_protocol_settings_leave_nothing_to_compare(oracle, tmp_path):
    options = PerplexityOptions(contexts=(32,), protocols=("stream",), stream_tokens=50)
    other = evaluate(Bigram(TABLE), tmp_path, "other", options=options)
    with pytest.raises(ValueError, match="no pass in common"):
        verdicts_of(oracle, other)


def test_missing_or_damaged_results_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"no result.json.*launch/evaluate.py run="):
        compare.load(tmp_path)
    evaluate(Recurrent(), tmp_path, "toy")
    (tmp_path / "tokens" / "position-64.npz").unlink()
    with pytest.raises(ValueError, match=r"position-64.npz: cannot be read"):
        compare.load(tmp_path)
    (tmp_path / "result.json").write_text('{"schema"')
    with pytest.raises(ValueError, match=r"result.json: cannot be read .* evaluate again"):
        compare.load(tmp_path)
    (tmp_path / "result.json").write_text('{"schema": "x", "suite": "extrapolation"}')
    with pytest.raises(ValueError, match=r"is of suite=extrapolation; only .*perplexity"):
        compare.load(tmp_path)


def test_losses_that_the_result_is_not_about_are_refused(tmp_path):
    """Another evaluation may have begun in the folder and been killed."""
    evaluate(Recurrent(seed=0), tmp_path, "toy")
    evaluate(Recurrent(seed=1), tmp_path / "other", "toy")
    name = "position-64.npz"
    (tmp_path / "other" / "tokens" / name).rename(tmp_path / "tokens" / name)
    with pytest.raises(ValueError, match=f"{name}: is not the pass that result.json is about"):
        compare.load(tmp_path)


def test_ngram_joins_as_a_run_over_the_same_tokens(oracle, tmp_path, monkeypatch):
    """A bigram source: the 5-gram learns it, so it must beat uniform and not beat the oracle."""
    training, _ = markov_documents([4000] * 8, vocab_size=12, seed=0)
    training = EvalDocuments(
        **{**vars(training), "source": {"path": "toy", "split": "train", "limit": None}}
    )
    ngram = baseline.evaluate(DOCUMENTS, training, oracle, tmp_path)
    worse = evaluate(softened(0.9), tmp_path / "soft", "softened")
    assert all(v.metric == "bpb" for v in verdicts_of(oracle, ngram))
    assert all(
        v.verdict == f"{ngram.name} better"
        for v in verdicts_of(worse, ngram)
        if v.protocol == "stream"
    )
    by_context = [ngram.tables[name].nll for name in ngram.tables if name.startswith("fixed")]
    assert np.array_equal(by_context[0], by_context[1]), "it has no context axis"

    def nothing_to_fit(documents):
        raise AssertionError("the kept losses must be found again")

    monkeypatch.setattr(baseline, "_fit", nothing_to_fit)
    again = baseline.evaluate(DOCUMENTS, training, oracle, tmp_path)
    assert np.array_equal(again.tables["position-64"].nll, ngram.tables["position-64"].nll)


def test_ngram_token_losses_sum_the_bytes_of_each_token(tmp_path):
    """Tokens of several bytes, one of none: the document's sum is that of its bytes."""
    pieces = [b""] * FIRST + [b"the ", b"cat ", b"s", b"\xe2\x82", b"\xac", b""]
    ids = np.array([4, 5, 6, 9, 7, 8, 4, 5, 4, 6] * 12)
    documents = dataclasses.replace(documents_of([ids, ids[::-1]], len(pieces)), token_bytes=pieces)
    options = PerplexityOptions(contexts=(8,), protocols=("stream",))
    run = evaluate(Recurrent(len(pieces)), tmp_path, "toy", documents, options)
    ngram = baseline.evaluate(documents, documents, run)
    (table,) = ngram.tables.values()
    model = baseline.ByteNgram.fit([documents.text(0), documents.text(1)])
    for doc in (0, 1):
        expected = model.nll(documents.text(doc)).sum()
        assert table.nll[table.doc == doc].sum() == pytest.approx(expected, rel=1e-5)
        assert (table.nll[table.n_bytes == 0] == 0).all()


def test_ngram_losses_of_another_split_or_training_text_are_not_taken_for_these(oracle, tmp_path):
    """Equal positions, kept in one folder."""
    training, _ = markov_documents([900] * 2, vocab_size=12, seed=1)
    more, _ = markov_documents([900] * 2, vocab_size=12, seed=2)
    other_text = dataclasses.replace(more, fingerprint="more")
    other_split = dataclasses.replace(
        DOCUMENTS, tokens=DOCUMENTS.tokens[::-1], source={"split": "test"}
    )
    first = baseline.evaluate(DOCUMENTS, training, oracle, tmp_path)
    for documents, text in ((DOCUMENTS, other_text), (other_split, training)):
        kept = baseline.evaluate(documents, text, oracle, tmp_path)
        fresh = baseline.evaluate(documents, text, oracle)
        for name, table in fresh.tables.items():
            assert np.array_equal(kept.tables[name].nll, table.nll)
            assert not np.array_equal(first.tables[name].nll, table.nll)


def test_ngram_on_other_documents_is_refused(oracle):
    other = dataclasses.replace(DOCUMENTS, fingerprint="other")
    with pytest.raises(ValueError, match="fingerprint"):
        baseline.evaluate(other, other, oracle)
