"""The suite: numbers from the store alone, resumed runs equal whole ones, files are complete."""

import csv
import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from evals import plots
from evals.facts import FACTS
from evals.perplexity import suite as perplexity
from evals.perplexity.suite import PerplexityOptions
from evals.scoring.store import TokenTable
from tests.evals.toy_models import Bigram, Copy, Recurrent, Uniform, documents_of, markov_documents
from tests.evals.toy_models import random_documents as documents_with

OPTIONS = PerplexityOptions(
    contexts=(16, 32, 64), spans_per_document=3, stream_tokens=100, segment_tokens=32
)


def run(model, documents, out_dir, options=OPTIONS, train_length=32):
    return perplexity.run(
        model, documents, options, out_dir, name="toy", train_length=train_length, progress=False
    )


def values(result, name, protocol="fixed"):
    return {m["context"]: m["value"] for m in plots.series(result, name, protocol)}


def without_timing(result):
    return {k: v for k, v in result.items() if k not in ("created", "command", "cost")}


def test_uniform_model_reports_ln_v_and_log2_v_bits_per_byte(tmp_path):
    result = run(Uniform(32), documents_with([200] * 3), tmp_path)
    for protocol in perplexity.DEFAULT_PROTOCOLS:
        assert list(values(result, "nll", protocol).values()) == pytest.approx(
            [np.log(32)] * len(values(result, "nll", protocol)), abs=1e-6
        )
        assert all(
            value == pytest.approx(5.0, abs=1e-6)
            for value in values(result, "bpb", protocol).values()
        ), "one byte a token: log2(32) bits"
        assert all(
            value == pytest.approx(32, rel=1e-5)
            for value in values(result, "token_ppl", protocol).values()
        )
    assert values(result, "gain") == pytest.approx({32: 0.0, 64: 0.0}, abs=1e-6)


def test_a_quick_look_does_not_replace_an_evaluation_of_more_documents(tmp_path):
    documents = documents_with([100, 80, 90])
    run(Uniform(32), documents, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    few = replace(documents, tokens=documents.tokens[:2], raw_bytes=documents.raw_bytes[:2])
    with pytest.raises(ValueError, match=r"holds an evaluation of 3 documents.*use name=quick"):
        run(Uniform(32), few, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_bigram_oracle_reports_the_entropy_rate_of_its_source(tmp_path):
    documents, table = markov_documents([3000] * 24, vocab_size=12, seed=1)
    result = run(Bigram(table), documents, tmp_path)
    text = table[4:, 4:] / table[4:, 4:].sum(1, keepdims=True)
    stationary = np.linalg.matrix_power(text, 200)[0]
    entropy = -(stationary[:, None] * text * np.log(text)).sum()
    (metric,) = plots.series(result, "nll", "position")
    assert abs(metric["value"] - entropy) < 4 * metric["se"]


def test_copy_model_gains_exactly_where_its_source_comes_into_reach(tmp_path):
    rng = np.random.default_rng(0)
    texts = [np.tile(rng.integers(4, 32, 40), 8) for _ in range(4)]
    result = run(Copy(32, lag=40), documents_of(texts, 32), tmp_path)
    assert values(result, "gain") == pytest.approx({32: 0.0, 64: np.log(32)}, abs=1e-5)
    assert values(result, "gain_beyond_training") == pytest.approx({64: np.log(32)}, abs=1e-5)


def test_metrics_are_rebuilt_from_the_store_without_a_model(tmp_path):
    result = run(Recurrent(), documents_with([220, 180, 300]), tmp_path)
    tables = [
        TokenTable.load(tmp_path / "tokens" / f"{record['pass']}.npz")
        for record in result["protocols"]
    ]
    assert perplexity.derive(tables, 32) == result["metrics"]


def test_finished_passes_are_not_scored_again(tmp_path):
    documents = documents_with([220, 180, 300])
    first = Recurrent()
    whole = run(first, documents, tmp_path)
    second = Recurrent()
    again = run(second, documents, tmp_path)
    assert without_timing(again) == without_timing(whole)
    assert again["cost"] == whole["cost"]
    gates_only = Recurrent()
    perplexity.gates.check_model(gates_only, documents, 128)
    assert len(second.calls) == len(gates_only.calls) < len(first.calls)


def test_rebuilding_restores_every_file_from_the_store_and_the_facts(tmp_path):
    whole = run(Recurrent(), documents_with([220, 180, 300]), tmp_path)
    files = {name: (tmp_path / name).read_bytes() for name in ("result.json", "curve.csv")}
    for path in tmp_path.glob("*.*"):
        if path.name != FACTS:
            path.unlink()
    assert perplexity.rebuild(tmp_path) == whole
    assert {name: (tmp_path / name).read_bytes() for name in files} == files
    assert (tmp_path / "curve.png").exists()


def test_rebuilding_refuses_what_the_facts_are_not_about(tmp_path):
    with pytest.raises(ValueError, match="evaluate again"):
        perplexity.rebuild(tmp_path)
    options = PerplexityOptions(contexts=(16,), protocols=("position",))
    run(Uniform(32), documents_with([60]), tmp_path / "one", options)
    run(Recurrent(), documents_with([60]), tmp_path / "other", options)
    (tmp_path / "one" / "tokens").rename(tmp_path / "gone")
    with pytest.raises(ValueError, match="cannot be read"):
        perplexity.rebuild(tmp_path / "one")
    (tmp_path / "other" / "tokens").rename(tmp_path / "one" / "tokens")
    with pytest.raises(ValueError, match="is not the pass that"):
        perplexity.rebuild(tmp_path / "one")


def test_other_weights_or_data_are_scored_anew(tmp_path):
    documents = documents_with([220, 180, 300])
    one = run(Recurrent(seed=0), documents, tmp_path)
    other = run(Recurrent(seed=1), documents, tmp_path)
    assert one["metrics"] != other["metrics"]
    fresh = run(Recurrent(seed=1), documents, tmp_path / "fresh")
    assert other["metrics"] == fresh["metrics"]


def test_another_split_of_the_same_corpus_is_scored_anew(tmp_path):
    """Splits share a fingerprint, and cut to one length they can ask for equal positions."""
    options = PerplexityOptions(contexts=(16,), protocols=("stream",), stream_tokens=100)
    splits = [
        replace(documents_with([220, 180], seed=seed), source={"split": name})
        for seed, name in enumerate(("train", "validation"))
    ]
    assert splits[0].fingerprint == splits[1].fingerprint
    results = [run(Recurrent(), split, tmp_path, options) for split in splits]
    fresh = run(Recurrent(), splits[1], tmp_path / "fresh", options)
    assert results[0]["metrics"] != results[1]["metrics"]
    assert results[1]["metrics"] == fresh["metrics"]


def test_more_documents_add_to_a_store_of_fewer(tmp_path):
    """All targets may lie in the few; what is stored still counts sums per document."""
    documents = documents_with([420, 60, 60])
    few = replace(documents, tokens=documents.tokens[:2], raw_bytes=documents.raw_bytes[:2])
    run(Recurrent(), few, tmp_path, PerplexityOptions(contexts=(16, 128), protocols=("fixed",)))
    options = PerplexityOptions(contexts=(16, 64, 128), protocols=("fixed",))
    more = run(Recurrent(), documents, tmp_path, options)
    assert more["metrics"] == run(Recurrent(), documents, tmp_path / "fresh", options)["metrics"]


@pytest.mark.parametrize("place", ["header", "losses"])
def test_a_damaged_pass_is_scored_anew(place, tmp_path):
    documents = documents_with([220, 180, 300])
    whole = run(Recurrent(), documents, tmp_path)
    (path,) = (tmp_path / "tokens").glob("stream-*.npz")
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        nll = archive.getinfo("nll.npy")
    first = nll.header_offset + 30 + len(nll.filename)
    first += 30 if place == "header" else nll.compress_size - 60
    content[first : first + 50] = bytes(50)
    path.write_bytes(content)
    assert without_timing(run(Recurrent(), documents, tmp_path)) == without_timing(whole)


def test_another_token_before_the_documents_is_scored_anew(tmp_path):
    documents = documents_with([220, 180])
    one = run(Recurrent(), documents, tmp_path)
    other = run(Recurrent(), replace(documents, bos_id=2), tmp_path)
    assert one["metrics"] != other["metrics"]
    assert (one["model"]["start_id"], other["model"]["start_id"]) == (1, 2)


def test_files_are_complete_and_agree(tmp_path):
    result = run(Recurrent(), documents_with([220, 180, 300]), tmp_path)
    assert json.loads((tmp_path / "result.json").read_text()) == result
    rows = list(csv.DictReader((tmp_path / "curve.csv").open()))
    assert [float(row["value"]) for row in rows] == [m["value"] for m in result["metrics"]]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert {path.suffix for path in (tmp_path / "tokens").iterdir()} == {".npz"}
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    assert all(m["n_docs_low"] for m in result["metrics"])
    for record in result["protocols"]:
        if record["id"].startswith("fixed"):
            assert record["context_seen"] == [record["context"], record["context"] + 3]
    for cost in result["cost"]:
        assert cost["tokens_per_second"] > 0
        assert cost["peak_memory_bytes"] > 0


def test_eos_is_charged_only_where_the_metric_says_so(tmp_path):
    result = run(Uniform(32), documents_with([60] * 2), tmp_path, PerplexityOptions(contexts=(16,)))
    (plain,) = plots.series(result, "bpb", "stream")
    (charged,) = plots.series(result, "bpb_eos", "stream")
    assert plain["n_tokens"] == 120
    assert charged["n_tokens"] == 122
    assert charged["value"] == pytest.approx(plain["value"] * 61 / 60)


def test_curves_over_contexts_have_bands_and_single_passes_intervals(tmp_path):
    options = replace(OPTIONS, protocols=perplexity.PROTOCOLS, stride_tokens=8, stream_tokens=None)
    result = run(Recurrent(), documents_with([220, 180, 300]), tmp_path, options)
    for name in ("nll", "bpb"):
        for protocol in ("fixed", "sliding", "truncate"):
            metrics = plots.series(result, name, protocol)
            assert [m["context"] for m in metrics] == [16, 32, 64]
            for m in metrics:
                assert m["band95"][0] < m["ci95"][0] < m["ci95"][1] < m["band95"][1]
        for protocol in ("position", "stream", "nonoverlap"):
            assert [m["band95"] for m in plots.series(result, name, protocol)] == [None]
    (metric,) = plots.series(result, "word_ppl", "sliding")[:1]
    (same,) = plots.series(result, "bpb", "sliding")[:1]
    words = sum(documents_with([220, 180, 300]).words(doc) for doc in range(3))
    assert np.log(metric["value"]) * words == pytest.approx(same["value"] * np.log(2) * 700)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contexts": ()}, "contexts="),
        ({"contexts": (0, 64)}, "contexts="),
        ({"contexts": (64,), "protocols": ("fixed", "slide")}, "protocols=fixed,slide"),
        ({"contexts": (64,), "protocols": ("sliding",), "stride_tokens": 65}, "stride_tokens=65"),
        ({"contexts": (64,), "stream_tokens": -1, "spans_per_document": 0}, "spans_per_document=0"),
        ({"contexts": (64, 4096)}, "contexts=4096 leaves no target"),
    ],
)
def test_bad_options_are_refused_by_name(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(Uniform(32), documents_with([100] * 2), tmp_path, PerplexityOptions(**options))
