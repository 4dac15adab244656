"""environment.json names what losses depend on."""

from importlib.metadata import version
from types import SimpleNamespace

import torch

from pretrain.ops.kernel_packages import VERSIONS
from pretrain.training.environment import describe_environment, installed_version


def test_versions_of_what_rounds_in_its_own_way_are_recorded() -> None:
    world = SimpleNamespace(size=1, device=torch.device("cpu"))
    found = describe_environment(world)
    assert found["torch"] == version("torch")
    assert {name: found[name] for name in VERSIONS} == {n: installed_version(n) for n in VERSIONS}


def test_what_is_not_installed_has_no_version() -> None:
    assert installed_version("numpy") == version("numpy")
    assert installed_version("no-such-distribution") == ""
