"""The processes that fine-tune together: started by deepspeed or torchrun, or one alone.

Each has a whole model. What they exchange are sums of gradients, by NCCL where they are on GPUs,
and by gloo a few words: what rank 0 decided, the answers that each wrote, the error that one of
them met. All call the same methods of `Ranks` in the same order.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.config_problems import launcher_world_size
from pretrain.dealing import deal
from pretrain.training.manifest import CheckpointError

# All wait while rank 0 scores: ROUGE takes 0.1 s for a long summary. A rank that dies is missed at
# once.
TIMEOUT = timedelta(hours=6)
TOLD = (ValueError, OSError, CheckpointError)  # what people can mend

T = TypeVar("T")


class SharedError(Exception):
    """One of `TOLD`, met by one rank or by all, and raised in all.

    Args:
        message: of the first rank that met it.
        kind: its class.
    """

    def __init__(self, message: str, kind: type[Exception]) -> None:
        super().__init__(message)
        self.kind = kind


class RankLost(Exception):
    """Another rank failed or died."""


@dataclass(frozen=True)
class Ranks:
    """This process's place among those that fine-tune together."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this one speaks and writes."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """What each rank gives, in every rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with _or_lost():
            dist.all_gather_object(found, value)
        return found

    def everywhere(self, make: Callable[[], T]) -> T:
        """What `make` gives in this rank, when it has succeeded in all.

        Raises:
            SharedError: it met one of `TOLD` in some rank.
        """
        made: list[T] = []
        met: Exception | None = None
        try:
            made.append(make())
        except TOLD as error:
            met = error
        for told in self.gather(None if met is None else (str(met), type(met))):
            if told is not None:
                message, kind = told
                raise SharedError(message, kind) from met
        return made[0]

    def on_main(self, make: Callable[[], T]) -> T:
        """What `make` gives in rank 0, which alone calls it, in every rank.

        Raises:
            SharedError: it met one of `TOLD`.
        """
        made = self.everywhere(lambda: make() if self.is_main else None)
        return self.gather(made)[0]  # type: ignore[return-value]

    def sum(self, tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """The sums over ranks, name by name; a rank may lack names. One all-reduce per dtype; the
        host waits for the other hosts, and for no GPU.

        Args:
            tensors: by name, of one shape and dtype wherever a name is.
            device: where they are.
        """
        if self.size == 1:
            return tensors
        kinds: dict[str, tuple[torch.Size, torch.dtype]] = {}
        for found in self.gather({name: (t.shape, t.dtype) for name, t in tensors.items()}):
            kinds |= found
        sums: dict[str, Tensor] = {}
        for dtype in {dtype: None for _, dtype in kinds.values()}:
            shapes = {name: shape for name, (shape, other) in kinds.items() if other == dtype}
            flat = torch.cat(
                [
                    tensors[name].flatten()
                    if name in tensors
                    else torch.zeros(shape.numel(), dtype=dtype, device=device)
                    for name, shape in shapes.items()
                ]
            )
            with _or_lost():
                dist.all_reduce(flat)
            parts = flat.split([shape.numel() for shape in shapes.values()])
            named = zip(shapes.items(), parts, strict=True)
            sums |= {name: part.view(shape) for (name, shape), part in named}
        return sums

    def map(
        self, work: Callable[[list[int]], list[T]], groups: Sequence[list[int]], sizes: list[int]
    ) -> list[T]:
        """What `work` makes of each of n rows, in their order, in every rank.

        Args:
            work: rows -> as many results; called once in each rank, perhaps with no row.
            groups: of all rows; those of a group go to one rank.
            sizes: what each row costs, in tokens or so, (n,).
        """
        hands = deal([sum(sizes[row] for row in group) for group in groups], self.size)
        mine = [row for k in hands[self.rank] for row in groups[k]]
        results: dict[int, T] = {}
        for part in self.gather(dict(zip(mine, work(mine), strict=True))):
            results |= part
        return [results[row] for row in range(len(sizes))]


@contextmanager
def _or_lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo raises nothing narrower
        raise RankLost(
            f"another process failed or died ({str(error).splitlines()[0]}); start the same "
            f"command again, it goes on from the last look at validation"
        ) from error


def join() -> Ranks:
    """Meets the processes that this one was started with."""
    if launcher_world_size() == 1:
        return Ranks()
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
    return Ranks(dist.get_rank(), dist.get_world_size())
