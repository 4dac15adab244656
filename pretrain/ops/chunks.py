"""How a call is cut into the chunks of a scan, and which chunks begin a document.

Shapes: B batch, T time, n resets.
"""

import torch
from torch import Tensor


def chunk_runs(
    length: int, chunk_size: int, resets: Tensor | None, edges: range
) -> list[tuple[int, int, int]]:
    """(start, stop, chunk) runs: a ragged head, the whole chunks, a ragged tail.

    Chunks end at reset edges, so that a reset is a property of a whole chunk.

    Raises:
        ValueError: `chunk_size` does not divide the spacing of the edges.
    """
    if resets is not None and edges.step % chunk_size:
        raise ValueError(
            f"chunk_size={chunk_size} does not divide the reset grid of {edges.step} tokens: "
            f"choose a chunk_size that does"
        )
    head = min(edges.start % chunk_size, length) if resets is not None else 0
    tail = (length - head) % chunk_size
    bounds = [
        (0, head, head),
        (head, length - tail, chunk_size),
        (length - tail, length, tail),
    ]
    return [run for run in bounds if run[1] > run[0]]


def kept_states(
    resets: Tensor | None, edges: range, start: int, stop: int, size: int
) -> Tensor | None:
    """(B, chunks) bool, False for a chunk that begins at a set flag; None when there is no edge."""
    inside = [i for i, edge in enumerate(edges) if start <= edge < stop]
    if resets is None or not inside:
        return None
    keep = torch.ones(
        resets.shape[0], (stop - start) // size, dtype=torch.bool, device=resets.device
    )
    first = (edges[inside[0]] - start) // size
    keep[:, first :: edges.step // size] = ~resets[:, inside[0] : inside[-1] + 1]
    return keep
