"""Analytic models give analytic answers, whatever the protocol, batch size and order of work."""

import numpy as np
import pytest

from evals.scoring import protocols
from evals.scoring.score import batches, score
from evals.scoring.store import TokenTable, pass_identity
from tests.evals.toy_models import (
    FIRST,
    Bigram,
    Copy,
    Recurrent,
    Uniform,
    documents_of,
    markov_documents,
)
from tests.evals.toy_models import random_documents as documents_with

CONTEXTS = (8, 32, 64)


def all_passes(lengths):
    return [
        *protocols.fixed(lengths, CONTEXTS, 2),
        *protocols.position(lengths, 100),
        *protocols.stream(lengths, 17),
        *protocols.nonoverlap(lengths, 16),
        *protocols.sliding(lengths, (16, 50), 7),
        *protocols.truncate(lengths, (16, 100)),
    ]


def test_uniform_model_costs_ln_v_everywhere():
    documents = documents_with([150, 90, 200])
    for scoring in all_passes(documents.lengths):
        table = score(Uniform(32), documents, scoring)
        # fp32 stores ln 32 = 3.4657 to 2e-7.
        np.testing.assert_allclose(table.nll, np.log(32), atol=3e-7)


def test_bigram_oracle_costs_its_own_table_in_every_protocol():
    documents, table = markov_documents([400, 150], vocab_size=12)
    for scoring in all_passes(documents.lengths):
        scored = score(Bigram(table), documents, scoring)
        for doc, position, nll in zip(scored.doc, scored.position, scored.nll, strict=True):
            before = documents.bos_id if position == 0 else documents.tokens[doc][position - 1]
            expected = -np.log(table[before, documents.tokens[doc][position]])
            assert nll == pytest.approx(expected, rel=1e-6)


def test_copy_model_pays_nothing_where_its_source_is_in_context():
    rng = np.random.default_rng(0)
    period = rng.integers(FIRST, 32, 20)
    documents = documents_of([np.tile(period, 12), np.tile(period[::-1], 9)], 32)
    model = Copy(32, lag=20)
    for scoring in all_passes(documents.lengths):
        table = score(model, documents, scoring)
        text = table.n_bytes > 0
        reachable = table.context >= 20
        np.testing.assert_allclose(table.nll[text & reachable], 0.0, atol=1e-6)
        np.testing.assert_allclose(table.nll[text & ~reachable], np.log(32), atol=1e-6)


@pytest.mark.parametrize("batch_tokens", [1, 50, 100_000])
def test_batch_size_leaves_the_losses_unchanged(batch_tokens):
    documents = documents_with([150, 90, 200, 91, 17])
    for scoring in all_passes(documents.lengths):
        model = Recurrent()
        chosen = batches(scoring.items, batch_tokens)
        table = score(model, documents, scoring, chosen=chosen)
        reference = score(Recurrent(), documents, scoring)
        assert table.same_tokens(reference)
        # A matmul of another shape may sum in another order: fp64 inside, one fp32 rounding.
        np.testing.assert_allclose(table.nll, reference.nll, rtol=2e-7)
        lanes = max(lane_count for lane_count, _ in model.calls)
        if batch_tokens == 1:
            assert lanes == 1


def test_stream_in_segments_equals_one_pass_over_the_document():
    documents = documents_with([150, 90, 200])
    (whole,) = protocols.position(documents.lengths, 1000)
    reference = score(Recurrent(), documents, whole)
    for segment in (1, 13, 64, 500):
        (scoring,) = protocols.stream(documents.lengths, segment)
        table = score(Recurrent(), documents, scoring)
        assert table.same_tokens(reference)
        np.testing.assert_allclose(table.nll, reference.nll, rtol=2e-7)


def test_first_window_of_nonoverlap_equals_the_start_of_position():
    documents = documents_with([150, 90])
    (windows,) = protocols.nonoverlap(documents.lengths, 32)
    (whole,) = protocols.position(documents.lengths, 32)
    first = score(Recurrent(), documents, windows)
    first = first.select(first.position < 32)
    reference = score(Recurrent(), documents, whole)
    np.testing.assert_array_equal(first.nll, reference.nll)


def test_store_returns_what_was_saved_and_only_for_its_identity(tmp_path):
    documents = documents_with([60, 50])
    (scoring,) = protocols.stream(documents.lengths, 16)
    table = score(Uniform(32), documents, scoring)
    path = tmp_path / "stream.npz"
    table.save(path)
    again = TokenTable.load_if_same(path, table.meta["identity"])
    assert again.same_tokens(table)
    assert np.array_equal(again.nll, table.nll)
    assert again.meta == table.meta
    assert TokenTable.load_if_same(path, "other") is None
    path.write_bytes(path.read_bytes()[:100])
    assert TokenTable.load_if_same(path, table.meta["identity"]) is None


def test_identity_changes_with_weights_data_settings_and_items():
    (scoring,) = protocols.stream([60], 16)
    (longer,) = protocols.stream([61], 16)
    (finer,) = protocols.stream([60], 15)
    base = pass_identity(scoring, "w", "d")
    assert base == pass_identity(scoring, "w", "d")
    others = [pass_identity(longer, "w", "d"), pass_identity(finer, "w", "d")]
    others += [pass_identity(scoring, "x", "d"), pass_identity(scoring, "w", "x")]
    assert len({base, *others}) == 5


def test_a_model_with_a_smaller_vocabulary_is_refused():
    documents = documents_with([60], vocab_size=32)
    (scoring,) = protocols.stream(documents.lengths, 16)
    with pytest.raises(ValueError, match="vocab_size=16 of the model"):
        score(Uniform(16), documents, scoring)


def test_a_store_from_before_its_text_was_marked_is_read_as_it_was(tmp_path):
    documents = documents_with([40, 30])
    (scoring,) = protocols.position(documents.lengths, 100)
    table = score(Uniform(32), documents, scoring)
    table.save(tmp_path / "new.npz")
    with np.load(tmp_path / "new.npz") as arrays:
        np.savez(tmp_path / "old.npz", **{k: v for k, v in arrays.items() if k != "is_text"})
    read = TokenTable.load(tmp_path / "old.npz")
    np.testing.assert_array_equal(read.is_text, table.is_text)
    np.testing.assert_array_equal(read.bits_and_bytes(), table.bits_and_bytes())
