"""Numbers of a step are read once, as they were when they were put."""

import pytest
import torch

from pretrain.training.late_read import LateRead

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_are_those_of_their_step(device: str) -> None:
    late = LateRead()
    assert late.take() is None
    numbers = torch.tensor([1, 0], device=device)
    for step in (3, 4, 5):
        late.put(step, numbers)
        numbers += 1  # the next step's
        assert late.take() == (step, [step - 2, step - 3])
        assert late.take() is None


@pytest.mark.gpu
def test_putting_does_not_wait_and_taking_does() -> None:
    numbers = torch.zeros(1, device="cuda")
    late = LateRead()
    late.put(0, numbers)  # the pinned memory is there
    late.take()
    torch.cuda.synchronize()
    torch.cuda._sleep(5 * 10**9)  # seconds: what runs beside this may hold it up
    late.put(1, numbers + 1)
    assert not torch.cuda.current_stream().query()
    assert late.take() == (1, [1.0])
    assert torch.cuda.current_stream().query()
