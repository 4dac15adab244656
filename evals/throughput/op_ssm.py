"""The diagonal LTI state-space op against its form by torch.fft.

Every call discretises the parameters and forms its operators, and its backward goes back through
them: the price for one micro-batch per step. How much of it remains for each of eight micro-batches
that share operators is seen in one call over eight times as many sequences, divided by eight.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from evals.throughput.op_jobs import Job
from evals.throughput.op_rows import Op, OpRow, errors, time_op
from pretrain.ops.lti_ssm import SSMParameters, lti_ssm, lti_ssm_fft

MICRO_BATCHES = 8


@dataclass
class SSMOptions:
    """Sizes; `tokens` in all sequences together."""

    lengths: str = "2048,8192,32768,65536"
    tokens: int = 65536
    d_model: int = 1024
    n_modes: int = 16
    chunk_size: int = 128
    compile: bool = True


def jobs(options: SSMOptions, lengths: list[int], device: torch.device) -> Iterator[Job]:
    """Rows in bf16 on a GPU, in fp32 on a CPU."""

    def chunked(u: Tensor, *parameters: Tensor) -> Tensor:
        return lti_ssm(u, SSMParameters(*parameters), chunk_size=options.chunk_size)[0]

    forms = {"torch.fft": _by_fft, "chunked": chunked}
    if options.compile:
        forms["chunked, compiled"] = torch.compile(chunked, dynamic=False)
    for length in lengths:
        for form, op in forms.items():
            for shared in (1,) if op is _by_fft else (1, MICRO_BATCHES):
                row = OpRow(form, length, max(1, options.tokens // length))
                if shared > 1:
                    row = row._replace(form=f"{form}, operators for {shared} micro-batches")
                yield Job(row, partial(_rows, row, op, shared, options, device))


def _rows(
    row: OpRow, op: Op, shared: int, options: SSMOptions, device: torch.device
) -> list[OpRow]:
    """Of `shared` micro-batches in one call, the time for one of them."""
    torch.manual_seed(0)
    parameters = _parameters(options, device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = (shared * row.batch_size, row.length, options.d_model)
    inputs = [torch.randn(shape, device=device, dtype=dtype).requires_grad_(), *parameters]
    forward, both = (time.divided_by(shared) for time in time_op(op, inputs, device))
    row = row._replace(forward=forward, both=both)
    if shared > 1:
        return [row]
    error, gradient_error = errors(op, _by_fft, inputs)
    return [row._replace(error=error, gradient_error=gradient_error)]


def _by_fft(u: Tensor, *parameters: Tensor) -> Tensor:
    return lti_ssm_fft(u, SSMParameters(*parameters))[0]


def _parameters(options: SSMOptions, device: torch.device) -> list[Tensor]:
    """S4D-Lin with steps between 1e-3 and 1e-1, in fp32."""
    d, n = options.d_model, options.n_modes
    low, high = torch.tensor([1e-3, 1e-1]).log().tolist()
    parameters = SSMParameters(
        log_dt=torch.empty(d).uniform_(low, high),
        log_A_real=torch.full((d, n), 0.5).log(),
        A_imag=(torch.pi * torch.arange(n)).expand(d, n).clone(),
        C=torch.randn(d, n, 2) / n**0.5,
        D=torch.ones(d),
    )
    return [part.to(device).requires_grad_() for part in parameters]
