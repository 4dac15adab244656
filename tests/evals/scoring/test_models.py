"""Our language models behind the scorer: the adapter's losses are the model's own."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from evals.scoring import gates, models, protocols
from evals.scoring.models import LanguageModelScorer
from evals.scoring.score import score
from pretrain.mixers.base import map_state
from pretrain.models import LanguageModel, LanguageModelConfig, LayersConfig
from tests.evals.toy_models import random_documents

MIXERS = {
    "bst": {"n_heads": 2, "block_size": 16, "chunk_size": 8},
    "swa": {"n_heads": 2, "window_size": 16},
    "s4d": {},
    "attention": {"n_heads": 2},
}


def scorer(name, precision="fp32"):
    torch.manual_seed(0)
    config = LanguageModelConfig(
        vocab_size=32,
        d_model=16,
        n_layers=2,
        layers=LayersConfig(default=name),
        mixers={name: MIXERS[name]},
        init_std=0.2,
    )
    return LanguageModelScorer(LanguageModel(config), torch.device("cpu"), precision)


def test_losses_are_the_models_own_in_any_chunking(monkeypatch):
    scored = scorer("bst")
    tokens = torch.randint(4, 32, (3, 41), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = scored.model.logits(scored.model(tokens[:, :-1]).hidden)
        expected = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        own = scored.model(tokens[:, :-1], targets=tokens[:, 1:], per_token=True).nll
        for chunk in (7, 512):
            monkeypatch.setattr(models, "HEAD_CHUNK_TOKENS", chunk)
            for first in (0, 35):
                nll, _ = scored.nll(tokens, score_from=first)
                # fp32 losses around 4 from matmuls of other shapes.
                torch.testing.assert_close(nll, expected[:, first:], atol=1e-5, rtol=0)
                torch.testing.assert_close(nll, own[:, first:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_every_mixer_passes_the_gates(name):
    results = gates.check_model(scorer(name), random_documents([200, 180]), 150)
    assert all(gate.passed for gate in results), results


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_stream_equals_one_pass_with_ragged_documents_side_by_side(name):
    documents = random_documents([150, 70, 133, 150])
    (whole,) = protocols.position(documents.lengths, 1000)
    (segments,) = protocols.stream(documents.lengths, 48)
    reference = score(scorer(name), documents, whole)
    table = score(scorer(name), documents, segments)
    assert table.same_tokens(reference)
    np.testing.assert_allclose(table.nll, reference.nll, atol=1e-4)  # the stated fp32 bound


@pytest.mark.parametrize("name", ["bst", "swa", "s4d"])
def test_stream_over_60k_tokens_equals_one_pass_at_constant_memory(name):
    documents = random_documents([60_001])
    (whole,) = protocols.position(documents.lengths, 100_000)
    (segments,) = protocols.stream(documents.lengths, 2048)
    state_sizes = set()

    class Watched(LanguageModelScorer):
        def nll(self, tokens, state=None, *, score_from=0):
            nll, after = super().nll(tokens, state, score_from=score_from)
            sizes = []
            map_state(lambda part: sizes.append(part.numel()), after)
            if tokens.shape[1] == 2049:
                state_sizes.add(sum(sizes))
            return nll, after

    reference = score(scorer(name), documents, whole)
    watched = Watched(scorer(name).model, torch.device("cpu"))
    table = score(watched, documents, segments)
    assert table.same_tokens(reference)
    np.testing.assert_allclose(table.nll, reference.nll, atol=1e-4)
    assert len(state_sizes) == 1, "what is carried does not grow with the document"


def test_fingerprint_sees_one_bit_of_one_weight():
    scored = scorer("s4d")
    before = scored.fingerprint()
    assert before == scored.fingerprint()
    with torch.no_grad():
        next(scored.model.parameters()).view(-1)[3] += 1e-6
    assert scored.fingerprint() != before


def test_bf16_autocast_stays_within_its_bound():
    documents = random_documents([120, 100])
    (scoring,) = protocols.stream(documents.lengths, 64)
    exact = score(scorer("swa"), documents, scoring)
    rounded = score(scorer("swa", "bf16"), documents, scoring)
    assert not np.array_equal(exact.nll, rounded.nll)
    np.testing.assert_allclose(rounded.nll, exact.nll, atol=0.1)
    with pytest.raises(ValueError, match="precision='fp16'"):
        scorer("swa", "fp16")
