"""LongVQ's codebook: what moves it, what restarts it, and what it leaves alone.

Shapes: B batch, T time, H heads, S codes, K key width.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain import mixers
from pretrain.mixers.codebook import DEAD_SHARE, Codebook, hash_uniform
from pretrain.mixers.longvq import LongVQ
from pretrain.models import LanguageModel, LanguageModelConfig, LayersConfig
from pretrain.ops.vq_attention import FORGOTTEN, nearest_codes

D_MODEL, W, BATCH, HEADS, CODES, WIDTH = 8, 8, 2, 2, 5, 4
OPTIONS: dict[str, Any] = {
    "block_size": W,
    "chunk_size": 4,
    "n_heads": HEADS,
    "d_shared": HEADS * WIDTH,
    "n_codes": CODES,
    "n_modes": 3,
}


def build(**options: Any) -> LongVQ:
    torch.manual_seed(0)
    mixer = mixers.build("longvq", d_model=D_MODEL, **(OPTIONS | options)).double()
    assert isinstance(mixer, LongVQ)
    return mixer


def inputs(length: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, length, D_MODEL, generator=generator, dtype=torch.float64)


def statistics(mixer: LongVQ, x: Tensor, counted: Tensor | None = None) -> dict[str, Tensor]:
    return {k: v for k, v in mixer(x, counted=counted).aux.items() if not k.endswith("_loss")}


@pytest.mark.parametrize("part", [7, 2048])  # several parts of the tokens, or one
def test_update_is_the_exponential_average_of_the_keys_of_each_code(
    part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.mixers.codebook.PART", part)
    mixer = build(codebook_decay=0.9)
    book = mixer.codes
    book.use.fill_(3.0)  # of codes that are in use nothing restarts
    before = book.codebook.clone()
    k = torch.nn.functional.normalize(torch.randn(BATCH, 40, HEADS, WIDTH).double(), dim=-1)
    codes = nearest_codes(k, book.codebook)
    book.update(book.statistics(k, codes, None))
    for head in range(HEADS):
        for code in range(CODES):
            mine = k[:, :, head][codes[:, :, head] == code]
            use = 0.9 * 3.0 + 0.1 * len(mine)
            want = (0.9 * 3.0 * before[head, code] + 0.1 * mine.sum(0)) / use
            torch.testing.assert_close(book.codebook[head, code], want, rtol=0, atol=1e-12)
            assert book.use[head, code].item() == pytest.approx(use)


def test_statistics_of_ranks_add_up_to_those_of_the_batch() -> None:
    mixer, x = build(), inputs(3 * W)
    whole = statistics(mixer, x)
    parts = [statistics(mixer, lane) for lane in x.split(1)]
    assert whole.keys() == {"code_counts", "code_sums", "code_errors"}
    for key, value in whole.items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(parts[0][key] + parts[1][key], value, rtol=0, atol=1e-12)
    assert whole["code_counts"].sum(1).tolist() == [BATCH * 3 * W] * HEADS


def test_tokens_outside_the_loss_leave_no_trace() -> None:
    """Pads: neither in the statistics nor in the commitment loss."""
    mixer, x = build(), inputs(3 * W)
    counted = torch.ones(BATCH, 3 * W, dtype=torch.bool)
    counted[:, 2 * W :] = False
    short, padded = mixer(x[:, : 2 * W]).aux, mixer(x, counted=counted).aux
    for key, value in short.items():
        torch.testing.assert_close(padded[key], value, rtol=0, atol=1e-12)


def test_pads_of_an_encoder_leave_no_trace_either() -> None:
    mixer, x = build(causal=False), inputs(3 * W)
    padding = torch.zeros(BATCH, 3 * W, dtype=torch.bool)
    padding[:, : W + 3] = True
    short, padded = mixer(x[:, W + 3 :]).aux, mixer(x, padding=padding).aux
    for key, value in short.items():
        torch.testing.assert_close(padded[key], value, rtol=0, atol=1e-12)


def test_commitment_loss_is_the_distance_of_keys_to_their_codes() -> None:
    mixer, x = build(commitment=0.5), inputs(3 * W)
    aux = mixer(x).aux
    want = 0.5 * aux["code_errors"].sum()
    torch.testing.assert_close(aux["commitment_loss"], want, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(aux["commitment_loss"], [mixer.unit.offset])
    assert gradient[0].abs().max() == 0  # queries are not committed to anything
    assert gradient[1].abs().max() > 0


def test_evaluation_reports_nothing_to_learn_from() -> None:
    mixer = build()
    assert mixer.eval()(inputs(W)).aux == {}


def test_dead_codes_restart_beside_live_ones_equally_on_every_rank() -> None:
    k = torch.nn.functional.normalize(torch.randn(1, 200, 1, WIDTH).double(), dim=-1)
    k[:, :, 0] = k[:, :2, 0].repeat(1, 100, 1) + 0.01 * k[:, :, 0]  # two clusters
    books = []
    for rank in range(2):
        torch.manual_seed(0)
        book = Codebook(1, 8, WIDTH, decay=0.99, seed=7).double()
        torch.manual_seed(rank)  # ranks draw different dropout masks
        book.update(book.statistics(k, nearest_codes(k, book.codebook), None))
        books.append(book)
    a, b = books
    assert torch.equal(a.codebook, b.codebook)
    assert torch.equal(a.born, b.born)
    restarted = a.born[0] == 1
    assert 6 <= restarted.sum() < 8  # two clusters: one or two codes were found
    alive = a.codebook[0][~restarted]
    distance = torch.cdist(a.codebook[0][restarted], alive).amin(1)
    assert (distance > 0).all()
    # As far as keys lie from their codes, in each coordinate.
    spread = (k[0, :, 0].unsqueeze(1) - alive).norm(dim=-1).amin(1).max()
    assert (distance < 4 * spread.clamp(min=0.01) * WIDTH**0.5).all()
    torch.testing.assert_close(
        a.use[0][restarted],
        2 * DEAD_SHARE * a.use[0].mean().expand(int(restarted.sum())),
        rtol=0.3,
        atol=0,
    )


def test_codes_spread_over_the_keys() -> None:
    """From a codebook of which one code wins everything to one that is in use all over."""
    torch.manual_seed(0)
    mixer = build(n_codes=16)
    book = mixer.codes
    book.codebook.fill_(1.0)
    book.codebook[:, 0] = 0
    k = torch.nn.functional.normalize(torch.randn(1, 512, HEADS, WIDTH).double(), dim=-1)
    errors, perplexity = [], []
    for _ in range(60):
        found = book.statistics(k, nearest_codes(k, book.codebook), None)
        errors.append(found["code_errors"].sum().item())
        book.update(found)
        perplexity.append(mixer.health()["code_perplexity"].item())
    assert errors[-1] < 0.35 * errors[0]
    assert perplexity[0] < 2.5
    assert perplexity[-1] > 10


def test_hash_is_uniform_and_depends_on_every_key() -> None:
    index, step = torch.arange(10_000), torch.tensor(3)
    draws = hash_uniform(0, step, index)
    assert draws.min() >= 0
    assert draws.max() < 1
    histogram = draws.histc(10, 0, 1)
    assert (histogram - 1000).abs().max() < 150  # five standard deviations
    for other in (hash_uniform(1, step, index), hash_uniform(0, step + 1, index)):
        assert torch.corrcoef(torch.stack([draws, other]))[0, 1].abs() < 0.05


def test_a_carried_state_forgets_what_lay_on_a_restarted_code() -> None:
    mixer = build().eval()
    state = mixer(inputs(6 * W + 3)).state
    code = int(state.counts[0, 0].argmax())
    assert state.counts[0, 0, code] > 0
    mixer.codes.updates += 1
    mixer.codes.born[0, code] = 1
    after = mixer(inputs(1, seed=2), state).state
    assert (after.counts[:, 0, code] == 0).all()
    assert (after.means[:, 0, code] == 0).all()
    assert torch.equal(after.counts[:, 1], state.counts[:, 1])  # the other head's is another code
    kept = after.code[:, :-1, 0]
    assert torch.equal(kept == FORGOTTEN, state.code[:, :, 0] == code)
    # The output is that of a state in which those tokens never were.
    x = inputs(W, seed=3)
    forgotten = state.code[:, :, 0] == code
    garbage = state._replace(
        v=torch.where(forgotten[..., None, None] & _first_head(), 1e6, state.v),
        means=state.means.index_put(
            (torch.arange(BATCH), torch.tensor(0), torch.tensor(code)),
            torch.tensor(1e6, dtype=torch.float64),
        ),
    )
    assert torch.equal(mixer(x, garbage).y, mixer(x, state).y)


def _first_head() -> Tensor:
    return torch.tensor([True] + [False] * (HEADS - 1)).view(1, 1, HEADS, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_no_code_of_the_contract_test_hangs_on_rounding(dtype: torch.dtype) -> None:
    """Equal codes are what its comparisons of splits and dtypes rest on."""
    from tests.pretrain.mixers import test_contract as contract

    for variant in contract.TABLE["longvq"]:
        mixer = contract.build("longvq", variant, dtype)
        for seed in (1, 5):
            k = mixer(contract.inputs(dtype=dtype, seed=seed)).state.k
            book = mixer.codes.codebook
            distance = (k.unsqueeze(3) - book).square().sum(-1)
            nearest, second = distance.topk(2, largest=False).values.unbind(-1)
            # fp32: 1e-6 is ten roundings of numbers near one.
            assert (second - nearest).min() > 1e-6


def model(**options: Any) -> LanguageModel:
    torch.manual_seed(0)
    config = LanguageModelConfig(
        vocab_size=16,
        d_model=D_MODEL,
        n_layers=2,
        layers=LayersConfig(default="longvq"),
        mixers={"longvq": OPTIONS},
        d_ff=16,
        **options,
    )
    return LanguageModel(config)


def test_a_model_hands_masks_down_and_statistics_back() -> None:
    plain, recomputing = model(), model(activation_checkpointing=True)
    tokens = torch.randint(16, (BATCH, 2 * W + 1), generator=torch.Generator().manual_seed(0))
    mask = torch.rand(BATCH, 2 * W, generator=torch.Generator().manual_seed(1)) < 0.7
    arguments = {"targets": tokens[:, 1:], "loss_mask": mask}
    found = []
    for lm in (plain, recomputing):
        output = lm(tokens[:, :-1], **arguments)
        assert output.loss_sum is not None
        (output.loss_sum + sum(v for k, v in output.aux.items() if k.endswith("_loss"))).backward()
        lm.update_buffers({k: v for k, v in output.aux.items() if not k.endswith("_loss")})
        found.append((output.aux, dict(lm.named_buffers())))
    aux, buffers = found[0]
    assert aux["1.code_counts"].sum(1).tolist() == [int(mask.sum())] * HEADS
    assert buffers["blocks.1.mixer.codes.updates"] == 1
    assert set(buffers) <= set(plain.state_dict())
    for key, value in found[1][0].items():
        torch.testing.assert_close(value, aux[key])
    for key, value in found[1][1].items():
        torch.testing.assert_close(value, buffers[key])
