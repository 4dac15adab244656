"""WikiText word perplexity: a detokenised page is read, the words of the published one counted."""

import re

import numpy as np
import pytest

from data.tokenizer import BytesTokenizer
from evals.perplexity import suite as perplexity
from evals.perplexity.suite import PerplexityOptions
from evals.scoring import wikitext
from evals.scoring.documents import EvalDocuments
from tests.evals.toy_models import Uniform

PAGE = """
 = Robert Boulter =

 Robert Boulter is an English film , television and theatre actor . He was paid £ 3 @,@ 000 ( 2
 @.@ 5 times more ) in the " well @-@ known " series : it 's , he said , " no more " ; was it ?

 = = Career = =

 N people saw it at 20 ° C. The actors ' names are known !
"""


@pytest.mark.parametrize(
    ("published", "read"),
    [
        ("3 @,@ 000 or 2 @.@ 5", "3,000 or 2.5"),
        ("a well @-@ known one", "a well-known one"),
        ("he came , saw ; and : so . Yes ! No ? Ah", "he came, saw; and: so. Yes! No? Ah"),
        ("ends with a point .", "ends with a point ."),
        ("( 1999 ) [ a ] { b }", "(1999) [a] {b}"),
        ('" no more " he said', '"no more" he said'),
        ("the ' new ' one", "the 'new' one"),
        ("the actors ' names", "the actors' names"),
        ("it 's so", "it's so"),
        ("\n = = = Early = = = \n", "\n=== Early ===\n"),
        ("= = = = x = = = =", "==== x ===="),
        ("20 ° C", "20°C"),
        ("N people , N cats", "N people, 1 cats"),
        ("/' 5/", "/'[0-9]/"),
    ],
)
def test_rules_by_hand(published, read):
    assert wikitext.detokenize(published) == read


def documents_of(texts):
    tokenizer = BytesTokenizer()
    return EvalDocuments(
        tokens=[np.array([*tokenizer.encode(text), 2]) for text in texts],
        token_bytes=tokenizer.token_bytes(),
        bos_id=1,
        fingerprint="pages",
        tokenizer_sha256="bytes",
        raw_bytes=[len(text.encode()) for text in texts],
        source={"path": "pages", "split": "test"},
    )


def test_word_perplexity_divides_by_the_words_of_the_published_page(tmp_path):
    """Every byte read costs ln V, so that the sum is known; EOS is left out, as by lm-eval."""
    published = documents_of([PAGE, PAGE[:150]])
    read = wikitext.detokenized(published, BytesTokenizer().encode)
    texts = [wikitext.detokenize(text) for text in (PAGE, PAGE[:150])]
    assert [read.text(k).decode() for k in range(2)] == texts
    assert len(texts[0]) < len(PAGE)
    n_words = sum(len(re.split(r"\s+", text)) for text in (PAGE, PAGE[:150]))
    assert n_words > sum(len(re.split(r"\s+", text)) for text in texts)

    options = PerplexityOptions(contexts=(16,), protocols=("nonoverlap",), window_tokens=32)
    model = Uniform(read.vocab_size)
    result = perplexity.run(
        model, read, options, tmp_path, name="uniform", train_length=32, progress=False
    )
    (word_ppl,) = [m["value"] for m in result["metrics"] if m["name"] == "word_ppl"]
    n_bytes = sum(len(text.encode()) for text in texts)
    assert np.log(word_ppl) == pytest.approx(n_bytes * np.log(model.vocab_size) / n_words, rel=1e-6)
    assert result["data"]["detokenize"] == "wikitext"
    assert result["data"]["fingerprint"] != published.fingerprint
    assert result["data"]["n_bytes"] == n_bytes


def test_pages_that_a_tokenizer_has_changed_are_refused():
    documents = documents_of([PAGE])
    documents.raw_bytes[0] += 1
    with pytest.raises(ValueError, match="detokenize=wikitext: the tokenizer loses text"):
        wikitext.detokenized(documents, BytesTokenizer().encode)
