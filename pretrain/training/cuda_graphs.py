"""A micro-batch's forward and backward as one CUDA graph: for models so small that the host needs
longer to start their kernels than the device to run them.

The gradient of a sum of losses needs only a scalar from above, so the forward computes it, as
`pretrain.ops.cross_entropy` does, and the backward scales it, into fresh tensors that may be summed
and kept. A recording reads and writes where it read and wrote first: inputs are copied there,
results from there, and weights must stay, as they do up to ZeRO-2.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from pretrain.models.language_model import ModelOutput
from pretrain.training.random_state import preserved_random_state

WARM_UP = 2  # compiles and chooses kernels, which must not be recorded
MOST_RECORDINGS = 8  # each holds gradients, and memory for activations

T = TypeVar("T")


@dataclass
class Recording:
    """One kind of micro-batch; a replay reads `inputs`, and writes `output` and `gradients` anew.

    Attributes:
        kind: what an equal micro-batch has in common with it.
        inputs: tensors among the arguments of forward.
        output: of forward, without gradient.
        gradients: of the summed losses, for each parameter that takes part. The others get none,
            not even None, which ZeRO's hooks would stumble over.
        replays: how often it ran.
    """

    kind: list[Any]
    inputs: list[Tensor]
    replay: Callable[[], None]
    output: ModelOutput
    gradients: dict[nn.Parameter, Tensor]
    replays: int = 0


class RecordedForward:
    """Takes the place of `model.forward`. Without gradients, as in evaluation, it is that forward;
    with them it records each kind of micro-batch (shapes, and what is None) when first met.

    Backward through `loss_sum` gives the gradient of `loss_sum` and of every `_loss` of `aux`; the
    other results, and the state that is given, have none: backpropagation is truncated there.

    Args:
        model: a language model or an encoder-decoder, on a GPU.
        carry_state: return states; else they are None.
    """

    def __init__(self, model: nn.Module, *, carry_state: bool) -> None:
        self.model, self.forward, self.carry_state = model, model.forward, carry_state
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.recordings: list[Recording] = []
        self.unhooked = _Unhooked(model, self.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> ModelOutput:
        """Arguments of `model.forward`, `targets` among them.

        Raises:
            ValueError: micro-batches are of too many kinds.
        """
        if not (self.model.training and torch.is_grad_enabled()):
            return self.forward(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        kind = [
            spec,
            *((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves),
            *(parameter.data_ptr() for parameter in self.parameters.values()),
        ]
        found = next((r for r in self.recordings if r.kind == kind), None)
        if found is None:
            if len(self.recordings) == MOST_RECORDINGS:
                raise ValueError(
                    f"train.cuda_graphs=true: more than {MOST_RECORDINGS} kinds of micro-batches, "
                    f"and each recording holds memory of its own; use train.cuda_graphs=false"
                )
            found = self._record(leaves, spec, kind)
            self.recordings.append(found)
        torch._foreach_copy_(found.inputs, _tensors(leaves))
        found.replay()
        found.replays += 1
        output = tree_map_only(Tensor, torch.clone, found.output)
        loss_sum = _Replayed.apply(found, output.loss_sum, *found.gradients)
        return output._replace(loss_sum=loss_sum)

    def _record(self, leaves: list[Any], spec: TreeSpec, kind: list[Any]) -> Recording:
        inputs = [x.detach().clone() if isinstance(x, Tensor) else x for x in leaves]
        args, kwargs = tree_unflatten(inputs, spec)

        def run() -> tuple[ModelOutput, tuple[Tensor | None, ...]]:
            # Leaves of this run alone: autograd's nodes of the parameters themselves may be older,
            # and of the default stream, which must not wait for one that is recorded.
            own: dict[str, Tensor] = {
                f"model.{n}": nn.Parameter(p.detach()) for n, p in self.parameters.items()
            }
            output = functional_call(self.unhooked, own, args, kwargs)
            losses = [value for name, value in output.aux.items() if name.endswith("_loss")]
            loss = torch.stack([output.loss_sum, *losses]).sum()
            gradients = torch.autograd.grad(loss, tuple(own.values()), allow_unused=True)
            if not self.carry_state:
                output = output._replace(state=None)
            return tree_map_only(Tensor, Tensor.detach, output), gradients

        with preserved_random_state():  # a resumed run draws the same dropout masks
            replay, (output, gradients) = capture(run)
        pairs = zip(self.parameters.values(), gradients, strict=True)
        used = {parameter: gradient for parameter, gradient in pairs if gradient is not None}
        return Recording(kind, _tensors(inputs), replay, output, used)


class _Unhooked(nn.Module):
    """The model's forward without its hooks: DeepSpeed's wait for the device, which a recording
    forbids, and have run when a micro-batch comes to be recorded."""

    def __init__(self, model: nn.Module, forward: Callable[..., ModelOutput]) -> None:
        super().__init__()
        self.model, self.model_forward = model, forward

    def forward(self, *args: Any, **kwargs: Any) -> ModelOutput:
        return self.model_forward(*args, **kwargs)


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, recording: Recording, loss_sum: Tensor, *parameters: Tensor) -> Tensor:
        ctx.recording, ctx.replays = recording, recording.replays
        return loss_sum.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss: Tensor):
        assert ctx.replays == ctx.recording.replays, "a later forward has overwritten gradients"
        return None, None, *torch._foreach_mul(list(ctx.recording.gradients.values()), d_loss)


def _tensors(leaves: list[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def capture(run: Callable[[], T]) -> tuple[Callable[[], None], T]:
    """Records what `run` does on the GPU, as torch's notes on CUDA graphs ask for.

    Returns:
        A function that does it again, and what it then writes to.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # thread_local: threads that load batches may pin memory meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = run()
    return graph.replay, result
