"""Weights of a run, finished or not, for evaluation and export: one process, no process group."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.config import RunConfig, load_saved_config
from pretrain.models import EncoderDecoder, LanguageModel, build_model
from pretrain.training import manifest
from pretrain.training.manifest import CheckpointError


def load_weights(folder: Path) -> dict[str, Tensor]:
    """fp32 parameters and buffers of a checkpoint from any ZeRO stage and world size, on the CPU.

    Tied weights appear under each of their names.
    """
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    if training["zero_stage"] == 3:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            weights = dict(get_fp32_state_dict_from_zero_checkpoint(str(folder), tag="deepspeed"))
    else:
        model_states = folder / "deepspeed" / "mp_rank_00_model_states.pt"
        weights = torch.load(model_states, map_location="cpu", weights_only=False)["module"]
    weights |= torch.load(folder / "buffers.pt", map_location="cpu", weights_only=True)
    return {
        name: (weight.float() if weight.is_floating_point() else weight).detach()
        for name, weight in weights.items()
    }


def load_model(
    run_dir: Path, tag: str = "latest"
) -> tuple[LanguageModel, RunConfig, dict[str, Any]]:
    """Rebuilds a trained language model; see `load_any_model`.

    Raises:
        CheckpointError: when the checkpoint is missing or damaged.
        ValueError: the run trained an encoder-decoder.
    """
    model, config, info = load_any_model(run_dir, tag)
    if not isinstance(model, LanguageModel):
        raise ValueError(
            f"run={run_dir}: it trained an encoder-decoder (objective={config.objective}), and "
            f"this takes a language model; name a run of objective=causal"
        )
    return model, config, info


def load_any_model(
    run_dir: Path, tag: str = "latest"
) -> tuple[LanguageModel | EncoderDecoder, RunConfig, dict[str, Any]]:
    """Rebuilds a trained model of either kind.

    Args:
        run_dir: a run directory, e.g. runs/NAME.
        tag: a checkpoint's name, e.g. step_00001000; "latest" is the newest complete one.

    Returns:
        The model in fp32 on the CPU in eval mode, the configuration it was trained with, and the
        contents of the checkpoint's training.json, with its `path` added, and `passed_over`: a line
        for every newer one that is not complete.

    Raises:
        CheckpointError: when the checkpoint is missing or damaged.
    """
    path, passed_over = find_checkpoint(run_dir, tag)
    config = load_saved_config(path / "config.yaml")
    model = build_model(config.model)
    model.load_state_dict(load_weights(path))
    info = json.loads((path / "training.json").read_text(encoding="utf-8"))
    return model.eval(), config, {**info, "path": str(path), "passed_over": passed_over}


def find_checkpoint(run_dir: Path, tag: str = "latest") -> tuple[Path, list[str]]:
    """A checkpoint's folder, and a line for every newer one that is not complete; arguments and
    errors of `load_any_model`."""
    root = Path(run_dir) / "checkpoints"
    if tag == "latest":
        path, passed_over = manifest.newest_complete(root)
        if path is None:
            reasons = "; ".join(passed_over) or "the folder is empty or missing"
            raise CheckpointError(f"run={run_dir}: no complete checkpoint in {root}: {reasons}")
        return path, passed_over
    problem = manifest.problem_of(root / tag)
    if problem:
        names = ", ".join(saved.path.name for saved in manifest.saved_checkpoints(root))
        raise CheckpointError(f"{root / tag}: {problem}; there are: {names or 'none'}")
    return root / tag, []
