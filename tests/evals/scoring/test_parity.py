"""The same model and text give the numbers of lm-evaluation-harness and of transformers' recipe.

lm-eval is no dependency: its rules are written out here as read in 0.4.13 (lm_eval/utils.py,
`get_rolling_token_windows` and `make_disjoint_window`; `process_results` of the task wikitext). The
strided recipe is that of transformers' documentation, "Perplexity of fixed-length models".
"""

import re

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from evals.perplexity import suite as perplexity
from evals.scoring import protocols
from evals.scoring.documents import EvalDocuments
from evals.scoring.score import score
from tests.evals.toy_models import BOS, EOS, FIRST, ToyModel

VOCAB = FIRST + 256
PAGES = [
    " \n = Robert Boulter = \n \n Robert Boulter is an English film and theatre actor . \n",
    "Cafés — naïve façades cost 3 @,@ 000 €\n\n" * 5,
    "One word",
    "No white space at its ends, " * 9 + "and a last one",
]
TOLERANCE = 1e-5
"""Bits per byte or nats: fp32 losses of forwards with other batches."""


class FromTransformers(ToyModel):
    """A causal model of transformers behind the scorer's interface; it carries no state."""

    def __init__(self, model):
        super().__init__(model.config.vocab_size)
        self.model = model

    def log_p(self, inputs, state):
        assert state is None
        return F.log_softmax(self.model(inputs).logits, dim=-1), None


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,  # losses that differ between tokens by nats
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def documents():
    texts = [page.encode() for page in PAGES]
    return EvalDocuments(
        tokens=[np.array([*(FIRST + b for b in text), EOS]) for text in texts],
        token_bytes=[b""] * FIRST + [bytes([b]) for b in range(256)],
        bos_id=BOS,
        fingerprint="pages",
        tokenizer_sha256="bytes",
        raw_bytes=[len(text) for text in texts],
    )


def ours(model, documents, scoring):
    """The store of a pass, and the suite's metrics of it by name."""
    table = score(FromTransformers(model), documents, scoring)
    metrics = perplexity.derive([table], train_length=64)
    return table, {metric["name"]: metric["value"] for metric in metrics}


def rolling_log_likelihood(model, tokens, max_length):
    """lm-eval: the first window feeds a prefix token; later ones predict the next `max_length`
    tokens, and the last one ends with the text and is as long as the others."""
    total = 0.0
    for first in range(0, len(tokens), max_length):
        end = min(first + max_length, len(tokens))
        inputs = ([BOS, *tokens])[max(end - max_length, 0) : end]
        targets = tokens[first:end]
        log_p = F.log_softmax(model(torch.tensor([inputs])).logits[0], dim=-1)
        rows = torch.arange(len(inputs) - len(targets), len(inputs))
        total += log_p[rows, torch.tensor(targets)].double().sum().item()
    return total


@pytest.mark.parametrize("max_length", [16, 37, 500])
@torch.no_grad()
def test_nonoverlap_gives_lm_evals_rolling_bits_per_byte_and_word_perplexity(
    llama, documents, max_length
):
    (scoring,) = protocols.nonoverlap(documents.lengths, max_length)
    table, metrics = ours(llama, documents, scoring)
    total = 0.0
    for doc, ids in enumerate(documents.tokens):
        expected = rolling_log_likelihood(llama, ids[:-1].tolist(), max_length)
        rows = table.doc == doc
        assert -table.nll[rows].sum() / rows.sum() == pytest.approx(
            expected / rows.sum(), abs=TOLERANCE
        )
        total += expected
    n_bytes = sum(len(page.encode()) for page in PAGES)
    n_words = sum(len(re.split(r"\s+", page)) for page in PAGES)
    assert metrics["bpb"] == pytest.approx(-total / (np.log(2) * n_bytes), abs=TOLERANCE)
    assert np.log(metrics["word_ppl"]) == pytest.approx(-total / n_words, rel=TOLERANCE)


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 5), (37, 8), (90, 3), (500, 100)])
@torch.no_grad()
def test_sliding_gives_the_strided_recipe_of_transformers(llama, documents, window, stride):
    (scoring,) = protocols.sliding(documents.lengths, [window], stride)
    table, metrics = ours(llama, documents, scoring)
    summed = 0.0
    for doc, document in enumerate(documents.tokens):
        ids = torch.tensor([[BOS, *document.tolist()]])
        length, end_before = ids.shape[1], 0
        nll = table.nll[table.doc == doc].astype(np.float64)
        for begin in range(0, length, stride):
            end = min(begin + window + 1, length)
            n_labels = end - end_before
            inputs = ids[:, begin:end]
            labels = inputs.clone()
            labels[:, :-n_labels] = -100
            loss = llama(inputs, labels=labels).loss.item()
            # The model drops the first label of a window: one of those that count in the first
            # window only, where it is BOS.
            own = nll[max(end_before - 1, 0) : end - 1]
            assert loss == pytest.approx(own.mean(), abs=TOLERANCE)
            summed += loss * len(own)
            end_before = end
            if end == length:
                break
    assert metrics["nll"] == pytest.approx(summed / len(table.nll), abs=TOLERANCE)


def test_words_are_counted_as_lm_eval_counts_them(documents):
    counted = [documents.words(doc) for doc in range(len(PAGES))]
    assert counted == [len(re.split(r"\s+", page)) for page in PAGES]
    assert counted[0] == len(PAGES[0].split()) + 2, "white space at the ends counts"


def test_word_perplexity_needs_the_whole_text(llama, documents):
    (part,) = protocols.nonoverlap(documents.lengths, 16, 100)
    assert "word_ppl" not in ours(llama, documents, part)[1]
    (short,) = protocols.truncate(documents.lengths, [100])
    assert "word_ppl" not in ours(llama, documents, short)[1]
    (whole,) = protocols.truncate(documents.lengths, [1000])
    assert "word_ppl" in ours(llama, documents, whole)[1]
