"""S5 against its continuous system, discretised by scipy."""

import numpy as np
import scipy.signal
import torch

from pretrain.mixers.s5 import S5


def test_impulse_responses_are_the_zero_order_hold_of_the_continuous_system() -> None:
    torch.manual_seed(0)
    # One step size for all modes, because scipy has one for a system.
    ssm = S5(3, n_modes=4, dt_min=0.05, dt_max=0.05, chunk_size=8).double().ssm
    a = (-ssm.log_A_real.exp() + 1j * ssm.A_imag).detach().numpy()
    b, c = (torch.view_as_complex(p.detach()).numpy() for p in (ssm.B, ssm.C))
    pairs = [np.diag(np.concatenate([a, a.conj()])), np.concatenate([b, b.conj()])]
    pairs += [np.concatenate([c, c.conj()], 1), np.diag(ssm.D.detach().numpy())]
    dt = ssm.log_dt[0].exp().item()
    step, held, *_ = scipy.signal.cont2discrete(tuple(pairs), dt, "zoh")
    length = 50
    for channel in range(3):
        impulse = torch.zeros(1, length, 3, dtype=torch.float64)
        impulse[:, 0, channel] = 1
        got, _ = ssm(impulse, None, None, range(0))
        state, want = held[:, channel], []
        for _ in range(length):
            want.append((pairs[2] @ state).real)
            state = step @ state
        want[0] = want[0] + pairs[3][:, channel]
        np.testing.assert_allclose(got[0].detach(), want, rtol=1e-10, atol=1e-12)


def test_the_state_does_not_grow_with_the_width() -> None:
    layer = S5(6, n_modes=4)
    state = layer.init_state(2, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert state.ssm.shape == (2, 2, 4)
    assert state.ssm.dtype == torch.float32
