"""The byte n-gram as an evaluated run: scored on exactly the tokens that a model was scored on.

A token's loss is the sum over its bytes, each predicted from the document's bytes before it, so
pairing, intervals and verdicts are those of two models. It has no context axis: every pass over the
same targets has the same losses. EOS has no bytes and no loss here; bits per byte leaves it out on
both sides.
"""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from evals.compare import EvalRun
from evals.perplexity.metrics import derive
from evals.perplexity.ngram import ORDER, ByteNgram
from evals.scoring.documents import EvalDocuments
from evals.scoring.store import TokenTable

NAME = f"byte {ORDER}-gram"


def evaluate(
    documents: EvalDocuments,
    training: EvalDocuments,
    like: EvalRun,
    store: Path | None = None,
) -> EvalRun:
    """Fits the n-gram on the training text and scores every pass of a run with it.

    Args:
        documents: the documents `like` was evaluated on.
        training: the split whose text the n-gram may see.
        like: whose targets are scored.
        store: folder that keeps the losses; found there again, nothing is fitted.

    Raises:
        ValueError: `documents` are not those of `like`.
    """
    if documents.fingerprint != like.result["data"]["fingerprint"]:
        raise ValueError(
            f"data.fingerprint={like.result['data']['fingerprint'][:12]} of {like.name} is not "
            f"that of the corpus opened for the n-gram ({documents.fingerprint[:12]}); prepare the "
            "same corpus again, or leave out ngram=true"
        )
    losses = _Losses(documents, lambda: _fit(training))
    tables = {}
    for name, table in like.tables.items():
        path = store / f"{name}.npz" if store else None
        identity = _identity(documents, training, table)
        scored = TokenTable.load_if_same(path, identity) if path else None
        if scored is None:
            meta = {**table.meta, "identity": identity, "cost": {}}
            scored = replace(table, nll=losses.of(table), meta=meta)
            if path:
                scored.save(path)
        tables[name] = scored
    result = {
        **like.result,
        "name": NAME,
        "model": {
            "kind": f"interpolated modified Kneser-Ney over bytes, order {ORDER}",
            "charges_specials": False,
        },
        "gates": [],
        "cost": [],
        "metrics": derive(list(tables.values()), like.result["model"]["train_length"]),
    }
    return EvalRun(NAME, result, tables)


class _Losses:
    """Per-token n-gram losses of whole documents, computed when first asked for."""

    def __init__(self, documents: EvalDocuments, fit: Callable[[], ByteNgram]) -> None:
        self._documents = documents
        self._fit = fit
        self._model: ByteNgram | None = None
        self._cache: dict[int, np.ndarray] = {}

    def of(self, table: TokenTable) -> np.ndarray:
        """(n_scored,) float32 nats for the rows of a table."""
        nll = np.empty(len(table.doc), np.float32)
        for doc in np.unique(table.doc).tolist():
            rows = table.doc == doc
            nll[rows] = self._document(doc)[table.position[rows]]
        return nll

    def _document(self, doc: int) -> np.ndarray:
        if doc not in self._cache:
            if self._model is None:
                self._model = self._fit()
            by_byte = np.concatenate([[0.0], self._model.nll(self._documents.text(doc)).cumsum()])
            lengths = self._documents.byte_lengths[np.asarray(self._documents.tokens[doc])]
            ends = lengths.cumsum()
            self._cache[doc] = by_byte[ends] - by_byte[ends - lengths]
        return self._cache[doc]


def _fit(training: EvalDocuments) -> ByteNgram:
    return ByteNgram.fit(training.text(doc) for doc in range(len(training.tokens)))


def _identity(documents: EvalDocuments, training: EvalDocuments, table: TokenTable) -> str:
    sources = f"{documents.identity} {training.identity}"
    digest = hashlib.sha256(f"{NAME} 2 {sources}".encode())
    digest.update(table.doc.tobytes())
    digest.update(table.position.tobytes())
    return digest.hexdigest()
