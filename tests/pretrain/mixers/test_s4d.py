"""S4D against the continuous system it discretises."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from pretrain.mixers.s4d import S4D, DiagonalSSM
from pretrain.ops.lti_ssm import SSMParameters, lti_ssm


def test_kernel_is_the_zero_order_hold_of_the_continuous_system() -> None:
    torch.manual_seed(0)
    ssm = DiagonalSSM(3, n_modes=4).double()
    length = 50
    impulse = torch.zeros(1, length, 3, dtype=torch.float64)
    impulse[:, 0] = 1
    got, _ = ssm(impulse, None, None, range(0))
    for channel in range(3):
        a = (-ssm.log_A_real[channel].exp() + 1j * ssm.A_imag[channel]).detach().numpy()
        c = torch.view_as_complex(ssm.C[channel].detach()).numpy()
        # exp of [[A, B], [0, 0]] dt holds the input over one step: [[Ad, Bd], [0, 1]].
        system = np.zeros((5, 5), complex)
        system[:4, :4], system[:4, 4] = np.diag(a), 1
        discrete = scipy.linalg.expm(system * ssm.log_dt[channel].exp().item())
        state, kernel = discrete[:4, 4], []
        for _ in range(length):
            kernel.append(2 * (c @ state).real)
            state = discrete[:4, :4] @ state
        kernel[0] += ssm.D[channel].item()
        np.testing.assert_allclose(got[0, :, channel].detach(), kernel, rtol=1e-10, atol=1e-12)


def test_legs_spectrum_is_that_of_the_normal_part_of_hippo() -> None:
    modes = 8
    n = np.arange(2 * modes)
    root = np.sqrt(2 * n + 1)
    hippo = -np.tril(np.outer(root, root), -1) - np.diag(n + 1)  # LegS, Gu et al. 2020
    low_rank = np.sqrt(n + 0.5)
    want = np.linalg.eigvals(hippo + np.outer(low_rank, low_rank))
    want = sorted(w.imag for w in want if w.imag > 0)
    ssm = DiagonalSSM(1, n_modes=modes, init="legs")
    np.testing.assert_allclose(ssm.A_imag[0].detach(), want, rtol=1e-5)
    np.testing.assert_allclose(-ssm.log_A_real[0].exp().detach(), -0.5, rtol=1e-6)


def test_kernels_have_no_longest_length() -> None:
    """Twice the length leaves the weights alone and still reaches the first token."""
    torch.manual_seed(0)
    layer = S4D(4, n_modes=2, dt_min=1e-3, dt_max=1e-3)
    shapes = {key: value.shape for key, value in layer.state_dict().items()}
    x = torch.zeros(1, 4096, 4)
    x[:, 0] = 1
    y, _ = layer.ssm(x, None, None, range(0))
    assert y[:, -1].abs().max() > 0
    assert {key: value.shape for key, value in layer.state_dict().items()} == shapes


def test_slow_channels_do_not_cancel_in_fp32() -> None:
    """(exp(dt A) - 1) / A at dt = 1e-6 loses six digits unless it is formed with care."""
    generator = torch.Generator().manual_seed(0)
    wide = SSMParameters(
        torch.full((2,), -13.8, dtype=torch.float64),
        torch.zeros(2, 4, dtype=torch.float64),
        torch.arange(4, dtype=torch.float64).expand(2, 4),
        torch.randn(2, 4, 2, generator=generator, dtype=torch.float64),
        torch.zeros(2, dtype=torch.float64),
    )
    u = torch.randn(1, 64, 2, generator=generator, dtype=torch.float64)
    want, _ = lti_ssm(u, wide)
    got, _ = lti_ssm(u.float(), SSMParameters(*(p.float() for p in wide)))
    # The rounding of log dt itself, 13.8 * 6e-8, is the largest error that remains.
    torch.testing.assert_close(got.double(), want, rtol=0, atol=5e-6 * want.abs().max().item())


def test_initial_parameters_are_drawn_as_the_paper_says() -> None:
    torch.manual_seed(0)
    ssm = DiagonalSSM(2000, n_modes=4, dt_min=1e-4, dt_max=1e-2)
    log_dt, c = ssm.log_dt.detach() / math.log(10), ssm.C.detach()
    assert -4 <= log_dt.min() < -3.99
    assert -2.01 < log_dt.max() <= -2
    # Log-uniform: as many channels in each decade; 2000 draws give 1000 +- 22.
    assert (log_dt < -3).sum().item() == pytest.approx(1000, abs=90)
    # C ~ CN(0, 1): variance 1/2 in each part.
    assert c.square().mean((0, 1)).tolist() == pytest.approx([0.5, 0.5], rel=0.1)
    torch.testing.assert_close(ssm.log_A_real.exp(), torch.full((2000, 4), 0.5))
    torch.testing.assert_close(ssm.A_imag, math.pi * torch.arange(4.0).expand(2000, 4))
