"""One question and its answers, as text."""

import hashlib
import json
from collections.abc import Iterable
from typing import NamedTuple


class Example(NamedTuple):
    """What a task is made of.

    Attributes:
        id: file and row.
        input: what the model reads.
        references: what it may write; the first one is trained on.
    """

    id: str
    input: str
    references: tuple[str, ...]

    def rank(self) -> float:
        """In [0, 1), by the content alone: equal examples fall on the same side of a split."""
        content = "\0".join([self.input, *self.references]).encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") / 2**64


def digest(examples: Iterable[Example]) -> str:
    """sha256 of examples in their order, for telling whether data are the same as before."""
    found = hashlib.sha256()
    for example in examples:
        found.update(json.dumps(example).encode() + b"\n")
    return found.hexdigest()
