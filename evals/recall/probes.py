"""Questions to a trained language model that only its memory answers: contexts and candidates.

No torch and no model here. A trial is a context of L tokens behind BOS and some continuations, of
which one is right; `evals.recall.likelihood` ranks them. Generation would say nothing: small models
fail at it whatever they remember.

    passkey     Mohtashami & Jaggi (2023, 2305.16300): a sentence with a number in a long text, the
                number is asked for at the end. Their text is one sentence repeated, ours a passage
                of an evaluated document, behind the share `depth` of which the sentence stands.
                Candidates are random numbers of five digits, one of them the right one.
    phonebook   Jelassi et al. (2024, 2402.01032): lines of a name and a number of ten digits, two
                of them again as examples, and a name that stands at the share `depth` of the book.
                Candidates are numbers of the book: who remembers them but not whose they are
                guesses, and who knows only the last lines prefers theirs and does worse than that.
                Names are ours. What fills up the L tokens in front is text of a document.
    induction   Olsson et al. (2022, 2209.11895): random tokens repeated, here `SPAN_TOKENS` of them
                behind L tokens that begin with the first copy and go on as an evaluated document.
                The two continuations are the second copy and other random tokens, a control.

Right and wrong candidates are drawn alike, so 1 / K of the trials is right by chance, whatever the
tokenizer makes of numbers. The numbers, names and passages of a trial are the same at every depth.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from evals.scoring.documents import EvalDocuments

SPAN_TOKENS = 64
_FIRST_NAMES, _LAST_NAMES = (
    names.split()
    for names in (
        "Ada Alan Alice Anna Carl Clara Daniel Edith Edward Emma Frank George Grace Harold Helen "
        "Henry Ida Jack Jane John Julia Laura Louis Mary Oscar Paul Peter Rose Ruth Samuel Thomas",
        "Adams Baker Bell Brooks Carter Clark Cook Cooper Davis Evans Fisher Foster Gray Green "
        "Hall Harris Hill Hunt King Lewis Martin Mason Miller Moore Parker Reed Scott Shaw Smith",
    )
)
_INITIALS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

Encode = Callable[[str], np.ndarray]


class Trial(NamedTuple):
    """A question.

    Attributes:
        doc: index of the evaluated document whose text is in it.
        context: (L + 1,) int64 ids, BOS first.
        candidates: ids of each continuation.
        right: which candidate is.
    """

    doc: int
    context: np.ndarray
    candidates: list[np.ndarray]
    right: int


class DoesNotFit(ValueError):
    """A length at which a question cannot be put; the message says why."""


def passkey(
    documents: EvalDocuments,
    encode: Encode,
    length: int,
    depth: float,
    n_candidates: int,
    rng: np.random.Generator,
    trial: int,
) -> Trial:
    """A number hidden in a passage.

    Args:
        documents: the `trial`-th that is long enough, going round, gives the passage.
        encode: the tokenizer's.
        length: L, question included.
        depth: share of the passage before the sentence, in [0, 1].
        n_candidates: K.
        rng: of this trial.
        trial: its number.

    Raises:
        DoesNotFit: sentence and question alone are longer than L, or no document is long enough.
    """
    drawn = 10_000 + rng.choice(90_000, size=n_candidates, replace=False)
    keys = [encode(f" {key}") for key in drawn]
    right = int(rng.integers(n_candidates))
    needle = _join(
        encode("\nThe pass key is"),
        keys[right],
        encode(". Remember it."),
        keys[right],
        encode(" is the pass key.\n"),
    )
    question = encode("\nWhat is the pass key? The pass key is")
    n_passage = length - len(needle) - len(question)
    if n_passage < 1:
        raise DoesNotFit(f"sentence and question take {length - n_passage} tokens")
    doc, passage = _passage(documents, n_passage, rng, trial)
    cut = round(depth * n_passage)
    context = _join([documents.bos_id], passage[:cut], needle, passage[cut:], question)
    return Trial(doc, context, keys, right)


def phonebook(
    documents: EvalDocuments,
    encode: Encode,
    length: int,
    depth: float,
    n_candidates: int,
    rng: np.random.Generator,
    trial: int,
) -> Trial:
    """A name looked up in a book. Arguments as of `passkey`, `depth` being a share of the book.

    Raises:
        DoesNotFit: L has no room for as many entries as there are candidates and examples, or more
            than there are names.
    """
    n_names = len(_FIRST_NAMES) * len(_INITIALS) * len(_LAST_NAMES)
    newline = encode("\n")
    entries: list[tuple[np.ndarray, np.ndarray]] = []
    room, longest = length, 0
    for name in rng.permutation(n_names):
        called, number = encode(f"{_name(int(name))}:"), encode(f" {_number(rng)}")
        line = len(called) + len(number) + len(newline)
        room, longest = room - line, max(longest, line)
        # Behind the book: two examples, the question, and an empty line before each of the two.
        if room < 3 * longest + 2 * len(newline):
            break
        entries.append((called, number))
    else:
        raise DoesNotFit(f"a book of so many tokens needs more than {n_names} names")
    if len(entries) < n_candidates + 2:
        raise DoesNotFit(
            f"{len(entries)} entries fit; {n_candidates} candidates and two examples need "
            f"{n_candidates + 2}"
        )
    asked = round(depth * (len(entries) - 1))
    order = rng.permutation(len(entries))
    others = [k for k in order.tolist() if k != asked][: n_candidates + 1]
    examples, wrong = others[:2], others[2:]
    right = int(rng.integers(n_candidates))
    chosen = [*wrong[:right], asked, *wrong[right:]]
    book = [_join(*entry, newline) for entry in entries]
    text = _join(*book, newline, *(book[k] for k in examples), newline, entries[asked][0])
    doc, passage = _passage(documents, length - len(text), rng, trial)
    context = _join([documents.bos_id], passage, text)
    return Trial(doc, context, [entries[k][1] for k in chosen], right)


def induction(
    documents: EvalDocuments, length: int, rng: np.random.Generator, trial: int
) -> tuple[Trial, Trial]:
    """A span of random tokens in front of nothing, and L tokens after it began.

    Returns:
        The first copy, the only candidate behind BOS; then the second copy and the control, the
        candidates behind the first copy and L - SPAN_TOKENS tokens of a document.

    Raises:
        DoesNotFit: L is shorter than a span, or no document long enough.
    """
    if length < SPAN_TOKENS:
        raise DoesNotFit(f"the repeated span has {SPAN_TOKENS} tokens")
    ids = np.flatnonzero(documents.byte_lengths)
    span, control = rng.choice(ids, size=(2, SPAN_TOKENS))
    doc, passage = _passage(documents, length - SPAN_TOKENS, rng, trial)
    first = Trial(doc, _join([documents.bos_id]), [span], 0)
    second = Trial(doc, _join([documents.bos_id], span, passage), [span, control], 0)
    return first, second


def _passage(
    documents: EvalDocuments, n_tokens: int, rng: np.random.Generator, trial: int
) -> tuple[int, np.ndarray]:
    """A document and that many of its tokens from a random place, EOS not among them."""
    long_enough = [doc for doc, n in enumerate(documents.lengths) if n - 1 >= n_tokens]
    if not long_enough:
        raise DoesNotFit(
            f"{n_tokens} tokens of one text are needed; the longest document has "
            f"{max(documents.lengths) - 1}"
        )
    doc = long_enough[trial % len(long_enough)]
    start = int(rng.integers(documents.lengths[doc] - n_tokens))
    return doc, documents.slice(doc, start, start + n_tokens)


def _name(k: int) -> str:
    k, first = divmod(k, len(_FIRST_NAMES))
    last, initial = divmod(k, len(_INITIALS))
    return f"{_FIRST_NAMES[first]} {_INITIALS[initial]}. {_LAST_NAMES[last]}"


def _number(rng: np.random.Generator) -> str:
    """Ten digits, the first from 6 to 9, as in the paper's code."""
    return f"{rng.integers(6_000_000_000, 10_000_000_000)}"


def _join(*parts: np.ndarray | list[int]) -> np.ndarray:
    return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])
