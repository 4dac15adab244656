"""`residual_in_fp32=false` narrows the stream between blocks under autocast, and nothing else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain.models import EncoderStackConfig, LanguageModelConfig, LayersConfig, build_model
from pretrain.training.checkpoint import _check_model, tensor_shapes

VOCABULARY, LENGTH, BATCH = 31, 32, 4

MIXERS: dict[str, Any] = {
    "attention": {"n_heads": 2},
    "bst": {"n_heads": 2, "block_size": 8, "chunk_size": 4, "n_modes": 3},
    "swa": {"n_heads": 2, "window_size": 8},
}
ENCODER = EncoderStackConfig(
    n_layers=2, layers=LayersConfig(default="attention"), mixers={"attention": {"n_heads": 2}}
)


def build(residual_in_fp32: bool, **changes: Any) -> Any:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "n_layers": 3,
        "layers": LayersConfig(pattern=["swa", "bst", "attention"]),
        "mixers": MIXERS,
        "residual_in_fp32": residual_in_fp32,
    }
    return build_model(LanguageModelConfig(**settings | changes))


def tokens() -> Tensor:
    """(B, T + 1): each lane repeats a few tokens of its own, which a model can learn."""
    generator = torch.Generator().manual_seed(1)
    period = torch.randint(0, VOCABULARY, (BATCH, 5), generator=generator)
    return period.repeat(1, LENGTH)[:, : LENGTH + 1]


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    extra = {"encoder_tokens": batch[:, :9]} if model.config.has_encoder else {}
    output = model(batch[:, :-1], targets=batch[:, 1:], **extra)
    return output.loss_sum / batch[:, 1:].numel()


def stream_dtypes(model: nn.Module, *, autocast: bool) -> set[torch.dtype]:
    """Of what enters and leaves the blocks."""
    seen: set[torch.dtype] = set()

    def note(block: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        seen.update((arguments[0].dtype, output.x.dtype))

    hooks = [block.register_forward_hook(note) for block in model.blocks]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = loss_of(model, tokens())
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("changes", [{}, {"encoder": ENCODER}], ids=["decoder", "encoder-decoder"])
def test_the_stream_has_the_dtype_that_was_asked_for(changes: dict[str, Any]) -> None:
    assert stream_dtypes(build(True, **changes), autocast=True) == {torch.float32}
    assert stream_dtypes(build(False, **changes), autocast=True) == {torch.bfloat16}
    assert stream_dtypes(build(False, **changes), autocast=False) == {torch.float32}


def test_without_autocast_no_bit_changes() -> None:
    losses = [loss_of(build(wide), tokens()) for wide in (True, False)]
    assert torch.equal(*losses)


def test_a_narrow_stream_learns_as_a_wide_one_does() -> None:
    curves = []
    for wide in (True, False):
        model = build(wide)
        optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
        for _ in range(30):
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, tokens())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    wide_curve, narrow_curve = curves
    assert wide_curve[-1] < 0.5 * wide_curve[0]  # there is something to fall behind in
    error = (narrow_curve - wide_curve).abs() / wide_curve
    assert 0 < error.max() < 0.01  # seen: 0.002


def test_checkpoints_carry_over_and_a_run_may_resume_with_the_other_dtype(tmp_path: Path) -> None:
    """As with every key that changes no tensor's shape; the weights are fp32 either way."""
    wide, narrow = build(True), build(False)
    _check_model(tmp_path, tensor_shapes(wide), tensor_shapes(narrow))
    with torch.no_grad():
        for parameter in wide.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    narrow.load_state_dict(wide.state_dict())
    assert torch.equal(loss_of(narrow, tokens()), loss_of(wide, tokens()))
