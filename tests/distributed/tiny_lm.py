"""A language model and a loader that train 20 steps in a second, with every hard feature.

The model has what checkpoints lose: a registered buffer that training updates (a softly assigned
VQ codebook, so that rounding cannot flip a code), three parameter groups, a tied head, a recurrent
state and resets. The loader's loss masks are ragged. Shapes: B lanes, T time, D width, K codes.
"""

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.batch import Batch

VOCAB_SIZE = 32
POISON = VOCAB_SIZE - 1  # makes the loss NaN as a target, and the state as an input
WIDTH = 8
SEQ_LEN = 8
RESET_GRID = 4
LANES = 8


class TinyState(NamedTuple):
    hidden: Tensor  # (B, D)
    position: Tensor  # (B,)
    phase: Tensor  # (B, 0, 0)


class TinyOutput(NamedTuple):
    loss_sum: Tensor
    hidden: Tensor
    state: Any
    aux: dict[str, Tensor]
    nll: Tensor | None = None


class Recurrence(nn.Module):
    """h_t = sigmoid(log_decay) * h_{t-1} + x_t, zeroed at resets."""

    def __init__(self) -> None:
        super().__init__()
        self.log_decay = nn.Parameter(torch.linspace(0.0, 2.0, WIDTH))
        self.project = nn.Linear(WIDTH, WIDTH)

    def ssm_parameters(self) -> set[str]:
        return {"log_decay"}

    def health(self) -> dict[str, Tensor]:
        return {"memory_horizon": -1 / F.logsigmoid(self.log_decay.detach().double())}

    def forward(self, x: Tensor, state: TinyState, resets: Tensor | None) -> tuple[Tensor, Any]:
        decay, h, outputs = torch.sigmoid(self.log_decay), state.hidden, []
        x = self.project(x).float()
        for t in range(x.shape[1]):
            if resets is not None and t % RESET_GRID == 0:
                h = h * ~resets[:, t // RESET_GRID, None]
            h = decay * h + x[:, t]
            outputs.append(h)
        position = state.position + x.shape[1]
        return torch.stack(outputs, 1), TinyState(h, position, state.phase)


class SoftCodebook(nn.Module):
    """Adds the expected code; the codebook moves by statistics, never by gradients."""

    codebook: Tensor
    updates: Tensor

    def __init__(self, codes: int = 4) -> None:
        super().__init__()
        self.register_buffer("codebook", torch.randn(codes, WIDTH))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        weights = torch.softmax(x @ self.codebook.T, -1)
        code = weights @ self.codebook
        flat_weights, flat = weights.flatten(0, 1).detach(), x.flatten(0, 1).detach()
        aux = {
            "counts": flat_weights.sum(0).double(),
            "sums": (flat_weights.T @ flat).double(),
            "commit_loss": 0.01 * (x - code.detach()).square().sum(),
        }
        return x + code, aux

    def update(self, counts: Tensor, sums: Tensor) -> None:
        mean = (sums / counts[:, None].clamp(min=1e-3)).to(self.codebook.dtype)
        self.codebook.lerp_(mean, 0.2)
        self.updates += 1


class Head(nn.Module):
    """Tied output matrix and the loss: its sum, and of every token."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(x, self.weight).float()
        nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        nll = nll.view_as(targets) * mask
        poison = ((targets == POISON) & mask).any()
        return nll.sum() * torch.where(poison, torch.nan, 1.0), nll


class TinyLM(nn.Module):
    """Offers the part of the `LanguageModel` interface that training uses."""

    reset_grid = RESET_GRID

    def __init__(self, seed: int = 0, extra_row: bool = False, codebook: bool = True) -> None:
        super().__init__()
        self.has_codebook = codebook
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(VOCAB_SIZE + extra_row, WIDTH)
        self.recurrence = Recurrence()
        self.codes = SoftCodebook()
        self.norm = nn.LayerNorm(WIDTH)
        self.head = Head(self.embedding.weight)

    def forward(
        self,
        tokens: Tensor,
        state: TinyState | None = None,
        *,
        resets: Tensor | None = None,
        targets: Tensor,
        loss_mask: Tensor,
        per_token: bool = False,
    ) -> TinyOutput:
        if state is None:
            state = self.init_state(len(tokens), device=tokens.device, dtype=torch.float32)
        h, state = self.recurrence(self.embedding(tokens), state, resets)
        poison = (tokens == POISON).any(1, keepdim=True)
        state = state._replace(hidden=torch.where(poison, torch.nan, state.hidden))
        aux: dict[str, Tensor] = {}
        if self.has_codebook:
            h, aux = self.codes(h)
        h = self.norm(h)
        named = {f"0.{name}": value for name, value in aux.items()}
        loss_sum, nll = self.head(h, targets, loss_mask)
        return TinyOutput(loss_sum, h, state, named, nll.detach() if per_token else None)

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> TinyState:
        return TinyState(
            torch.zeros(batch_size, WIDTH, device=device, dtype=dtype),
            torch.zeros(batch_size, dtype=torch.int64, device=device),
            torch.zeros(batch_size, 0, 0, device=device),
        )

    def named_mixers(self) -> dict[str, Recurrence]:
        return {"0.recurrence": self.recurrence}

    def update_buffers(self, statistics: dict[str, Tensor]) -> None:
        self.codes.update(statistics["0.counts"], statistics["0.sums"])

    def flops_per_token(self, seq_len: int) -> dict[str, float]:
        return {"all": 2.0 * VOCAB_SIZE * WIDTH}


class TinyLoader:
    """Random lanes as a pure function of (seed, step, lane), with ragged masks and resets."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        *,
        seed: int = 0,
        poison: range = range(0),
    ) -> None:
        per_rank = LANES // world_size
        self.lanes = range(rank * per_rank, (rank + 1) * per_rank)
        self.micro_batch_size, self.seed, self.poison = micro_batch_size, seed, poison

    def steps(self, start_step: int) -> Iterator[list[Batch]]:
        step = start_step
        while True:
            rows = [self._lane(step, lane) for lane in self.lanes]
            size = self.micro_batch_size
            groups = [rows[i : i + size] for i in range(0, len(rows), size)]
            yield [
                Batch(*(torch.stack(column) for column in zip(*group, strict=True)))
                for group in groups
            ]
            step += 1

    def _lane(self, step: int, lane: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        digest = hashlib.sha256(f"{self.seed} {step} {lane}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))
        tokens = torch.randint(0, POISON, (SEQ_LEN + 1,), generator=generator)
        valid = int(torch.randint(0, SEQ_LEN + 1, (), generator=generator))
        mask = torch.arange(SEQ_LEN) < valid
        if step in self.poison and lane == LANES - 1:
            tokens[1:], mask = POISON, torch.ones(SEQ_LEN, dtype=torch.bool)
        resets = torch.rand(SEQ_LEN // RESET_GRID, generator=generator) < 0.2
        return tokens, mask, resets, torch.zeros(SEQ_LEN + 1, dtype=torch.int64)

    def state(self, step: int) -> dict[str, Any]:
        return {"seed": self.seed, "step": step, "lanes": LANES}

    def check_state(self, saved: dict[str, Any]) -> None:
        if saved["seed"] != self.seed:
            raise ValueError(
                f"data order: seed={self.seed} here, {saved['seed']} in the checkpoint; set the "
                f"seed of the run"
            )
