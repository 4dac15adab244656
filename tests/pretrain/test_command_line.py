"""Each process of a launch finds a GPU of its own, or hears that there is none."""

import pytest
import torch

from pretrain import command_line
from pretrain.command_line import own_device


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
