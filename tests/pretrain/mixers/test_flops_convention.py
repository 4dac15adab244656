"""The FLOP convention counts the keys that are visible, one by one, and no masked entry."""

import pytest

from pretrain import mixers

D_MODEL, W, MODES, CHUNK = 8, 8, 3, 4
LENGTHS = [W, 4 * W]


@pytest.mark.parametrize("length", LENGTHS)
def test_attention_counts_every_earlier_key(length: int) -> None:
    visible = sum(i + 1 for i in range(length)) / length
    mixer = mixers.build("attention", d_model=D_MODEL, n_heads=2)
    assert mixer.flops_per_token(length) == 8 * D_MODEL**2 + 4 * D_MODEL * visible


@pytest.mark.parametrize("length", [3, *LENGTHS])
def test_sliding_window_counts_the_window(length: int) -> None:
    visible = sum(min(i + 1, W) for i in range(length)) / length
    mixer = mixers.build("swa", d_model=D_MODEL, n_heads=2, window_size=W)
    assert mixer.flops_per_token(length) == pytest.approx(8 * D_MODEL**2 + 4 * D_MODEL * visible)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("reach", ["own", "own_and_previous"])
def test_bst_counts_both_attentions_and_half_the_toeplitz(length: int, reach: str) -> None:
    previous = W if reach == "own_and_previous" else 0
    own = sum(i % W + 1 for i in range(length))
    seen = 2 * own + sum(previous for i in range(length) if i >= W)
    mixer = mixers.build(
        "bst",
        d_model=D_MODEL,
        n_heads=2,
        block_size=W,
        chunk_size=CHUNK,
        n_modes=MODES,
        self_attention=reach,
    )
    # Projections: q, k, v, q2 (4), kc, vc (2), and the output of both attentions (2).
    want = 2 * 8 * D_MODEL**2 + 4 * D_MODEL * seen / length + D_MODEL * (CHUNK + 8 * MODES)
    assert mixer.flops_per_token(length) == pytest.approx(want)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("chunk", [W, 0], ids=["chunk", "full"])
def test_mega_counts_keys_of_the_chunk_and_half_the_toeplitz(length: int, chunk: int) -> None:
    seen = sum(i % (chunk or length) + 1 for i in range(length)) / length
    mixer = mixers.build(
        "mega",
        d_model=D_MODEL,
        chunk_size=chunk,
        ema_chunk_size=CHUNK,
        d_shared=4,
        d_value=12,
        n_modes=MODES,
    )
    # Projections: v, r and the way back (3 x 12), p and the gate (2 x 8), z (4).
    want = 2 * D_MODEL * (3 * 12 + 2 * D_MODEL + 4) + D_MODEL * (CHUNK + 4 * MODES)
    assert mixer.flops_per_token(length) == pytest.approx(want + 2 * (4 + 12) * seen)


@pytest.mark.parametrize("length", [3, W, 4 * W, 5 * W + 3])
def test_transformer_ls_counts_the_window_and_the_summaries(length: int) -> None:
    kept, rank = 3, 2
    visible = sum(min(i + 1, W) for i in range(length))
    summaries = sum(rank * min(kept, i // W * (W // CHUNK)) for i in range(length))
    mixer = mixers.build(
        "transformer_ls",
        d_model=D_MODEL,
        n_heads=2,
        window_size=W,
        chunk_size=CHUNK,
        rank=rank,
        kept_chunks=kept,
    )
    # Two heads of `rank` scores, and a product with k and with v for each summary.
    want = 8 * D_MODEL**2 + 2 * D_MODEL * 2 * rank + 4 * D_MODEL * rank
    want += 4 * D_MODEL * (visible + summaries) / length
    assert mixer.flops_per_token(length) == pytest.approx(want)


def test_mamba2_counts_half_of_a_chunk_and_both_products_with_the_state() -> None:
    mixer = mixers.build("mamba2", d_model=D_MODEL, head_dim=4, d_state=MODES, chunk_size=CHUNK)
    inner = 2 * D_MODEL
    projections = 2 * D_MODEL * (3 * inner + 2 * MODES + 4)
    inside = CHUNK * (MODES + inner)
    assert mixer.flops_per_token(64) == projections + inside + 4 * inner * MODES


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("memory", ["s4d", "ema"])
def test_longvq_counts_recent_keys_and_codes(length: int, memory: str) -> None:
    codes = 5
    seen = sum(
        i % W + 1 + (W if i >= W else 0) + (codes if i >= 2 * W else 0) for i in range(length)
    )
    mixer = mixers.build(
        "longvq",
        d_model=D_MODEL,
        block_size=W,
        chunk_size=CHUNK,
        n_codes=codes,
        d_shared=4,
        d_value=12,
        n_modes=MODES,
        memory=memory,
    )
    want = 2 * D_MODEL * (3 * 12 + 2 * D_MODEL + 4)
    want += D_MODEL * (CHUNK + (8 if memory == "s4d" else 4) * MODES)
    # To find its code every key meets the codebook once more.
    want += 2 * 4 * codes + 2 * (4 + 12) * seen / length
    assert mixer.flops_per_token(length) == pytest.approx(want)
