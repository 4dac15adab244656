"""Models whose losses are known in closed form, honest ones and ones with a planted fault.

Each is a `ScoredModel` on the CPU. V is the vocabulary, id 1 is BOS.
"""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.tokenizer import PAD_ID
from evals.scoring.documents import EvalDocuments
from evals.scoring.score import state_dict_sha256

BOS, EOS, FIRST = 1, 2, 4


class ToyModel:
    """Base: log-probabilities from `log_p(inputs, state) -> ((B, L, V), state)`."""

    reset_grid = 1
    max_tokens: int | None = None
    precision = "fp32"
    device = torch.device("cpu")
    constant_state = True

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.calls: list[tuple[int, int]] = []

    def log_p(self, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        raise AssertionError("a toy model defines log_p")

    def nll(self, tokens: Tensor, state: Any = None, *, score_from: int = 0) -> tuple[Tensor, Any]:
        self.calls.append((tokens.shape[0], tokens.shape[1] - 1))
        log_p, after = self.log_p(tokens[:, :-1], state)
        nll = -log_p.gather(-1, tokens[:, 1:, None])[..., 0]
        return nll[:, score_from:].float(), after

    def fingerprint(self) -> str:
        return hashlib.sha256(type(self).__name__.encode()).hexdigest()


class Uniform(ToyModel):
    """Every token costs ln V."""

    def log_p(self, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        shape = (*inputs.shape, self.vocab_size)
        return torch.full(shape, -float(np.log(self.vocab_size))), torch.zeros(len(inputs), 1)


class Bigram(ToyModel):
    """Knows the transition table the text was drawn from: the loss is the source's entropy rate."""

    def __init__(self, table: np.ndarray) -> None:
        super().__init__(len(table))
        self.table = torch.from_numpy(np.log(np.maximum(table, 1e-300)))

    def log_p(self, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.table[inputs], torch.zeros(len(inputs), 1)


class CopyState(NamedTuple):
    tail: Tensor  # (B, lag) the last inputs, -1 where there was none


class Copy(ToyModel):
    """Predicts the token `lag` places back: loss 0 on a periodic text, ln V without context."""

    def __init__(self, vocab_size: int, lag: int) -> None:
        super().__init__(vocab_size)
        self.lag = lag

    def log_p(self, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        n_lanes = len(inputs)
        tail = state.tail if state else torch.full((n_lanes, self.lag), -1)
        joined = torch.cat([tail, inputs], dim=1)
        # The target after input j is guessed to repeat the input `lag` before it.
        source = joined[:, 1 : 1 + inputs.shape[1]]
        log_p = torch.full((*inputs.shape, self.vocab_size), -float(np.log(self.vocab_size)))
        known = source >= FIRST
        certain = torch.full((self.vocab_size,), -float("inf")).repeat(*inputs.shape, 1)
        certain.scatter_(-1, source.clamp(min=0)[..., None], 0.0)
        log_p = torch.where(known[..., None], certain, log_p)
        return log_p, CopyState(joined[:, inputs.shape[1] :])


class PhraseCopy(ToyModel):
    """After a phrase of `order` tokens that stood before within `window`, what followed it then.

    That token has probability 1/2, as all others together; a new phrase tells nothing. The latest
    earlier place counts. `window`: how many of the last inputs are known; None: all.
    """

    def __init__(self, vocab_size: int, order: int, window: int | None = None) -> None:
        super().__init__(vocab_size)
        self.order, self.window = order, window

    def log_p(self, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        past = state.tail if state else torch.zeros(len(inputs), 0, dtype=torch.int64)
        known = torch.cat([past, inputs], dim=1)
        p = torch.full((*inputs.shape, self.vocab_size), 1 / self.vocab_size)
        for lane, row in enumerate(known.tolist()):
            follows: dict[tuple[int, ...], int] = {}
            for end in range(self.order, len(row) + 1):
                phrase = tuple(row[end - self.order : end])
                found = follows.get(phrase)
                now = end - 1 - past.shape[1]
                reach = end if self.window is None else self.window
                if now >= 0 and found is not None and end - (found - self.order) <= reach:
                    p[lane, now] = 0.5 / (self.vocab_size - 1)
                    p[lane, now, row[found]] = 0.5
                follows[phrase] = end  # of what comes next
        return p.log(), CopyState(known)


class RecurrentState(NamedTuple):
    hidden: Tensor  # (B, D)
    phase: Tensor  # (B, r, 0): a length-only tensor, as the mixers' states have


class Recurrent(ToyModel):
    """A random leaky integrator with a softmax head: causal, stateful, position by position.

    Faults:
        future: every position also sees the mean of the whole input.
        length: the decay depends on the length of the call.
        padding: outputs shrink by the share of pads (id 0) at the end of the input.
        stale: `state=None` continues from the previous call.
        mutate: counts calls in a buffer that shifts nothing but the weights' hash.
    """

    def __init__(
        self, vocab_size: int = 32, width: int = 8, seed: int = 0, fault: str = ""
    ) -> None:
        super().__init__(vocab_size)
        generator = torch.Generator().manual_seed(seed)
        self.fault = fault
        self.module = nn.Module()
        self.module.embedding = nn.Parameter(
            torch.randn(vocab_size, width, generator=generator, dtype=torch.float64)
        )
        self.module.head = nn.Parameter(
            torch.randn(width, vocab_size, generator=generator, dtype=torch.float64)
        )
        self.module.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.last: Tensor | None = None

    def log_p(self, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        x = self.module.embedding[inputs]
        n_lanes, length, width = x.shape
        decay = 0.9 if self.fault != "length" else 0.9 - 0.1 / length**0.5
        hidden = state.hidden if state else torch.zeros(n_lanes, width, dtype=x.dtype)
        if self.fault == "stale" and state is None and self.last is not None:
            hidden = self.last[:1].expand(n_lanes, width)
        if self.fault == "mutate":
            self.module.calls += 1
        outputs = []
        for t in range(length):
            hidden = decay * hidden + x[:, t]
            outputs.append(hidden)
        y = torch.stack(outputs, dim=1)
        self.last = hidden
        if self.fault == "future":
            y = y + x.mean(dim=1, keepdim=True)
        if self.fault == "padding":
            pads = (inputs == PAD_ID).flip(1).cumprod(1).sum(1)
            y = y * (1 - pads / length)[:, None, None]
        phase = torch.zeros(n_lanes, length % 4, 0)
        return F.log_softmax(y @ self.module.head, dim=-1), RecurrentState(hidden, phase)

    def fingerprint(self) -> str:
        return state_dict_sha256(self.module)


def documents_of(
    token_lists: list[np.ndarray], vocab_size: int, fingerprint: str = "toy"
) -> EvalDocuments:
    """Documents whose ids from 4 on are one byte each; EOS is appended."""
    token_bytes = [b""] * FIRST + [bytes([32 + i % 90]) for i in range(vocab_size - FIRST)]
    return EvalDocuments(
        tokens=[np.concatenate([ids, [EOS]]).astype(np.uint16) for ids in token_lists],
        token_bytes=token_bytes,
        bos_id=BOS,
        fingerprint=fingerprint,
        tokenizer_sha256="toy",
        raw_bytes=[len(ids) for ids in token_lists],
        source={"path": "toy", "split": "validation", "limit": None},
    )


def random_documents(lengths: list[int], vocab_size: int = 32, seed: int = 0) -> EvalDocuments:
    rng = np.random.default_rng(seed)
    return documents_of([rng.integers(FIRST, vocab_size, n) for n in lengths], vocab_size)


def markov_documents(
    lengths: list[int], vocab_size: int, seed: int = 0
) -> tuple[EvalDocuments, np.ndarray]:
    """Texts drawn from a random transition table over ids >= 4, and that table (V, V)."""
    rng = np.random.default_rng(seed)
    table = np.zeros((vocab_size, vocab_size))
    table[:, FIRST:] = rng.dirichlet(np.full(vocab_size - FIRST, 0.5), size=vocab_size)
    table[:, EOS] = 1e-6
    table /= table.sum(1, keepdims=True)
    text = table[:, FIRST:] / table[:, FIRST:].sum(1, keepdims=True)
    cumulative = text.cumsum(1)
    documents = []
    for n in lengths:
        ids, last = [], BOS
        for u in rng.random(n):
            last = FIRST + min(int(np.searchsorted(cumulative[last], u)), vocab_size - FIRST - 1)
            ids.append(last)
        documents.append(np.array(ids))
    return documents_of(documents, vocab_size), table


class CountState(NamedTuple):
    seen: Tensor  # (B,) inputs since the state was fresh


class ByContext(ToyModel):
    """A token behind c inputs costs `loss(c)` nats, whatever it is; id 0 takes what is left.

    Args:
        vocab_size: V, of which id 0 never occurs.
        loss: of c int64, in nats float64, at least ln V everywhere.
    """

    def __init__(self, vocab_size: int, loss: Callable[[Tensor], Tensor]) -> None:
        super().__init__(vocab_size)
        self.loss = loss

    def log_p(self, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        seen = state.seen if state else torch.zeros(len(inputs), dtype=torch.int64)
        at = seen[:, None] + torch.arange(inputs.shape[1])
        cost = self.loss(at)
        rest = torch.log1p(-(self.vocab_size - 1) * torch.exp(-cost)).clamp(max=0)
        log_p = (-cost)[..., None].repeat(1, 1, self.vocab_size)
        log_p[..., 0] = rest
        return log_p, CountState(seen + inputs.shape[1])

    def fingerprint(self) -> str:
        return hashlib.sha256(self.loss(torch.arange(4096)).numpy().tobytes()).hexdigest()
