"""What the loops train: a model of ours or a peer, behind the few things that they ask of it."""

from typing import Protocol

import torch
from torch import Tensor, nn

from evals.throughput.settings import Measurement
from pretrain.config import RunConfig
from pretrain.models import LanguageModel
from pretrain.models.block import keep_states
from pretrain.training.compiled_blocks import compile_blocks
from pretrain.training.compiled_check import verify_compiled


class Candidate(Protocol):
    """A model to be timed.

    Attributes:
        module: on the device.
        train_flops: per token, forward and backward, by the convention of this package.
    """

    train_flops: float

    @property
    def module(self) -> nn.Module: ...

    def compile(self) -> None:
        """Compiles blocks.

        Raises:
            ValueError: a compiled block computes something else.
        """
        ...

    def loss(self, tokens: Tensor) -> Tensor:
        """tokens (B, T + 1) -> the loss in nats, summed over B * T targets."""
        ...

    def after_step(self) -> None:
        """What the model does itself after an optimizer step."""
        ...


class LongspanModel:
    """A model of this repository.

    Args:
        m: what is measured.
        config: the run whose step that is.
        device: where.
    """

    def __init__(self, m: Measurement, config: RunConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        with device:
            self.module = LanguageModel(config.model)
        keep_states(self.module, config.train.carry_state)
        self.train_flops = 3 * sum(self.module.flops_per_token(m.length).values())
        self.forward: nn.Module = self.module  # DeepSpeed's engine takes its place
        self.statistics: dict[str, Tensor] = {}

    def compile(self) -> None:
        compile_blocks(self.module)
        verify_compiled(self.module, self.config, self.device)

    def loss(self, tokens: Tensor) -> Tensor:
        targets = tokens[:, 1:]
        # As the trainer: for blocks that take it, a compiler tells it from none.
        mask = torch.ones_like(targets, dtype=torch.bool)
        output = self.forward(tokens[:, :-1], targets=targets, loss_mask=mask)
        parts = {name: value for name, value in output.aux.items() if name.endswith("_loss")}
        self.statistics = {k: v.detach() for k, v in output.aux.items() if k not in parts}
        return torch.stack([output.loss_sum, *parts.values()]).sum()

    def after_step(self) -> None:
        if self.statistics:
            self.module.update_buffers(self.statistics)
