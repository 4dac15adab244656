"""The diagonal LTI state-space op against its form by torch.fft.

Every call discretises the parameters and forms its operators, and its backward goes back through
them: the price for one micro-batch per step. How much of it remains for each of eight micro-batches
that share operators is seen in one call over eight times as many sequences, divided by eight.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from evals.throughput.op_rows import OpRow, errors, time_op
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


def measure(options: SSMOptions, lengths: list[int], device: torch.device) -> Iterator[OpRow]:
    """Rows in bf16 on a GPU, in fp32 on a CPU."""

    def chunked(u: Tensor, *parameters: Tensor) -> Tensor:
        return lti_ssm(u, SSMParameters(*parameters), chunk_size=options.chunk_size)[0]

    def by_fft(u: Tensor, *parameters: Tensor) -> Tensor:
        return lti_ssm_fft(u, SSMParameters(*parameters))[0]

    forms = {"torch.fft": by_fft, "chunked": chunked}
    if options.compile:
        forms["chunked, compiled"] = torch.compile(chunked, dynamic=False)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for length in lengths:
        torch.manual_seed(0)
        batch_size = max(1, options.tokens // length)
        parameters = _parameters(options, device)
        for form, op in forms.items():
            for shared in (1,) if op is by_fft else (1, MICRO_BATCHES):
                shape = (shared * batch_size, length, options.d_model)
                u = torch.randn(shape, device=device, dtype=dtype).requires_grad_()
                row = OpRow(form, length, batch_size)
                if shared > 1:
                    row = row._replace(form=f"{form}, operators for {shared} micro-batches")
                try:
                    times = time_op(op, [u, *parameters], device)
                    found = None
                    if shared == 1:
                        found = errors(op, by_fft, [u, *parameters])
                except torch.OutOfMemoryError:
                    yield row._replace(note="out of memory")
                    continue
                forward, both = (time.divided_by(shared) for time in times)
                row = row._replace(forward=forward, both=both)
                yield row._replace(error=found[0], gradient_error=found[1]) if found else row


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
