"""Our language model behind the `ScoredModel` interface.

Shapes: B lanes, L inputs, V vocabulary.

Losses are fp32 log-softmax over fp32 logits, taken only where targets are scored and at most
`HEAD_CHUNK_TOKENS` rows at a time: no (B, L, V) tensor exists, and a 64-token span behind 8,192
tokens of context pays for 64 rows of the head.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from evals.scoring.score import state_dict_sha256
from pretrain.mixers.codebook import Codebook
from pretrain.models import LanguageModel

HEAD_CHUNK_TOKENS = 512


class LanguageModelScorer:
    """Adapter from `pretrain.models.LanguageModel` to `ScoredModel`.

    Args:
        model: put into eval mode and moved to `device`; parameters keep their dtype.
        device: where it runs.
        precision: "fp32", or "bf16" for autocast matmuls.
    """

    max_tokens: int | None = None

    def __init__(self, model: LanguageModel, device: torch.device, precision: str = "fp32") -> None:
        if precision not in ("fp32", "bf16"):
            raise ValueError(f"precision={precision!r} is not known; use fp32 or bf16")
        self.model = model.to(device).eval()
        self.device = device
        self.precision = precision
        self.vocab_size = model.config.vocab_size
        self.reset_grid = model.reset_grid
        self.constant_state = model.constant_state
        self.quantisers = [part for part in model.modules() if isinstance(part, Codebook)]

    def nll(self, tokens: Tensor, state: Any = None, *, score_from: int = 0) -> tuple[Tensor, Any]:
        with torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"
        ):
            out = self.model(tokens[:, :-1], state)
            hidden = out.hidden[:, score_from:]
            targets = tokens[:, 1 + score_from :]
            rows = max(1, HEAD_CHUNK_TOKENS // tokens.shape[0])
            chunks = [
                self._chunk_nll(hidden[:, first : first + rows], targets[:, first : first + rows])
                for first in range(0, hidden.shape[1], rows)
            ]
        return torch.cat(chunks, dim=1), out.state

    def _chunk_nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self.model.logits(hidden).float()
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return losses.view(targets.shape)

    def fingerprint(self) -> str:
        return state_dict_sha256(self.model)
