"""The evaluated documents: token ids, and the text bytes behind each token.

A document's last token is EOS; the scorer puts BOS before it, or whatever stood there in training.
Bytes are those of the decoded tokens: with a lossless tokenizer they are the original text's, and
`lossless` says whether they are. Where the text is at hand and its tokens decode to another one
(`evals.scoring.huggingface`), bytes are the text's own. Tokens that stand for no text (EOS) are
left out of bits per byte in both sums, numerator and denominator.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from data.shards import Corpus
from data.tokenizer import BOS_ID
from evals.stats import per_document


@dataclass(frozen=True)
class EvalDocuments:
    """What the suite needs to know of a corpus split.

    Attributes:
        tokens: per document (n,) integer ids, EOS included; views of memory-mapped shards are fine.
        token_bytes: the text bytes of every id, empty for specials.
        bos_id: id put in front of a document: what stood there in training.
        fingerprint: identity of the tokenized corpus, all of its splits.
        tokenizer_sha256: identity of the tokenizer.
        raw_bytes: bytes of each document's original text.
        source: where it came from, JSON-able: path, split and the like.
        n_words: per document, where they are counted on another text than the tokens'.
        texts: per document, where its tokens decode to another text.
        text_bytes: with `texts`, per document (n,) of its text's bytes, those that each token
            accounts for; -1 for tokens that stand for no text.
    """

    tokens: Sequence[np.ndarray]
    token_bytes: list[bytes]
    bos_id: int
    fingerprint: str
    tokenizer_sha256: str
    raw_bytes: Sequence[int]
    source: dict[str, Any] = field(default_factory=dict)
    n_words: Sequence[int] | None = None
    texts: Sequence[bytes] | None = None
    text_bytes: Sequence[np.ndarray] | None = None

    @property
    def identity(self) -> str:
        """All that these documents decide about a store of losses: corpus, split, what stands in
        front, and how many there are, which its sums by document go over."""
        n_docs = len(self.tokens)
        return f"{self.fingerprint}:{self.source.get('split')}:{self.bos_id}:{n_docs}"

    @property
    def vocab_size(self) -> int:
        return len(self.token_bytes)

    @property
    def lengths(self) -> list[int]:
        return [len(tokens) for tokens in self.tokens]

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """(V,) int64 text bytes of each id; 0 for specials."""
        return np.array([len(piece) for piece in self.token_bytes], dtype=np.int64)

    def bytes_of(self, doc: int, start: int, stop: int) -> np.ndarray:
        """(stop - start,) text bytes of a document's tokens; -1 for those that are no text."""
        if self.text_bytes is not None:
            return self.text_bytes[doc][start:stop]
        lengths = self.byte_lengths[np.asarray(self.tokens[doc][start:stop])]
        return np.where(lengths > 0, lengths, -1)

    def slice(self, doc: int, start: int, stop: int) -> np.ndarray:
        """Ids [start, stop) of a document as int64, where index -1 is BOS."""
        ids = np.asarray(self.tokens[doc][max(start, 0) : stop], dtype=np.int64)
        return np.concatenate([[self.bos_id], ids]) if start < 0 else ids

    def text(self, doc: int) -> bytes:
        """The document's text, decoded from its tokens where it is not at hand."""
        if self.texts is not None:
            return self.texts[doc]
        return decode(self.tokens[doc], self.token_bytes)

    def words(self, doc: int) -> int:
        """Words of the document's text, as prepared but for `evals.scoring.wikitext`."""
        if self.n_words is not None:
            return self.n_words[doc]
        return count_words(self.text(doc).decode(errors="replace"))

    def words_if_whole(self, doc: np.ndarray, n_bytes: np.ndarray) -> list[int] | None:
        """Words per document where scored tokens stand for every byte of it; None otherwise.

        Args:
            doc: (n,) documents of scored tokens.
            n_bytes: (n,) their text bytes.
        """
        n_docs = len(self.tokens)
        if per_document(doc, n_bytes, n_docs).tolist() != list(self.raw_bytes):
            return None
        return [self.words(k) for k in range(n_docs)]

    def text_sha256(self) -> str:
        """Identity of the text whatever the tokenizer, for bits-per-byte comparisons."""
        digest = hashlib.sha256()
        for doc in range(len(self.tokens)):
            digest.update(hashlib.sha256(self.text(doc)).digest())
        return digest.hexdigest()

    def lossless(self) -> bool:
        """Whether every document's tokens decode to its text, up to a space in front, or to as many
        bytes where the text is not at hand."""
        if self.texts is not None:
            decoded = (decode(ids, self.token_bytes) for ids in self.tokens)
            return all(d in (t, b" " + t) for d, t in zip(decoded, self.texts, strict=True))
        return all(
            int(self.byte_lengths[np.asarray(ids)].sum()) == raw
            for ids, raw in zip(self.tokens, self.raw_bytes, strict=True)
        )


def count_words(text: str) -> int:
    """Words as lm-evaluation-harness counts them for word perplexity.

    `len(re.split(r"\\s+", text))`: a white-space run at either end counts one more.
    """
    return 1 + sum(1 for _ in re.finditer(r"\s+", text))


def decode(ids: np.ndarray, token_bytes: list[bytes]) -> bytes:
    """The bytes of a token sequence."""
    return b"".join([token_bytes[i] for i in np.asarray(ids).tolist()])


def from_corpus(corpus: Corpus, limit: int | None = None, start_id: int = BOS_ID) -> EvalDocuments:
    """The first `limit` documents of a prepared split, in its order.

    Args:
        corpus: an opened split.
        limit: at most this many documents; None: all.
        start_id: put in front of each: `data.loader.start_id` of the order a model was trained in.

    Raises:
        ValueError: the split holds no document, or the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} leaves no document; use limit >= 1 or leave it out")
    n = corpus.n_documents if limit is None else min(limit, corpus.n_documents)
    if n == 0:
        raise ValueError(
            f"split={corpus.split}: {corpus.path} holds no document there; prepare one that does"
        )
    return EvalDocuments(
        tokens=[corpus.document(i) for i in range(n)],
        token_bytes=corpus.tokenizer.token_bytes(),
        bos_id=start_id,
        fingerprint=corpus.fingerprint,
        tokenizer_sha256=corpus.tokenizer.sha256,
        raw_bytes=corpus.raw_bytes[:n].tolist(),
        source={"path": str(corpus.path), "split": corpus.split, "limit": limit},
    )
