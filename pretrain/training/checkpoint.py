"""Saving and restoring a run: all ranks together, all or nothing, and only into the same run.

    step_00001000/
        deepspeed/             DeepSpeed's own files: weights, optimizer shards
        buffers.pt             registered buffers (VQ codebooks) by name
        carried_00000_00004.pt recurrent states of lanes 0..3, one file per rank
        training.json          step, tokens, data position, shapes and fingerprints
        config.yaml            the resolved configuration
        manifest.json          written last, see manifest.py

There is no RNG state to save: the trainer seeds every step from (seed, step, rank). Carried states
are stored by lane, not by rank, so that another world size or micro-batch size finds its own.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from torch import Tensor, nn

from pretrain.config import RunConfig, save_config
from pretrain.files import TEMPORARY, write_json
from pretrain.mixers.base import cat_states, map_state
from pretrain.training import manifest, universal
from pretrain.training.engine import World
from pretrain.training.load import find_checkpoint, load_weights
from pretrain.training.manifest import CheckpointError

DEEPSPEED = "deepspeed"
FORMAT = 1


def tensor_shapes(model: nn.Module) -> dict[str, list[int]]:
    """Names and shapes of parameters and persistent buffers: what makes two models the same.

    Call it before `deepspeed.initialize`: ZeRO-3 leaves parameters empty.
    """
    named = {**dict(model.named_parameters()), **persistent_buffers(model)}
    return {name: list(tensor.shape) for name, tensor in sorted(named.items())}


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Registered buffers that belong to the model's state, by name."""
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def checkpoint_bytes(model: nn.Module) -> int:
    """Size of one checkpoint: fp32 weights, fp32 master copy and two moments, with 5 % on top."""
    return round(1.05 * 16 * sum(parameter.numel() for parameter in model.parameters()))


@dataclass(frozen=True)
class ResumePlan:
    """Which checkpoint to continue from, and whether it has to be converted first."""

    path: Path
    training: dict[str, Any]
    convert: bool
    notes: list[str]
    finished: bool  # the run had come to its end


def plan_resume(
    config: RunConfig, model: nn.Module, world: World, tokenizer: str
) -> ResumePlan | None:
    """Finds the newest complete checkpoint and makes sure that it belongs to this run.

    Collective: rank 0 reads, all ranks get the same answer.

    Returns:
        The plan, or None to start from the beginning.

    Raises:
        ValueError: when there is nothing to resume but `resume.mode=must`, something to overwrite
            but `resume.mode=never`, or the checkpoint belongs to another model or tokenizer.
    """
    return on_main(world, lambda: _plan(config, model, world, tokenizer))


def _plan(config: RunConfig, model: nn.Module, world: World, tokenizer: str) -> ResumePlan | None:
    root, mode = config.run_dir / "checkpoints", config.resume.mode
    if mode == "never":
        if any(root.glob("step_*")):
            raise ValueError(
                f"resume.mode=never: {root} already holds checkpoints, which a new run would mix "
                f"with its own; choose another name=, move them away, or use resume.mode=auto"
            )
        return None
    path, passed_over = manifest.newest_complete(root)
    if path is None:
        if passed_over:
            listed = "; ".join(passed_over)
            raise ValueError(
                f"resume.mode={mode}: no complete checkpoint in {root} ({listed}); restore one, or "
                f"remove the folder to start from the beginning"
            )
        if mode == "must":
            raise ValueError(
                f"resume.mode=must: no checkpoint in {root}; check name= and out_dir=, or use "
                f"resume.mode=auto to start from the beginning"
            )
        return None
    training = json.loads((path / "training.json").read_text(encoding="utf-8"))
    if training["format"] != FORMAT:
        raise ValueError(
            f"{path}: checkpoint format {training['format']}, this code reads {FORMAT}; use the "
            f"version that wrote it"
        )
    _check_model(path, training["shapes"], tensor_shapes(model))
    if training["tokenizer"] != tokenizer:
        raise ValueError(
            f"data.path={config.data.path}: its tokenizer ({tokenizer}) is not the one that {path} "
            f"was trained with ({training['tokenizer']}); use the run's own corpus, or a new name="
        )
    if config.train.carry_state:
        _check_carried(path, model)
    convert = universal.needs_conversion(
        training,
        world_size=world.size,
        stage=config.zero.stage,
        reshard=config.resume.reshard,
        model=model,
    )
    finished = (config.run_dir / "DONE").exists()
    return ResumePlan(path, training, convert, passed_over, finished)


def start_with(
    model: nn.Module, run_dir: Path, world: World, tokenizer: str
) -> tuple[Path, list[str]]:
    """Gives a run that begins the newest weights of another; all else of it begins anew.

    Collective, before `build_engine`, which hands rank 0's weights to all.

    Returns:
        The checkpoint that they are from, and a line for every newer one that is not complete.

    Raises:
        ValueError: there is no such run, or it is of another model or tokenizer.
        CheckpointError: its checkpoint is missing or damaged.
    """

    def load() -> tuple[Path, list[str]]:
        if not run_dir.is_dir():
            raise ValueError(
                f"train.init_from={run_dir}: no such folder; use a run directory such as runs/NAME"
            )
        path, passed_over = find_checkpoint(run_dir)
        training = json.loads((path / "training.json").read_text(encoding="utf-8"))
        _check_model(path, training["shapes"], tensor_shapes(model))
        if training["tokenizer"] != tokenizer:
            raise ValueError(
                f"train.init_from={run_dir}: its tokenizer ({training['tokenizer']}) is not this "
                f"run's ({tokenizer}); prepare the data with that one's (tokenizer=FILE)"
            )
        model.load_state_dict(load_weights(path))
        return path, passed_over

    return on_main(world, load)


def _check_model(path: Path, saved: dict[str, list[int]], ours: dict[str, list[int]]) -> None:
    differing = [name for name in sorted({*saved, *ours}) if saved.get(name) != ours.get(name)]
    if differing:
        name = differing[0]
        rest = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise ValueError(
            f"model: {path} holds another model: '{name}' is {saved.get(name, 'absent')} there and "
            f"{ours.get(name, 'absent')} in this configuration{rest}; use the configuration beside "
            f"it (config.yaml), or leave it out: another name= for a new run, no train.init_from="
        )


def _check_carried(path: Path, model: nn.Module) -> None:
    """That there are states, and this model's."""
    first = min(path.glob("carried_*.pt"), default=None)
    if first is None:
        raise ValueError(
            f"train.carry_state=true: {path} holds no carried states; continue with "
            f"train.carry_state=false, or a new name="
        )
    state = model.init_state(1, device=torch.device("cpu"), dtype=torch.float32)  # type: ignore[operator]
    ours: list[Tensor] = []
    map_state(ours.append, state)
    saved = torch.load(first, map_location="meta", weights_only=True)
    if not saved:  # the step before it was skipped
        return
    shapes = ([tuple(tensor.shape[1:]) for tensor in tensors] for tensors in (saved, ours))
    for there, here in zip_longest(*shapes):
        if there is None or here is None or not _comes_from(there, here):
            raise ValueError(
                f"train.carry_state=true: {path} carries states of another model, {there} per "
                f"sequence there and {here} in this configuration; use the configuration beside it "
                f"(config.yaml), continue with train.carry_state=false, or use a new name="
            )


def _comes_from(shape: tuple[int, ...], initial: tuple[int, ...]) -> bool:
    """Sizes of 0 grow with the tokens that were read."""
    return len(shape) == len(initial) and all(
        ours in (0, size) for size, ours in zip(shape, initial, strict=True)
    )


def restore(
    engine: deepspeed.DeepSpeedEngine, plan: ResumePlan, config: RunConfig, world: World
) -> list[Any] | None:
    """Loads everything of a checkpoint into `engine` (built with `universal=plan.convert`).

    Returns:
        The carried state of each micro-batch slot of this rank; None without `carry_state`.
    """
    names = [group["name"] for group in engine.optimizer.param_groups]
    folder, tag = plan.path, DEEPSPEED
    if plan.convert:
        folder = plan.path.parent / f"{TEMPORARY}universal.{plan.path.name}"
        tag = "universal"
        on_main(world, lambda: _convert(plan.path / DEEPSPEED, folder / tag))
    loaded, _ = engine.load_checkpoint(str(folder), tag=tag)
    if loaded is None:
        raise CheckpointError(f"{folder}: DeepSpeed found nothing to load")
    universal.repair_optimizer(engine, config.optim, names)
    saved = torch.load(plan.path / "buffers.pt", map_location=world.device, weights_only=True)
    with torch.no_grad():
        for name, buffer in persistent_buffers(engine.module).items():
            buffer.copy_(saved[name])
    dist.barrier()  # everyone has read the converted files
    if plan.convert and world.is_main:
        shutil.rmtree(folder)
    return (
        load_carried(plan.path, engine.module, config, world) if config.train.carry_state else None
    )


def _convert(source: Path, target: Path) -> None:
    shutil.rmtree(target.parent, ignore_errors=True)
    try:
        target.parent.mkdir()
        universal.convert(source, target)
    except Exception as error:
        shutil.rmtree(target.parent, ignore_errors=True)
        raise CheckpointError(
            f"cannot convert {source} to another number of processes: {type(error).__name__}: "
            f"{error}. It is unharmed; free space (a copy of it is made), or start as many "
            f"processes as wrote it"
        ) from error


def load_carried(folder: Path, model: nn.Module, config: RunConfig, world: World) -> list[Any]:
    """This rank's carried states, one per micro-batch slot, whatever ranks wrote them.

    Each is None when the step before the checkpoint was skipped.
    """
    per_rank = config.global_batch_size // world.size
    first = world.rank * per_rank
    pieces: list[tuple[int, list[Tensor]]] = []
    for path in sorted(folder.glob("carried_*.pt")):
        start, stop = (int(part) for part in path.stem.split("_")[1:])
        if start < first + per_rank and first < stop:
            tensors = torch.load(path, map_location=world.device, weights_only=True)
            lanes = slice(max(first, start) - start, min(first + per_rank, stop) - start)
            pieces.append((start, [tensor[lanes] for tensor in tensors]))
    flat = [torch.cat(column) for column in zip(*(part for _, part in pieces), strict=True)]
    size = config.train.micro_batch_size
    if not flat:
        return [None] * (per_rank // size)
    # The structure comes from the model; the files hold its tensors in the same order.
    skeleton = model.init_state(1, device=torch.device("cpu"), dtype=torch.float32)  # type: ignore[operator]
    slots = []
    for begin in range(0, per_rank, size):
        tensors = iter([tensor[begin : begin + size].clone() for tensor in flat])
        slots.append(map_state(lambda _, rest=tensors: next(rest), skeleton))
    return slots


class CheckpointSaver:
    """Writes checkpoints of one run and removes old ones.

    Args:
        config: of the run.
        model: before `deepspeed.initialize`.
        world: this rank.
        tokenizer: fingerprint of the tokenizer that made the corpus.
    """

    def __init__(self, config: RunConfig, model: nn.Module, world: World, tokenizer: str) -> None:
        self.config, self.world, self.tokenizer = config, world, tokenizer
        self.root = config.run_dir / "checkpoints"
        self.shapes = tensor_shapes(model)

    def save(
        self,
        engine: deepspeed.DeepSpeedEngine,
        *,
        step: int,
        tokens: int,
        data: dict[str, Any],
        carried: list[Any] | None,
    ) -> Path:
        """Saves the run after `step` steps; every rank calls it.

        Args:
            engine: at an optimizer-step boundary.
            step: optimizer steps taken.
            tokens: tokens seen.
            data: the loader's position, `StepLoader.state(step)`.
            carried: states of this rank's micro-batch slots, each None when the next segment
                begins without one; None without `carry_state`.

        Raises:
            CheckpointError: on every rank when any rank failed. Earlier checkpoints are untouched.
        """
        final = self.root / manifest.checkpoint_name(step)
        folder = self.root / f"{TEMPORARY}{final.name}"
        training = {
            "format": FORMAT,
            "step": step,
            "tokens": tokens,
            "data": data,
            "tokenizer": self.tokenizer,
            "shapes": self.shapes,
            "world_size": self.world.size,
            "zero_stage": self.config.zero.stage,
            "rng": "seeded every step from (seed, step, rank)",
            "versions": {"torch": torch.__version__, "deepspeed": deepspeed.__version__},
        }
        self._together(lambda: self._prepare(folder), final, main_only=True)
        self._together(lambda: self._write(engine, folder, training, carried), final)
        entries: dict[str, Any] = {}

        def hash_share() -> None:
            mine = manifest.content_files(folder)[self.world.rank :: self.world.size]
            entries.update(manifest.file_entries(folder, mine))

        self._together(hash_share, final)
        shares: list[Any] = [None] * self.world.size
        dist.all_gather_object(shares, entries)
        files = {name: entry for share in shares for name, entry in share.items()}
        content = {"step": step, "tokens": tokens, "files": files}
        self._together(lambda: manifest.publish(folder, final, content), final, main_only=True)
        self._together(lambda: self._remove_old(step), final, main_only=True)
        return final

    def _prepare(self, folder: Path) -> None:
        manifest.remove_leftovers(self.root)
        (folder / DEEPSPEED).mkdir(parents=True)

    def _write(
        self,
        engine: deepspeed.DeepSpeedEngine,
        folder: Path,
        training: dict[str, Any],
        carried: list[Any] | None,
    ) -> None:
        writer = _DurableWriter()
        engine.checkpoint_engine = writer
        # It would put a copy of zero_to_fp32.py there, between two collectives.
        engine._copy_recovery_script = lambda save_path: None
        engine.save_checkpoint(
            str(folder), tag=DEEPSPEED, client_state=universal.CLIENT_STATE, save_latest=False
        )
        if writer.error is not None:
            raise writer.error
        if carried is not None:
            tensors: list[Tensor] = []
            map_state(tensors.append, cat_states(carried))
            per_rank = self.config.global_batch_size // self.world.size
            first = self.world.rank * per_rank
            name = f"carried_{first:05d}_{first + per_rank:05d}.pt"
            _save_tensors(tensors, folder / name)
        if self.world.is_main:
            _save_tensors(persistent_buffers(engine.module), folder / "buffers.pt")
            save_config(self.config, folder / "config.yaml")
            write_json(folder / "training.json", training)

    def _remove_old(self, step: int) -> None:
        """Of `step` and before it: a later one was passed over, and must not crowd out these."""
        keep = self.config.checkpoint
        saved = [saved for saved in manifest.saved_checkpoints(self.root) if saved.step <= step]
        for path in manifest.superseded(saved, keep.keep_last, keep.keep_every_tokens):
            manifest.remove_checkpoint(path)

    def _together(
        self, action: Callable[[], None], final: Path, *, main_only: bool = False
    ) -> None:
        """Runs `action`; if it failed on any rank, all ranks raise and rank 0 cleans up."""
        failure = None
        if self.world.is_main or not main_only:
            try:
                action()
            except Exception as error:
                failure = f"rank {self.world.rank}: {type(error).__name__}: {error}"
        failures: list[str | None] = [None] * self.world.size
        dist.all_gather_object(failures, failure)
        first = next((text for text in failures if text), None)
        if first is None:
            return
        # A rank that left while rank 0 still reads would have the launcher kill it, unheard.
        raise CheckpointError(on_main(self.world, lambda: self._what_is_left(final, first)))

    def _what_is_left(self, final: Path, failure: str) -> str:
        shutil.rmtree(self.root / f"{TEMPORARY}{final.name}", ignore_errors=True)
        safe, _ = manifest.newest_complete(self.root)
        left = f"The last complete checkpoint, {safe.name}, is unharmed" if safe else "None is left"
        return (
            f"cannot save {final}: {failure}. {left}; free space or fix the folder, then start the "
            f"same command again"
        )


class _DurableWriter(TorchCheckpointEngine):
    """Writes DeepSpeed's files through to the disk, and keeps the first error for later.

    An exception inside `save_checkpoint` on one rank would leave the others waiting in its barrier.
    """

    def __init__(self) -> None:
        super().__init__()
        self.error: Exception | None = None

    def save(self, state_dict: Any, path: str) -> None:
        try:
            _save_tensors(state_dict, Path(path))
        except Exception as error:
            self.error = self.error or error


def _save_tensors(content: Any, path: Path) -> None:
    with open(path, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def on_main(world: World, action: Callable[[], Any]) -> Any:
    """Result of `action` on rank 0, on all ranks; its exception is raised on all ranks too."""
    outcome: list[Any] = [None, None]
    if world.is_main:
        try:
            outcome[0] = action()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
