"""Gives up compiling what takes too long, without a process of its own."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from torch._inductor.async_compile import shutdown_compile_workers


class NotCompiledError(BaseException):
    """A compilation took too long. Like an interrupt from the keyboard no Exception, so that no
    compiler takes it for a failure of its own."""


@contextmanager
def compile_limit(seconds: float) -> Iterator[None]:
    """Raises NotCompiledError in the main thread when `seconds` are over.

    The compiler's workers are ended then: they would go on beside what is timed next.
    """

    def stop(signal_number: int, frame: FrameType | None) -> None:
        raise NotCompiledError(f"not compiled within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except NotCompiledError:
        shutdown_compile_workers()
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
