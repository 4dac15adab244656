"""Hands a training loop its batches and times the steps between them.

A loop of any kind asks for its next batch when it has queued a step, so that the moments of asking,
as events in the device's queue, are the ends of the steps; nothing waits for the device between
them. Whatever the loop does on the host counts as soon as it leaves the device idle.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TypeVar

import torch

from pretrain.training.metrics import memory_gib

WARM_UP = 2
MIN_STEPS, MAX_STEPS = 3, 20

T = TypeVar("T")
Say = Callable[[str], None]


class StepClock:
    """Times one loop; made before the model is.

    Args:
        device: whose time counts.
        seconds: to be timed, as far as 3 to 20 steps allow.
        say: is told of every phase.
        profile: file for the table of kernels of a step behind the timed ones; "" for none.

    Attributes:
        ready_seconds: until the first step was done: building, compiling, checks, kernel choice.
        step_seconds: of each timed step.
        memory_gib: peak of the timed steps.
    """

    def __init__(self, device: torch.device, seconds: float, say: Say, profile: str = "") -> None:
        self.device, self.seconds, self.say, self.profile = device, seconds, say, profile
        self.began = time.perf_counter()
        self.ready_seconds = float("nan")
        self.step_seconds: list[float] = []
        self.memory_gib = float("nan")

    def steps(self, batches: Sequence[T], check: Callable[[], None]) -> Iterator[T]:
        """Yields `batches` in turn, one per step.

        Args:
            batches: any number.
            check: called behind the first step; raises when it was not right.
        """
        self.say("first step")
        yield batches[0]
        check()
        self.ready_seconds = self._now() - self.began
        self.say("warming up")
        for step in range(WARM_UP):
            began = self._now()
            yield batches[step % len(batches)]
        expected = self._now() - began
        count = max(MIN_STEPS, min(MAX_STEPS, round(self.seconds / expected)))
        self.say(f"timing {count} steps of some {1e3 * expected:.0f} ms")
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        marks = [self._mark()]
        for step in range(count):
            yield batches[step % len(batches)]
            marks.append(self._mark())
        self.step_seconds = self._between(marks)
        self.memory_gib = memory_gib(self.device)
        if self.profile:
            yield from self._profiled(batches)
        self.say("done")

    def _profiled(self, batches: Sequence[T]) -> Iterator[T]:
        self.say("one step under the profiler")
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profile:
            yield batches[0]
            self._now()
        averages = profile.key_averages()
        order = f"self_{self.device.type}_time_total"
        table = averages.table(sort_by=order, row_limit=60, max_name_column_width=90)
        with open(self.profile, "w", encoding="utf-8") as file:
            file.write(table)

    def _now(self) -> float:
        """Seconds, when all that was queued is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _mark(self) -> torch.cuda.Event | float:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, marks: list[torch.cuda.Event | float]) -> list[float]:
        self._now()
        seconds = []
        for before, after in pairwise(marks):
            if isinstance(before, float) or isinstance(after, float):
                seconds.append(float(after) - float(before))  # type: ignore[arg-type]
            else:
                seconds.append(before.elapsed_time(after) / 1e3)
        return seconds
