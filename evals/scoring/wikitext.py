"""WikiText as EleutherAI's lm-evaluation-harness scores it: detokenised, counted before that.

WikiText's pages are cut into words by spaces (`3 @,@ 000 km`, `( 1999 )`); its word counts, and so
word perplexities in the literature, are of that text. The harness lets a model read a page with
most of these spaces taken out and divides the loss by the page's words before (its task `wikitext`,
`preprocess_wikitext.py`, as read in 0.4.13). A word perplexity by any other rule is another number.

Surprising: the harness's rule for apostrophes before digits looks for slashes, writes `[0-9]`
literally, and so all but never applies; it is kept, for equal numbers.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from evals.scoring.documents import EvalDocuments, count_words

Rule = tuple[str, str]


def _literal(*pairs: tuple[str, str]) -> list[Rule]:
    return [(re.escape(old), new) for old, new in pairs]


def _inner_spaces(*pairs: str) -> list[Rule]:
    """`( a )` becomes `(a)`, for each pair of an opening and a closing character."""
    rules = []
    for pair in pairs:
        opening, closing = pair[0], pair[1]
        end = re.escape(closing)
        rules.append((rf"{re.escape(opening)}\s*([^{end}]*?)\s*{end}", rf"{opening}\1{closing}"))
    return rules


RULES: list[Rule] = [
    *_literal(("s '", "s'")),
    (r"/' [0-9]/", r"/'[0-9]/"),
    *_literal(*((f" @{mark}@ ", mark) for mark in "-,.")),
    *_literal(*((f" {mark} ", f"{mark} ") for mark in ":;.!?,")),
    *_inner_spaces("()", "[]", "{}", '""', "''"),
    *_literal(("= = = =", "===="), ("= = =", "==="), ("= =", "==")),
    *_literal((" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")),
]
"""Patterns and what takes their place, one after the other over the whole page."""


def detokenize(page: str) -> str:
    """The page as a model reads it."""
    for pattern, new in RULES:
        page = re.sub(pattern, new, page)
    return page


def detokenized(documents: EvalDocuments, encode: Callable[[str], Iterable[int]]) -> EvalDocuments:
    """The documents detokenised, their words counted before that; bytes are of what is scored.

    Args:
        documents: WikiText, a page each.
        encode: the model's tokenizer; ids without BOS and EOS.

    Raises:
        ValueError: the pages as published cannot be had back from their tokens.
    """
    if not documents.lossless():
        raise ValueError(
            "detokenize=wikitext: the tokenizer loses text, and words are counted on the pages as "
            "published; use a lossless tokenizer"
        )
    numbers = range(len(documents.tokens))
    pages = [documents.text(number).decode() for number in numbers]
    texts = [detokenize(page) for page in pages]
    read = replace(
        documents,
        tokens=[
            np.array([*encode(text), documents.tokens[number][-1]])  # EOS
            for number, text in zip(numbers, texts, strict=True)
        ],
        raw_bytes=[len(text.encode()) for text in texts],
    )
    return counted_as_published(read, pages)


def counted_as_published(documents: EvalDocuments, pages: Sequence[str]) -> EvalDocuments:
    """Documents of detokenised pages, their words counted on the pages as published."""
    return replace(
        documents,
        n_words=[count_words(page) for page in pages],
        fingerprint=hashlib.sha256(f"wikitext 1 {documents.fingerprint}".encode()).hexdigest(),
        source={**documents.source, "detokenize": "wikitext"},
    )
