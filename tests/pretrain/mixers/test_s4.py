"""S4 against the HiPPO-LegS system, written down densely and discretised by scipy."""

import numpy as np
import scipy.signal
import torch

from pretrain.mixers.s4 import NPLRSSM, S4, legs_modes

MODES = 8


def hippo() -> tuple[np.ndarray, np.ndarray]:
    """A (2N, 2N) and B (2N,) of HiPPO-LegS (Gu et al. 2020, 2008.07669)."""
    n = np.arange(2 * MODES)
    root = np.sqrt(2 * n + 1)
    return -np.tril(np.outer(root, root), -1) - np.diag(n + 1), root


def impulse_response(ssm: NPLRSSM, length: int) -> np.ndarray:
    impulse = torch.zeros(1, length, ssm.d_model, dtype=torch.float64)
    impulse[:, 0] = 1
    y, _ = ssm(impulse, None, None, range(0))
    return (y[0] - impulse[0] * ssm.D).detach().numpy()


def test_initial_kernel_is_that_of_the_dense_hippo_system_discretised_bilinearly() -> None:
    torch.manual_seed(0)
    ssm = NPLRSSM(3, n_modes=MODES).double()
    a, b = hippo()
    # Parameters are stored in fp32, which is all that separates the two: set them anew in fp64.
    eigenvalues, vectors = np.linalg.eig(a + np.outer(b, b) / 2)
    order = np.argsort(eigenvalues.imag)[MODES:]
    vectors = vectors[:, order]  # of a normal matrix, hence orthonormal
    np.testing.assert_allclose(ssm.A_imag[0].detach(), eigenvalues.imag[order], rtol=1e-6)
    np.testing.assert_allclose(
        ssm.P[0, :, 0].detach(), np.abs(vectors.conj().T @ b) / 2**0.5, rtol=1e-6
    )
    c = np.random.default_rng(0).standard_normal(2 * MODES)
    pairs = {
        "P": vectors.conj().T @ b / 2**0.5,
        "B": vectors.conj().T @ b,
        "C": c @ vectors,  # its conjugate is the other half, so 2 Re is the whole
    }
    with torch.no_grad():
        ssm.A_imag.copy_(torch.from_numpy(eigenvalues.imag[order]))
        for name, value in pairs.items():
            getattr(ssm, name).copy_(torch.view_as_real(torch.from_numpy(value)))
    length = 200
    got = impulse_response(ssm, length)
    for channel in range(3):
        dt = ssm.log_dt[channel].exp().item()
        system = (a, b[:, None], c[None], np.zeros((1, 1)))
        step, held, *_ = scipy.signal.cont2discrete(system, dt, "bilinear")
        # scipy also transforms C and D to read the state between two samples; S4 keeps them.
        state, kernel = held[:, 0], []
        for _ in range(length):
            kernel.append(c @ state)
            state = step @ state
        np.testing.assert_allclose(got[:, channel], kernel, rtol=0, atol=1e-11 * np.abs(c).sum())


def test_initial_modes_have_the_spectrum_of_hippo() -> None:
    """LegS has the eigenvalues -1, -2, ..., -2N although no mode of its normal part is real."""
    imag, p = (
        torch.cat([x, sign * x]).numpy() for x, sign in zip(legs_modes(MODES), (-1, 1), strict=True)
    )
    got = np.sort(np.linalg.eigvals(np.diag(-0.5 + 1j * imag) - np.outer(p, p)).real)
    # Far from normal: eigenvalues are ill-conditioned even in fp64.
    np.testing.assert_allclose(got, -np.arange(2 * MODES, 0, -1), rtol=1e-4)


def test_kernels_of_any_length_leave_the_state_dict_alone() -> None:
    torch.manual_seed(0)
    layer = S4(4, n_modes=2, dt_min=1e-3, dt_max=1e-3).double()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    short, long = (impulse_response(layer.ssm, length) for length in (100, 4096))
    np.testing.assert_allclose(long[:100], short, rtol=1e-9, atol=1e-12)
    assert np.abs(long[-1]).max() > 0
    after = layer.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_no_parameter_is_complex() -> None:
    assert not any(p.is_complex() for p in S4(4, n_modes=2).parameters())


def test_powers_stay_bounded_in_fp32() -> None:
    """A + A^* is negative definite, so no step makes a state longer: 64 states, 4,096 tokens."""
    torch.manual_seed(0)
    ssm = NPLRSSM(4, n_modes=32)
    u = torch.randn(1, 4096, 4)
    got, _ = ssm(u, None, None, range(0))
    want, _ = ssm.double()(u.double(), None, None, range(0))
    # Rounding of dA^64 adds up over 64 factors: 1e-5 is seen.
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
