"""Models whose use of context is known get the verdict, effective context and drift they have."""

import csv
import json
import multiprocessing
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from evals import plots
from evals.extrapolation import concat
from evals.extrapolation import report as extrapolation_report
from evals.extrapolation import suite as extrapolation
from evals.extrapolation.metrics import judge, resampled_effective
from evals.extrapolation.suite import ExtrapolationOptions, parse_multiples
from evals.scoring.gates import GateFailure
from evals.scoring.models import LanguageModelScorer
from evals.scoring.processes import Processes
from pretrain.models import LanguageModel, LanguageModelConfig, LayersConfig
from tests.evals.toy_models import (
    FIRST,
    ByContext,
    Copy,
    Recurrent,
    Uniform,
    documents_of,
    random_documents,
)

V, L0 = 32, 32
OPTIONS = ExtrapolationOptions(
    contexts=(16, 32, 64, 128), segment_tokens=64, concat_tokens=4096, spans_per_document=2
)
DOCUMENTS = random_documents([200] * 24, V)
PERIODIC = documents_of(
    [np.tile(np.random.default_rng(k).integers(FIRST, V, 40), 6) for k in range(20)], V
)


WAVES = ByContext(V, lambda c: np.log(V) + 0.5 + 0.2 * torch.sin(c.double()))


@pytest.fixture(autouse=True)
def figure(request, monkeypatch):
    """Drawing takes longer than all the rest; one test looks at it."""
    if "files_agree" not in request.node.name:
        monkeypatch.setattr(extrapolation.plots, "extrapolation_figure", lambda result: None)
        monkeypatch.setattr(extrapolation.plots, "to_png", lambda figure: b"")


def run(model, documents, out_dir, options=OPTIONS, processes=None):
    return extrapolation.run(
        model,
        documents,
        options,
        out_dir,
        name="toy",
        train_length=L0,
        processes=processes,
        progress=False,
    )


def content(result):
    """Without what time does to it."""
    told = {k: v for k, v in result.items() if k not in ("created", "cost", "concat")}
    return told, result["concat"]["windows"], result["concat"]["drift"]


def words(result):
    return {row["context"]: row["verdict"] for row in result["verdicts"]}


def flat_then(loss):
    """ln V + 0.5 nat within the training length and its spans, plus `loss(c)` beyond."""
    return lambda c: np.log(V) + 0.5 + torch.where(c > L0 + 4, loss(c.double()), 0.0)


def test_a_uniform_model_is_flat_everywhere_and_uses_no_context(tmp_path):
    result = run(Uniform(V), DOCUMENTS, tmp_path)
    assert words(result) == {64: "flat", 128: "flat"}
    effective = result["effective_context"]
    assert (effective["value"], effective["ci95"]) == (16, [16, 16])
    assert effective["at_grid_start"]
    assert effective["shown_context"] is None
    assert result["concat"]["verdict"] == "flat"
    assert result["concat"]["tokens"] == 4096


def test_a_copy_model_gains_ln_v_where_its_source_comes_into_reach(tmp_path):
    options = replace(OPTIONS, concat_tokens=0, stream_tokens=100)
    result = run(Copy(V, lag=40), PERIODIC, tmp_path, options)
    assert words(result) == {64: "gains", 128: "gains"}
    gains = [m["value"] for m in plots.series(result, "gain_beyond_training")]
    assert gains == pytest.approx([np.log(V)] * 2, abs=1e-5)
    assert result["concat"] is None


@pytest.mark.parametrize(("lag", "expected"), [(16, 16), (17, 32), (40, 64), (64, 64), (100, 128)])
def test_effective_context_is_what_the_model_uses_to_the_grid(tmp_path, lag, expected):
    texts = [np.tile(np.random.default_rng(k).integers(FIRST, V, lag), 12) for k in range(20)]
    options = replace(OPTIONS, concat_tokens=0, stream_tokens=16, span_tokens=1)
    result = run(Copy(V, lag), documents_of(texts, V), tmp_path, options)
    effective = result["effective_context"]
    assert (effective["value"], effective["ci95"]) == (expected, [expected, expected])
    assert effective["shown_context"] == (expected if expected > 16 else None)
    assert effective["at_grid_end"] == (expected == 128)


@pytest.mark.parametrize(
    ("curve", "truth", "low", "high"),
    [
        ([0.15, 0.106, 0.075, 0.053, 0.0375, 0.0265, 0.019, 0.013], 6, 0.96, 1.0),
        ([0.2, 0.1, 0.05, 0.022, 0.0095, 0.0005, 0.0, 0.0], 4, 0.8, 0.92),
    ],
    ids=["a gain of 0.6 margins", "a gain of 0.95 margins"],
)
def test_the_effective_contexts_interval_holds_the_truth_as_often_as_is_said(
    curve, truth, low, high
):
    rng = np.random.default_rng(0)
    held = []
    for _ in range(150):
        tokens = 256 * np.exp(rng.normal(0, 0.8, 20))
        off = rng.normal(0, 0.25, (20, 1)) + rng.normal(0, 0.03, (20, 8))
        edges = resampled_effective((curve + off) * tokens[:, None], tokens, 0.01, draws=300)
        held.append(edges[0] <= truth <= edges[1])
    assert low <= np.mean(held) <= high


def test_what_a_context_does_beyond_the_training_length_is_its_verdict(tmp_path):
    worse = ByContext(V, flat_then(lambda c: 0.05 + 0 * c))
    assert words(run(worse, DOCUMENTS, tmp_path)) == {64: "degrades", 128: "degrades"}
    rising = ByContext(V, flat_then(lambda c: 0.0009 * (c - L0)))
    assert words(run(rising, DOCUMENTS, tmp_path)) == {64: "degrades", 128: "degrades"}
    lost = ByContext(V, flat_then(lambda c: 0.0013 * (c - L0)))
    result = run(lost, DOCUMENTS, tmp_path)
    assert words(result) == {64: "degrades", 128: "diverges"}
    assert result["effective_context"]["value"] == 16, "no context is worth anything"
    better = ByContext(V, flat_then(lambda c: -0.02 + 0 * c))
    assert words(run(better, DOCUMENTS, tmp_path)) == {64: "gains", 128: "gains"}


def test_a_loss_that_is_not_finite_diverges_and_the_rest_is_still_told(tmp_path):
    broken = ByContext(V, flat_then(lambda c: torch.where(c > 100, torch.inf, 0.0)))
    result = run(broken, DOCUMENTS, tmp_path)
    assert words(result) == {64: "flat", 128: "diverges"}
    assert result["verdicts"][-1]["non_finite_tokens"] == 24 * 2 * 4
    assert result["stream_non_finite_from"] == 101
    assert result["concat"]["non_finite_from"] == 101
    assert result["concat"]["verdict"] == "diverges"
    assert all(np.isfinite(m["value"]) for m in result["metrics"])
    json.dumps(result, allow_nan=False)
    assert "not finite from position 101" in " ".join(extrapolation_report.findings(result))


def test_no_difference_shown_is_not_called_flat(tmp_path):
    """Half of the documents, those of even ids, get worse by as much as the others get better."""

    class Divided(Uniform):
        def nll(self, tokens, state=None, *, score_from=0):
            seen = (state[0] if state else 0) + torch.arange(1, tokens.shape[1])
            sign = 1.0 - 2.0 * (tokens[:, 1:] % 2)
            nll = np.log(V) + 0.05 * sign * (seen > L0 + 4)
            return nll[:, score_from:].float(), (seen[-1:],)

    texts = [np.full(200, FIRST + k % 2) for k in range(24)]
    options = replace(OPTIONS, concat_tokens=0)
    result = run(Divided(V), documents_of(texts, V), tmp_path, options)
    assert words(result) == {64: "undecided", 128: "undecided"}
    wide = replace(options, flat_margin_nats=0.06)
    assert words(run(Divided(V), documents_of(texts, V), tmp_path, wide))[64] == "flat"


@pytest.mark.parametrize(
    ("gain", "interval", "word"),
    [
        (0.003, (0.001, 0.005), "flat"),
        (-0.003, (-0.005, -0.001), "flat"),
        (0.0, (-0.01, 0.01), "flat"),
        (0.006, (0.001, 0.011), "gains"),
        (-0.02, (-0.03, -0.011), "degrades"),
        (0.002, (-0.001, 0.011), "undecided"),
        (0.02, None, "undecided"),
    ],
)
def test_a_difference_that_does_not_matter_is_flat_even_where_it_is_shown(gain, interval, word):
    assert judge(gain, interval, margin=0.01) == word


def test_contexts_that_few_documents_reach_are_left_out_and_said(tmp_path):
    documents = random_documents([60] * 20 + [200] * 5, V)
    result = run(Uniform(V), documents, tmp_path)
    assert words(result) == {64: "n_docs_low", 128: "n_docs_low"}
    assert [row["n_docs"] for row in result["verdicts"]] == [5, 5]
    assert all(m["n_docs"] == 25 for m in plots.series(result, "nll"))
    asked = run(Uniform(V), documents, tmp_path, replace(OPTIONS, min_documents=5))
    assert words(asked) == {64: "flat", 128: "flat"}
    assert all(row["n_docs_low"] for row in asked["verdicts"])


def tiny_model(layers):
    torch.manual_seed(0)
    config = LanguageModelConfig(
        vocab_size=V,
        d_model=16,
        n_layers=len(layers),
        layers=LayersConfig(pattern=layers),
        mixers={
            "swa": {"n_heads": 2, "window_size": 8},
            "bst": {"n_heads": 2, "block_size": 16, "n_modes": 4, "chunk_size": 16},
        },
        init_std=0.3,
    )
    return LanguageModel(config)


def test_concat_stream_equals_scoring_the_joined_text_in_one_go(tmp_path):
    """fp64 weights: what is left is the rounding of an fp32 loss of some 4 nats."""
    model = LanguageModelScorer(tiny_model(["swa", "s4d"]).double(), torch.device("cpu"))
    documents = random_documents([50, 70, 40], V)
    table = concat.load_or_score(
        model,
        documents,
        concat.concat_pass(140, segment_tokens=24),
        tmp_path,
        model_id="tiny",
        processes=Processes(),
        progress=False,
    )
    assert table.meta["doc_lengths"] == [51, 71, 18]
    whole = np.concatenate([[documents.bos_id], *documents.tokens])[:141]
    with torch.inference_mode():
        nll, _ = model.nll(torch.from_numpy(whole.astype(np.int64))[None])
    np.testing.assert_allclose(table.nll, nll[0].numpy(), atol=1e-6)
    assert table.position.tolist() == list(range(140))


def test_drift_over_the_joined_stream_is_the_slope_that_was_planted(tmp_path):
    """A loss of a nats more per token read since the state was fresh: a times the stream."""
    options = replace(OPTIONS, concat_tokens=4020)  # twenty documents of 201 tokens
    for rise, word in ((5e-6, "degrades"), (1e-4, "diverges"), (1e-8, "flat")):
        creeping = ByContext(V, lambda c, rise=rise: np.log(V) + 0.5 + rise * c.double())
        record = run(creeping, DOCUMENTS, tmp_path, options)["concat"]
        assert record["drift"]["value"] == pytest.approx(4020 * rise, rel=0.01, abs=1e-5)
        assert record["verdict"] == word
        assert record["n_docs"] == 20
        assert record["drift"]["n_docs"] == 19, "the first has a fresh state in both"


def test_state_time_and_memory_are_told_at_doublings_and_the_end(tmp_path):
    marks = run(WAVES, DOCUMENTS, tmp_path)["concat"]["marks"]
    assert [mark["tokens"] for mark in marks] == [64, 128, 256, 512, 1024, 2048, 4096]
    assert {mark["state_bytes"] for mark in marks} == {8}, "a count"
    assert all(mark["seconds_per_token"] > 0 for mark in marks)
    assert all(mark["peak_memory_bytes"] > 2**20 for mark in marks)


def test_a_growing_state_runs_to_its_limit_and_says_so(tmp_path):
    model = LanguageModelScorer(tiny_model(["attention"]), torch.device("cpu"))
    options = replace(OPTIONS, growing_tokens=192)
    result = run(model, DOCUMENTS, tmp_path, options)
    record = result["concat"]
    assert record["tokens"] == 192
    assert result["concat_ends_at"].startswith("the most that a model with a growing state")
    # Keys and values of 16 fp32 numbers each, and the position.
    assert record["marks"][-1]["state_bytes"] == 192 * 2 * 16 * 4 + 8
    assert record["verdict"] == "undecided"
    assert record["drift"] is None


def test_a_false_claim_of_a_constant_state_fails_and_leaves_no_report(tmp_path):
    model = LanguageModelScorer(tiny_model(["attention"]), torch.device("cpu"))
    model.constant_state = True
    with pytest.raises(GateFailure, match="constant_state"):
        run(model, DOCUMENTS, tmp_path, replace(OPTIONS, concat_tokens=256, stream_tokens=64))
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize(("segment_tokens", "concat_tokens"), [(16, 1000), (20, 1000), (16, 40)])
def test_a_part_of_a_block_in_a_state_is_no_growth(tmp_path, segment_tokens, concat_tokens):
    """Keys and values of a block are held until it is whole: segments end anywhere in one."""
    model = LanguageModelScorer(tiny_model(["bst"]), torch.device("cpu"))
    options = replace(OPTIONS, segment_tokens=segment_tokens, concat_tokens=concat_tokens)
    gates = {gate["name"]: gate for gate in run(model, DOCUMENTS, tmp_path, options)["gates"]}
    assert gates["constant_state"]["passed"]


def test_a_failed_gate_takes_earlier_results_away(tmp_path):
    options = replace(OPTIONS, contexts=(16, 64), concat_tokens=256)
    run(Uniform(V), DOCUMENTS, tmp_path, options)
    with pytest.raises(GateFailure, match="future_perturbation"):
        run(Recurrent(fault="future"), DOCUMENTS, tmp_path, options)
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, monkeypatch):
    options = replace(OPTIONS, contexts=(16, 64), concat_tokens=512, stream_tokens=64)

    whole = run(WAVES, DOCUMENTS, tmp_path / "whole", options)

    def dies(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(concat, "score", dies)
        with pytest.raises(KeyboardInterrupt):
            run(WAVES, DOCUMENTS, tmp_path / "cut", options)
    assert not (tmp_path / "cut" / "result.json").exists()
    resumed = run(WAVES, DOCUMENTS, tmp_path / "cut", options)
    assert content(resumed) == content(whole)
    again = ByContext(V, WAVES.loss)
    assert run(again, DOCUMENTS, tmp_path / "cut", options)["cost"] == resumed["cost"]
    gates_only = ByContext(V, WAVES.loss)
    extrapolation.gates.check_model(gates_only, DOCUMENTS, 2048)
    assert len(again.calls) == len(gates_only.calls)


def test_two_processes_write_what_one_alone_writes(tmp_path):
    options = replace(OPTIONS, contexts=(16, 64), concat_tokens=512)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def work(rank):
        client = dist.TCPStore("127.0.0.1", store.port, is_master=False)
        run(WAVES, DOCUMENTS, tmp_path / "two", options, Processes(rank, 2, client))

    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=work, args=(rank,), daemon=True) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    assert content(result) == content(run(WAVES, DOCUMENTS, tmp_path / "one", options))


def test_files_agree_and_tensorboard_holds_the_same_scalars(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = run(WAVES, DOCUMENTS, tmp_path)
    assert json.loads((tmp_path / "result.json").read_text()) == result
    rows = list(csv.DictReader((tmp_path / "extrapolation.csv").open()))
    beyond = [row for row in rows if row["name"] == "gain_beyond_training"]
    assert {int(row["context"]): row["verdict"] for row in beyond} == words(result)
    assert [float(row["multiple"]) for row in beyond] == [2, 4]
    assert (tmp_path / "extrapolation.png").read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    gains = {e.step: e.value for e in events.Scalars("eval/fixed/gain")}
    expected = {m["context"]: m["value"] for m in plots.series(result, "gain")}
    assert gains == pytest.approx(expected, abs=1e-6)
    assert len(events.Scalars("eval/concat/excess")) == len(result["concat"]["windows"])
    page = extrapolation_report.write(result, tmp_path).read_text()
    for expected in (
        "constant_state",
        "effective context",
        "simultaneous 95 %",
        "drift",
        "data:image/svg",
    ):
        assert expected in page


@pytest.mark.parametrize(
    ("text", "contexts"),
    [("1/8..4", (8, 16, 32, 64, 128, 256)), ("1/2,1,3", (32, 64, 192)), ("0.5,2", (32, 128))],
)
def test_multiples_of_the_training_length(text, contexts):
    assert parse_multiples(text, 64) == contexts


@pytest.mark.parametrize("text", ["", "4..1", "0,1", "1/0", "-1..2", "a..b"])
def test_what_is_no_multiple_is_refused(text):
    with pytest.raises(ValueError, match=r"use 1/8\.\.256"):
        parse_multiples(text, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contexts": (0, 64)}, "contexts="),
        ({"segment_tokens": 0, "min_documents": 0}, "min_documents=0.*segment_tokens=0"),
        ({"flat_margin_nats": 0.0}, "flat_margin_nats=0.0"),
        ({"diverge_nats": float("nan")}, "diverge_nats=nan"),
        ({"min_documents": 25}, "only 24 of 24 documents have the 37 tokens"),
    ],
)
def test_bad_options_are_refused_by_name(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(Uniform(V), DOCUMENTS, tmp_path, replace(OPTIONS, **changes))


def test_a_third_of_32_tokens_is_refused():
    with pytest.raises(ValueError, match="1/3 of the training length 32 is no whole number"):
        parse_multiples("1/3,1", 32)
