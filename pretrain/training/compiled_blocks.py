"""Compiles a model's blocks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pretrain.training.compiled_products import FasterProducts
from pretrain.training.loop_barriers import add_loop_barriers

# One for all models: blocks with other options are compiled anew, and count as another variant.
_OPTIONS = {"post_grad_custom_post_pass": FasterProducts()}


def compile_blocks(model: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compiles each block, and the norm behind the last one, in place. That between an encoder and
    its decoder, `encoder_norm`, stays eager.

    All blocks share the code of `Block.forward`, and with it the number of variants that torch
    compiles before it runs the rest eagerly for good: eight, but each kind of layer has one without
    a state and one with, in training and in evaluation, where the last segment is shorter. Shapes
    are static, as in the tests of the mixers: training has one.
    """
    torch._dynamo.config.recompile_limit = 64
    # Backward runs outside of autocast. By default a compiled one does not: products that a forward
    # forms in fp32 by switching autocast off, as S4's powers, would have gradients in bf16.
    torch._functorch.config.backward_pass_autocast = "off"
    add_loop_barriers()
    options = _OPTIONS if backend == "inductor" else None
    for module in (*model.blocks, model.norm):  # type: ignore[misc]
        module.compile(backend=backend, dynamic=False, options=options)
