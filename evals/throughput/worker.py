"""One measurement in a process of its own: `python -m evals.throughput.worker SETTINGS RESULT`.

A fresh process has a fresh allocator, no kernels left in its caches, and can be ended when it
hangs. Every phase is a line with the seconds since the start; short before the time is over, all
threads' stacks go to the log.
"""

import faulthandler
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()
PHASE = "phase"  # begins a line that the parent shows


def say(text: str) -> None:
    """One phase."""
    print(f"{PHASE} {time.perf_counter() - BEGAN:7.1f} s  {text}", flush=True)


def measure(settings: dict[str, Any], *, compile_only: bool = False) -> dict[str, Any]:
    """Measures; what goes wrong is in `status`, else "ok".

    Args:
        settings: the fields of `Measurement`.
        compile_only: end where the first step would begin; what is compiled stays in torch's cache.
    """
    say("importing")
    import torch

    from evals.throughput.clock import StepClock
    from evals.throughput.loops import CheckFailed, build, run_loop
    from evals.throughput.settings import Measurement

    m = Measurement(**settings)
    if compile_only:
        build(m, m.config(), torch.device(m.device), say)
        return {"status": "ok", "ready_seconds": time.perf_counter() - BEGAN}
    clock = StepClock(torch.device(m.device), m.seconds, say, m.profile)
    try:
        facts = run_loop(m, clock, say)
    except torch.OutOfMemoryError:
        return {"status": "out of memory"}
    except ImportError as error:
        if not m.is_peer:
            raise
        return {"status": f"cannot be imported: {error}"}
    except (CheckFailed, ValueError) as error:
        return {"status": f"wrong: {error}"}
    return {
        "status": "ok",
        **facts,
        "step_seconds": clock.step_seconds,
        "ready_seconds": clock.ready_seconds,
        "memory_gib": clock.memory_gib,
    }


def main(arguments: list[str]) -> None:
    """Reads the settings, writes the result."""
    job = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    faulthandler.dump_traceback_later(0.9 * job["timeout_seconds"])
    result = measure(job["settings"], compile_only=job["compile_only"])
    Path(arguments[1]).write_text(json.dumps(result), encoding="utf-8")
    sys.stdout.flush()
    # Threads of compilers and of NCCL have nothing left to do; see pretrain.training.leaving.leave.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
