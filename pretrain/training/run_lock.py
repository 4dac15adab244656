"""One training at a time in a run directory: two would delete each other's checkpoints and rows."""

import errno
import fcntl
import time
from pathlib import Path
from typing import IO

POLL_SECONDS = 0.2
_HELD: list[IO[str]] = []  # until the process ends, however it does


def lock_run(run_dir: Path, seconds: float = 30.0) -> str | None:
    """Takes RUN/lock for this process, and waits a while for one that is about to end.

    Returns:
        None, or why there is no lock: some file systems have none.

    Raises:
        ValueError: another process has it.
    """
    file = open(run_dir / "lock", "a", encoding="utf-8")  # noqa: SIM115
    _HELD.append(file)
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return f"{run_dir} cannot be locked ({error.strerror}): start it once only"
            if time.monotonic() > deadline:
                raise ValueError(
                    f"name={run_dir.name}: another process trains in {run_dir}; stop it or wait "
                    f"for it, or choose another name="
                ) from None
            time.sleep(POLL_SECONDS)
        else:
            return None
