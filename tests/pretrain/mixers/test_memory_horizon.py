"""Memory horizons: what a mixer reports is how its own state decays.

Shapes: B batch, T time, D width, N modes.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain import mixers
from pretrain.mixers.block_recurrent import BlockRecurrent
from pretrain.mixers.bst import BlockStateTransformer
from pretrain.mixers.codebook import DEAD_SHARE
from pretrain.mixers.ema import EMA
from pretrain.mixers.longvq import LongVQ
from pretrain.mixers.mamba2 import Mamba2
from pretrain.mixers.s4 import S4
from pretrain.mixers.s4d import S4D
from pretrain.ops.nplr_ssm import NPLRParameters, nplr_ssm_naive
from tests.pretrain.mixers.test_contract import D_MODEL, TABLE, W, build, every_row

QUANTITIES = {"dt", "memory_horizon", "code_perplexity", "dead_codes"}
# Attention remembers what its window, cache or projections hold: nothing decays.
WITHOUT_DECAY = {"attention", "swa", "transformer_ls", "transformer_xl"}
# Modes that keep to themselves: each entry of the state decays by its own factor per token.
SEPARATE_MODES = [
    ("bst", "own"),
    ("bst", "multi-head"),
    ("bst", "multi-filter"),
    ("ema", "damped"),
    ("gss", "half width"),
    ("longvq", "s4d"),
    ("longvq", "ema"),
    ("mamba2", "two groups"),
    ("mega", "chunk"),
    ("s4d", "lin"),
    ("s4d", "real"),
    ("s5", "legs"),
    ("spade", "concat"),
]
REAL_MODES = {"ema", "mega", "mamba2"}  # names of mixers, or of LongVQ's memory
SETTLING, LATER = 2 * W, 3 * W  # tokens behind an impulse


@every_row
def test_health_is_of_the_documented_form(name: str, variant: str) -> None:
    mixer = build(name, variant, torch.float32)
    found = mixer.health()
    assert set(found) <= QUANTITIES
    assert ("memory_horizon" in found) == (name not in WITHOUT_DECAY and variant != "none")
    assert ("code_perplexity" in found) == ("dead_codes" in found) == (name == "longvq")
    for key, value in found.items():
        assert value.dtype == torch.float64
        assert not value.requires_grad
        assert value.isfinite().all()
        assert (value.ndim == 0) == (key in ("code_perplexity", "dead_codes"))
        assert value.ndim == 0 or (value > 0).all()


@pytest.mark.parametrize(("name", "variant"), SEPARATE_MODES)
def test_every_mode_of_the_state_decays_as_its_horizon_says(name: str, variant: str) -> None:
    mixer = build(name, variant)
    if isinstance(mixer, Mamba2):  # its convolution would go on writing
        torch.nn.init.zeros_(mixer.conv1d.bias)
    x = torch.zeros(1, LATER, D_MODEL, dtype=torch.float64)
    x[:, 0] = torch.randn(D_MODEL, dtype=torch.float64)
    with torch.no_grad():
        early, late = (mixer(x[:, :t]).state.ssm[0] for t in (SETTLING, LATER))
    if {name, variant}.isdisjoint(REAL_MODES):
        early, late = early.norm(dim=-2), late.norm(dim=-2)  # of re and im
    horizon = mixer.health()["memory_horizon"]
    if name == "mamba2":
        horizon = horizon[:, None, None]  # one per head, of a state (H, P, N)
    decay = (late / early).log()
    torch.testing.assert_close(
        decay, (-(LATER - SETTLING) / horizon).expand_as(decay), rtol=1e-7, atol=0
    )


def test_s4_state_decays_at_last_as_its_longest_horizon_says() -> None:
    """dA couples modes, so only the slowest eigenvector is left behind an impulse in the end."""
    torch.manual_seed(0)
    ssm = S4(2, n_modes=3, dt_min=0.05, dt_max=0.1).double().ssm
    with torch.no_grad():
        ssm.A_imag += 0.3 * torch.randn_like(ssm.A_imag)  # not only the one of HiPPO
    system = NPLRParameters(ssm.log_dt, ssm.log_A_real, ssm.A_imag, ssm.P, ssm.B, ssm.C, ssm.D)
    impulse = torch.zeros(1, 400, 2, dtype=torch.float64)
    impulse[:, 0] = 1
    with torch.no_grad():
        early, late = (nplr_ssm_naive(impulse[:, :t], system)[1] for t in (300, 400))
    decay = (late.norm(dim=(-1, -2)) / early.norm(dim=(-1, -2))).log()[0]
    horizon = ssm.health()["memory_horizon"]
    assert horizon.shape == (2, 6)
    torch.testing.assert_close(decay, -100 / horizon.amax(1), rtol=1e-3, atol=0)


def test_legs_forgets_within_one_over_dt_tokens() -> None:
    """HiPPO-LegS's slowest eigenvalue is -1; the bilinear step makes it (1 - dt/2) / (1 + dt/2)."""
    ssm = S4(5, n_modes=4).ssm
    found = ssm.health()
    want = -1 / ((1 - found["dt"] / 2) / (1 + found["dt"] / 2)).log()
    torch.testing.assert_close(found["memory_horizon"].amax(1), want, rtol=1e-3, atol=0)


def test_hand_set_horizons() -> None:
    s4d = S4D(2, n_modes=3)
    torch.nn.init.constant_(s4d.ssm.log_dt, math.log(0.01))  # Re A = -1/2: 2 / dt tokens
    assert_all(s4d.health()["dt"], 0.01)
    assert_all(s4d.health()["memory_horizon"], 200)
    ema = EMA(2, n_modes=3)
    for parameter in (ema.ssm.delta, ema.ssm.alpha):
        torch.nn.init.zeros_(parameter)  # q = 1 - 1/4
    assert_all(ema.health()["memory_horizon"], -1 / math.log(0.75))
    mamba2 = Mamba2(8, head_dim=4, d_state=3)
    torch.nn.init.constant_(mamba2.dt_bias, math.log(math.expm1(0.02)))
    torch.nn.init.constant_(mamba2.A_log, math.log(5))
    assert_all(mamba2.health()["dt"], 0.02)
    assert_all(mamba2.health()["memory_horizon"], 10)
    filters = {"filters": "unstructured", "train_length": 101}
    bst = BlockStateTransformer(8, n_heads=2, block_size=8, chunk_size=8, **filters)
    torch.nn.init.constant_(bst.context.filters.log_alpha, math.log(4))
    assert_all(bst.health()["memory_horizon"], 25)


def test_two_sided_ema_reports_both_directions() -> None:
    assert EMA(2, causal=False, n_modes=3).health()["memory_horizon"].shape == (4, 3)


def test_recurrent_states_decay_as_the_gate_says_when_nothing_is_written() -> None:
    torch.manual_seed(0)
    mixer = BlockRecurrent(8, n_heads=2, block_size=4, n_states=3).double()
    torch.nn.init.zeros_(mixer.update_proj.weight)  # its bias starts at zero or is set here
    torch.nn.init.zeros_(mixer.update_proj.bias)
    torch.nn.init.uniform_(mixer.keep, -1, 3)
    with torch.no_grad():
        state = mixer(torch.randn(1, 12, 8, dtype=torch.float64)).state  # three blocks
        decay = (state.recurrent[0] / mixer.initial).log()
    horizon = mixer.health()["memory_horizon"]
    torch.testing.assert_close(decay, (-12 / horizon).expand(3, 8))


def test_code_perplexity_and_dead_codes_of_a_hand_made_use() -> None:
    mixer: Any = mixers.build("longvq", d_model=D_MODEL, **TABLE["longvq"]["s4d"] | {"n_codes": 8})
    assert isinstance(mixer, LongVQ)
    found = mixer.health()
    assert (found["code_perplexity"], found["dead_codes"]) == (0, 0)  # nothing counted yet
    # Head 0 uses four codes alike, head 1 all eight; a mean over heads.
    mixer.codes.use.copy_(torch.tensor([[3.0] * 4 + [0.0] * 4, [5.0] * 8]))
    found = mixer.health()
    assert found["code_perplexity"].item() == pytest.approx((4 + 8) / 2)
    assert found["dead_codes"].item() == pytest.approx((4 + 0) / 2)


def test_restarted_codes_count_as_dead_until_something_falls_on_them() -> None:
    mixer: Any = mixers.build("longvq", d_model=D_MODEL, **TABLE["longvq"]["s4d"] | {"n_codes": 8})
    counts = torch.zeros_like(mixer.codes.use).double()
    counts[:, :6] = 10.0
    width = mixer.codes.codebook.shape[-1]
    statistics = {
        "code_counts": counts,
        "code_sums": counts.unsqueeze(-1).expand(-1, -1, width).clone(),
        "code_errors": counts,
    }
    for _ in range(90):  # through a restart and the 70 steps after it
        mixer.update_buffers(statistics)
        assert mixer.health()["dead_codes"] == 2
    assert (mixer.codes.born[:, 6:] > 1).all()
    counts[:, 6:] = 100 * DEAD_SHARE
    mixer.update_buffers(statistics)
    for _ in range(40):
        mixer.update_buffers(statistics)
    assert mixer.health()["dead_codes"] == 0


def assert_all(values: Tensor, want: float) -> None:
    torch.testing.assert_close(values, torch.full_like(values, want), rtol=1e-6, atol=0)
