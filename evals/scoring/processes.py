"""The processes that evaluate together: started by torchrun or deepspeed, or one alone.

Scoring needs no collective: a rank takes its share of the work, and losses travel through files
that also make it resumable. What is exchanged here, over the launcher's TCP store on CPU and GPU
alike, are counts and a few words. So nothing waits inside of a communication library for a rank
that died: a launcher ends the others, and without one whoever waits gives up, with a message, when
all work has stood still for `STALL_SECONDS`.
"""

import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

STALL_SECONDS = 1800.0
POLL_SECONDS = 0.05
_BEATS, _LEFT, _FAILED = "beats", "left", "failed"


class ProcessLost(Exception):
    """Another process failed, died or hangs."""


class Processes:
    """This process's place among those that work together.

    Args:
        rank: of this process; rank 0 writes results and speaks.
        size: how many there are.
        store: where they count; one that is not given serves a process alone.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: dist.Store | None = None) -> None:
        self.rank, self.size = rank, size
        self.store = dist.HashStore() if store is None else store
        self._scopes = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @contextmanager
    def scope(self) -> Iterator["Processes"]:
        """The same processes, with counts and words of their own, until all have left.

        All enter as many scopes in the same order. An exception in one of them ends the others,
        wherever they wait, with `ProcessLost`.
        """
        inner = Processes(self.rank, self.size, dist.PrefixStore(str(self._scopes), self.store))
        self._scopes += 1
        try:
            yield inner
        except Exception as error:
            with suppress(dist.DistError):
                inner.store.set(_FAILED, f"rank {self.rank}: {error}")
            raise
        # Rank 0 may host the store: it waits until no other asks anything any more.
        if not self.is_main:
            inner.count(_LEFT, 1)
            return
        inner.wait_until(lambda: inner.count(_LEFT) == self.size - 1)

    def count(self, key: str, n: int = 0) -> int:
        """Adds to a count; the sum over all processes. Work that counts nothing looks hung."""
        try:
            if n:
                self.store.add(_BEATS, n)
            return int(self.store.add(key, n))
        except dist.DistError as error:
            raise _lost("rank 0 cannot be reached") from error

    def from_main(self, key: str, make: Callable[[], Any]) -> Any:
        """What rank 0 makes, JSON-able, in every process."""
        if self.is_main:
            value = make()
            self.store.set(key, json.dumps(value))
            return value
        self.wait_until(lambda: self._has(key))
        return json.loads(self.store.get(key))

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Raises:
        ProcessLost: another process failed, or nobody counted anything for `STALL_SECONDS`.
        """
        beats, since = self.count(_BEATS), time.monotonic()
        while not ready():
            if self._has(_FAILED):
                raise ProcessLost(self.store.get(_FAILED).decode())
            time.sleep(POLL_SECONDS)
            now = self.count(_BEATS)
            if now != beats:
                beats, since = now, time.monotonic()
            elif time.monotonic() - since > STALL_SECONDS:
                raise _lost(f"no process scored anything for {STALL_SECONDS:g} seconds")

    def _has(self, key: str) -> bool:
        try:
            return bool(self.store.check([key]))
        except dist.DistError as error:
            raise _lost("rank 0 cannot be reached") from error


def _lost(what: str) -> ProcessLost:
    return ProcessLost(
        f"{what}: a process died or hangs; start the same command again, what is scored is kept"
    )


@functools.cache
def join() -> Processes:
    """Meets the processes that this one was started with; once in the life of a process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    # The launchers' environment: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.
    timeout = timedelta(seconds=STALL_SECONDS)
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    return Processes(rank, size, store)
