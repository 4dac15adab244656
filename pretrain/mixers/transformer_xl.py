"""Transformer-XL (Dai et al. 2019, 1901.02860) as a sliding window with carried memory and T5 bias.

It *is* `swa` with other defaults: the memory is the window's cache of keys and values, carried from
segment to segment (the trainer detaches it, as the paper does).

The paper's: memory of the previous segment, relative positions. Ours: T5's bias by distance in
place of the sinusoids with the vectors u and v, as in the baselines of 2203.07852 and 2306.09539;
every token sees exactly `window_size` tokens, where the paper's see the whole memory and what
precedes them in their segment, so the reach does not depend on where segments are cut.
"""

from pretrain.mixers.swa import SlidingWindowAttention


class TransformerXL(SlidingWindowAttention):
    """Sliding-window attention with T5's relative positions.

    Args:
        d_model: model width.
        n_heads: attention heads.
        window_size: visible tokens, the present one and the carried memory included.
        qk_norm: L2-normalise queries and keys, with a learned scale per head.
    """

    two_sided = False

    def __init__(
        self, d_model: int, *, n_heads: int = 8, window_size: int = 512, qk_norm: bool = False
    ) -> None:
        super().__init__(
            d_model, n_heads=n_heads, window_size=window_size, qk_norm=qk_norm, position="t5"
        )
