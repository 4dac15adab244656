"""What is said of a machine is true: the GPU that is visible first, and why there is no commit."""

from pathlib import Path

import pytest
import torch

from evals.throughput.machine import Machine, describe_machine

# Of two GPUs; both where it is asked for none of them.
NVIDIA_SMI = """#!/bin/sh
case "$*" in
  *--id=0*) echo "first" ;;
  *--id=1*|*--id=GPU-1b*) echo "second" ;;
  *--id=*) echo "No devices were found"; exit 6 ;;
  *) echo "first"; echo "second" ;;
esac
"""
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "nvidia-smi"
    path.write_text(NVIDIA_SMI, encoding="utf-8")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


@pytest.mark.parametrize(
    ("visible", "name"),
    [
        (None, "first"),
        ("0,1", "first"),
        ("1,0", "second"),
        (" 1", "second"),
        ("GPU-1b,GPU-0a", "second"),
    ],
)
def test_the_gpu_is_the_first_that_is_visible(
    visible: str | None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert describe_machine(CUDA).device == name


def test_a_gpu_that_nvidia_smi_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-2c")
    with pytest.raises(ValueError, match=r"--id=MIG-2c .*No devices were found.*; begin CUDA_VIS"):
        describe_machine(CUDA)


@pytest.mark.parametrize(
    ("commit", "shown"),
    [
        ("0123456789abcdef" * 2 + "01234567", "commit 0123456789ab"),
        ("0123456789abcdef" * 2 + "01234567+changes", "commit 0123456789ab+changes"),
        ("unknown (not a git checkout)", "commit unknown (not a git checkout)"),
    ],
)
def test_a_commit_is_shortened_and_a_reason_is_not(commit: str, shown: str) -> None:
    assert Machine("a processor", "", "", "2", "3", "an OS", commit).describe().endswith(shown)
