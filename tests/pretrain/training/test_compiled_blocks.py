"""Compiled blocks are checked before training, as training calls them."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from pretrain.config import RunConfig, load_config
from pretrain.mixers.base import map_state
from pretrain.models import LanguageModel, LanguageModelConfig, LayersConfig, build_model
from pretrain.models.block import BlockOutput
from pretrain.models.layers import RMSNorm
from pretrain.ops.numerics import no_autocast
from pretrain.training.compiled_blocks import compile_blocks
from pretrain.training.compiled_check import compiled_error, verify_compiled
from pretrain.training.precision import autocast


def test_many_kinds_of_layers_all_stay_compiled() -> None:
    """Torch gives up after eight variants of one forward, in silence but for a warning."""

    class Layer(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.kind = kind

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * len(self.kind)

    model = nn.Module()
    model.blocks = nn.ModuleList(Layer("a" * length) for length in range(1, 11))
    model.norm = nn.Identity()
    torch._dynamo.reset()
    counters.clear()
    compile_blocks(model, backend="eager")
    for length, block in enumerate(model.blocks, 1):
        assert block(torch.ones(2)).tolist() == [length, length]
    assert counters["frames"] == {"total": 10, "ok": 10}


def test_equal_models_share_what_is_compiled() -> None:
    """Else a process that trains many models runs the blocks of later ones uncompiled."""

    class Layer(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sin() * x

    torch._dynamo.reset()
    counters.clear()
    for _ in range(3):
        model = nn.Module()
        model.blocks, model.norm = nn.ModuleList([Layer()]), nn.Identity()
        compile_blocks(model)
        model.blocks[0](torch.ones(2))
    assert counters["frames"] == {"total": 1, "ok": 1}


def test_what_runs_in_fp32_has_its_gradient_in_fp32() -> None:
    """As S4's powers under autocast; by torch's default its products are in bf16 backward."""

    class Powers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = nn.Parameter(torch.randn(16, 16))

        def forward(self) -> torch.Tensor:
            with no_autocast(self.step):
                return self.step @ self.step @ self.step

    gradients = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, powers = nn.Module(), Powers()
        model.blocks, model.norm = nn.ModuleList([powers]), nn.Identity()
        if compiled:
            compile_blocks(model, backend="aot_eager")
        with torch.autocast("cpu", torch.bfloat16):
            cube = powers()
        cube.square().sum().backward()
        gradients.append(powers.step.grad)
    torch.testing.assert_close(*gradients)


def test_wrongly_compiled_code_is_found_before_training() -> None:
    """A block that computes something else when compiled, as inductor was seen to do."""
    model_config = LanguageModelConfig(
        vocab_size=16, d_model=32, n_layers=2, layers=LayersConfig(default="s4d")
    )
    config = RunConfig(model=model_config)
    config.train.seq_len, config.train.micro_batch_size = 64, 2
    device = torch.device("cpu")
    torch._dynamo.reset()
    model = LanguageModel(model_config)
    compile_blocks(model, backend="aot_eager")
    verify_compiled(model, config, device)

    class WrongOutput(type(model.blocks[1])):  # type: ignore[misc]
        def __call__(self, *args: object, **more: object) -> BlockOutput:
            output = self.forward(*args, **more)
            return output._replace(x=output.x * 1.3)

    class WrongGradient(type(model.blocks[1])):  # type: ignore[misc]
        def __call__(self, *args: object, **more: object) -> BlockOutput:
            output = self.forward(*args, **more)
            return output._replace(x=output.x.detach() + 0.5 * (output.x - output.x.detach()))

    class WrongGradientOfTheInput(type(model.blocks[1])):  # type: ignore[misc]
        def __call__(self, x: torch.Tensor, *args: object, **more: object) -> BlockOutput:
            return self.forward(1.2 * x - 0.2 * x.detach(), *args, **more)

    class WrongGradientOfWhatIsAdded(type(model.blocks[1])):  # type: ignore[misc]
        def __call__(self, *args: object, added: torch.Tensor, **more: object) -> BlockOutput:
            return self.forward(*args, added=1.2 * added - 0.2 * added.detach(), **more)

    class NotANumber(type(model.blocks[1])):  # type: ignore[misc]
        def __call__(self, *args: object, **more: object) -> BlockOutput:
            output = self.forward(*args, **more)
            output.x.register_hook(lambda gradient: gradient * torch.nan)
            return output

    inputs = (WrongGradientOfTheInput, WrongGradientOfWhatIsAdded)
    for wrong in (WrongOutput, WrongGradient, *inputs, NotANumber):
        model.blocks[1].__class__ = wrong
        with pytest.raises(ValueError, match=r"train\.compile=true: the compiled 's4d' block"):
            verify_compiled(model, config, device)


def test_one_wrong_gradient_is_found_in_fp32() -> None:
    """Of a parameter whose share of all gradients is below the bound."""
    config = load_config(["model=swa_tiny", "train.seq_len=64", "train.precision=fp32"])
    config.train.micro_batch_size, config.model.vocab_size = 2, 16
    device = torch.device("cpu")
    model = build_model(config.model)
    verify_compiled(model, config, device)

    class WrongGain(type(model.blocks[-1])):  # type: ignore[misc]
        def __call__(self, *args: object, **more: object) -> BlockOutput:
            gain = self.mlp_norm.weight
            self.mlp_norm.weight = nn.Parameter(gain.detach())
            output = self.forward(*args, **more)
            self.mlp_norm.weight = gain
            return output

    model.blocks[-1].__class__ = WrongGain  # one of each kind is checked
    with pytest.raises(ValueError, match=r"the compiled 'swa' block differs.* by 1\.000"):
        verify_compiled(model, config, device)
    config.train.precision = "bf16"
    verify_compiled(model, config, device)  # compared as one


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_wrong_gradient_of_what_a_decoder_reads_is_found(precision: str) -> None:
    """Through it alone the encoder learns."""
    config = load_config(["model=spade_t5_tiny", "train.seq_len=64"])
    config.train.precision, config.train.micro_batch_size = precision, 2
    config.model.vocab_size = 16
    device = torch.device("cpu")
    model = build_model(config.model)
    verify_compiled(model, config, device, target_length=16)

    class WrongGradient(type(model.blocks[-1])):  # type: ignore[misc]
        def __call__(self, *args: object, memory: torch.Tensor, **more: object) -> BlockOutput:
            return self.forward(*args, memory=1.2 * memory - 0.2 * memory.detach(), **more)

    model.blocks[-1].__class__ = WrongGradient
    with pytest.raises(ValueError, match=r"the compiled 'attention' block differs.* by 0\.2"):
        verify_compiled(model, config, device, target_length=16)


def test_a_norm_is_compared_by_a_gradient_that_it_has() -> None:
    """Of the sum of its squares it has none but rounding's."""
    torch.manual_seed(0)
    norm, x = RMSNorm(64), torch.randn(2, 8, 64, requires_grad=True)
    wide = x.double()
    other_order = (wide / (wide.square().mean(-1, keepdim=True) + norm.eps).sqrt()).float()
    assert compiled_error(norm, [x], norm(x), other_order * norm.weight, each=True) < 1e-5


@pytest.mark.parametrize(
    ("model", "carry_state", "expected"),
    [
        ("bst_tiny", True, [False, True] * 3),  # the first swa, to which nothing is left; swa, bst
        ("bst_tiny", False, [False] * 3),
        # spade, swa, and the decoder's attention, the first and another.
        ("spade_t5_tiny", False, [False] * 4),
    ],
)
def test_compiled_blocks_are_checked_with_a_state_where_training_carries_one(
    model: str, carry_state: bool, expected: list[bool]
) -> None:
    config = load_config([f"model={model}", "train.seq_len=128"])
    config.train.carry_state, config.train.micro_batch_size = carry_state, 2
    config.model.vocab_size = 16
    built, given = build_model(config.model), []
    for block in built.blocks:
        block.register_forward_pre_hook(lambda block, inputs: given.append(inputs[1] is not None))
    verify_compiled(built, config, torch.device("cpu"), target_length=29)
    assert given == expected


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("data.mode=lanes", 2),
        ("data.mode=lanes data.boundary=pad_block", 2),
        ("data.mode=lanes data.boundary=pad_segment", 2),
        ("data.mode=lanes data.boundary=cross", 0),
        ("data.mode=windows", 0),
        ("data.mode=windows data.boundary=packed", 0),
        ("data.mode=windows data.boundary=pad_block", 2),
        ("data.mode=stream data.source=a data.val_source=b data.tokenizer=bytes", 0),
    ],
)
def test_compiled_blocks_are_checked_with_resets_where_batches_have_them(
    data: str, expected: int
) -> None:
    """One flag per 128 tokens, as `build_loader` makes them."""
    config = load_config(["model=swa_tiny", "train.seq_len=256", *data.split()])
    config.train.micro_batch_size, config.model.vocab_size = 3, 16
    model, given = build_model(config.model), []

    class Watched(type(model.blocks[0])):  # type: ignore[misc]
        def __call__(self, *args: object, **more: object) -> BlockOutput:
            given.append(more.get("resets"))
            return self.forward(*args, **more)

    for block in model.blocks:
        block.__class__ = Watched
    verify_compiled(model, config, torch.device("cpu"))
    assert len(given) == 2  # the first block, and one to which that leaves something
    for resets in given:
        assert (resets is not None) == (expected > 0)
        if resets is not None:
            assert (resets.dtype, resets.shape) == (torch.bool, (3, expected))


@pytest.mark.parametrize("seen", [torch.zeros_like, torch.ones_like])
@pytest.mark.parametrize(
    ("rows", "seq_len", "carry_state", "segment"),
    # Where a row has one flag, it drops the state that is carried.
    [(1, 512, False, "first"), (2, 128, True, "second")],
)
def test_a_block_that_is_wrong_with_resets_alone_is_found(
    seen: Callable[[torch.Tensor], torch.Tensor],
    rows: int,
    seq_len: int,
    carry_state: bool,
    segment: str,
) -> None:
    """It separates no document, or every block."""
    config = load_config(["model=swa_tiny", f"train.seq_len={seq_len}", "data.boundary=cross"])
    config.train.carry_state, config.train.micro_batch_size = carry_state, rows
    config.model.vocab_size = 16
    model, device = build_model(config.model), torch.device("cpu")

    class Wrong(type(model.blocks[0])):  # type: ignore[misc]
        def __call__(self, *args: object, **more: object) -> BlockOutput:
            if "resets" in more:
                more["resets"] = seen(more["resets"])
            return self.forward(*args, **more)

    for block in model.blocks:
        block.__class__ = Wrong
    verify_compiled(model, config, device)
    config.data.boundary = ""
    with pytest.raises(ValueError, match=f"the compiled 'swa' block .* in the {segment} segment"):
        verify_compiled(model, config, device)


@pytest.mark.parametrize(
    ("name", "carry_state", "target_length", "n_resets"),
    [
        ("bst_tiny", True, 0, 2),
        ("bst_tiny model.activation_checkpointing=true", True, 0, 2),
        ("bst_tiny data.boundary=cross", True, 0, 0),
        ("swa_tiny data.boundary=pad_segment", True, 0, 2),
        ("longvq_tiny", False, 0, 2),
        ("longvq_tiny data.mode=windows", False, 0, 0),
        ("mamba2_tiny data.mode=windows data.boundary=pad_block", False, 0, 2),
        ("spade_t5_tiny", False, 29, 0),
        # An encoder is told which tokens count only where it has pads.
        ("spade_t5_tiny model.encoder.layers.at.1=longvq", False, 29, 0),
    ],
)
def test_training_compiles_no_block_that_was_not_checked(
    name: str, carry_state: bool, target_length: int, n_resets: int
) -> None:
    config = load_config([*f"model={name}".split(), "train.seq_len=256"])
    config.train.carry_state, config.train.micro_batch_size = carry_state, 2
    config.model.vocab_size = 16
    device, compiled = torch.device("cpu"), []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., object]:
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = build_model(config.model)
    compile_blocks(model, backend)
    verify_compiled(model, config, device, target_length)
    checked, state = len(compiled), None
    tokens = torch.randint(16, (2, 1 + (target_length or 256)))
    inputs = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    inputs["loss_mask"] = torch.ones_like(tokens[:, 1:], dtype=torch.bool)
    if target_length:
        inputs["encoder_tokens"] = torch.randint(16, (2, 256))
    for _ in range(4):
        if n_resets:
            inputs["resets"] = torch.randint(2, (2, n_resets)).bool()
        with autocast(config, device):
            output = model(state=state, **inputs)
        if carry_state:
            state = map_state(torch.Tensor.detach, output.state)
    assert len(compiled) == checked + 1  # the norm behind the blocks


def test_compiled_blocks_are_checked_without_dropout_and_then_train_with_it() -> None:
    """Compiled and uncompiled, they draw other masks."""
    config = load_config(["model=swa_tiny", "model.dropout=0.5", "train.seq_len=64"])
    config.train.micro_batch_size, config.model.vocab_size = 2, 16
    model = build_model(config.model)
    torch._dynamo.reset()
    compile_blocks(model, backend="eager")
    verify_compiled(model, config, torch.device("cpu"))
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(("wide", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_compiled_blocks_are_checked_in_the_dtype_of_their_stream(
    wide: bool, dtype: torch.dtype
) -> None:
    model_config = LanguageModelConfig(
        vocab_size=16, d_model=16, n_layers=1, layers=LayersConfig(default="s4d")
    )
    model_config.residual_in_fp32 = wide
    config, model = RunConfig(model=model_config), LanguageModel(model_config)
    config.train.seq_len, config.train.micro_batch_size = 64, 2
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0].dtype))
    verify_compiled(model, config, torch.device("cpu"))
    assert set(seen) == {dtype}
