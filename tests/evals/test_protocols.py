"""What every protocol promises about which token is scored with which context."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals import protocols

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=6)


def contexts_of(scoring):
    rows = {}
    for item in scoring.items:
        for token, context in zip(
            range(item.score_from, item.stop), item.context().tolist(), strict=True
        ):
            rows[item.doc, token] = context
    return rows


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 70))
def test_stream_and_nonoverlap_score_every_token_exactly_once(lengths, size):
    expected = [(doc, i) for doc, n in enumerate(lengths) for i in range(n)]
    for generator in (protocols.stream, protocols.nonoverlap):
        (scoring,) = generator(lengths, size)
        docs, positions = protocols.scored_positions(scoring.items)
        assert list(zip(docs.tolist(), positions.tolist(), strict=True)) == expected


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 70), st.integers(1, 200))
def test_a_token_limit_scores_exactly_the_first_tokens(lengths, size, limit):
    expected = [(doc, i) for doc, n in enumerate(lengths) for i in range(min(n, limit))]
    for (scoring,) in (
        protocols.stream(lengths, size, limit),
        protocols.nonoverlap(lengths, size, limit),
        protocols.position(lengths, limit),
    ):
        docs, positions = protocols.scored_positions(scoring.items)
        assert list(zip(docs.tolist(), positions.tolist(), strict=True)) == expected


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 70))
def test_stream_and_position_see_all_of_the_document_before_a_token(lengths, size):
    for (scoring,) in (protocols.stream(lengths, size), protocols.position(lengths, 300)):
        assert all(context == token for (_, token), context in contexts_of(scoring).items())


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 70))
def test_nonoverlap_sees_its_own_window_and_one_token_before_it(lengths, size):
    (scoring,) = protocols.nonoverlap(lengths, size)
    for (_, token), context in contexts_of(scoring).items():
        assert context == (token if token < size else token % size + 1)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 70))
def test_stream_segments_hand_the_state_on_without_gap_or_overlap(lengths, size):
    (scoring,) = protocols.stream(lengths, size)
    previous = None
    for item in scoring.items:
        if item.carry:
            assert (item.doc, item.start) == (previous.doc, previous.stop - 1)
        else:
            assert item.start == -1
        previous = item


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(200, 3000), min_size=1, max_size=8),
    st.integers(1, 12),
)
def test_fixed_scores_the_same_spans_with_exactly_the_asked_context(lengths, per_document):
    contexts = (16, 50, 150)
    passes = list(protocols.fixed(lengths, contexts, 4, per_document))
    assert [scoring.context for scoring in passes] == list(contexts)
    targets = None
    for scoring in passes:
        spans = [(item.doc, item.score_from, item.stop) for item in scoring.items]
        assert targets in (None, spans)
        targets = spans
        for item in scoring.items:
            assert item.start == item.score_from - scoring.context >= 0
            assert item.context().tolist() == list(range(scoring.context, scoring.context + 4))
            assert item.stop <= lengths[item.doc] - 1, "EOS is no target of a span"
    docs, positions = protocols.scored_positions(passes[0].items)
    assert len(set(zip(docs.tolist(), positions.tolist(), strict=True))) == len(docs)
    counts = np.bincount([doc for doc, _, _ in targets], minlength=len(lengths))
    for n, count in zip(lengths, counts.tolist(), strict=True):
        assert count == min(per_document, (n - 1 - 150) // 4)


def test_spans_spread_evenly_over_the_part_of_a_document_that_can_have_them():
    spans = protocols.fixed_spans([60_000] * 24, 8192, 64, 4)
    room = 60_000 - 1 - 8192
    eighths = np.array([start - 8192 for _, start in spans]) * 8 // room
    share = np.bincount(eighths, minlength=8) / len(spans)
    # 96 points: each eighth has its due share within a half.
    assert share.min() > 1 / 16
    assert share.max() < 3 / 16


@pytest.mark.parametrize(("span_tokens", "seen"), [(32, 32), (64, 64), (128, 64)])
def test_a_span_shows_a_block_model_every_phase_when_it_is_as_long_as_a_block(span_tokens, seen):
    block = 64
    for scoring in protocols.fixed([60_000] * 3, [512, 4096], span_tokens):
        slots = [np.arange(i.score_from, i.stop) - 1 - i.start for i in scoring.items]
        share = np.bincount(np.concatenate(slots) % block, minlength=block)
        assert (share > 0).sum() == seen
        assert len(set(share[share > 0].tolist())) == 1


def test_spans_longer_than_a_quarter_of_the_smallest_context_are_refused():
    with pytest.raises(ValueError, match=r"span_tokens=64.*use span_tokens=16"):
        list(protocols.fixed([10_000], [64, 4096], 64))
    assert protocols.default_span_tokens([64, 4096]) == 16
    assert protocols.default_span_tokens([512]) == 64


def test_too_short_documents_are_refused_with_the_length_that_is_needed():
    with pytest.raises(ValueError, match="the longest of 2 documents has 900 tokens and 1041"):
        list(protocols.fixed([900, 10], [64, 1024]))


def test_log_buckets_partition_the_positions():
    for n in (1, 2, 3, 1000, 1024, 1025):
        edges = protocols.log_buckets(n)
        assert edges[0] == 0
        assert edges[-1] == n
        assert (np.diff(edges) > 0).all()
