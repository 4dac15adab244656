"""Another world size or ZeRO stage, through DeepSpeed's universal checkpoint and its repairs.

A regular ZeRO checkpoint loads only at the world size that wrote it. The universal form holds one
fp32 tensor per parameter and optimizer moment. What it leaves wrong, and who puts it right:

1. Stages 1 and 2 demand `universal_checkpoint_info` in the client state: every save writes it.
2. Registered buffers stay at their initial values: `checkpoint.restore` reloads them.
3. Under ZeRO-3 every parameter group gets group 0's learning rate and weight decay, and
4. all groups share one step counter, which then advances once per group: both mended here.
5. Stage 1 or 2 cannot become 3, nor 0 anything else: refused with the way out.
"""

import argparse
import contextlib
import io
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pretrain.config import OptimConfig
from pretrain.training.optim import group_hyperparameters

CLIENT_STATE = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
SHARDED_FAMILIES = {
    0: "replicated",
    1: "gradients and moments",
    2: "gradients and moments",
    3: "all",
}


def needs_conversion(
    saved: dict[str, Any], *, world_size: int, stage: int, reshard: bool, model: nn.Module
) -> bool:
    """Whether a checkpoint must become universal before this run can load it.

    Args:
        saved: `world_size` and `zero_stage` of the checkpoint.
        world_size: of this run.
        stage: ZeRO stage of this run.
        reshard: `resume.reshard`.
        model: refuses frozen parameters, which the universal form forgets.

    Raises:
        ValueError: when the change is impossible, or needs `resume.reshard=true`.
    """
    change = (
        f"the checkpoint was written by {saved['world_size']} process(es) at zero.stage="
        f"{saved['zero_stage']}; this run has {world_size} at zero.stage={stage}"
    )
    if SHARDED_FAMILIES[saved["zero_stage"]] != SHARDED_FAMILIES[stage]:
        raise ValueError(
            f"zero.stage={stage}: {change}. DeepSpeed converts between stages 1 and 2 only; "
            f"continue with zero.stage={saved['zero_stage']}"
        )
    same = (saved["world_size"], saved["zero_stage"]) == (world_size, stage)
    if same or stage == 0:  # stage 0 replicates everything, so its world size does not matter
        return False
    if not reshard:
        raise ValueError(
            f"resume.reshard=false: {change}. Set resume.reshard=true to convert it (equal to "
            f"rounding, not to the bit), or start {saved['world_size']} process(es)"
        )
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    if frozen:
        raise ValueError(
            f"resume.reshard=true: the universal checkpoint forgets frozen parameters "
            f"({', '.join(frozen[:3])}); start {saved['world_size']} process(es)"
        )
    return True


def convert(source: Path, target: Path) -> None:
    """Writes the universal form of DeepSpeed's folder `source` to `target` (one process)."""
    from deepspeed.checkpoint import ds_to_universal

    arguments = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,  # no worker processes: a fork of a process with a live GPU context
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(arguments)


def repair_optimizer(engine: Any, config: OptimConfig, names: list[str]) -> None:
    """Re-applies our hyper-parameters to each group, and separates shared step counters.

    Args:
        engine: after `load_checkpoint`.
        config: what the groups should hold; the configuration wins over the checkpoint.
        names: of the groups, in the optimizer's order, taken before loading.
    """
    hyperparameters = group_hyperparameters(config)
    for group, name in zip(engine.optimizer.param_groups, names, strict=True):
        group.update(hyperparameters[name], betas=config.betas, eps=config.eps)
    base = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for state in base.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
