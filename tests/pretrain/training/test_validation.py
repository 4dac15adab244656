"""Evaluation during training: the right numbers, the same on any number of ranks, and no trace."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from evals.scoring.score import state_dict_sha256
from pretrain.models import LanguageModel, LanguageModelConfig, LayersConfig
from pretrain.training.engine import World
from pretrain.training.random_state import preserved_random_state
from pretrain.training.validation import Validation

VOCAB_SIZE, SEGMENT, LENGTH, GRID = 11, 16, 70, 8
LONGVQ = {"block_size": GRID, "chunk_size": 4, "n_heads": 2, "d_shared": 8, "n_codes": 5}
SWA = {"n_heads": 2, "window_size": GRID}


def model_of(layer: str, mixer: dict[str, int]) -> LanguageModel:
    torch.manual_seed(0)
    config = LanguageModelConfig(
        vocab_size=VOCAB_SIZE,
        d_model=8,
        n_layers=2,
        layers=LayersConfig(pattern=[layer, layer]),
        mixers={layer: mixer},
    )
    return LanguageModel(config).eval()


def documents(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randint(0, VOCAB_SIZE, (count, LENGTH + 1), generator=generator))


def world(rank: int = 0, size: int = 1) -> World:
    return World(rank, size, torch.device("cpu"))


@pytest.fixture
def alone(tmp_path: Path) -> object:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/met", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@torch.no_grad()
def test_numbers_are_those_of_whole_documents_and_of_segments_read_alone(alone: None) -> None:
    """Oracle: one forward over each document, and cross entropy as torch has it."""
    model, texts = model_of("longvq", LONGVQ), documents(3)
    values = Validation(texts, SEGMENT, 2.5, world())(model)

    def losses(tokens: Tensor) -> Tensor:
        logits = model.logits(model(tokens[None, :-1]).hidden)[0]
        return torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none").double()

    whole = torch.stack([losses(text) for text in texts])
    assert values["val/loss"] == pytest.approx(whole.mean().item(), rel=1e-5)
    assert values["val/bpb"] == pytest.approx(whole.mean().item() / np.log(2) / 2.5, rel=1e-5)
    # Of four whole segments the last two: targets 40 to 47 and 56 to 63, behind 40 tokens or more.
    gains = [
        (losses(text[start : start + SEGMENT + 1]) - whole[k, start : start + SEGMENT])[8:]
        for k, text in enumerate(texts)
        for start in (32, 48)
    ]
    assert values["val/context_gain@40"] == pytest.approx(torch.cat(gains).mean().item(), abs=1e-6)
    assert abs(values["val/context_gain@40"]) > 1e-4, "a memory that is there makes a difference"
    assert set(values) == {"val/loss", "val/bpb", "val/context_gain@40"}


@torch.no_grad()
def test_a_window_that_fits_half_a_segment_gains_nothing_from_more(alone: None) -> None:
    """Two layers of window 4 reach 8 tokens back; every target has 8 in its own segment."""
    model = model_of("swa", SWA | {"window_size": 4})
    values = Validation(documents(2), SEGMENT, 1.0, world())(model)
    (name,) = [name for name in values if name.startswith("val/context_gain")]
    assert values[name] == pytest.approx(0.0, abs=1e-6)


def test_documents_of_one_segment_have_no_gain_to_measure(alone: None) -> None:
    texts = [text[: SEGMENT + 8] for text in documents(2)]
    values = Validation(texts, SEGMENT, 1.0, world())(model_of("swa", SWA))
    assert set(values) == {"val/loss", "val/bpb"}


@torch.no_grad()
def test_any_number_of_ranks_finds_the_same_sums() -> None:
    """Five documents on 1, 2, 3 and 8 ranks: dummies count for nothing, groups change no bit."""
    model, texts = model_of("longvq", LONGVQ), documents(5)
    (one,) = [Validation(texts, SEGMENT, 1.0, world()).sums(model)]
    assert one[1] == 5 * LENGTH
    assert one[3] == 5 * SEGMENT
    for size in (2, 3, 8):
        parts = [Validation(texts, SEGMENT, 1.0, world(r, size)).sums(model) for r in range(size)]
        torch.testing.assert_close(torch.stack(parts).sum(0), one, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_it_moves_no_weight_and_no_buffer(alone: None) -> None:
    model = model_of("longvq", LONGVQ)
    before = state_dict_sha256(model)
    assert any("codebook" in name for name, _ in model.named_buffers())
    Validation(documents(2), SEGMENT, 1.0, world())(model)
    assert state_dict_sha256(model) == before


def draws() -> list[object]:
    return [random.random(), np.random.rand(), torch.rand(()).item()]  # noqa: NPY002


def test_random_generators_are_left_as_they_were_even_by_an_error() -> None:
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    torch.manual_seed(3)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    with preserved_random_state():
        inside = draws()
    with pytest.raises(ZeroDivisionError), preserved_random_state():
        draws().append(1 / 0)
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])
    assert draws() == inside


@pytest.mark.gpu
def test_the_generator_of_the_gpu_is_left_as_it_was() -> None:
    torch.cuda.manual_seed(3)
    before = torch.cuda.get_rng_state()
    with preserved_random_state():
        torch.rand(5, device="cuda")
    assert torch.equal(torch.cuda.get_rng_state(), before)
