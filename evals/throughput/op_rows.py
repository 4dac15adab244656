"""One row of an operator's table: its times and its error, or why it has none."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evals.throughput.device_time import DeviceTime, device_time


class OpRow(NamedTuple):
    """Times in milliseconds; errors are the norm of the difference over that of the fp64 result.

    Attributes:
        form: which implementation.
        length: tokens per sequence.
        batch_size: sequences.
        forward: without gradients.
        both: forward and backward, to inputs and parameters.
        error: of the output.
        gradient_error: the largest of all gradients'.
        note: what else there is to say.
    """

    form: str
    length: int
    batch_size: int
    forward: DeviceTime | None = None
    both: DeviceTime | None = None
    error: float | None = None
    gradient_error: float | None = None
    note: str = ""


Op = Callable[..., Tensor]


def time_op(
    op: Op, inputs: Sequence[Tensor], device: torch.device
) -> tuple[DeviceTime, DeviceTime]:
    """Forward, and forward and backward of a sum that weights all outputs at random.

    Args:
        op: of all inputs; returns one tensor.
        inputs: those with `requires_grad` get a gradient.
        device: whose time counts.
    """
    leaves = [x for x in inputs if x.requires_grad]
    # As the product behind it in a model leaves it, whatever the strides of the output.
    above = torch.randn_like(op(*inputs), memory_format=torch.contiguous_format).detach()

    def forward() -> Tensor:
        with torch.no_grad():
            return op(*inputs)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(op(*inputs), leaves, above)

    return device_time(forward, device), device_time(both, device)


def errors(op: Op, definition: Op, inputs: Sequence[Tensor]) -> tuple[float, float]:
    """Of the output and of the worst gradient, against `definition` in fp64."""
    above = torch.randn_like(op(*inputs)).detach()
    found: list[list[Tensor]] = []
    for function, double in ((op, False), (definition, True)):
        given = [
            (x.detach().double() if double else x.detach()).requires_grad_(x.requires_grad)
            for x in inputs
        ]
        y = function(*given)
        leaves = [x for x in given if x.requires_grad]
        found.append([y.detach(), *torch.autograd.grad(y, leaves, above.to(y.dtype))])
    relative = [_distance(a, b) for a, b in zip(*found, strict=True)]
    return relative[0], max(relative[1:])


def _distance(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


def markdown(rows: Sequence[OpRow]) -> str:
    """The table."""
    lines = [
        "| form | B x L | forward ms | forward + backward ms | by | error | gradients |",
        "| --- | ---: | ---: | ---: | --- | ---: | ---: |",
    ]
    for row in rows:
        times = [time for time in (row.forward, row.both) if time]
        cells: list[Any] = [
            row.form,
            f"{row.batch_size} x {row.length:,}",
            _ms(row.forward),
            _ms(row.both) or row.note,
            "/".join(dict.fromkeys(time.method for time in times)),
            *("" if x is None else f"{x:.1e}" for x in (row.error, row.gradient_error)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _ms(time: DeviceTime | None) -> str:
    return "" if time is None else f"{time.ms:.3f} [{time.q1:.3f}, {time.q3:.3f}]"
