"""Time that a device needs for one call, without the time that the host needs to ask for it.

"graph": the call is recorded once as a CUDA graph and replayed; what training code that is captured
would see. "queue": calls are queued behind a pause of the device, so that the host is ahead; where
a call takes the host longer than the device, that still shows, as it does in training. "host": no
GPU, the clock on the wall.
"""

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

WARM_UP = 3
SECONDS, FEWEST_REPEATS, REPEATS = 2.0, 5, 20
PAUSE_CYCLES = 10**8  # some 50 ms of an H100

Method = Literal["graph", "queue", "host"]


class DeviceTime(NamedTuple):
    """Milliseconds: the median of as many calls as `SECONDS` hold, 5 to 20, and the quartiles."""

    ms: float
    q1: float
    q3: float
    method: Method

    def divided_by(self, parts: int) -> "DeviceTime":
        """The time of one of `parts` equal parts of the call."""
        return DeviceTime(self.ms / parts, self.q1 / parts, self.q3 / parts, self.method)


def device_time(call: Callable[[], Any], device: torch.device) -> DeviceTime:
    """By graph where the call can be captured, else by queue, and the method says which."""
    if device.type == "cuda":
        graph = capture(call)
        if graph is not None:
            return _queued(graph.replay, "graph")
    return queued_time(call, device)


def queued_time(call: Callable[[], Any], device: torch.device) -> DeviceTime:
    """By queue, as uncaptured code runs; on a CPU by its clock."""
    for _ in range(WARM_UP):
        call()
    return _queued(call, "queue") if device.type == "cuda" else _on_host(call)


def capture(call: Callable[[], Any]) -> torch.cuda.CUDAGraph | None:
    """The call as a graph; None when it does what cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # The outer context gives the stream back when a capture fails inside.
    with torch.cuda.stream(torch.cuda.current_stream()):
        try:
            with torch.cuda.graph(graph):
                call()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            torch.cuda.synchronize()
            return None
    return graph


def _queued(call: Callable[[], Any], method: Method) -> DeviceTime:
    repeats = _repeats(call, torch.cuda.synchronize)
    torch.cuda._sleep(PAUSE_CYCLES)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return _summary([before.elapsed_time(after) for before, after in pairwise(events)], method)


def _on_host(call: Callable[[], Any]) -> DeviceTime:
    repeats = _repeats(call, lambda: None)
    marks = [time.perf_counter()]
    for _ in range(repeats):
        call()
        marks.append(time.perf_counter())
    return _summary([1e3 * (after - before) for before, after in pairwise(marks)], "host")


def _repeats(call: Callable[[], Any], wait: Callable[[], Any]) -> int:
    """From the time of one call, on the host or on the device, whichever takes longer."""
    wait()
    began = time.perf_counter()
    call()
    wait()
    count = SECONDS / (time.perf_counter() - began)
    return round(max(FEWEST_REPEATS, min(REPEATS, count)))


def _summary(ms: list[float], method: Method) -> DeviceTime:
    q1, median, q3 = np.quantile(ms, (0.25, 0.5, 0.75)).tolist()
    return DeviceTime(median, q1, q3, method)
