"""Codebooks that learn by averages, not by gradients: LongVQ's (longvq.py says what is known).

Shapes: B batch, T time, H heads, S codes, K key width.

Between two updates a codebook is a constant. A code that nothing falls on is *dead*: it restarts
beside a code in use, chosen by a hash of (seed, step, code) that is equal on all ranks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.ops.vq_attention import look_up, nearest_codes

# A code is dead below this share of the mean use, and restarts with twice that: at a decay of 0.99
# it has 70 steps to be found.
DEAD_SHARE = 0.03

PART = 2048  # tokens that are summed by code apart from others


class Codebook(nn.Module):
    """H codebooks of S unit keys, moved by exponential averages of what falls on each code.

    Args:
        n_heads: H.
        n_codes: S.
        width: K.
        decay: of the averages, per optimizer step.
        seed: of the restarts.
    """

    codebook: Tensor
    use: Tensor
    born: Tensor
    updates: Tensor

    def __init__(self, n_heads: int, n_codes: int, width: int, decay: float, seed: int) -> None:
        super().__init__()
        self.decay, self.seed = decay, seed
        codes = F.normalize(torch.randn(n_heads, n_codes, width), dim=-1)
        self.register_buffer("codebook", codes)  # (H, S, K)
        self.register_buffer("use", torch.zeros(n_heads, n_codes))  # averaged counts
        born = torch.zeros(n_heads, n_codes, dtype=torch.int64)
        self.register_buffer("born", born)  # the update that last restarted the code
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def forward(self, k: Tensor) -> Tensor:
        """The nearest code of each key, (B, T, H, K) -> (B, T, H) int64; a call of its own, so that
        evaluation can hook into it (evals/scoring/held_codes.py)."""
        return nearest_codes(k, self.codebook)

    def statistics(self, k: Tensor, codes: Tensor, counted: Tensor | None) -> dict[str, Tensor]:
        """What an update needs, in fp64: sums over ranks then do not depend on their order.

        Args:
            k: (B, T, H, K).
            codes: (B, T, H).
            counted: (B, T) bool, False on pads; None: all.

        Returns:
            code_counts (H, S), code_sums (H, S, K) and code_errors (H, S), squared distances.
        """
        heads, size, _ = self.codebook.shape
        batch, length = k.shape[:2]
        k = k.detach().double()
        weight = k.new_ones(k.shape[:3]) if counted is None else counted[..., None].expand_as(codes)
        weight = weight.to(k.dtype)
        # In parts first: on a GPU what falls on one code waits in line.
        part = torch.arange(batch * length, device=k.device).view(batch, length, 1) // PART
        parts = -(-batch * length // PART)
        rows = (codes + size * (torch.arange(heads, device=k.device) + heads * part)).flatten()

        def by_code(x: Tensor) -> Tensor:
            """(B, T, H, ...) -> (H, S, ...)."""
            sums = x.new_zeros(parts * heads * size, *x.shape[3:])
            sums = sums.index_add(0, rows, x.flatten(0, 2))
            return sums.unflatten(0, (parts, heads, size)).sum(0)

        errors = (k - look_up(codes, self.codebook)).square().sum(-1)
        return {
            "code_counts": by_code(weight),
            "code_sums": by_code(k * weight.unsqueeze(-1)),
            "code_errors": by_code(errors * weight),
        }

    @torch.no_grad()
    def update(self, statistics: dict[str, Tensor]) -> None:
        """One step of the averages, and new places for dead codes."""
        counts, sums = statistics["code_counts"], statistics["code_sums"]
        old = self.decay * self.use.double()
        use = old + (1 - self.decay) * counts
        moved = old.unsqueeze(-1) * self.codebook.double() + (1 - self.decay) * sums
        codes = torch.where(
            use.unsqueeze(-1) > 0, moved / use.clamp(min=1e-30).unsqueeze(-1), self.codebook
        )
        self.updates += 1

        # A dead code goes beside one in use, as far away as keys lie from the mean of their code.
        mean = use.mean(1, keepdim=True)
        dead = use < DEAD_SHARE * mean
        heads, size, width = codes.shape
        index = torch.arange(heads * size, device=codes.device).view(heads, size)
        share = use.cumsum(1) / use.sum(1, keepdim=True).clamp(min=1e-30)
        draw = hash_uniform(self.seed, self.updates, index)
        donor = torch.searchsorted(share, draw).clamp(max=size - 1)
        beside = codes.gather(1, donor.unsqueeze(-1).expand_as(codes))
        shift = sums / counts.clamp(min=1).unsqueeze(-1) - self.codebook
        around = statistics["code_errors"] - counts * shift.square().sum(-1)
        spread = around.sum(1).clamp(min=0) / counts.sum(1).clamp(min=1)  # a variance
        spread = (spread / width).sqrt()
        place = index.unsqueeze(-1) * width + torch.arange(width, device=codes.device)
        noise = 12**0.5 * (hash_uniform(self.seed + 1, self.updates, place) - 0.5)
        beside = beside + spread[:, None, None] * noise
        self.codebook.copy_(torch.where(dead.unsqueeze(-1), beside, codes))
        self.use.copy_(torch.where(dead, 2 * DEAD_SHARE * mean, use))
        self.born.copy_(torch.where(dead, self.updates, self.born))

    @torch.no_grad()
    def health(self) -> dict[str, Tensor]:
        """Means over heads, both 0 before the first update: perplexity, and how many are dead, by
        less use than a restart gives: restarted, and not found since."""
        use = self.use.double()
        share = use / use.sum(1, keepdim=True).clamp(min=1e-30)
        entropy = -(share * share.clamp(min=1e-30).log()).sum(1)
        perplexity = torch.where(use.sum(1) > 0, entropy.exp(), 0)
        dead = use < 2 * DEAD_SHARE * use.mean(1, keepdim=True)
        return {
            "code_perplexity": perplexity.mean(),
            "dead_codes": dead.sum(1).double().mean(),
        }


def hash_uniform(seed: int, step: Tensor, index: Tensor) -> Tensor:
    """A number in [0, 1) for each entry of `index`, the same on every rank and device; fp64."""
    mixed = torch.full_like(index, seed)
    for key in (step, index):
        mixed = (mixed ^ key) & 0xFFFFFFFF
        for _ in range(2):  # an integer hash of 32 bits; the products stay below 2^63
            mixed = ((mixed ^ (mixed >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
        mixed = mixed ^ (mixed >> 16)
    return mixed.double() / 2**32
