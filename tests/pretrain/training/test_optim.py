"""Parameter groups and schedules."""

import math

import pytest
import torch
from torch import nn

from pretrain.config import OptimConfig, ScheduleConfig
from pretrain.training.optim import parameter_groups, schedule_factor
from tests.distributed.tiny_lm import TinyLM

TOTAL = 1_000_000


def names_by_group(model: nn.Module) -> dict[str, set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, OptimConfig())
    return {group["name"]: {names[id(p)] for p in group["params"]} for group in groups}


def test_matrices_decay_and_embeddings_vectors_and_state_space_parameters_do_not() -> None:
    assert names_by_group(TinyLM()) == {
        "decay": {"recurrence.project.weight"},
        "no_decay": {
            "embedding.weight",  # also the tied head
            "recurrence.project.bias",
            "norm.weight",
            "norm.bias",
        },
        "ssm": {"recurrence.log_decay"},
    }


def test_every_trainable_parameter_is_in_one_group_and_frozen_ones_in_none() -> None:
    model = TinyLM()
    model.recurrence.project.bias.requires_grad_(False)
    grouped = [p for g in parameter_groups(model, OptimConfig()) for p in g["params"]]
    assert len({id(p) for p in grouped}) == len(grouped)
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters() if p.requires_grad}


def test_ssm_group_has_its_own_rate_and_no_decay() -> None:
    config = OptimConfig(learning_rate=1e-2, ssm_learning_rate=1e-4, weight_decay=0.3)
    groups = {group["name"]: group for group in parameter_groups(TinyLM(), config)}
    rates = {name: (group["base_lr"], group["weight_decay"]) for name, group in groups.items()}
    assert rates == {"decay": (1e-2, 0.3), "no_decay": (1e-2, 0.0), "ssm": (1e-4, 0.0)}


def test_misspelt_parameter_name_is_an_error() -> None:
    class Wrong(nn.Linear):
        def no_decay_parameters(self) -> set[str]:
            return {"wieght"}

    with pytest.raises(ValueError, match="'wieght', which is not one of its parameters"):
        parameter_groups(nn.Sequential(Wrong(2, 2)), OptimConfig())


@pytest.mark.parametrize("kind", ["wsd", "cosine", "constant"])
def test_schedule_warms_up_linearly_and_ends_at_its_final_ratio(kind: str) -> None:
    config = ScheduleConfig(kind, warmup_fraction=0.1, decay_fraction=0.2, final_ratio=0.05)
    assert schedule_factor(0, TOTAL, config) == 0
    assert schedule_factor(TOTAL // 20, TOTAL, config) == pytest.approx(0.5)
    assert schedule_factor(TOTAL // 10, TOTAL, config) == pytest.approx(1.0)
    end = 1.0 if kind == "constant" else 0.05
    for tokens in (TOTAL, TOTAL + 5000):  # the last step may reach beyond the total
        assert schedule_factor(tokens, TOTAL, config) == pytest.approx(end)


def test_wsd_is_flat_until_its_decay_and_then_linear() -> None:
    config = ScheduleConfig("wsd", warmup_fraction=0.1, decay_fraction=0.2, final_ratio=0.0)
    assert schedule_factor(int(0.79 * TOTAL), TOTAL, config) == 1.0
    assert schedule_factor(int(0.9 * TOTAL), TOTAL, config) == pytest.approx(0.5)


def test_cosine_is_half_way_down_at_half_of_what_follows_warm_up() -> None:
    config = ScheduleConfig("cosine", warmup_fraction=0.0, final_ratio=0.2)
    assert schedule_factor(TOTAL // 2, TOTAL, config) == pytest.approx(0.6)
    quarter = 0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2
    assert schedule_factor(TOTAL // 4, TOTAL, config) == pytest.approx(quarter)


def test_no_schedule_divides_by_zero_without_warm_up_or_decay() -> None:
    config = ScheduleConfig("wsd", warmup_fraction=0.0, decay_fraction=0.0)
    assert schedule_factor(0, TOTAL, config) == 1.0
    assert schedule_factor(TOTAL, TOTAL, config) == 1.0
    assert torch.isfinite(torch.tensor(schedule_factor(TOTAL + 1, TOTAL, config)))
