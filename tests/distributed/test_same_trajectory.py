"""World size, ZeRO stage, gradient accumulation and offload change how, not what, is computed."""

from pathlib import Path

import pytest
import torch

from tests.distributed.launching import (
    finish,
    largest_difference,
    rows_of,
    start_runs,
    trajectory,
)
from tests.distributed.tiny_lm import WIDTH
from tests.distributed.tiny_run import Run

pytestmark = pytest.mark.distributed

# Sums in another order: 20 fp32 AdamW steps stay within 1e-6 here, a wrong normaliser is 1e-1.
FP32_TOLERANCE = 1e-5
# One bf16 rounding of a matmul operand is 4e-3; world size moves lanes between matmuls.
BF16_TOLERANCE = 2e-2

STAGES, ACCUMULATION, WORLDS = (0, 1, 2, 3), (1, 4), (1, 2)
EVALUATED_STAGES = (1, 3)


def run_of(folder: Path, world: int, precision: str, stage: int, grad_accum: int) -> Run:
    return Run(
        name=f"{precision}_zero{stage}_accum{grad_accum}",
        out_dir=str(folder / f"world{world}"),
        stage=stage,
        precision=precision,
        grad_accum=grad_accum,
    )


def evaluated(folder: Path, world: int, stage: int) -> Run:
    out_dir = str(folder / f"world{world}")
    return Run(f"evaluated{stage}", out_dir, stage, grad_accum=4, evaluate_every=3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole matrix in one launch per world size, both at the same time."""
    folder = tmp_path_factory.mktemp("matrix")
    launches = []
    for world in WORLDS:
        runs = [run_of(folder, world, "fp32", s, a) for s in STAGES for a in ACCUMULATION]
        runs += [run_of(folder, world, "bf16", s, 1) for s in STAGES]
        runs.append(Run("offload", str(folder / f"world{world}"), stage=2, offload=True))
        runs += [evaluated(folder, world, stage) for stage in EVALUATED_STAGES]
        launches.append(start_runs(folder, runs, processes=world))
    for launch in launches:
        code, output = finish(launch)
        assert code == 0, output[-6000:]
    return folder


def test_zero_accumulation_and_world_size_give_one_fp32_trajectory(trained: Path) -> None:
    reference = trajectory(run_of(trained, 1, "fp32", 0, 1))
    assert len(reference) == 20
    for world in WORLDS:
        for stage in STAGES:
            for grad_accum in ACCUMULATION:
                ours = trajectory(run_of(trained, world, "fp32", stage, grad_accum))
                difference = largest_difference(ours, reference)
                assert difference < FP32_TOLERANCE, (world, stage, grad_accum)


def test_offloaded_optimizer_gives_the_same_trajectory(trained: Path) -> None:
    reference = trajectory(run_of(trained, 1, "fp32", 0, 1))
    for world in WORLDS:
        ours = trajectory(Run("offload", str(trained / f"world{world}")))
        assert largest_difference(ours, reference) < FP32_TOLERANCE


@pytest.mark.parametrize("stage", EVALUATED_STAGES)
def test_evaluation_during_training_changes_no_bit_of_it(trained: Path, stage: int) -> None:
    found = []
    for world in WORLDS:
        run = evaluated(trained, world, stage)
        assert trajectory(run) == trajectory(run_of(trained, world, "fp32", stage, 4))
        rows = rows_of(run, "val/loss")
        assert [row["step"] for row in rows] == [3, 6, 9, 12, 15, 18, 20]
        found.append([row["val/loss"] for row in rows])
    # Three documents on two ranks: one of the forwards is a dummy, and counts for nothing.
    assert found[1] == pytest.approx(found[0], rel=FP32_TOLERANCE)


def test_memory_horizons_are_logged_at_the_start_at_evaluations_and_at_the_end(
    trained: Path,
) -> None:
    """With partitioned parameters too, which hold nothing outside of a forward."""
    key = "health/0.recurrence/memory_horizon/p50"
    found = []
    for world in WORLDS:
        for stage in EVALUATED_STAGES:
            rows = rows_of(evaluated(trained, world, stage), key)
            assert [row["step"] for row in rows] == [0, 3, 6, 9, 12, 15, 18, 20]
            found.append([row[key] for row in rows])
            whole = rows_of(run_of(trained, world, "fp32", stage, 1), key)
            assert [row["step"] for row in whole] == [0, 20]
    decays = torch.linspace(0.0, 2.0, WIDTH, dtype=torch.float64).sigmoid()
    assert found[0][0] == pytest.approx((-1 / decays.log()).quantile(0.5).item())
    assert abs(found[0][-1] / found[0][0] - 1) > 1e-3  # training moves them
    for horizons in found[1:]:
        assert horizons == pytest.approx(found[0], rel=FP32_TOLERANCE)


def test_bf16_autocast_sums_gradients_in_fp32_at_every_stage(trained: Path) -> None:
    for world in WORLDS:
        reference = trajectory(run_of(trained, world, "bf16", 0, 1))
        for stage in STAGES[1:]:
            ours = trajectory(run_of(trained, world, "bf16", stage, 1))
            assert largest_difference(ours, reference) < FP32_TOLERANCE, (world, stage)
    exact = trajectory(run_of(trained, 1, "fp32", 0, 1))
    rounded = trajectory(run_of(trained, 1, "bf16", 0, 1))
    assert 1e-6 < largest_difference(rounded, exact) < BF16_TOLERANCE
