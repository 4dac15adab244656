"""A BST:SH layer against a Block-Recurrent layer: the forward alone, as in BST's paper (Figure 4).

Both in bf16 autocast without gradients. Each is run as it is, compiled, and both of these as CUDA
graphs; the ratio is between the best of either. Of the Block-Recurrent layer, whose loop over
blocks a compiler unrolls, the step from block to block is compiled, and up to `unrolled_blocks` the
whole layer too. What is not compiled within `timeout_s` is a row that says so. It has as many
states as a block has tokens, as in its own paper.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from evals.throughput.compile_limit import compile_limit
from evals.throughput.device_time import device_time, queued_time
from evals.throughput.op_jobs import Job
from evals.throughput.op_rows import OpRow
from pretrain.mixers import TokenMixer, build

CHECKED_BLOCKS = 4


@dataclass
class BSTLayerOptions:
    """Sizes of BST's benchmark."""

    lengths: str = "4096,8192,16384,32768,65536"
    batch_size: int = 1
    d_model: int = 512
    n_heads: int = 16
    window: int = 128
    n_modes: int = 16
    compile: bool = True
    unrolled_blocks: int = 32
    timeout_s: float = 60.0


def jobs(options: BSTLayerOptions, lengths: list[int], device: torch.device) -> Iterator[Job]:
    """All ways to run both layers at all lengths."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_heads": options.n_heads, "block_size": options.window}
    d, w = options.d_model, options.window
    bst = build("bst", d_model=d, n_modes=options.n_modes, chunk_size=w, **sizes).to(device)
    rival = build("block_recurrent", d_model=d, n_states=w, **sizes).to(device)
    for length in lengths:
        forms: dict[str, TokenMixer | Callable[..., object]] = {"bst": bst}
        forms["block_recurrent"] = rival
        if options.compile:
            forms["bst, compiled"] = torch.compile(bst, dynamic=False)
            forms["block_recurrent, step compiled"] = _with_compiled_step(rival)
            if length <= options.unrolled_blocks * options.window:
                forms["block_recurrent, compiled"] = torch.compile(rival, dynamic=False)
        for form, layer in forms.items():
            row = OpRow(form, length, options.batch_size)
            definition = bst if form.startswith("bst") else rival
            yield Job(row, partial(_rows, row, layer, definition, options, device))


def _rows(
    row: OpRow,
    layer: Callable[..., object],
    definition: TokenMixer,
    options: BSTLayerOptions,
    device: torch.device,
) -> list[OpRow]:
    """By queue, and as a CUDA graph.

    Raises:
        NotCompiledError: not within `timeout_s`.
    """
    torch.manual_seed(0)
    x = torch.randn(row.batch_size, row.length, options.d_model, device=device)
    call = partial(_forward, layer, x)
    with compile_limit(options.timeout_s):
        call()
    row = row._replace(error=_error(layer, definition, x[:, : CHECKED_BLOCKS * options.window]))
    rows = [row._replace(forward=queued_time(call, device))]
    if device.type == "cuda":
        graphed = device_time(call, device)
        if graphed.method == "graph":
            rows.append(row._replace(forward=graphed))
        else:
            rows.append(row._replace(note="cannot be captured"))
    return rows


def ratios(rows: list[OpRow]) -> list[str]:
    """How many times faster BST's best form is than the best Block-Recurrent one, per length where
    both are known."""
    found = []
    for length in dict.fromkeys(row.length for row in rows):
        best: dict[str, OpRow] = {}
        for row in rows:
            name = row.form.split(",")[0]
            if row.length == length and row.forward:
                best[name] = min(best.get(name, row), row, key=_milliseconds)
        if len(best) < 2:
            continue
        bst, rival = best["bst"], best["block_recurrent"]
        assert bst.forward
        assert rival.forward
        found.append(
            f"{length:,} tokens: {rival.forward.ms / bst.forward.ms:.2f} times as fast "
            f"({bst.form}, {bst.forward.method}: {bst.forward.ms:.3f} ms; "
            f"{rival.form}, {rival.forward.method}: {rival.forward.ms:.3f} ms)"
        )
    return found


def _milliseconds(row: OpRow) -> float:
    return row.forward.ms if row.forward else float("inf")


@torch.no_grad()
def _forward(layer: Callable[..., object], x: Tensor) -> Tensor:
    # A graph that is replayed cannot look into autocast's cache of narrow weights.
    with torch.autocast(x.device.type, dtype=torch.bfloat16, cache_enabled=False):
        return layer(x).y  # type: ignore[attr-defined]


def _with_compiled_step(layer: TokenMixer) -> TokenMixer:
    """A copy that shares the weights; what it does once per block is compiled."""
    compiled = copy.copy(layer)
    for name in ("_read", "_mix"):
        step = torch.compile(getattr(layer, name), dynamic=False)
        object.__setattr__(compiled, name, step)
    return compiled


def _error(layer: Callable[..., object], definition: TokenMixer, x: Tensor) -> float:
    """Of the first blocks, against the same layer in fp64 on the CPU: both are causal."""
    exact = copy.deepcopy(definition).cpu().double()
    with torch.no_grad():
        want = exact(x.cpu().double()).y
    got = _forward(layer, x).cpu().double()
    return ((got - want).norm() / want.norm()).item()
