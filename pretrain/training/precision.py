"""The precision of training."""

import torch

from pretrain.config import RunConfig


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """For forwards outside of `engine.forward`, as in evaluation."""
    bf16 = config.train.precision == "bf16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)
