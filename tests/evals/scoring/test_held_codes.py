"""A quantised model passes the gates when rounding decides its ties, and with no fault beside."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data.tokenizer import PAD_ID
from evals.recall.branching import check_branching
from evals.recall.likelihood import RecallOptions, cells, questions
from evals.scoring import gates
from evals.scoring.held_codes import Reference, tie_margins
from evals.scoring.models import LanguageModelScorer
from pretrain.mixers.base import map_state
from pretrain.models import LanguageModel, LanguageModelConfig, LayersConfig
from tests.evals.toy_models import random_documents

DOCUMENTS = random_documents([120, 110])
OPTIONS = {"block_size": 16, "chunk_size": 8, "n_heads": 2, "n_codes": 8, "d_shared": 16}
TIED = 10  # the position of a key halfway between two codes


def build(tokens: Tensor | None = None) -> LanguageModelScorer:
    """Two layers of LongVQ. In the lower one a key of the first document, or of other tokens, has
    two nearest codes, and keys of calls of different shape differ by 1e-5, so that their shape
    decides which it takes."""
    torch.manual_seed(0)
    config = LanguageModelConfig(
        vocab_size=32,
        d_model=16,
        n_layers=2,
        layers=LayersConfig(default="longvq"),
        mixers={"longvq": OPTIONS},
        init_std=0.3,
    )
    scorer = LanguageModelScorer(LanguageModel(config), torch.device("cpu"))
    lower = scorer.quantisers[0]
    seen = []
    hook = lower.register_forward_hook(lambda _, inputs, codes: seen.append(inputs[0]))
    with torch.no_grad():
        scorer.nll(first_document() if tokens is None else tokens)
        hook.remove()
        key = seen[0][0, TIED]  # (H, K)
        apart = 0.1 * torch.randn_like(key)
        apart -= key * (key * apart).sum(-1, keepdim=True)  # ties stay ties when keys are scaled
        lower.codebook[:, 0], lower.codebook[:, 1] = key + apart, key - apart
    for quantiser in scorer.quantisers:
        quantiser.register_forward_pre_hook(rounded_by_shape)
    return scorer


def first_document() -> Tensor:
    return torch.from_numpy(DOCUMENTS.slice(0, -1, 90))[None]


def rounded_by_shape(quantiser: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    (k,) = inputs
    generator = torch.Generator().manual_seed(1000 * len(k) + k.shape[1])
    return (k * (1 + 1e-5 * torch.randn(k.shape, generator=generator)),)


def failed_gates(model: LanguageModelScorer) -> dict[str, gates.GateResult]:
    return {gate.name: gate for gate in gates.check_model(model, DOCUMENTS, 90) if not gate.passed}


def test_ties_that_rounding_decides_pass_and_are_reported() -> None:
    results = {gate.name: gate for gate in gates.check_model(build(), DOCUMENTS, 90)}
    assert all(gate.passed for gate in results.values()), results
    assert "flips: 0 of" in results["future_perturbation"].detail  # of equal shapes
    for name in ("prefix_consistency", "step_equals_parallel"):
        assert "largest tie margin" in results[name].detail
        assert f"at quantiser 0, position {TIED}" in results[name].detail


def test_without_held_codes_the_same_model_fails() -> None:
    model = build()
    model.quantisers = []
    assert {"prefix_consistency", "step_equals_parallel"} <= set(failed_gates(model))


def leak_future(model: LanguageModelScorer) -> None:
    """Every position also sees 1 % of the mean of the whole input."""
    model.model.blocks[0].mixer.register_forward_pre_hook(
        lambda _, inputs: (inputs[0] + 0.01 * inputs[0].mean(1, keepdim=True), *inputs[1:])
    )


def leak_future_into_codes(model: LanguageModelScorer) -> None:
    """Keys see the mean of all keys, and nothing else does: losses with held codes are equal."""
    model.quantisers[1].register_forward_pre_hook(
        lambda _, inputs: (inputs[0] + 0.5 * inputs[0].mean(1, keepdim=True),)
    )


def choose_by_the_future(model: LanguageModelScorer) -> None:
    """Codes are those of the key two places on, wherever there is one; keys know nothing of it."""
    model.quantisers[1].register_forward_hook(
        lambda _, inputs, codes: torch.cat([codes[:, 2:], codes[:, -2:]], 1)
    )


def leak_length_into_codes(model: LanguageModelScorer) -> None:
    model.quantisers[1].register_forward_pre_hook(
        lambda _, inputs: (inputs[0] + 1 / inputs[0].shape[1],)
    )


def leak_pads(model: LanguageModelScorer) -> None:
    """Embeddings shrink by the share of pads at the end of the input."""

    def shrink(_: nn.Module, inputs: tuple[Tensor], x: Tensor) -> Tensor:
        pads = (inputs[0] == PAD_ID).flip(1).cumprod(1).sum(1)
        return x * (1 - pads / inputs[0].shape[1])[:, None, None]

    model.model.embedding.register_forward_hook(shrink)


def leak_pads_into_codes(model: LanguageModelScorer) -> None:
    share = torch.zeros(())

    def count(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        share.copy_((inputs[0] == PAD_ID).float().mean())

    model.model.register_forward_pre_hook(count)
    model.quantisers[1].register_forward_pre_hook(lambda _, inputs: (inputs[0] + 0.1 * share,))


def keep_state(model: LanguageModelScorer) -> None:
    """A document of a single lane continues the last one."""
    nll, last = model.nll, [None]

    def stale(tokens, state=None, *, score_from=0):
        state = last[0] if state is None and len(tokens) == 1 else state
        losses, after = nll(tokens, state, score_from=score_from)
        last[0] = after if len(tokens) == 1 else None
        return losses, after

    model.nll = stale  # type: ignore[method-assign]


def halve_the_state(model: LanguageModelScorer) -> None:
    """What is handed on is halved on the way."""
    nll = model.nll

    def lost(tokens, state=None, *, score_from=0):
        halved = map_state(lambda t: t / 2 if t.is_floating_point() else t, state)
        return nll(tokens, halved, score_from=score_from)

    model.nll = lost  # type: ignore[method-assign]


def keep_keys(model: LanguageModelScorer) -> None:
    """Keys, and through them codes, hang on the last call's."""
    last = [torch.zeros(())]

    def stale(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        before, last[0] = last[0], inputs[0].mean()
        return (inputs[0] + before,)

    model.quantisers[1].register_forward_pre_hook(stale)


@pytest.mark.parametrize(
    ("plant", "gate", "in_codes"),
    [
        (leak_future, "future_perturbation", False),
        (leak_future_into_codes, "future_perturbation", True),
        (choose_by_the_future, "future_perturbation", True),
        (leak_length_into_codes, "prefix_consistency", True),
        (leak_pads, "padding_invariance", False),
        (leak_pads_into_codes, "padding_invariance", True),
        (keep_state, "document_isolation", False),
        (keep_keys, "document_isolation", True),
    ],
)
def test_a_fault_is_not_taken_for_flips(plant, gate, in_codes) -> None:
    model = build()
    plant(model)
    failed = failed_gates(model)
    assert gate in failed
    assert ("a flip that is no tie" in failed[gate].detail) == in_codes


BRANCHING = RecallOptions(lengths=(64,), probes=("induction",), trials=1)


def branching(model: LanguageModelScorer) -> gates.GateResult:
    (result,) = check_branching(model, DOCUMENTS, lambda text: np.zeros(0), BRANCHING)
    return result


def branching_model() -> LanguageModelScorer:
    """Its tie is in the context of the question that is put."""
    (cell,) = cells(BRANCHING)
    ((_, asked),) = questions(cell, DOCUMENTS, lambda text: np.zeros(0), BRANCHING)
    return build(torch.from_numpy(np.concatenate([asked.context, asked.candidates[0]]))[None])


def test_candidates_behind_a_carried_state_pass_with_ties_that_rounding_decides() -> None:
    model = branching_model()
    result = branching(model)
    assert result.passed
    assert f"at quantiser 0, position {TIED}" in result.detail
    model.quantisers = []
    assert not branching(model).passed, "without held codes"


@pytest.mark.parametrize(
    ("plant", "in_codes"), [(halve_the_state, False), (leak_length_into_codes, True)]
)
def test_a_fault_in_what_is_carried_to_candidates_is_not_taken_for_flips(plant, in_codes) -> None:
    model = branching_model()
    plant(model)
    result = branching(model)
    assert not result.passed
    assert ("a flip that is no tie" in result.detail) == in_codes


def test_only_the_documents_lane_and_positions_are_held() -> None:
    model = build()
    tokens = first_document()
    with torch.inference_mode():
        reference = Reference(model, tokens)
        assert reference.flips is not None
        n = tokens.shape[1] - 1
        again, _ = reference.again(torch.cat([tokens + 1, tokens]).clamp(max=31), lane=1)
        assert again.shape == (2, n)
        assert reference.flips.codes == 2 * 2 * n  # layers, heads


def test_a_tie_margin_is_the_distance_to_the_plane_between_two_codes() -> None:
    close = 2.0**-20
    codebook = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0 + close]]])
    k = torch.tensor([[[3.0, 3.0]], *([[[4.0, 3.0]]] * 3), [[torch.nan, 0.0]]])
    own = torch.tensor([[0], [0], [1], [3], [0]])
    held = torch.tensor([[1], [1], [2], [2], [1]])
    # From (4, 3) to the diagonal: 1 / sqrt 2. Codes in one place are tied wherever the key is.
    want = torch.tensor([0, 0.5**0.5 / 5, 0, close / 5, torch.inf], dtype=torch.float64)
    torch.testing.assert_close(tie_margins(k, own, held, codebook)[:, 0], want, rtol=1e-9, atol=0)
    assert (tie_margins(k, own, own, codebook) == 0).all()
