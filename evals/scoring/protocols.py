"""Which tokens are scored with which context: pure index generators, no torch and no model.

"Perplexity at context length C" has several incompatible definitions, so each one has an id here
that stands beside every number:

    fixed(T)       the same target spans of T tokens for every C, each preceded by exactly C tokens
                   of its own document and scored in one forward. The headline: only the context
                   varies, so l(C) is paired token by token.
    position       one forward from the start of each document; l(i) by position i.
    stream         the state is carried through the document in segments; every token once.
    nonoverlap(L)  windows of L tokens, each seeing only itself. Half of the tokens see fewer than
                   L/2: it measures stability more than use of context. lm-eval's rolling rule.
    sliding(S)     windows of L tokens, each S further and scoring what none before it did, behind
                   L-S+1 .. L tokens. The strided recipe of transformers' documentation.
    truncate(L)    the first L tokens of each document alone: context and place in the text vary
                   together, and openings of books weigh most where L is small.

Coordinates: token i of a document has index i = 0 .. n-1, the last one being EOS; index -1 is the
BOS that the scorer puts in front. An item feeds tokens [start, stop-1) and has the targets
[start+1, stop), of which [score_from, stop) count.

Surprising: a forward that starts exactly C tokens before a span fixes the span's place in a block
model's grid, wherever in the document it stands. For C a multiple of the block size W, its tokens
are predicted from phases W-1, 0, 1 .. T-2: the same ones for every C, but mostly early ones, where
block attention reaches least far, unless T is a multiple of W. `stream` averages over all phases.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

_GOLDEN = 0.6180339887498949


def parse_contexts(text: str, key: str = "contexts") -> tuple[int, ...]:
    """`64..8192` doubles from 64 to 8192; `64,512,8192` is a list.

    Raises:
        ValueError: the value of `key` is neither of the two.
    """
    try:
        if ".." in text:
            first, last = (int(part) for part in text.split(".."))
            if not 1 <= first <= last:
                raise ValueError
            contexts = [first]
            while contexts[-1] * 2 <= last:
                contexts.append(contexts[-1] * 2)
            return tuple(contexts)
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"{key}={text} is neither FIRST..LAST nor a list; use 64..8192 or 64,512,8192"
        ) from None


class WorkItem(NamedTuple):
    """One forward of one lane.

    Attributes:
        doc: index into the evaluated documents.
        start: first input token; -1 is BOS.
        stop: one past the last target.
        score_from: first target that counts.
        carry: continue from the state that this document's previous item left.
    """

    doc: int
    start: int
    stop: int
    score_from: int
    carry: bool = False

    def context(self) -> np.ndarray:
        """(n_scored,) int64: real tokens of the own document each scored target can see."""
        first_visible = 0 if self.carry else max(self.start, 0)
        return np.arange(self.score_from, self.stop, dtype=np.int64) - first_visible


@dataclass(frozen=True)
class Pass:
    """A protocol at one setting: what one file of the token store holds.

    Attributes:
        name: file name of the store, without suffix.
        protocol: the protocol id.
        context: C for `fixed`, L for `nonoverlap`, `sliding` and `truncate`, else None.
        settings: everything that defines the pass, JSON-able.
        items: in document order; the items of one document that carry state are consecutive.
    """

    name: str
    protocol: str
    context: int | None
    settings: dict[str, Any]
    items: tuple[WorkItem, ...]


def family(protocol: str) -> str:
    """The protocol of an id without its setting: `fixed` of `fixed(64)`."""
    return protocol.partition("(")[0]


def default_span_tokens(contexts: Sequence[int]) -> int:
    """64, and at most a quarter of the smallest context: a long span blurs small contexts."""
    return max(1, min(64, min(contexts) // 4))


def fixed_spans(
    lengths: Sequence[int],
    max_context: int,
    span_tokens: int,
    spans_per_document: int,
) -> list[tuple[int, int]]:
    """Target spans (doc, first token), the same ones for every context.

    Each long enough document is cut into `spans_per_document` equal stretches behind its first
    `max_context` tokens, one span in each; its place there walks by the golden ratio, evenly and
    without a period that a text could share. EOS is never in a span.

    Args:
        lengths: tokens per document, EOS included.
        max_context: the largest context; every span has that many tokens before it.
        span_tokens: T.
        spans_per_document: at most this many spans; fewer where they would overlap.
    """
    spans: list[tuple[int, int]] = []
    for doc, length in enumerate(lengths):
        room = (length - 1) - max_context
        count = min(spans_per_document, room // span_tokens)
        for k in range(count):
            low = max_context + room * k // count
            high = max_context + room * (k + 1) // count - span_tokens
            spans.append((doc, low + int((high - low + 1) * (len(spans) * _GOLDEN % 1.0))))
    return spans


def fixed(
    lengths: Sequence[int],
    contexts: Sequence[int],
    span_tokens: int | None = None,
    spans_per_document: int = 4,
) -> Iterator[Pass]:
    """One pass per context over one set of spans.

    Raises:
        ValueError: T is above a quarter of the smallest context, or no document is long enough.
    """
    contexts = sorted(set(contexts))
    limit = default_span_tokens(contexts)
    span_tokens = limit if span_tokens is None else span_tokens
    if not 1 <= span_tokens <= max(1, contexts[0] // 4):
        raise ValueError(
            f"span_tokens={span_tokens} is not between 1 and a quarter of the smallest context "
            f"({contexts[0]}): longer spans blur small contexts; use span_tokens={limit}"
        )
    spans = fixed_spans(lengths, contexts[-1], span_tokens, spans_per_document)
    if not spans:
        raise ValueError(
            f"contexts={contexts[-1]} leaves no target: the longest of {len(lengths)} documents "
            f"has {max(lengths, default=0)} tokens and {contexts[-1] + span_tokens + 1} are "
            f"needed; choose a smaller largest context"
        )
    for context in contexts:
        yield Pass(
            name=f"fixed-{span_tokens}-C{context:08d}",
            protocol=f"fixed({span_tokens})",
            context=context,
            settings={
                "span_tokens": span_tokens,
                "spans_per_document": spans_per_document,
                "max_context": contexts[-1],
            },
            items=tuple(
                WorkItem(doc, start - context, start + span_tokens, start) for doc, start in spans
            ),
        )


def position(lengths: Sequence[int], max_tokens: int) -> Iterator[Pass]:
    """One forward over the first `max_tokens` tokens of each document, BOS in front."""
    yield Pass(
        name=f"position-{max_tokens}",
        protocol="position",
        context=None,
        settings={"max_tokens": max_tokens},
        items=tuple(WorkItem(doc, -1, min(n, max_tokens), 0) for doc, n in enumerate(lengths) if n),
    )


def stream(
    lengths: Sequence[int], segment_tokens: int = 2048, tokens_per_document: int | None = None
) -> Iterator[Pass]:
    """The whole document, or its first tokens, in segments with the state handed on."""
    items = []
    for doc, n in enumerate(lengths):
        end = n if tokens_per_document is None else min(n, tokens_per_document)
        for first in range(0, end, segment_tokens):
            stop = min(first + segment_tokens, end)
            items.append(WorkItem(doc, first - 1, stop, first, carry=first > 0))
    yield Pass(
        name=f"stream-{tokens_per_document or 'all'}",
        protocol="stream",
        context=None,
        settings={"segment_tokens": segment_tokens, "tokens_per_document": tokens_per_document},
        items=tuple(items),
    )


def nonoverlap(
    lengths: Sequence[int], window_tokens: int, tokens_per_document: int | None = None
) -> Iterator[Pass]:
    """Windows of L targets; each later window's only context is the one token before it.

    The rolling log-likelihood of lm-evaluation-harness (`get_rolling_token_windows` with
    `context_len=1`, read in 0.4.13) to the token: the first window begins with BOS, the last one of
    a longer document is moved back to L inputs, so that its targets see the tokens before them too,
    and EOS, which a text does not have, is neither fed nor scored.
    """
    items = []
    for doc, n in enumerate(lengths):
        end = n - 1 if tokens_per_document is None else min(n - 1, tokens_per_document)
        for first in range(0, end, window_tokens):
            stop = min(first + window_tokens, end)
            items.append(WorkItem(doc, max(stop - window_tokens, 0) - 1, stop, first))
    yield Pass(
        name=f"nonoverlap-{window_tokens}-{tokens_per_document or 'all'}",
        protocol=f"nonoverlap({window_tokens})",
        context=window_tokens,
        settings={
            "window_tokens": window_tokens,
            "tokens_per_document": tokens_per_document,
            "last_window": "full",
        },
        items=tuple(items),
    )


def default_stride(contexts: Sequence[int]) -> int:
    """256, the stride that long-context papers quote, and at most half of the smallest window."""
    return max(1, min(256, min(contexts) // 2))


def sliding(
    lengths: Sequence[int],
    contexts: Sequence[int],
    stride_tokens: int | None = None,
    tokens_per_document: int | None = None,
) -> Iterator[Pass]:
    """One pass per window length L; all of them move by the same stride S.

    Token i is scored behind i tokens in the first window, then behind L-S+1 + (i-L) mod S: how far
    a document goes on changes nothing. Its last window is shorter. The strided recipe of
    transformers' documentation with `max_length=L+1` on BOS and the document scores the same tokens
    in the same windows (but weighs all windows after the first one by S-1 instead of S). A pass
    feeds about L/S times the document.

    Raises:
        ValueError: S is above the smallest L, so that tokens between windows would be left out.
    """
    contexts = sorted(set(contexts))
    default = default_stride(contexts)
    stride = default if stride_tokens is None else stride_tokens
    if not 1 <= stride <= contexts[0]:
        raise ValueError(
            f"stride_tokens={stride} is not between 1 and the smallest context ({contexts[0]}): "
            f"tokens between windows would be left out; use stride_tokens={default}"
        )
    for window in contexts:
        items = []
        for doc, n in enumerate(lengths):
            end = n if tokens_per_document is None else min(n, tokens_per_document)
            if end:
                items.append(WorkItem(doc, -1, min(window, end), 0))
            for first in range(window, end, stride):
                start = first + stride - window - 1
                items.append(WorkItem(doc, start, min(first + stride, end), first))
        yield Pass(
            name=f"sliding-{stride}-L{window:08d}-{tokens_per_document or 'all'}",
            protocol=f"sliding({stride})",
            context=window,
            settings={
                "window_tokens": window,
                "stride_tokens": stride,
                "tokens_per_document": tokens_per_document,
            },
            items=tuple(items),
        )


def truncate(lengths: Sequence[int], contexts: Sequence[int]) -> Iterator[Pass]:
    """One pass per L over the first L tokens of each document, BOS in front; shorter ones whole."""
    for window in sorted(set(contexts)):
        yield Pass(
            name=f"truncate-L{window:08d}",
            protocol=f"truncate({window})",
            context=window,
            settings={"window_tokens": window},
            items=tuple(WorkItem(doc, -1, min(n, window), 0) for doc, n in enumerate(lengths) if n),
        )


def scored_positions(items: Sequence[WorkItem]) -> tuple[np.ndarray, np.ndarray]:
    """(doc, position) of every scored token, sorted: what a complete store must hold.

    Returns:
        Two (n_scored,) int64 arrays. A pair that occurs twice was asked for twice.
    """
    if not items:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    docs = np.repeat([item.doc for item in items], [i.stop - i.score_from for i in items])
    positions = np.concatenate([np.arange(item.score_from, item.stop) for item in items])
    order = np.lexsort((positions, docs))
    return docs[order].astype(np.int64), positions[order].astype(np.int64)


def log_buckets(max_tokens: int) -> np.ndarray:
    """Ascending bucket edges 0, 1, 2, 4, .. `max_tokens`, log-spaced.

    Returns:
        (n_buckets + 1,) int64; bucket b holds positions edges[b] <= i < edges[b+1].
    """
    powers = 2 ** np.arange(max(max_tokens, 1).bit_length())
    edges = np.unique(np.concatenate([[0], powers, [max_tokens]]))
    return edges[edges <= max_tokens]


def check_room(passes: Sequence[Pass], max_tokens: int | None) -> None:
    """Raises:
    ValueError: a pass shows a model more than it can see at once.
    """
    for scoring in passes:
        needed = max(item.stop - 1 - (-1 if item.carry else item.start) for item in scoring.items)
        if max_tokens is not None and needed > max_tokens:
            shorter = {
                "stream": f"stream_tokens={max_tokens}",
                "nonoverlap": f"window_tokens={max_tokens}",
            }
            advice = shorter.get(
                family(scoring.protocol), f"contexts up to {max_tokens} less span_tokens"
            )
            raise ValueError(
                f"{scoring.protocol}: needs {needed} tokens at once, and the model takes "
                f"{max_tokens}; use {advice}, or other protocols"
            )
