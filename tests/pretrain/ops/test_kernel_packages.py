"""Packages of kernels: taken in the version whose functions are called, and in no other."""

import tomllib
import warnings
from pathlib import Path

import pytest
import torch

from pretrain.ops import kernel_packages
from pretrain.ops.kernel_packages import VERSIONS, describe_missing, is_installed

PYPROJECT = Path(__file__).resolve().parents[3] / "pyproject.toml"
HOPPER = torch.device("cuda")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages found in this folder alone."""
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    return tmp_path


def install(folder: Path, name: str, version: str) -> None:
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_versions_are_those_of_the_extra() -> None:
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    extra = [words.replace("[cu13]", "") for words in project["optional-dependencies"]["flash"]]
    assert extra == [f"{name}=={version}" for name, version in VERSIONS.items()]


@pytest.mark.parametrize("name", VERSIONS)
def test_the_version_that_is_called_is_taken(name: str, folder: Path) -> None:
    assert not is_installed(name)
    install(folder, name, VERSIONS[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert is_installed(name)


def test_another_version_is_named_and_not_taken(folder: Path) -> None:
    install(folder, "flash-attn-4", "4.1.0")
    with pytest.warns(UserWarning, match=r"flash-attn-4 4\.1\.0 is installed.*FlexAttention"):
        assert not is_installed("flash-attn-4")


def test_another_package_with_the_same_module_is_not_imported(folder: Path) -> None:
    """FlashAttention-2 brings a flash_attn/cute of its own, and breaks where torch is another."""
    install(folder, "flash-attn", "2.8.3")
    (folder / "flash_attn" / "cute").mkdir(parents=True)
    (folder / "flash_attn" / "__init__.py").write_text("raise ImportError('undefined symbol')")
    assert not is_installed("flash-attn-4")


@pytest.mark.usefixtures("folder")
def test_a_hopper_without_them_says_what_it_takes_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    flash, quack = describe_missing(HOPPER)
    assert "FlexAttention" in flash
    assert "`flash`" in flash
    assert "cuBLAS" in quack
    monkeypatch.setattr(kernel_packages, "is_installed", lambda name: True)
    assert not describe_missing(HOPPER)


@pytest.mark.usefixtures("folder")
def test_other_devices_miss_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert not describe_missing(HOPPER)
    assert not describe_missing(torch.device("cpu"))
