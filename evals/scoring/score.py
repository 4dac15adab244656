"""Runs a model over documents: the only code here that does.

Shapes: B lanes of a batch, L inputs of a lane.

A model is whatever offers `ScoredModel`; `evals.scoring.models` adapts ours. `evals.scoring.passes`
calls this for suites, over several processes and again after an interruption. Batches hold items of
one shape, so nothing is ever padded. Documents whose state is carried walk side by side as lanes of
one batch and drop out where they end.
"""

import hashlib
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from evals.scoring.documents import EvalDocuments
from evals.scoring.protocols import Pass, WorkItem
from evals.scoring.store import TokenTable, pass_identity
from pretrain.mixers.base import cat_states, index_state

BATCH_TOKENS = 16_384
"""Inputs per forward. Part of a pass's identity: another shape may change a loss's last bit."""


class ScoredModel(Protocol):
    """What can be evaluated.

    Attributes:
        vocab_size: ids are below it.
        reset_grid: documents of one batch may only begin on its multiples; 1 is anywhere.
        max_tokens: the most that it can see at once; None: any number.
        precision: "fp32" or "bf16", the arithmetic of the forward; it sets the gates' bounds.
        device: where tokens are sent.
        constant_state: False when the state grows with the context.
    """

    vocab_size: int
    reset_grid: int
    max_tokens: int | None
    precision: str
    device: torch.device
    constant_state: bool

    def nll(self, tokens: Tensor, state: Any = None, *, score_from: int = 0) -> tuple[Tensor, Any]:
        """Negative log-likelihoods in nats of the targets tokens[:, 1 + score_from :].

        Args:
            tokens: (B, L + 1) int64; tokens[:, :-1] are the inputs.
            state: what the previous call returned; None at the start of a document.
            score_from: index of the first target that counts.

        Returns:
            (B, L - score_from) float32, and the state after the last input.
        """
        ...

    def fingerprint(self) -> str:
        """sha256 of all weights and buffers; equal before and after an evaluation."""
        ...


Chain = list[WorkItem]
Batch = list[Chain]


def state_dict_sha256(model: torch.nn.Module) -> str:
    """sha256 over names, dtypes, shapes and bytes of all parameters and buffers.

    Buffers that are not persistent count too: a kernel cache that evaluation rewrites is a fault.
    """
    digest = hashlib.sha256()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def model_identity(fingerprint: str, precision: str) -> str:
    """Weights, buffers and arithmetic: what the model contributes to a pass's identity."""
    return f"{fingerprint}:{precision}:{BATCH_TOKENS}"


def score(
    model: ScoredModel,
    documents: EvalDocuments,
    scoring: Pass,
    *,
    chosen: Sequence[Batch] | None = None,
    identity: str | None = None,
    advance: Callable[[int], None] | None = None,
) -> TokenTable:
    """Scores a pass, or some batches of it, in this process.

    Args:
        model: the model.
        documents: the items index into these.
        scoring: the pass.
        chosen: some of its `batches`; None: all.
        identity: of the result, when it is not that of the whole pass.
        advance: called with the number of tokens after each forward.

    Raises:
        ValueError: the documents' vocabulary is larger than the model's.
    """
    if documents.vocab_size > model.vocab_size:
        raise ValueError(
            f"vocab_size={model.vocab_size} of the model is below the tokenizer's "
            f"{documents.vocab_size}; evaluate with the tokenizer the model was trained with"
        )
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(model.device)
    partial = chosen is not None
    chosen = batches(scoring.items) if chosen is None else chosen
    if identity is None:
        model_id = model_identity(model.fingerprint(), model.precision)
        identity = pass_identity(scoring, model_id, documents.identity)
    began = time.perf_counter()
    rows: list[tuple[WorkItem, np.ndarray]] = []
    with torch.inference_mode():
        for batch in chosen:
            rows += _run_batch(model, documents, batch, advance or (lambda n: None))
    seconds = time.perf_counter() - began
    inputs = sum(map(n_inputs, chosen))
    meta: dict[str, Any] = {
        "identity": identity,
        "pass": scoring.name,
        "protocol": scoring.protocol,
        "context": scoring.context,
        "settings": scoring.settings,
        "n_docs": len(documents.tokens),
        "cost": {
            "input_tokens": inputs,
            "seconds": seconds,
            "tokens_per_second": inputs / max(seconds, 1e-9),
            "peak_memory_bytes": peak_memory(model.device),
            "peak_memory_of": "pass" if cuda else "process",
        },
    }
    table = _table(rows, documents, meta)
    meta["n_words"] = None if partial else documents.words_if_whole(table.doc, table.n_bytes)
    return table


def batches(items: Sequence[WorkItem], batch_tokens: int = BATCH_TOKENS) -> list[Batch]:
    """Chains whose first items have one shape, side by side; `batch_tokens` inputs at most.

    Args:
        items: of a pass.
        batch_tokens: inputs per forward; a longer item runs alone.
    """
    cut: list[Batch] = []
    for chain in _chains(items):
        shape = _shape(chain[0])
        lanes = max(1, batch_tokens // shape[0])
        if cut and len(cut[-1]) < lanes and _shape(cut[-1][0][0]) == shape:
            cut[-1].append(chain)
        else:
            cut.append([chain])
    return cut


def n_inputs(batch: Batch) -> int:
    """Tokens that a batch feeds."""
    return sum(item.stop - item.start - 1 for chain in batch for item in chain)


def _chains(items: Sequence[WorkItem]) -> list[Chain]:
    """Items joined by a carried state, longest chain first; single items are chains of one."""
    chains: list[Chain] = []
    for item in items:
        if item.carry:
            last = chains[-1][-1] if chains else None
            after = (last.doc, last.stop - 1) if last else None
            assert after == (item.doc, item.start), "a state is carried over a gap"
            chains[-1].append(item)
        else:
            chains.append([item])
    return sorted(chains, key=lambda chain: (_shape(chain[0]), len(chain), chain[-1].stop))[::-1]


def _shape(item: WorkItem) -> tuple[int, int]:
    return item.stop - item.start - 1, item.score_from - item.start - 1


def _run_batch(
    model: ScoredModel, documents: EvalDocuments, chains: Batch, advance: Callable[[int], None]
) -> list[tuple[WorkItem, np.ndarray]]:
    """Walks a batch of chains side by side. Lanes that end drop out; odd tails run on their own."""
    rows = []
    lanes, state = list(range(len(chains))), None
    for step in range(max(len(chain) for chain in chains)):
        kept_lanes: list[int] = []
        kept_states: list[Any] = []
        for shape in sorted({_shape(chains[lane][step]) for lane in lanes}, reverse=True):
            at = [k for k, lane in enumerate(lanes) if _shape(chains[lane][step]) == shape]
            items = [chains[lanes[k]][step] for k in at]
            tokens = torch.from_numpy(
                np.stack([documents.slice(item.doc, item.start, item.stop) for item in items])
            ).to(model.device)
            index = torch.tensor(at, device=model.device)
            nll, after = model.nll(
                tokens,
                state if len(at) == len(lanes) else index_state(state, index),
                score_from=shape[1],
            )
            rows += list(zip(items, nll.float().cpu().numpy(), strict=True))
            advance(len(items) * shape[0])
            going = [j for j, k in enumerate(at) if step + 1 < len(chains[lanes[k]])]
            if going:
                kept_lanes += [lanes[at[j]] for j in going]
                index = torch.tensor(going, device=model.device)
                kept_states.append(after if len(going) == len(at) else index_state(after, index))
        lanes = kept_lanes
        if not lanes:
            break
        state = kept_states[0] if len(kept_states) == 1 else cat_states(kept_states)
    return rows


def _table(
    rows: list[tuple[WorkItem, np.ndarray]], documents: EvalDocuments, meta: dict[str, Any]
) -> TokenTable:
    rows.sort(key=lambda row: (row[0].doc, row[0].score_from, row[0].start))
    doc = np.concatenate([np.full(len(nll), item.doc, np.int32) for item, nll in rows])
    position = np.concatenate(
        [np.arange(item.score_from, item.stop, dtype=np.int32) for item, _ in rows]
    )
    context = np.concatenate([item.context().astype(np.int32) for item, _ in rows])
    n_bytes = np.concatenate(
        [documents.bytes_of(item.doc, item.score_from, item.stop) for item, _ in rows]
    )
    is_text = n_bytes >= 0
    n_bytes = np.maximum(n_bytes, 0).astype(np.uint32)
    nll = np.concatenate([nll for _, nll in rows]).astype(np.float32)
    return TokenTable(doc, position, context, nll, n_bytes, is_text, meta)


def peak_memory(device: torch.device) -> int:
    """Bytes: the accelerator's peak since the pass began, or the process's resident peak so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
