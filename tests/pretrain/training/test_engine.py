"""DeepSpeed's configuration, and what the engine refuses."""

import ast
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.utils.config import get_timers_config
from torch import nn

from pretrain.config import RunConfig
from pretrain.training import engine
from pretrain.training.engine import (
    World,
    build_engine,
    deepspeed_config,
    start_process_group,
    take_step,
)


def config_with(**zero: object) -> RunConfig:
    config = RunConfig()
    for key, value in zero.items():
        setattr(config.zero, key, value)
    return config


def test_batch_triple_and_clipping_are_always_explicit() -> None:
    config = RunConfig()
    config.optim.grad_clip = 0.0
    generated = deepspeed_config(config, world_size=2)
    triple = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    micro, accumulation, batch = (generated[key] for key in triple)
    assert micro * accumulation * 2 == batch == 8192 // 512
    assert generated["gradient_clipping"] == 0.0  # omitted, DeepSpeed clips at 1.0


@pytest.mark.parametrize(("stage", "clipping"), [(0, 0.0), (1, 0.7), (3, 0.7)])
def test_deepspeed_clips_where_take_step_does_not(stage: int, clipping: float) -> None:
    config = config_with(stage=stage)
    config.optim.grad_clip = 0.7
    assert deepspeed_config(config, world_size=1)["gradient_clipping"] == clipping


@pytest.mark.parametrize("grad_clip", [0.0, 0.1, 1e9])
def test_stage_0_takes_torchs_clipped_step(grad_clip: float) -> None:
    """Of a parameter without a part in the loss, too, as DeepSpeed between two processes."""
    torch.manual_seed(0)
    ours = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2)})
    torchs, x = deepcopy(ours), torch.randn(5, 3)
    ours_step, torchs_step = (
        torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5).step
        for model in (ours, torchs)
    )
    ours["used"](x).square().sum().backward()
    engine = SimpleNamespace(
        module=ours, zero_optimization_stage=lambda: 0, step=ours_step, optimizer=SimpleNamespace()
    )
    norm, applied = take_step(engine, grad_clip)
    assert applied

    (torchs["used"](x).square().sum() + 0 * torchs["unused"](x).sum()).backward()
    want = nn.utils.clip_grad_norm_(torchs.parameters(), grad_clip or torch.inf)
    torchs_step()
    torch.testing.assert_close(norm, want)
    torch.testing.assert_close(list(ours.parameters()), list(torchs.parameters()))


def test_a_skipped_step_leaves_nothing_but_its_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: the group of one would stay for other tests."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        for stage in (0, 1, 2):
            skipped = pool.submit(_take_steps, stage, [1.0, torch.nan, 1.0]).result()
            without = pool.submit(_take_steps, stage, [1.0, 1.0]).result()
            assert skipped["weights"] == without["weights"]  # so are moments and gradients
            assert [norm == torch.inf for norm in skipped["norms"]] == [False, True, False]
            assert skipped["applied"] == [True, False, True]
            counted = {"micro_steps": 6, "global_steps": 3, "global_samples": 12}
            counted["skipped_steps"] = min(stage, 1)  # at stage 0 the trainer's
            assert skipped["counted"] == counted, f"stage {stage}"


def _take_steps(stage: int, scales: list[float]) -> dict[str, object]:
    """A step of two micro-batches of two samples for each scale of the loss, on a CPU."""
    config = config_with(stage=stage)
    config.train.precision = "fp32"
    config.train.seq_len, config.train.micro_batch_size, config.train.global_batch_tokens = 1, 2, 4
    world = start_process_group(config)
    torch.manual_seed(0)
    engine = build_engine(config, nn.Linear(3, 2), world)
    x, norms, applied = torch.randn(2, 2, 3), [], []
    for scale in scales:
        engine.backward(engine(x[0]).square().sum())
        engine.step()
        engine.backward(scale * engine(x[1]).square().sum())
        norm, was_applied = take_step(engine, grad_clip=1.0)
        norms.append(float(norm))
        applied.append(bool(was_applied))
    names = ("micro_steps", "global_steps", "global_samples", "skipped_steps")
    counted = {name: getattr(engine, name) for name in names}
    weights = [parameter.tolist() for parameter in engine.module.parameters()]
    engine.destroy()
    return {"norms": norms, "applied": applied, "counted": counted, "weights": weights}


def test_deepspeed_does_not_wait_for_the_device_to_time_itself() -> None:
    assert get_timers_config({}).enabled
    assert not get_timers_config(deepspeed_config(RunConfig(), world_size=1)).enabled


def test_extra_is_merged_deeply_and_wins() -> None:
    extra = {"zero_optimization": {"reduce_bucket_size": 1000}, "comms_logger": {"enabled": True}}
    generated = deepspeed_config(config_with(stage=2, extra=extra), world_size=1)
    assert generated["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    assert generated["comms_logger"] == {"enabled": True}
    assert extra["zero_optimization"] == {"reduce_bucket_size": 1000}


def test_key_that_deepspeed_would_ignore_is_an_error_with_the_closest_match() -> None:
    with pytest.raises(ValueError, match=r"zero\.extra\.zero_optimisation: .*'zero_optimization'"):
        deepspeed_config(config_with(extra={"zero_optimisation": {}}), world_size=1)


@pytest.mark.parametrize(
    ("section", "key", "value", "own"),
    [
        ("zero_optimization", "stage", 2, "zero.stage"),
        # DeepSpeed would scale losses for fp16, and autocast would stay bf16.
        ("torch_autocast", "dtype", "float16", "train.precision"),
        ("torch_autocast", "enabled", False, "train.precision"),
    ],
)
def test_what_has_a_key_of_its_own_is_set_there(
    section: str, key: str, value: object, own: str
) -> None:
    with pytest.raises(ValueError, match=rf"{section}\.{key}: .*use {own}"):
        deepspeed_config(config_with(extra={section: {key: value}}), world_size=1)


def test_a_section_is_a_mapping() -> None:
    with pytest.raises(ValueError, match=r"zero\.extra\.zero_optimization=2: must be a mapping"):
        deepspeed_config(config_with(extra={"zero_optimization": 2}), world_size=1)


def test_bf16_keeps_parameters_and_gradient_sums_in_fp32() -> None:
    generated = deepspeed_config(RunConfig(), world_size=1)
    assert "bf16" not in generated  # it would cast every parameter
    assert generated["torch_autocast"]["lower_precision_safe_modules"] == []


def test_complex_parameter_is_refused() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rates = nn.Parameter(torch.zeros(2, dtype=torch.complex64))

    world = World(0, 1, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"'rates' is torch\.complex64: ZeRO drops imaginary"):
        build_engine(RunConfig(), Complex(), world)


@pytest.mark.parametrize(("stage", "size", "sums"), [(0, 1, False), (0, 2, True), (1, 1, True)])
def test_one_process_at_stage_0_has_nothing_to_sum(
    stage: int, size: int, sums: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = SimpleNamespace(enable_backward_allreduce=True)
    monkeypatch.setattr(engine.deepspeed, "initialize", lambda **_: (found, None))
    config = config_with(stage=stage)
    build_engine(config, nn.Linear(2, 2), World(0, size, torch.device("cpu")))
    assert found.enable_backward_allreduce == sums


def test_training_imports_neither_data_nor_evals() -> None:
    for path in Path(engine.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"data", "evals", "launch"}, path
