"""Forwards of a quantised model in which the codes of a reference forward are held.

Shapes: B lanes, L inputs, H heads, S codes, K key width.

A quantiser takes the code nearest to a key. Calls of another shape sum in another order and move
keys by 1e-7; one that lies between two codes then takes the other one, a *flip*, and its loss and
later ones move by far more than rounding. No bound on losses tells such a flip from a leak of the
future. So the model is seen as two parts, and both are compared:

    losses, given all codes           are continuous: held codes, and the usual bounds
    a code, given all codes before it is chosen anew beside the held one; where it is another,
                                      the key must lie on the edge between both

The second keeps the first honest. A key hangs on inputs and on codes held in layers below, so in
honest forwards it differs by rounding only; what leaks into keys moves them, and many take another
code at a *margin*: the key's distance to the plane halfway between both codes, over its length. By
so much at least it has moved, since in the reference it lay on the plane's other side. In other
words: forwards that pass differ where a key is within `TIES` of a tie, and nowhere else.

Scoring holds nothing. Passes with batches of other shapes may flip codes too: noise of the model,
in its losses as in its use, that no evaluation could take away.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from evals.scoring.score import ScoredModel
from pretrain.mixers.codebook import Codebook
from pretrain.ops.vq_attention import look_up

TIES = {"fp32": 1e-4, "bf16": 0.01}
"""precision -> largest margin of a tie, a share of the key's length. From call to call keys move by
1e-7 to 1e-5 in fp32, by a unit in the last place, 2^-8, or two in bf16; a leak into keys alone that
moves them by less than this is not seen."""


@runtime_checkable
class QuantisedModel(Protocol):
    """What a `ScoredModel` has besides, when some of its values are codes.

    Attributes:
        quantisers: each called once in every forward; their codes are held by hooks.
    """

    quantisers: Sequence[Codebook]


@dataclass
class Flips:
    """Codes chosen otherwise than in the reference.

    Attributes:
        count: of them.
        codes: that were held.
        margin: the largest; 0 is an exact tie.
        where: the largest.
    """

    count: int = 0
    codes: int = 0
    margin: float = 0.0
    where: str = ""

    def __str__(self) -> str:
        largest = f", largest tie margin {self.margin:.2g} at {self.where}" if self.count else ""
        return f"flips: {self.count:,} of {self.codes:,} codes{largest}"


class Reference:
    """A forward that others are compared with; of models without quantisers, nothing is held.

    Args:
        model: the model.
        tokens: (1, L + 1) int64, a document from its start.

    Attributes:
        nll: (1, L) float64, nats.
        flips: of all later forwards; None when there is no code.
    """

    def __init__(self, model: ScoredModel, tokens: Tensor) -> None:
        self.model = model
        self.quantisers = model.quantisers if isinstance(model, QuantisedModel) else []
        self.flips = Flips() if self.quantisers else None
        self.codes: list[Tensor] = []  # of each quantiser, (L, H)
        self.nll = self._run(self._record, tokens, None)[0]

    def again(
        self,
        tokens: Tensor,
        state: Any = None,
        *,
        start: int = 0,
        stop: int | None = None,
        lane: int = 0,
    ) -> tuple[Tensor, Any]:
        """A forward in which the document's codes are held.

        Args:
            tokens: (B, T + 1) int64.
            state: of the call before.
            start: the document's position of the first input.
            stop: its position from which on inputs are others, and free; None: all are its own.
            lane: the document's; other lanes are free.

        Returns:
            (B, T) float64 losses in nats, and the state after.
        """
        stop = start + tokens.shape[1] - 1 if stop is None else stop
        return self._run(partial(self._hold, start, stop, lane), tokens, state)

    def _run(
        self, hook: Callable[..., Tensor | None], tokens: Tensor, state: Any
    ) -> tuple[Tensor, Any]:
        with ExitStack() as stack:
            for index, quantiser in enumerate(self.quantisers):
                stack.enter_context(quantiser.register_forward_hook(partial(hook, index)))
            nll, after = self.model.nll(tokens, state)
        return nll.double(), after

    def _record(
        self, index: int, quantiser: Codebook, inputs: tuple[Tensor], codes: Tensor
    ) -> None:
        assert len(self.codes) == index, "a quantiser is called once in a forward, in order"
        self.codes.append(codes[0])

    def _hold(
        self,
        start: int,
        stop: int,
        lane: int,
        index: int,
        quantiser: Codebook,
        inputs: tuple[Tensor],
        codes: Tensor,
    ) -> Tensor:
        held, (keys,) = self.codes[index][start:stop], inputs
        own, k = codes[lane, : len(held)], keys[lane, : len(held)]
        assert self.flips is not None
        self.flips.codes += held.numel()
        self.flips.count += int((own != held).sum())
        margin = tie_margins(k, own, held, quantiser.codebook)
        if float(margin.max()) > self.flips.margin:
            self.flips.margin = float(margin.max())
            position = start + int(margin.amax(-1).argmax())
            self.flips.where = f"quantiser {index}, position {position}"
        codes = codes.clone()
        codes[lane, : len(held)] = held
        return codes


def tie_margins(k: Tensor, own: Tensor, held: Tensor, codebook: Tensor) -> Tensor:
    """How far keys lie from the planes halfway between two codes each, over their lengths.

    At most how far the codes lie apart: two that training left in nearly one place are one.

    Args:
        k: (T, H, K).
        own: (T, H) int64, one code.
        held: (T, H) int64, the other; where it is the same the margin is 0.
        codebook: (H, S, K).

    Returns:
        (T, H) float64; infinity for keys that are not finite.
    """
    k = k.double()
    one, other = (look_up(codes[None], codebook)[0].double() for codes in (own, held))
    gap = ((k - other).square().sum(-1) - (k - one).square().sum(-1)).abs()
    apart = (one - other).norm(dim=-1)
    margin = torch.minimum(gap / (2 * apart).clamp(min=1e-30), apart) / k.norm(dim=-1)
    margin = torch.nan_to_num(margin, nan=torch.inf)
    return torch.where(own == held, 0.0, margin)
