"""What a measurement ran on, found without opening the device, which would take memory of it."""

import platform
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
        return (
            f"{self.device}{gpu}, torch {self.torch}, Python {self.python}, "
            f"commit {self.commit[:12]}{'+changes' if self.commit.endswith('+changes') else ''}"
        )


def describe_machine(device: torch.device) -> Machine:
    """The first GPU that is visible, or the processor."""
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
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return found.stdout.splitlines()[0].strip()
