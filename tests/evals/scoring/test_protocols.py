"""What every protocol promises about which token is scored with which context."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals.scoring import protocols

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=6)


def contexts_of(scoring):
    rows = {}
    for item in scoring.items:
        for token, context in zip(
            range(item.score_from, item.stop), item.context().tolist(), strict=True
        ):
            rows[item.doc, token] = context
    return rows


def scored(scoring):
    docs, positions = protocols.scored_positions(scoring.items)
    return list(zip(docs.tolist(), positions.tolist(), strict=True))


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 70), st.integers(1, 70))
def test_every_token_is_scored_exactly_once_and_by_nonoverlap_all_but_eos(lengths, size, stride):
    expected = [(doc, i) for doc, n in enumerate(lengths) for i in range(n)]
    text = [(doc, i) for doc, n in enumerate(lengths) for i in range(n - 1)]
    (stream,) = protocols.stream(lengths, size)
    (nonoverlap,) = protocols.nonoverlap(lengths, size)
    passes = list(protocols.sliding(lengths, (size, size + 9, 1000), min(stride, size)))
    assert scored(stream) == expected
    assert scored(nonoverlap) == text
    assert [scoring.context for scoring in passes] == [size, size + 9, 1000]
    assert all(scored(scoring) == expected for scoring in passes)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 70), st.integers(1, 200))
def test_a_token_limit_scores_exactly_the_first_tokens(lengths, size, limit):
    expected = [(doc, i) for doc, n in enumerate(lengths) for i in range(min(n, limit))]
    for (scoring,) in (
        protocols.stream(lengths, size, limit),
        protocols.sliding(lengths, [size], size, limit),
        protocols.position(lengths, limit),
        protocols.truncate(lengths, [limit]),
    ):
        assert scored(scoring) == expected
    (scoring,) = protocols.nonoverlap(lengths, size, limit)
    assert scored(scoring) == [(doc, i) for doc, i in expected if i < lengths[doc] - 1]


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 70))
def test_stream_and_position_see_all_of_the_document_before_a_token(lengths, size):
    for (scoring,) in (protocols.stream(lengths, size), protocols.position(lengths, 300)):
        assert all(context == token for (_, token), context in contexts_of(scoring).items())


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 70))
def test_nonoverlap_sees_its_own_window_and_one_token_before_it(lengths, size):
    (scoring,) = protocols.nonoverlap(lengths, size)
    for (doc, token), context in contexts_of(scoring).items():
        text = lengths[doc] - 1
        moved_back = -text % size if token >= text // size * size else 0
        assert context == (token if token < size else token % size + 1 + moved_back)
    assert all(item.stop - item.start - 1 <= size for item in scoring.items)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 70), st.integers(1, 70))
def test_sliding_windows_keep_all_but_a_stride_of_context(lengths, size, stride):
    stride = min(stride, size)
    (scoring,) = protocols.sliding(lengths, [size], stride)
    for (_, token), context in contexts_of(scoring).items():
        assert context == (token if token < size else size - stride + 1 + (token - size) % stride)
    assert all(item.stop - item.start - 1 <= size for item in scoring.items)
    assert not any(item.carry for item in scoring.items)


@settings(max_examples=60, deadline=None)
@given(LENGTHS)
def test_truncated_documents_are_read_from_their_start_and_nested(lengths):
    short, long = protocols.truncate(lengths, [100, 7])
    assert (short.protocol, short.context) == ("truncate(7)", 7)
    for scoring in (short, long):
        assert [item.doc for item in scoring.items] == list(range(len(lengths)))
        assert all((item.start, item.score_from) == (-1, 0) for item in scoring.items)
        assert all(context == token for (_, token), context in contexts_of(scoring).items())
    assert set(scored(short)) <= set(scored(long))


def test_strides_that_leave_tokens_out_are_refused():
    with pytest.raises(ValueError, match=r"stride_tokens=65 .*\(64\).*use stride_tokens=32"):
        list(protocols.sliding([1000], [64, 512], 65))
    assert protocols.default_stride([2048, 8192]) == 256


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
