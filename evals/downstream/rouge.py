"""ROUGE-1, -2, -L and -Lsum (Lin 2004) by the package `rouge-score`, with stemming.

RLsum compares sentence by sentence and has to be told them: without newlines it silently equals RL,
some ten points lower on long summaries. The package itself would split by a model that it
downloads; here sentences are those of `sentences`, and `SPLITTER` names the rule wherever numbers
stand.
"""

import re
from collections.abc import Sequence

import numpy as np

MEASURES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
SPLITTER = "a sentence ends at a newline, or at [.!?] and closing marks before white space"
# Closing marks go with the end: ROUGE reads none.
_END = re.compile("\\n+|(?<=[.!?])[\"')\\]\u201d\u2019]*\\s+")


def sentences(text: str) -> list[str]:
    """The sentences of a text, by `SPLITTER`; abbreviations are cut, too."""
    return [part.strip() for part in _END.split(text) if part.strip()]


def rouge(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
    """F-measures in percent.

    Of several references the best counts, for each measure on its own, as SciTLDR has it (Cachola
    et al. 2020, 2004.15011).

    Returns:
        (n,) for each of `MEASURES`.

    Raises:
        ValueError: the package is not installed.
    """
    try:
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise ValueError(
            f"metrics=rouge...: the package rouge-score is missing ({error}); "
            "pip install -e '.[downstream]'"
        ) from error
    scorer = rouge_scorer.RougeScorer(list(MEASURES), use_stemmer=True)
    scores = [
        scorer.score_multi(["\n".join(sentences(r)) for r in wanted], "\n".join(sentences(text)))
        for text, wanted in zip(predictions, references, strict=True)
    ]
    return {
        measure: 100 * np.array([score[measure].fmeasure for score in scores])
        for measure in MEASURES
    }
