"""Mamba-2's parameters are laid out as the released ones."""

import pytest
import torch
import torch.nn.functional as F

from pretrain.mixers.mamba2 import Mamba2


@pytest.mark.parametrize("groups", [1, 2])
def test_parameters_have_the_published_names_and_shapes(groups: int) -> None:
    """Those of transformers' `Mamba2Mixer`, rows of in_proj in the order z, x, b, c, dt: its
    `backbone.layers.{i}.mixer.` is our `blocks.{i}.mixer.`, its `.norm.` our block's mixer norm,
    and an MLP whose output is zero makes up for the one it lacks."""
    d_model, inner, heads, state, taps = 32, 64, 8, 16, 4
    mixer = Mamba2(d_model, head_dim=8, d_state=state, n_groups=groups)
    convolved = inner + 2 * groups * state
    assert {key: tuple(value.shape) for key, value in mixer.state_dict().items()} == {
        "in_proj.weight": (inner + convolved + heads, d_model),
        "conv1d.weight": (convolved, 1, taps),
        "conv1d.bias": (convolved,),
        "dt_bias": (heads,),
        "A_log": (heads,),
        "D": (heads,),
        "norm.weight": (inner,),
        "out_proj.weight": (d_model, inner),
    }


def test_initial_steps_and_decays_lie_where_asked() -> None:
    torch.manual_seed(0)
    mixer = Mamba2(512, head_dim=8, dt_min=1e-3, dt_max=1e-1)
    dt, a = F.softplus(mixer.dt_bias), mixer.A_log.exp()
    # 128 heads: the extremes come close to the bounds.
    assert 1e-3 * 0.999 <= dt.min() < 2e-3 < 5e-2 < dt.max() <= 1e-1 * 1.001
    assert 1 * 0.999 <= a.min() < 2 < 14 < a.max() <= 16 * 1.001
