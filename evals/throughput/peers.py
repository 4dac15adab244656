"""A public implementation as something to be timed: our loss, and checks before it is.

Which there are: peer_models.py. Embeddings have our size and are tied to the head; weights are fp32
under autocast unless told otherwise. FLOPs per token follow the rule for our models, three times
the forward: 2 per weight of a linear layer and of the head, and what mixing tokens takes.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from evals.throughput.peer_models import BUILDERS, shape_of
from evals.throughput.settings import Measurement
from pretrain.config import RunConfig
from pretrain.ops.cross_entropy import linear_cross_entropy
from pretrain.training.compiled_check import COMPILED_ERROR, compiled_error

LARGEST_LEAK = 0.1  # bf16 makes some hundredths of it


class Peer:
    """A backbone with our loss; see `candidates.Candidate`.

    Raises:
        ImportError: its package is not installed, or cannot run here.
        ValueError: it cannot be built like that.
    """

    def __init__(self, m: Measurement, config: RunConfig, device: torch.device) -> None:
        shape = shape_of(config)
        with device:
            self.backbone = BUILDERS[m.model](shape)
        self.module = self.backbone.module
        if m.precision == "bf16_weights":
            self.module.to(torch.bfloat16)
        if m.checkpointing:
            enable: Any = getattr(self.module, "gradient_checkpointing_enable", None)
            if enable is None:
                raise ValueError(f"checkpointing=true: {m.model} has no such way; use false")
            enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.module.train()
        self.name, self.vocab_size = m.model, shape.vocab_size
        self.batch_size, self.length = m.batch_size, m.length
        self.chunk_size = config.model.loss_chunk_size
        linear = (part for part in self.module.modules() if isinstance(part, nn.Linear))
        weights = sum(part.weight.numel() for part in linear)
        head = shape.vocab_size * shape.d_model
        self.train_flops = 3 * (2 * (weights + head) + self.backbone.mixing)

    @torch.no_grad()
    def check_causal(self) -> None:
        """Raises ValueError when other tokens later on change what comes before them.

        In fp32 where they may change its rounding: in bf16 that grows to 0.8 of the hidden states
        in 24 of Mega-pytorch's layers, whose weights begin with a standard deviation of 1.
        """
        tokens = self._random_tokens(1, self.length)
        kind = tokens.device.type
        wide = torch.autocast(kind, enabled=False) if self.backbone.rounds_by_all else nullcontext()
        with wide:
            want = self.backbone.hidden_states(tokens)
            # Early, where a single key more weighs most, and within a block behind many.
            for cut in {min(4, self.length // 2), self.length // 2 + self.length // 16} - {0}:
                other = self._random_tokens(1, self.length - cut)
                got = self.backbone.hidden_states(torch.cat([tokens[:, :cut], other], 1))
                change = (got - want)[:, :cut].float().norm(dim=-1)
                leak = (change / want[:, :cut].float().norm(dim=-1)).max().item()
                if not leak < LARGEST_LEAK:
                    raise ValueError(
                        f"{self.name} sees what is to come: tokens from {cut} on change the hidden "
                        f"states before them by {leak:.3f}; not to be compared"
                    )

    def compile(self) -> None:
        """Compiles what is to be compiled; where that is nothing, has Triton's kernels chosen.

        Raises:
            ValueError: compiled, a part computes something else.
        """
        parts = self.backbone.compilable
        if not parts:
            self.loss(self._random_tokens(1, self.length + 1)).backward()
            self.module.zero_grad(set_to_none=True)
            return
        torch._dynamo.config.recompile_limit = 64
        calls = self._last_calls(parts)
        for part in parts:
            part.compile(dynamic=False)
        for part, args, kwargs in calls:
            args[0].requires_grad_()  # as in training: a compiler distinguishes
            want, got = (call(*args, **kwargs) for call in (part.forward, part))
            if isinstance(want, tuple):
                want, got = want[0], got[0]
            error = compiled_error(part, args[:1], want, got)
            if not error < COMPILED_ERROR:
                raise ValueError(
                    f"{self.name}'s compiled {type(part).__name__} differs from the same "
                    f"uncompiled by {error:.3f} in its output or gradients; use compile=false or "
                    f"another torch"
                )

    def _last_calls(
        self, parts: Sequence[nn.Module]
    ) -> list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
        """What the last part of each type was called with, in a forward of a whole micro-batch."""
        calls: dict[type, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = {}

        def keep(part: nn.Module, args: Any, kwargs: Any, _: Any) -> None:
            if any(p.requires_grad for p in part.parameters()):
                calls[type(part)] = part, args, kwargs

        hooks = [part.register_forward_hook(keep, with_kwargs=True) for part in parts]
        with torch.no_grad():
            self.backbone.hidden_states(self._random_tokens(self.batch_size, self.length))
        for hook in hooks:
            hook.remove()
        torch.clear_autocast_cache()  # its narrow weights have no gradients
        return list(calls.values())

    def _random_tokens(self, batch_size: int, length: int) -> Tensor:
        device = self.backbone.embedding.weight.device
        return torch.randint(self.vocab_size, (batch_size, length), device=device)

    def loss(self, tokens: Tensor) -> Tensor:
        hidden = self.backbone.hidden_states(tokens[:, :-1]).flatten(0, 1)
        targets = tokens[:, 1:].flatten()
        counted = torch.ones_like(targets, dtype=torch.bool)
        weight = self.backbone.embedding.weight
        return linear_cross_entropy(
            hidden, weight, targets, counted, chunk_size=self.chunk_size
        ).loss_sum

    def after_step(self) -> None:
        """Nothing."""
