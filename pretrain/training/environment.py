"""What a run ran on: commit, versions, machine, command. Written to environment.json."""

import os
import platform
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pretrain.ops.kernel_packages import VERSIONS as KERNEL_PACKAGES

if TYPE_CHECKING:  # Evaluation asks for the commit, and need not wait for DeepSpeed's import.
    from pretrain.training.engine import World

REPOSITORY = Path(__file__).resolve().parents[2]


def git_commit() -> str:
    """The commit of this code, with `+changes` when files differ from it; or why it is unknown."""
    try:
        commit = _git("rev-parse", "HEAD")
        return f"{commit}+changes" if _git("status", "--porcelain") else commit
    except (OSError, subprocess.CalledProcessError):
        return "unknown (not a git checkout)"


def describe_environment(world: "World") -> dict[str, Any]:
    """JSON-able facts about this process and its machine."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "commit": git_commit(),
        "command": sys.argv,
        "world_size": world.size,
        "host": socket.gethostname(),
        "device": str(world.device),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: version(name) for name in ("torch", "deepspeed", "numpy")},
        # Kernels come from these where they are installed, and round in their own ways.
        **{name: installed_version(name) for name in ("triton", *KERNEL_PACKAGES)},
    }


def installed_version(name: str) -> str:
    """Of a distribution; "" where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name here, so that each of several processes is given one."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(index) for index in range(torch.cuda.device_count())]
    return [name for name in named.split(",") if name]


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.strip()
