"""What a measurement ran on, found without opening the device, which would take memory of it."""

import os
import platform
import re
import subprocess
from dataclasses import dataclass

import torch

from pretrain.training.environment import git_commit


@dataclass(frozen=True)
class Machine:
    """JSON-able facts.

    Attributes:
        device: name of the GPU, or of the processor.
        driver: of the GPU; "" without one.
        cuda: version that torch was built with; "" without a GPU.
        torch: version.
        python: version.
        platform: operating system.
        commit: of this code.
    """

    device: str
    driver: str
    cuda: str
    torch: str
    python: str
    platform: str
    commit: str

    def describe(self) -> str:
        """One line."""
        gpu = f", driver {self.driver}, CUDA {self.cuda}" if self.driver else ""
        commit = re.sub(r"^([0-9a-f]{12})[0-9a-f]+", r"\1", self.commit)  # or why it is unknown
        return f"{self.device}{gpu}, torch {self.torch}, Python {self.python}, commit {commit}"


def describe_machine(device: torch.device) -> Machine:
    """The first GPU that is visible, or the processor.

    Raises:
        ValueError: nvidia-smi does not know that GPU.
    """
    name, driver = platform.processor() or platform.machine(), ""
    if device.type == "cuda":
        name, driver = _nvidia_smi("name"), _nvidia_smi("driver_version")
    return Machine(
        device=name,
        driver=driver,
        cuda=(torch.version.cuda or "") if driver else "",
        torch=torch.__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        commit=git_commit(),
    )


def _nvidia_smi(field: str) -> str:
    # GPUs of several kinds CUDA counts otherwise, unless CUDA_DEVICE_ORDER=PCI_BUS_ID.
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    command = ["nvidia-smi", f"--id={gpu}", f"--query-gpu={field}", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        raise ValueError(
            f"{' '.join(command)} failed ({(found.stdout + found.stderr).strip()}); begin "
            f"CUDA_VISIBLE_DEVICES, where it is set, with an index or a whole UUID of nvidia-smi -L"
        )
    return found.stdout.strip()
