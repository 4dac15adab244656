"""Replays train as forwards do: nothing that outlives a forward is overwritten or left out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pretrain.config import ConfigError, RunConfig, load_config
from pretrain.mixers.base import map_state
from pretrain.models import LanguageModel, LanguageModelConfig, LayersConfig, build_model
from pretrain.training import cuda_graphs
from pretrain.training.compiled_blocks import compile_blocks
from pretrain.training.cuda_graphs import MOST_RECORDINGS, RecordedForward
from pretrain.training.engine import World, build_engine

STEPS, MICRO_BATCHES, LANES, LENGTH = 4, 2, 2, 128


def test_a_processor_is_refused() -> None:
    config = RunConfig()
    config.train.cuda_graphs = True
    with pytest.raises(ValueError, match=r"train\.cuda_graphs=true: this run is on the cpu"):
        build_engine(config, nn.Linear(2, 2), World(0, 1, torch.device("cpu")))


@pytest.mark.parametrize("other", ["zero.stage=3", "model.activation_checkpointing=true"])
def test_what_cannot_be_recorded_is_refused(other: str) -> None:
    with pytest.raises(ConfigError, match=f"train.cuda_graphs=true with {other}"):
        load_config(["model=swa_tiny", "train.cuda_graphs=true", other])


@pytest.mark.parametrize("mixer", ["swa", "longvq"])  # the second has losses and statistics in aux
def test_accumulation_states_dropout_and_evaluation_are_as_without(mixer: str, rerun: None) -> None:
    plain, replayed = (_train(_model(mixer, dropout=0.1), record=on) for on in (False, True))
    assert plain[-1] < plain[0]
    torch.testing.assert_close(replayed, plain, rtol=1e-5, atol=0)


def test_hooks_run_once_per_call(rerun: None) -> None:
    model, tokens = _model("swa"), torch.zeros(LANES, LENGTH, dtype=torch.int64)
    model.forward, called = RecordedForward(model, carry_state=False), []
    model.register_forward_pre_hook(lambda *_: called.append("before"))
    model.register_forward_hook(lambda *_: called.append("after"))
    for _ in range(2):
        model(tokens, targets=tokens)
    assert called == ["before", "after"] * 2


def test_only_states_that_are_carried_are_returned(rerun: None) -> None:
    model, tokens = _model("swa"), torch.zeros(LANES, LENGTH, dtype=torch.int64)
    assert model(tokens, targets=tokens).state is not None
    model.forward = RecordedForward(model, carry_state=False)
    assert model(tokens, targets=tokens).state is None


def test_a_parameter_that_takes_no_part_gets_no_gradient(rerun: None) -> None:
    model, tokens = _model("swa"), torch.zeros(LANES, LENGTH, dtype=torch.int64)
    model.unused, called = nn.Parameter(torch.zeros(3)), []
    model.unused.register_post_accumulate_grad_hook(called.append)
    model.forward = RecordedForward(model, carry_state=False)
    model(tokens, targets=tokens).loss_sum.backward()
    assert not called
    assert model.unused.grad is None
    assert model.norm.weight.grad is not None


def test_a_later_forward_does_not_pass_for_an_earlier_one(rerun: None) -> None:
    model, tokens = _model("swa"), torch.zeros(LANES, LENGTH, dtype=torch.int64)
    model.forward = RecordedForward(model, carry_state=False)
    first, _ = (model(tokens, targets=tokens).loss_sum for _ in range(2))
    with pytest.raises(AssertionError, match="overwritten"):
        first.backward()


def test_kinds_of_micro_batches_have_an_end_and_moved_weights_make_one(rerun: None) -> None:
    model, tokens = _model("swa"), torch.zeros(LANES, LENGTH, dtype=torch.int64)
    forward = model.forward = RecordedForward(model, carry_state=False)
    places = [torch.ones(64) for _ in range(MOST_RECORDINGS + 1)]
    for place in places[:-1]:
        model.norm.weight.data = place
        for _ in range(2):
            model(tokens, targets=tokens)
    assert len(forward.recordings) == MOST_RECORDINGS
    model.norm.weight.data = places[-1]
    with pytest.raises(ValueError, match=f"more than {MOST_RECORDINGS} kinds of micro-batches"):
        model(tokens, targets=tokens)


@pytest.mark.gpu
@pytest.mark.timeout(60)  # 3 s per kind of call to compile, of five; a stack says where it hangs
def test_recordings_train_as_compiled_blocks_do() -> None:
    torch._dynamo.reset()
    models = [_model("swa").cuda() for _ in range(2)]
    for model in models:
        compile_blocks(model)
    plain, replayed = (_train(m, record=on) for m, on in zip(models, (False, True), strict=True))
    assert plain[-1] < plain[0]
    torch.testing.assert_close(replayed, plain, rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    "on_gpu", [pytest.param(False, id="cpu"), pytest.param(True, id="cuda", marks=pytest.mark.gpu)]
)
def test_an_encoder_decoder_trains_as_without(on_gpu: bool, request: pytest.FixtureRequest) -> None:
    if not on_gpu:
        request.getfixturevalue("rerun")
    losses = []
    for record in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = build_model(load_config(["model=spade_t5_mini", "model.vocab_size=64"]).model)
        tokens = torch.randint(64, (LANES, 2 * LENGTH))
        partial = (torch.arange(2 * LENGTH) < LENGTH).expand(LANES, -1)
        if on_gpu:
            model, tokens, partial = model.cuda(), tokens.cuda(), partial.cuda()
            compile_blocks(model)
        if record:
            model.forward = RecordedForward(model, carry_state=False)
        if on_gpu:  # as DeepSpeed's timer does
            model.register_forward_pre_hook(lambda *_: torch.cuda.synchronize())
        optimizer, found = torch.optim.AdamW(model.parameters(), lr=1e-3), []
        for mask in (None, None, partial, partial):  # an epoch's last batch is recorded late
            inputs = {"tokens": tokens[:, :LENGTH], "targets": tokens[:, 1 : LENGTH + 1]}
            output = model(encoder_tokens=tokens, encoder_mask=mask, per_token=True, **inputs)
            (output.loss_sum / inputs["targets"].numel()).backward()
            found += [output.nll.mean().detach(), _gradient_norm(model)]
            optimizer.step()
            optimizer.zero_grad()
        losses.append(torch.stack(found).cpu())
    assert losses[0][-2] < losses[0][0]
    # Two GPU runs without recordings lie up to 1.3e-4 apart in the last norm: atomics, then AdamW.
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=0)


@pytest.fixture
def rerun(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of a replay on a GPU: runs again, and writes where the first run wrote."""

    def capture(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        result = run()

        def replay() -> None:
            for held, new in zip(tree_leaves(result), tree_leaves(run()), strict=True):
                if isinstance(held, Tensor):
                    held.copy_(new)

        return replay, result

    monkeypatch.setattr(cuda_graphs, "capture", capture)


def _model(mixer: str, *, dropout: float = 0.0) -> LanguageModel:
    torch.manual_seed(0)
    options = {"swa": {"n_heads": 2, "window_size": 64}}
    layers = LayersConfig(default="swa", at={1: mixer})
    config = LanguageModelConfig(
        vocab_size=64,
        d_model=64,
        n_layers=2,
        layers=layers,
        mixers=options,
        dropout=dropout,
        tie_embeddings=True,
    )
    return LanguageModel(config)


def _train(model: LanguageModel, *, record: bool) -> Tensor:
    """Losses of each micro-batch and, between steps, the gradient's norm and the loss of an
    evaluation; the states are carried."""
    device = model.norm.weight.device
    if record:
        model.forward = RecordedForward(model, carry_state=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    torch.manual_seed(1)
    tokens = torch.randint(64, (MICRO_BATCHES, LANES, LENGTH + 1), device=device)
    states: list[Any] = [None] * MICRO_BATCHES
    losses = []
    for step in range(STEPS):
        torch.manual_seed(step)
        statistics: dict[str, Tensor] = {}
        for slot, batch in enumerate(tokens):
            output = _forward(model, batch, states[slot])
            auxiliary = [value for name, value in output.aux.items() if name.endswith("_loss")]
            (torch.stack([output.loss_sum, *auxiliary]).sum() / batch.numel()).backward()
            losses += [output.loss_sum, *auxiliary]
            for name, value in output.aux.items():
                if not name.endswith("_loss"):
                    statistics[name] = statistics.get(name, 0) + value.detach()
            states[slot] = map_state(Tensor.detach, output.state)
        losses.append(_gradient_norm(model))
        optimizer.step()
        optimizer.zero_grad()
        model.update_buffers(statistics)
        model.eval()
        with torch.no_grad():
            losses.append(_forward(model, tokens[0], states[0]).loss_sum)
        model.train()
    return torch.stack([loss.detach() for loss in losses]).cpu()


def _gradient_norm(model: nn.Module) -> Tensor:
    found = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.stack([gradient.norm() for gradient in found]).norm()


def _forward(model: LanguageModel, batch: Tensor, state: Any) -> Any:
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=batch.is_cuda):
        return model(batch[:, :-1], state, targets=batch[:, 1:])
