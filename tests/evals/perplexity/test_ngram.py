"""The n-gram is a proper distribution and equals a slow one written from the formula."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from evals.perplexity.ngram import BOS, ByteNgram, _discounts

TEXTS = [b"the cat sat on the mat. the rat sat too", b"a cat and a rat and a mat", b"\x00\xff\x00"]


def brute_force(texts, order, history):
    """P(. | history) by dictionaries, recursively, straight from the formula."""
    counts = Counter()
    for text in texts:
        symbols = [BOS] * (order - 1) + list(text)
        counts.update(tuple(symbols[i : i + order]) for i in range(len(text)))
    levels = {order: counts}
    for n in range(order - 1, 0, -1):
        levels[n] = Counter(gram[1:] for gram in levels[n + 1])
    return interpolate(levels, order, tuple(history)[len(history) - order + 1 :])


def interpolate(levels, n, context):
    if n == 0:
        return np.full(256, 1 / 256)
    lower = interpolate(levels, n - 1, context[1:])
    discounts = _discounts(np.array(list(levels[n].values())))
    followers = {gram[-1]: c for gram, c in levels[n].items() if gram[:-1] == context}
    if not followers:
        return lower
    total = sum(followers.values())
    mass = defaultdict(float)
    left = 0.0
    for symbol, count in followers.items():
        discount = discounts[min(count, 3)]
        mass[symbol] = (count - discount) / total
        left += discount / total
    return np.array([mass[symbol] for symbol in range(256)]) + left * lower


@pytest.mark.parametrize("order", [1, 2, 5])
def test_equals_the_formula_by_brute_force(order):
    model = ByteNgram.fit(TEXTS, order)
    for history in (b"", b"t", b"the ", b"the cat", b"zz", b"\xff", b"cat sat o"):
        padded = [BOS] * order + list(history)
        expected = brute_force(TEXTS, order, padded)
        # Both sum fewer than a hundred fp64 terms.
        np.testing.assert_allclose(model.distribution(history), expected, rtol=1e-12)


def test_is_a_proper_distribution_after_any_history():
    rng = np.random.default_rng(0)
    text = bytes(rng.choice(np.frombuffer(b"abcde ", np.uint8), 20_000).tolist())
    model = ByteNgram.fit([text, *TEXTS])
    for _ in range(200):
        history = bytes(rng.integers(0, 256, rng.integers(0, 8)).tolist())
        p = model.distribution(history)
        assert p.min() > 0
        assert abs(p.sum() - 1) < 1e-12


def test_document_losses_are_the_chain_rule_from_bos():
    model = ByteNgram.fit(TEXTS)
    text = b"the mat and the dog"
    expected = [-np.log(model.distribution(text[:i])[byte]) for i, byte in enumerate(text)]
    np.testing.assert_allclose(model.nll(text), expected, rtol=1e-12)


def test_learns_what_a_markov_source_has_to_teach():
    rng = np.random.default_rng(1)
    state, bits = 0, []
    for flip in rng.random(40_000) < 0.1:
        state ^= int(flip)
        bits.append(97 + state)
    model = ByteNgram.fit([bytes(bits[:30_000])])
    entropy = -(0.1 * np.log(0.1) + 0.9 * np.log(0.9))
    # The sample's own entropy differs from the source's by about 0.02 over 10,000 flips.
    assert abs(model.nll(bytes(bits[30_000:])).mean() - entropy) < 0.03


def test_no_text_and_impossible_orders_are_refused():
    with pytest.raises(ValueError, match="0 bytes"):
        ByteNgram.fit([b""])
    with pytest.raises(ValueError, match="order=8"):
        ByteNgram.fit(TEXTS, 8)
