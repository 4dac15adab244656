"""Trains TinyLM as told by a JSON file: the script behind every real launch in these tests.

    deepspeed ... tiny_run.py SPEC.json        SPEC: a list of runs, trained one after another in
                                               one process group, each into its own run directory

Faults are put in from here, the code under test has no hooks: signals are raised by the loader,
and an audit hook kills the process just before a chosen file operation.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pretrain.batch import Batch
from pretrain.config import RunConfig
from pretrain.training.engine import World, start_process_group
from pretrain.training.leaving import leave
from pretrain.training.manifest import CheckpointError
from pretrain.training.metrics import CorpusFacts
from pretrain.training.trainer import Trainer, TrainingError
from pretrain.training.validation import Validation
from tests.distributed.tiny_lm import LANES, SEQ_LEN, TinyLM, TinyLoader

EXIT_PREEMPTED = 75


@dataclass
class Run:
    """One training run; steps are optimizer steps."""

    name: str
    out_dir: str
    stage: int = 1
    precision: str = "fp32"
    grad_accum: int = 1
    steps: int = 20
    carry_state: bool = True
    codebook: bool = True
    log_every: int = 1  # steps
    save_every: int = 0
    keep_last: int = 2
    learning_rate: float = 1e-2
    resume: str = "auto"
    reshard: bool = False
    max_skips: int = 3
    seed: int = 0
    tokenizer: str = "tiny"
    other_model: bool = False
    offload: bool = False
    signals: dict[str, int] = field(default_factory=dict)  # signal name -> step it arrives before
    fault_rank: int = 0
    poison: tuple[int, int] = (0, 0)  # steps [first, last) have a NaN in one lane
    evaluate_every: int = 0  # steps; 0: no evaluation at all
    abandon_at: int | None = None  # the process forgets the run before this step, saving nothing
    kill_before: tuple[str, str] | None = None  # (audit event, path below checkpoints/)
    file_size_limit: int | None = None  # bytes, on `fault_rank`, as a full disk would be


def config_of(run: Run, world_size: int) -> RunConfig:
    config = RunConfig(name=run.name, out_dir=run.out_dir, seed=run.seed)
    config.train.seq_len = SEQ_LEN
    config.train.global_batch_tokens = LANES * SEQ_LEN
    config.train.micro_batch_size = LANES // world_size // run.grad_accum
    config.train.total_tokens = run.steps * LANES * SEQ_LEN
    config.train.precision = run.precision
    config.train.carry_state = run.carry_state
    config.train.max_consecutive_skips = run.max_skips
    config.optim.learning_rate = run.learning_rate
    config.optim.ssm_learning_rate = run.learning_rate / 3
    config.optim.grad_clip = 0.5
    config.zero.stage = run.stage
    config.zero.offload_optimizer = run.offload
    # Partition even the smallest parameters, or ZeRO-3 keeps this whole model whole.
    config.zero.extra = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    config.checkpoint.every_tokens = run.save_every * LANES * SEQ_LEN
    config.checkpoint.keep_last = run.keep_last
    config.resume.mode = run.resume
    config.resume.reshard = run.reshard
    config.eval.every_tokens = run.evaluate_every * LANES * SEQ_LEN
    config.logging.every_steps = run.log_every
    config.logging.tensorboard = False
    return config


class Abandoned(Exception):
    """Stands in for a kill where several runs share one process."""


class FaultyLoader(TinyLoader):
    """Raises signals in this process before the chosen steps."""

    def __init__(self, run: Run, world: World, micro_batch_size: int) -> None:
        super().__init__(
            world.rank, world.size, micro_batch_size, seed=run.seed, poison=range(*run.poison)
        )
        self.signals = run.signals if world.rank == run.fault_rank else {}
        self.abandon_at = run.abandon_at

    def steps(self, start_step: int) -> Iterator[list[Batch]]:
        for step, batches in enumerate(super().steps(start_step), start_step):
            if step == self.abandon_at:
                raise Abandoned
            for name, at in self.signals.items():
                if step == at:
                    os.kill(os.getpid(), getattr(signal, name))
            yield batches


def kill_before(event: str, path: Path) -> None:
    """SIGKILLs this process just before its first such operation on `path`."""

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        if name == event and str(arguments[0]) == str(path):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def build_trainer(run: Run, world: World) -> Trainer:
    config = config_of(run, world.size)
    (config.run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    loader = FaultyLoader(run, world, config.train.micro_batch_size)
    model = TinyLM(seed=7, extra_row=run.other_model, codebook=run.codebook)
    facts = CorpusFacts(bytes_per_token=1.0, tokenizer=run.tokenizer)
    documents = [torch.arange(3 * SEQ_LEN + 1) % (5 + number) for number in range(3)]
    evaluate = Validation(documents, SEQ_LEN, 1.0, world) if run.evaluate_every else None
    return Trainer(config, model, loader, world, facts, evaluate=evaluate)


def train(run: Run, world: World) -> int:
    if run.kill_before is not None and world.rank == run.fault_rank:
        event, path = run.kill_before
        kill_before(event, Path(run.out_dir) / run.name / "checkpoints" / path)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if run.file_size_limit is not None and world.rank == run.fault_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (run.file_size_limit, unlimited[1]))
    try:
        trainer = build_trainer(run, world)
        finished = trainer.fit()
        trainer.engine.destroy()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    return 0 if finished else EXIT_PREEMPTED


def main(spec: str) -> int:
    torch.set_num_threads(1)
    runs = [Run(**entry) for entry in json.loads(Path(spec).read_text())]
    world = start_process_group(config_of(runs[0], int(os.environ.get("WORLD_SIZE", "1"))))
    outcomes: list[dict[str, Any]] = []
    for run in runs:
        code, message = 0, ""
        try:
            code = train(run, world)
        except Abandoned:
            message = "abandoned"
        except (ValueError, TrainingError, CheckpointError) as error:
            code, message = (2 if isinstance(error, ValueError) else 1), str(error)
        outcomes.append({"code": code, "message": message})
    if world.is_main:
        Path(spec).with_suffix(".outcomes").write_text(json.dumps(outcomes))
    return max(outcome["code"] for outcome in outcomes)


if __name__ == "__main__":
    leave(main(next(a for a in sys.argv[1:] if not a.startswith("--local_rank"))))
