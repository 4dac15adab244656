"""Models that copy, that see a window, and that know nothing give the ranks they must give."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.distributed import HashStore

from data.tokenizer import BytesTokenizer
from evals.recall import likelihood, probes, suite
from evals.recall.likelihood import Cell, CellScores, RecallOptions
from evals.recall.probes import SPAN_TOKENS, DoesNotFit
from evals.scoring.gates import GateFailure
from evals.scoring.processes import Processes
from evals.scoring.score import model_identity
from evals.stats import wilson
from tests.evals.toy_models import (
    FIRST,
    PhraseCopy,
    Recurrent,
    Uniform,
    documents_of,
    random_documents,
)

TOKENIZER = BytesTokenizer()
VOCABULARY = TOKENIZER.vocab_size
DEPTHS = (0.0, 0.5, 1.0)


def text_documents(lengths, seed=0):
    """Letters and spaces: no digits, no newlines, nothing that a probe asks for."""
    rng = np.random.default_rng(seed)
    letters = np.array([FIRST + b for b in b"abcdefghijklmnopqrstuvwxyz     "])
    ids = [letters[rng.integers(len(letters), size=n)] for n in lengths]
    return replace(documents_of(ids, VOCABULARY), token_bytes=TOKENIZER.token_bytes())


DOCUMENTS = text_documents([900, 700, 1000])


def options(**changes):
    values = {"lengths": (600,), "depths": DEPTHS, "trials": 6, "candidates": 5}
    return RecallOptions(**(values | {"segment_tokens": 250} | changes))


def score_cells(model, chosen, folder):
    return likelihood.score_cells(
        model,
        DOCUMENTS,
        TOKENIZER.encode,
        chosen,
        folder,
        model_id=model_identity(model.fingerprint(), model.precision),
        processes=Processes(),
        progress=False,
    )


def accuracies(model, chosen, out_dir):
    scores = score_cells(model, chosen, out_dir)
    return {cell: float(likelihood.ranks(found)[0].mean()) for cell, found in scores.items()}


@pytest.mark.parametrize("probe", ["passkey", "phonebook"])
def test_a_model_that_copies_phrases_finds_the_right_one_at_every_depth(probe, tmp_path):
    chosen = options(probes=(probe,), trials=3)
    found = accuracies(PhraseCopy(VOCABULARY, order=12), chosen, tmp_path)
    assert found == {Cell(probe, 600, depth): 1.0 for depth in DEPTHS}


def test_a_window_finds_the_key_only_where_it_reaches(tmp_path):
    chosen = options(probes=("passkey",), trials=8)
    found = accuracies(PhraseCopy(VOCABULARY, order=12, window=200), chosen, tmp_path)
    assert found[Cell("passkey", 600, 1.0)] == 1.0
    # What it knows nothing of are ties, which count as the guess they are.
    assert found[Cell("passkey", 600, 0.0)] == found[Cell("passkey", 600, 0.5)] == 1 / 5


class FrequentDigits(Uniform):
    """Prefers some digits, whatever was read: prior knowledge, and no memory."""

    def log_p(self, inputs, state):
        log_p, after = super().log_p(inputs, state)
        tilt = torch.linspace(0, 2, self.vocab_size)
        return torch.log_softmax(log_p + tilt, -1), after


@pytest.mark.parametrize("probe", ["passkey", "phonebook"])
def test_without_memory_the_share_is_one_in_k_whatever_is_likelier_beforehand(probe, tmp_path):
    chosen = options(probes=(probe,), depths=(0.5,), trials=300, candidates=4)
    (uniform,) = accuracies(Uniform(VOCABULARY), chosen, tmp_path / "uniform").values()
    assert uniform == 1 / 4
    (tilted,) = accuracies(FrequentDigits(VOCABULARY), chosen, tmp_path / "tilted").values()
    low, high = wilson(300 * tilted, 300)
    assert low <= 1 / 4 <= high
    assert tilted != 1 / 4, "it does rank"


@pytest.mark.parametrize("length", [SPAN_TOKENS, 150])
def test_a_repeated_span_costs_a_copying_model_less_than_the_first_time(length, tmp_path):
    chosen = options(probes=("induction",), lengths=(length,), trials=4)
    scores = score_cells(PhraseCopy(VOCABULARY, order=2), chosen, tmp_path)
    found = {m["name"]: m for m in likelihood.derive(scores)}
    assert found["nll_second"]["value"] < 1.2 < 4 < found["nll_first"]["value"]
    assert found["gain"]["value"] == pytest.approx(
        found["nll_first"]["value"] - found["nll_second"]["value"]
    )
    assert found["copied"]["ci95"][0] > 4
    scores = score_cells(
        PhraseCopy(VOCABULARY, order=2, window=length - 1), chosen, tmp_path / "window"
    )
    window = {m["name"]: m["value"] for m in likelihood.derive(scores)}
    assert abs(window["copied"]) < 0.5


def test_a_spans_loss_is_per_token_and_leaves_out_its_first(tmp_path):
    chosen = options(probes=("induction",), lengths=(100,), trials=2)
    for metric in likelihood.derive(score_cells(Uniform(VOCABULARY), chosen, tmp_path)):
        known = np.log(VOCABULARY) if metric["name"].startswith("nll") else 0
        assert metric["value"] == pytest.approx(known, abs=1e-5)


def test_several_depths_of_one_question_are_one_trial():
    rng = np.random.default_rng(0)
    found = CellScores(np.arange(40) % 4, rng.integers(3, size=40), rng.random((40, 3)))
    once, twice = (
        likelihood.derive({Cell("passkey", 600, depth): found for depth in depths})[-2]
        for depths in ((0.0,), (0.0, 1.0))
    )
    assert once["name"] == twice["name"] == "accuracy"
    assert once["depth"] is twice["depth"] is None
    assert once["ci95_by_trial"] == list(wilson(40 * once["value"], 40)) == twice["ci95_by_trial"]
    assert once["ci95"] == pytest.approx(twice["ci95"])
    assert once["n_docs"] == 4


def test_ranks_and_ties_are_counted_as_defined():
    nll = np.array([[1.0, 2, 3, 4], [2, 1, 3, 4], [1, 1, 3, 4], [5, 5, 5, 5], [9, 1, 9, 9]])
    scores = CellScores(np.arange(5), np.zeros(5, dtype=int), nll)
    first, reciprocal = likelihood.ranks(scores)
    assert first.tolist() == [1, 0, 1 / 2, 1 / 4, 0]
    harmonic = 1 + 1 / 2 + 1 / 3 + 1 / 4
    expected = [1, 1 / 2, 3 / 4, harmonic / 4, (1 / 2 + 1 / 3 + 1 / 4) / 3]
    assert reciprocal == pytest.approx(expected)


def test_chances_are_those_of_a_random_order():
    rng = np.random.default_rng(0)
    scores = CellScores(np.arange(4000), rng.integers(6, size=4000), rng.random((4000, 6)))
    cell = Cell("passkey", 600, 0.5)
    for metric in likelihood.derive({cell: scores}):
        if metric["depth"] is not None:
            assert metric["value"] == pytest.approx(metric["chance"], abs=0.03)
            assert metric["n_trials"] == metric["n_docs"] == 4000


def test_the_key_stands_at_its_depth_and_only_there():
    for depth in DEPTHS:
        rng = np.random.default_rng(3)
        trial = probes.passkey(DOCUMENTS, TOKENIZER.encode, 500, depth, 10, rng, 1)
        assert trial.doc == 1
        assert len(trial.context) == 501
        text = TOKENIZER.decode(trial.context)
        keys = [TOKENIZER.decode(candidate) for candidate in trial.candidates]
        assert len(set(keys)) == 10
        assert [text.count(key) for key in keys] == [
            2 if k == trial.right else 0 for k in range(10)
        ]
        assert text.endswith("The pass key is")
        before, _, after = text.partition("\nThe pass key is")
        after = after.removeprefix(f"{keys[trial.right]}. Remember it.{keys[trial.right]}")
        after = after.removeprefix(" is the pass key.\n")
        passage = before + after.removesuffix("\nWhat is the pass key? The pass key is")
        assert len(before) == round(depth * len(passage))
        assert passage in DOCUMENTS.text(1).decode()


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_book_holds_every_candidate_once_but_the_examples(depth):
    rng = np.random.default_rng(5)
    trial = probes.phonebook(DOCUMENTS, TOKENIZER.encode, 900, depth, 10, rng, 0)
    text = TOKENIZER.decode(trial.context)
    assert len(trial.context) == 901
    passage_and_book, examples, question = text.rsplit("\n\n", 2)
    lines = passage_and_book.split("\n")
    first = lines[0]  # some text of the document, then the first entry
    start = next(i for i, letter in enumerate(first) if letter.isupper())
    lines[0] = first[start:]
    book = dict(line.split(": ") for line in lines)
    assert len(book) == len(lines) >= 12
    assert all(len(number) == 10 and number[0] in "6789" for number in book.values())
    numbers = [TOKENIZER.decode(candidate).strip() for candidate in trial.candidates]
    assert len(set(numbers)) == 10
    assert set(numbers) <= set(book.values())
    assert book[question.removesuffix(":")] == numbers[trial.right]
    assert list(book).index(question.removesuffix(":")) == round(depth * (len(book) - 1))
    shown = dict(line.split(": ") for line in examples.split("\n"))
    assert len(shown) == 2
    assert shown.items() <= book.items()
    assert not set(shown.values()) & set(numbers)


def test_the_right_one_is_at_any_place():
    rng = [np.random.default_rng(k) for k in range(200)]
    found = [
        probes.passkey(DOCUMENTS, TOKENIZER.encode, 200, 0, 4, rng[k], k).right for k in range(200)
    ]
    assert (np.bincount(found, minlength=4) > 25).all()


@pytest.mark.parametrize(
    ("ask", "length", "reason"),
    [
        (probes.passkey, 50, "sentence and question take"),
        (probes.passkey, 2000, "the longest document has 1000"),
        (probes.phonebook, 200, "entries fit; 10 candidates"),
    ],
)
def test_questions_that_do_not_fit_say_why(ask, length, reason):
    with pytest.raises(DoesNotFit, match=reason):
        ask(DOCUMENTS, TOKENIZER.encode, length, 0.5, 10, np.random.default_rng(0), 0)


def stateful():
    return Recurrent(VOCABULARY, width=4)


def run_suite(out_dir, model=None, processes=None, **changes):
    chosen = options(**({"trials": 3, "lengths": (64, 600), "segment_tokens": 96} | changes))
    return suite.run(
        model or stateful(),
        DOCUMENTS,
        TOKENIZER.encode,
        chosen,
        out_dir,
        name="toy",
        train_length=100,
        provenance={"command": "evaluate.py"},
        processes=processes,
        progress=False,
    )


def numbers_of(result):
    return {k: v for k, v in result.items() if k not in ("created", "cost")}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("recall")
    return out_dir, run_suite(out_dir)


def test_a_killed_evaluation_goes_on_to_the_same_result(evaluated, tmp_path, monkeypatch):
    _, whole = evaluated
    score, scored = likelihood.score, []

    def killed_in_the_third(model, asked, chosen):
        scored.append(asked)
        if len(scored) == 3:
            raise KeyboardInterrupt
        return score(model, asked, chosen)

    monkeypatch.setattr(likelihood, "score", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        run_suite(tmp_path)
    assert len(list((tmp_path / "cells").iterdir())) == 2
    assert not (tmp_path / "result.json").exists()
    assert numbers_of(run_suite(tmp_path)) == numbers_of(whole)
    assert len(scored) == 3 + 6, "3 depths of 2 probes and 2 lengths of one are 8 cells"


def test_a_damaged_cell_is_scored_anew(evaluated, tmp_path):
    out_dir, whole = evaluated
    shutil.copytree(out_dir, tmp_path / "again")
    (tmp_path / "again" / "cells" / "passkey-600-0.json").write_text('{"doc": [0')
    assert numbers_of(run_suite(tmp_path / "again")) == numbers_of(whole)


def test_how_many_run_at_once_changes_nothing_but_rounding(evaluated, tmp_path, monkeypatch):
    _, whole = evaluated
    monkeypatch.setattr(likelihood, "BATCH_TOKENS", 1)
    single = run_suite(tmp_path, probes=("passkey",))["metrics"]
    several = [metric for metric in whole["metrics"] if metric["probe"] == "passkey"]
    for a, b in zip(several, single, strict=True):
        assert a["value"] == pytest.approx(b["value"], abs=1e-5)


def test_files_tell_what_was_asked_and_what_was_not(evaluated):
    out_dir, result = evaluated
    assert json.loads((out_dir / "result.json").read_text()) == result
    assert {gate["name"] for gate in result["gates"]} >= {
        "step_equals_parallel",
        "candidates_equal_whole",
        "finite",
        "unchanged_model",
    }
    asked = {(m["probe"], m["length"], m["depth"]) for m in result["metrics"]}
    expected = {(probe, 600, depth) for probe in likelihood.RANKED for depth in (*DEPTHS, None)}
    assert asked == expected | {("induction", 64, None), ("induction", 600, None)}
    assert {(c["probe"], c["length"]) for c in result["skipped"]} == {
        ("passkey", 64),
        ("phonebook", 64),
    }
    rows = (out_dir / "cells.csv").read_text().splitlines()
    assert len(rows) == 1 + len(result["metrics"])
    assert (out_dir / "recall.png").read_bytes().startswith(b"\x89PNG")
    page = (out_dir / "report.html").read_text()
    assert "passkey at 64 tokens: not asked; sentence and question take" in page
    assert "data:image/svg+xml" in page
    assert not re.search(r"(src|href)=.(https?:)?//", page), "it opens offline"


def test_several_processes_give_the_result_of_one(evaluated, tmp_path):
    _, whole = evaluated
    store = HashStore()
    with ThreadPoolExecutor(3) as pool:
        processes = [Processes(rank, 3, store) for rank in range(3)]
        results = list(pool.map(lambda p: run_suite(tmp_path, processes=p), processes))
    assert [numbers_of(result) for result in results] == 3 * [numbers_of(whole)]


def test_everything_is_derived_again_from_the_cells(evaluated, tmp_path):
    out_dir, whole = evaluated
    for path in (suite.FACTS, "cells"):
        copy = shutil.copytree if path == "cells" else shutil.copy
        copy(out_dir / path, tmp_path / path)
    assert suite.derive(tmp_path) == whole
    for name in ("report.html", "cells.csv"):
        assert (tmp_path / name).read_bytes() == (out_dir / name).read_bytes()
    assert any((tmp_path / "tensorboard").iterdir())
    (tmp_path / "cells" / "passkey-600-0.json").unlink()
    with pytest.raises(ValueError, match=r"passkey-600-0\.json: missing"):
        suite.derive(tmp_path)
    (tmp_path / suite.FACTS).unlink()
    with pytest.raises(ValueError, match=r"facts\.json: cannot be read"):
        suite.derive(tmp_path)


def test_other_questions_are_scored_anew(evaluated, tmp_path):
    shutil.copytree(evaluated[0], tmp_path / "again")
    out_dir = tmp_path / "again"
    cells = {path.name: path.read_bytes() for path in (out_dir / "cells").iterdir()}
    score_cells(stateful(), options(trials=3, segment_tokens=96), out_dir / "cells")
    assert cells == {path.name: path.read_bytes() for path in (out_dir / "cells").iterdir()}
    chosen = options(trials=3, segment_tokens=96, seed=1, probes=("passkey",))
    score_cells(stateful(), chosen, out_dir / "cells")
    changed = {k for k, v in cells.items() if (out_dir / "cells" / k).read_bytes() != v}
    assert changed == {f"passkey-600-{depth:g}.json" for depth in DEPTHS}


class LosesItsState(Recurrent):
    """Begins anew where a batch of states is handed on: branches see only their own tokens."""

    def log_p(self, inputs, state):
        return super().log_p(inputs, None if len(inputs) > 1 else state)


def test_a_state_that_does_not_reach_the_candidates_fails_a_gate(tmp_path):
    with pytest.raises(GateFailure, match="candidates_equal_whole"):
        run_suite(tmp_path, LosesItsState(VOCABULARY, width=4), probes=("passkey",))
    assert not (tmp_path / "report.html").exists()


def test_losses_that_are_no_numbers_fail_a_gate():
    scores = {Cell("passkey", 64, 0.5): CellScores(np.zeros(1), np.zeros(1), np.array([[np.nan]]))}
    assert not likelihood.check_finite(scores).passed


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lengths": ()}, "lengths=.*at least one"),
        ({"depths": (0.5, 1.5)}, "depths=.*from 0 to 1"),
        ({"probes": ("needle",)}, "probes=needle: choose from passkey, phonebook, induction"),
        ({"candidates": 1}, "candidates=1: must be at least 2"),
        ({"trials": 0}, "trials=0: must be at least 1"),
        ({"lengths": (16,)}, "lengths=16: no question fits; passkey: sentence and question"),
    ],
)
def test_options_that_make_no_sense_are_refused(changes, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        run_suite(tmp_path, **changes)


def test_a_vocabulary_without_text_is_no_place_for_random_spans():
    assert random_documents([10]).byte_lengths[:FIRST].sum() == 0
    rng = np.random.default_rng(0)
    first, second = probes.induction(DOCUMENTS, 100, rng, 0)
    assert second.context[1 : 1 + SPAN_TOKENS].tolist() == first.candidates[0].tolist()
    assert second.candidates[0].tolist() == first.candidates[0].tolist()
    assert (np.concatenate(second.candidates) >= FIRST).all()
    assert len(second.context) == 101
