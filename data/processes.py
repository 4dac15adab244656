"""Calls a function for many items in worker processes that end with their parent."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
POLL_SECONDS = 0.2

# Spawned, not forked: the parent has threads (the progress bar's, SentencePiece's).
CONTEXT = multiprocessing.get_context("spawn")


class WorkerKilledError(RuntimeError):
    """The operating system ended a worker process."""


def map_processes(
    function: Callable[[_Item], _Result],
    items: Iterable[_Item],
    workers: int,
    *,
    start: Callable[..., None] | None = None,
    start_args: tuple[Any, ...] = (),
    finished: Callable[[int], Any] = lambda i: None,
    poll: Callable[[], Any] = lambda: None,
) -> list[_Result]:
    """Results of `function` in the order of `items`; in this process for one worker or one item.

    Args:
        function: a function of a module, called in whichever worker is free.
        items: its arguments, one per call.
        workers: processes, at most.
        start: called in each worker before its first item.
        start_args: its arguments.
        finished: called with the number of each item when it is done.
        poll: called a few times per second, and last when all is done.

    Raises:
        WorkerKilledError: a worker process was killed.
        Exception: the first that `function` raises; no further item is begun.
    """
    items = list(items)
    workers = min(workers, len(items))
    if workers <= 1:
        if start:
            start(*start_args)
        results = []
        for item in items:
            results.append(function(item))
            finished(len(results) - 1)
            poll()
        return results
    with ProcessPoolExecutor(workers, CONTEXT, _start_worker, (start, start_args)) as pool:
        futures = [pool.submit(function, item) for item in items]
        number: dict[Future[_Result], int] = {future: i for i, future in enumerate(futures)}
        pending = set(futures)
        try:
            while pending:
                done, pending = wait(pending, POLL_SECONDS, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                    finished(number[future])
                poll()
        except BrokenProcessPool as error:
            raise WorkerKilledError("a worker process was killed (out of memory?)") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return [future.result() for future in futures]


def leave_with_parent() -> None:
    """For a worker process to call first. A killed parent, whose locks are free, would leave it
    working beside whoever comes next, and then waiting for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait_for_its_end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_for_its_end, daemon=True).start()


def _start_worker(start: Callable[..., None] | None, start_args: tuple[Any, ...]) -> None:
    leave_with_parent()
    if start:
        start(*start_args)
