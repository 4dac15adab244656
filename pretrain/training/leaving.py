"""The end of a process that trained."""

import os
import sys
from typing import NoReturn

import torch.distributed as dist


def leave(code: int) -> NoReturn:
    """Ends this process with `code`, when everything is on disk.

    Not by `sys.exit`: about one CPU start in fifty aborted in the teardown of C++ threads after its
    last line ("terminate called without an active exception"), which turned finished runs into
    failed ones.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
