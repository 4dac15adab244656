"""The GPU that is asked for is the one that is used; each process of a launch finds a GPU of its
own, or hears that there is none."""

import importlib

import pytest
import torch

from pretrain import command_line
from pretrain.command_line import choose_device, first_device, own_device


def test_a_gpu_with_an_index_becomes_the_one_that_kernels_run_on(monkeypatch):
    taken = []
    monkeypatch.setattr(torch, "empty", lambda size, device: None)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for name in ("cpu", "cuda", "cuda:1"):
        assert choose_device(name) == torch.device(name)
    assert taken == [torch.device("cuda", 1)]


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("evals.recall.__main__", ["task=flag", "mixers=swa"]),
        ("evals.lra.__main__", ["task=listops", "mixers=swa"]),
    ],
)
def test_commands_of_many_processes_refuse_an_index(module, words, tmp_path, capsys):
    main = importlib.import_module(module).main
    assert main([*words, "device=cuda:1", f"out={tmp_path}"]) == 2
    assert "CUDA_VISIBLE_DEVICES=1" in capsys.readouterr().err


def test_the_first_gpu_is_any_device_without_an_index():
    assert first_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="device=cuda:1: processes take the first GPU"):
        first_device("cuda:1")


def test_processes_of_a_node_take_a_gpu_each(monkeypatch):
    taken = []
    monkeypatch.setattr(command_line, "choose_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert own_device("cuda") == torch.device("cuda", int(rank))
        assert own_device("cpu") == torch.device("cpu")
    assert taken == [torch.device("cuda", 0), torch.device("cuda", 1)]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"process 3 of this node finds 2 GPU\(s\)"):
        own_device("cuda")
