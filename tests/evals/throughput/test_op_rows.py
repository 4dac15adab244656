"""Errors are those against the definition in fp64."""

import pytest
import torch

from evals.throughput.op_rows import errors


def test_errors_are_relative_and_of_the_worst_gradient() -> None:
    torch.manual_seed(0)
    x, y = (torch.randn(50).requires_grad_() for _ in range(2))
    found = errors(lambda a, b: 1.5 * (a + b), lambda a, b: a + b, [x, y])
    assert found == pytest.approx((0.5, 0.5), rel=1e-6)
    found = errors(lambda a, b: a + b, lambda a, b: a + b.detach() + (b - b.detach()) * 2, [x, y])
    assert found == pytest.approx((0.0, 0.5), abs=1e-6)


def test_the_definition_is_computed_in_fp64() -> None:
    x = torch.full((3,), 1 / 3).requires_grad_()
    error, _ = errors(lambda a: a / 3, lambda a: a / 3, [x])
    assert 1e-10 < error < 1e-7  # rounding to fp32, once
