"""What may be resumed into what, and carried states that find their lanes again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.config import RunConfig
from pretrain.training import checkpoint, universal
from pretrain.training.checkpoint import (
    _check_carried,
    _check_model,
    load_carried,
    start_with,
    tensor_shapes,
)
from pretrain.training.engine import World
from pretrain.training.load import load_model
from pretrain.training.manifest import CheckpointError
from tests.distributed.tiny_lm import LANES, SEQ_LEN, WIDTH, TinyLM


def ask(saved: tuple[int, int], ours: tuple[int, int], reshard: bool, **model: Any) -> bool:
    """needs_conversion between (world size, ZeRO stage) pairs."""
    return universal.needs_conversion(
        {"world_size": saved[0], "zero_stage": saved[1]},
        world_size=ours[0],
        stage=ours[1],
        reshard=reshard,
        model=model.get("model", TinyLM()),
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_same_layout_loads_directly(stage: int) -> None:
    assert not ask((2, stage), (2, stage), reshard=False)


def test_replicated_checkpoint_loads_at_any_world_size() -> None:
    assert not ask((2, 0), (1, 0), reshard=False)


@pytest.mark.parametrize(("saved", "ours"), [((2, 1), (1, 1)), ((1, 3), (2, 3)), ((2, 1), (2, 2))])
def test_other_layout_is_converted_only_when_asked(
    saved: tuple[int, int], ours: tuple[int, int]
) -> None:
    with pytest.raises(ValueError, match=r"resume\.reshard=false: .*Set resume\.reshard=true"):
        ask(saved, ours, reshard=False)
    assert ask(saved, ours, reshard=True)


@pytest.mark.parametrize(("saved", "ours"), [(1, 3), (2, 3), (3, 1), (0, 1), (1, 0)])
def test_impossible_stage_change_is_refused_with_the_way_out(saved: int, ours: int) -> None:
    with pytest.raises(
        ValueError, match=rf"zero\.stage={ours}: .*continue with zero\.stage={saved}"
    ):
        ask((2, saved), (2, ours), reshard=True)


def test_frozen_parameters_cannot_be_resharded() -> None:
    model = TinyLM()
    model.norm.bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"forgets frozen parameters \(norm\.bias\)"):
        ask((2, 1), (1, 1), reshard=True, model=model)


def test_another_model_is_named_by_its_first_difference() -> None:
    saved, ours = tensor_shapes(TinyLM()), tensor_shapes(TinyLM(extra_row=True))
    _check_model(Path("step_1"), saved, tensor_shapes(TinyLM(seed=5)))
    expected = r"another model: 'embedding.weight' is \[32, 8\] there and \[33, 8\]"
    with pytest.raises(ValueError, match=expected):
        _check_model(Path("step_1"), saved, ours)


def test_shapes_include_buffers_that_training_updates() -> None:
    assert "codes.codebook" in tensor_shapes(TinyLM())


@pytest.mark.parametrize("readers", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_carried_states_follow_their_lanes_to_any_rank_and_slot(
    tmp_path: Path, readers: int, micro_batch_size: int
) -> None:
    hidden = torch.arange(LANES * WIDTH, dtype=torch.float32).view(LANES, WIDTH)
    position = torch.arange(LANES)
    for start, stop in ((0, 4), (4, 8)):  # written by two ranks
        tensors = [hidden[start:stop], position[start:stop], torch.zeros(stop - start, 0, 0)]
        torch.save(tensors, tmp_path / f"carried_{start:05d}_{stop:05d}.pt")
    config = RunConfig()
    config.train.seq_len, config.train.global_batch_tokens = SEQ_LEN, LANES * SEQ_LEN
    config.train.micro_batch_size = micro_batch_size
    found = []
    for rank in range(readers):
        world = World(rank, readers, torch.device("cpu"))
        slots = load_carried(tmp_path, TinyLM(), config, world)
        assert len(slots) == config.grad_accum_steps(readers)
        found += [slot.position for slot in slots]
        for slot in slots:
            assert torch.equal(slot.hidden, hidden[slot.position])
    assert torch.equal(torch.cat(found), position)


def test_carried_states_of_another_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no carried states"):
        _check_carried(tmp_path, TinyLM())
    ours = [torch.zeros(2, WIDTH), torch.zeros(2), torch.zeros(2, 3, 0)]  # the last one has grown
    found = tmp_path / "carried_00000_00002.pt"
    for fine in (ours, []):  # nothing, behind a step that was skipped
        torch.save(fine, found)
        _check_carried(tmp_path, TinyLM())
    for tensors, told in (
        ([torch.zeros(2, WIDTH + 1), *ours[1:]], r"\(9,\) per sequence there and \(8,\) in this"),
        ([torch.zeros(2, 1, WIDTH), *ours[1:]], r"\(1, 8\) per sequence there and \(8,\) in this"),
        (ours[:2], r"None per sequence there and \(0, 0\) in this"),
        ([*ours, ours[1]], r"\(\) per sequence there and None in this"),
    ):
        torch.save(tensors, found)
        with pytest.raises(ValueError, match=f"carries states of another model, {told}"):
            _check_carried(tmp_path, TinyLM())


def test_load_model_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no complete checkpoint .* empty or missing"):
        load_model(tmp_path / "run")
    broken = tmp_path / "run" / "checkpoints" / "step_00000002"
    broken.mkdir(parents=True)
    files = {"a": {"bytes": 1, "sha256": ""}}
    (broken / "manifest.json").write_text(json.dumps({"step": 2, "tokens": 2, "files": files}))
    with pytest.raises(CheckpointError, match="step_00000002 is not complete: a is missing"):
        load_model(tmp_path / "run")
    with pytest.raises(CheckpointError, match="there are: step_00000002"):
        load_model(tmp_path / "run", tag="step_00000007")


def test_beginning_with_weights_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "on_main", lambda world, action: action())
    world = World(0, 1, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"train\.init_from=.*run: no such folder"):
        start_with(TinyLM(), tmp_path / "run", world, "a")
    step = tmp_path / "run" / "checkpoints" / "step_00000002"
    step.mkdir(parents=True)
    (step / "training.json").write_text(
        json.dumps({"shapes": tensor_shapes(TinyLM()), "tokenizer": "a"})
    )
    (step / "manifest.json").write_text(json.dumps({"step": 2, "tokens": 2, "files": {}}))
    with pytest.raises(ValueError, match=r"'embedding.weight' is \[32, 8\] there and \[33, 8\]"):
        start_with(TinyLM(extra_row=True), tmp_path / "run", world, "a")
    with pytest.raises(ValueError, match=r"its tokenizer \(a\) is not this run's \(b\)"):
        start_with(TinyLM(), tmp_path / "run", world, "b")


def test_a_conversion_that_fails_is_one_clear_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(source: Path, target: Path) -> None:
        target.mkdir()
        raise OSError("No space left on device")

    monkeypatch.setattr(universal, "convert", convert)
    source = tmp_path / "step_00000001"
    source.mkdir()
    with pytest.raises(CheckpointError, match=r"cannot convert .*No space left.*unharmed"):
        checkpoint._convert(source, tmp_path / "tmp.universal" / "universal")
    assert list(tmp_path.iterdir()) == [source]
