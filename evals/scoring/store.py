"""The token store: one npz per pass, one row per scored token. Every metric is rebuilt from it.

A file carries the identity of what produced it (weights, data, pass), so a finished pass is found
again after an interruption and a stale one is never mistaken for it. Rows are sorted by (doc,
position): batch size and order of work leave no trace.
"""

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from data.shards import write_atomically
from evals.scoring.protocols import Pass, WorkItem
from evals.stats import per_document

STORE_FORMAT = 3
_COLUMNS = ("doc", "position", "context", "nll", "n_bytes", "is_text")
_UNREADABLE = (
    *(OSError, ValueError, KeyError, EOFError),
    *(zipfile.BadZipFile, zlib.error, TokenError),  # of an archive and of an array's header
)


@dataclass(frozen=True)
class TokenTable:
    """Scored tokens; all arrays (n_scored,), sorted by (doc, position).

    Attributes:
        doc: int32 index into the evaluated documents.
        position: int32 index of the token in its document.
        context: int32 real tokens of the own document the model could see.
        nll: float32 nats.
        n_bytes: uint32 text bytes of the token, 0 for specials.
        is_text: bool, whether its loss is one of the text; some such tokens have no bytes, such as
            the mark that Llama's tokenizer puts in front.
        meta: pass, identity, cost, and `n_words` per document where all of its text was scored.
    """

    doc: np.ndarray
    position: np.ndarray
    context: np.ndarray
    nll: np.ndarray
    n_bytes: np.ndarray
    is_text: np.ndarray
    meta: dict[str, Any]

    def select(self, rows: np.ndarray) -> "TokenTable":
        """The rows a mask or index array picks."""
        return TokenTable(meta=self.meta, **{k: getattr(self, k)[rows] for k in _COLUMNS})

    def nats_and_tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Per document (n_docs,): summed NLL in nats, scored tokens; specials included."""
        n_docs = self._n_docs()
        return (
            per_document(self.doc, self.nll, n_docs),
            per_document(self.doc, np.ones(len(self.doc)), n_docs),
        )

    def bits_and_bytes(self) -> tuple[np.ndarray, np.ndarray]:
        """Per document (n_docs,): bits and bytes of the tokens that stand for text."""
        n_docs = self._n_docs()
        bits = np.where(self.is_text, self.nll, 0.0) / np.log(2.0)
        return per_document(self.doc, bits, n_docs), per_document(self.doc, self.n_bytes, n_docs)

    def same_tokens(self, other: "TokenTable") -> bool:
        """Whether both hold the same targets of the same documents, with the same bytes."""
        return all(
            np.array_equal(a, b)
            for a, b in (
                (self.doc, other.doc),
                (self.position, other.position),
                (self.n_bytes, other.n_bytes),
            )
        )

    @classmethod
    def join(cls, tables: "Sequence[TokenTable]", meta: dict[str, Any]) -> "TokenTable":
        """The rows of all tables, in order."""
        columns = {k: np.concatenate([getattr(table, k) for table in tables]) for k in _COLUMNS}
        return cls(meta=meta, **columns).select(np.lexsort((columns["position"], columns["doc"])))

    def _n_docs(self) -> int:
        return int(self.meta["n_docs"])

    def save(self, path: Path) -> None:
        """Writes the table atomically: a reader sees the old file or the whole new one."""
        content = io.BytesIO()
        columns = {name: getattr(self, name) for name in _COLUMNS}
        meta = np.array(json.dumps(self.meta, sort_keys=True))
        np.savez_compressed(content, **columns, meta=meta)
        write_bytes(path, content.getvalue())

    @classmethod
    def load(cls, path: Path) -> "TokenTable":
        """Reads a table.

        Raises:
            ValueError: the file is missing or damaged.
        """
        try:
            with np.load(path) as arrays:
                meta = json.loads(str(arrays["meta"]))
                # Files from before `is_text` are of text that all has bytes.
                found = {"is_text": arrays["n_bytes"] > 0, **arrays}
                columns = {name: found[name] for name in _COLUMNS}
        except _UNREADABLE as error:
            raise ValueError(
                f"{path}: cannot be read ({error}); delete it and evaluate again"
            ) from error
        return cls(meta=meta, **columns)

    @classmethod
    def load_if_same(cls, path: Path, identity: str) -> "TokenTable | None":
        """The table when `path` was written for `identity`; None when absent, older or damaged."""
        try:
            table = cls.load(path)
        except ValueError:
            return None
        return table if table.meta.get("identity") == identity else None


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)


def pass_identity(scoring: Pass, model: str, data: str) -> str:
    """sha256 over what decides the numbers of a pass.

    Args:
        scoring: the pass; its items enter one by one, so the documents' lengths do too.
        model: identity of the model: weights, buffers and precision.
        data: identity of the documents, their split included.
    """
    record = [STORE_FORMAT, model, data, scoring.name, scoring.protocol, scoring.settings]
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    digest.update(_item_array(scoring.items).tobytes())
    return digest.hexdigest()


def _item_array(items: Sequence[WorkItem]) -> np.ndarray:
    return np.array([tuple(item) for item in items], dtype=np.int64).reshape(-1, 5)
