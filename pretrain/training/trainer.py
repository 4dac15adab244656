"""The training loop, top to bottom.

One optimizer step: learning rate from tokens; count the step's valid targets over all ranks;
forward and backward per micro-batch; update; let the model update its buffers; now and then log,
evaluate, save. Loss and gradients are *means over the step's valid tokens*, whatever the world
size, accumulation and masks: `engine.backward` divides by accumulation steps and ZeRO averages over
ranks, so the local sum is multiplied by ranks x accumulation / global valid tokens, known before.

The host waits for the device when it reports and saves, and not in a step, but for ZeRO 1 to 3,
where DeepSpeed waits by itself, and to keep what is not finite out of states and buffers.
"""

import gc
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.batch import Batch, EncoderDecoderBatch, StepLoader
from pretrain.config import RunConfig
from pretrain.files import write_json
from pretrain.mixers.base import map_state
from pretrain.training import health, metrics
from pretrain.training.checkpoint import CheckpointSaver, plan_resume, restore, start_with
from pretrain.training.engine import World, build_engine, take_step
from pretrain.training.late_read import LateRead
from pretrain.training.metrics import CorpusFacts, MetricLog
from pretrain.training.optim import schedule_factor
from pretrain.training.plan import train_flops_per_token
from pretrain.training.precision import autocast
from pretrain.training.profiling import StepProfiler
from pretrain.training.random_state import preserved_random_state, step_seed

AnyBatch = Batch | EncoderDecoderBatch
Evaluate = Callable[[nn.Module], dict[str, float]]


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what is saved. Raised on all ranks."""


class RankError(TrainingError):
    """Training cannot go on because of this rank alone; the others know nothing of it."""


class Trainer:
    """Trains one model; builds the engine and restores the newest checkpoint at construction.

    Args:
        config: of the run.
        model: what `build_model` gives; fp32.
        loader: this rank's batches by step, of the kind that the model takes.
        world: from `start_process_group`.
        facts: about the corpus.
        evaluate: in-training evaluation, called on all ranks, returns scalars by name.

    Raises:
        ValueError: when the checkpoint found, or that of `train.init_from`, belongs to another
            model or tokenizer, or the one found to another data order.
        CheckpointError: that of `train.init_from` is missing or damaged, or the one found could not
            be converted to another number of processes.
    """

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        loader: StepLoader,
        world: World,
        facts: CorpusFacts,
        *,
        evaluate: Evaluate | None = None,
    ) -> None:
        self.config, self.loader, self.world, self.facts = config, loader, world, facts
        self.evaluate = evaluate
        self.grad_accum_steps = config.grad_accum_steps(world.size)
        self.train_flops = train_flops_per_token(model, config.train.seq_len, facts.target_length)
        self.saver = CheckpointSaver(config, model, world, facts.tokenizer)
        plan = plan_resume(config, model, world, facts.tokenizer)
        if plan is not None:
            loader.check_state(plan.training["data"])
        beginning, passed_over = "starting from step 0", plan.notes if plan else []
        if plan is None and config.train.init_from:
            other = Path(config.train.init_from)
            source, passed_over = start_with(model, other, world, facts.tokenizer)
            beginning = f"{beginning} with the weights of {source}"
        universal = bool(plan and plan.convert)
        self.engine = build_engine(
            config, model, world, target_length=facts.target_length, universal=universal
        )
        self.step = plan.training["step"] if plan else 0
        # One recurrent state per micro-batch slot: slot m always reads the same lanes.
        self.carried: list[Any] = [None] * self.grad_accum_steps
        if plan is not None:
            self.carried = restore(self.engine, plan, config, world) or self.carried
        self.saved_step = self.step if plan else -1
        self.finished = bool(plan and plan.finished and self.step >= config.total_steps)
        self.grad_norm: Tensor | float = 0.0  # of the last step, before clipping; inf if skipped
        self.skipped_in_a_row, self.skips_reported = 0, self.engine.skipped_steps
        self.stop_requested = False  # of this process
        self.stopping = False  # of any, as all of them have heard
        self.last_step = LateRead()  # how many processes were asked to stop; whether it was skipped
        self.window = torch.zeros(3, dtype=torch.float64, device=world.device)
        self.groups: dict[str, Tensor] = {}  # NLL and count of targets reported apart
        self.window_steps = 0
        self.stopwatch = metrics.Stopwatch()
        self.profiler = StepProfiler(config, world, self.step)
        self.log: MetricLog | None = None
        if world.is_main:
            self.log = MetricLog(
                config.run_dir,
                self.step if plan else -1,
                tensorboard=config.logging.tensorboard,
            )
            for note in passed_over:
                self.log.say(f"passed over: {note}")
            self.log.say(f"resumed from {plan.path}" if plan else beginning)
            if self.step < config.total_steps:  # it may have finished earlier, at fewer tokens
                (config.run_dir / "DONE").unlink(missing_ok=True)

    @property
    def tokens(self) -> int:
        """Tokens seen, padding included; of an encoder-decoder the encoder's."""
        return self.step * self.config.train.global_batch_tokens

    def fit(self) -> bool:
        """Trains to the end.

        Returns:
            True when finished; False when stopped by SIGTERM after saving.

        Raises:
            TrainingError: training cannot go on.
            CheckpointError: nothing can be saved.
        """
        try:
            return self._fit()
        except OSError as error:  # the disk is full, or its folder is gone
            raise RankError(
                f"rank {self.world.rank} cannot go on behind step {self.step}: {error} (last "
                f"checkpoint: {self._last_saved()}). Free space or fix the folder, then start the "
                f"same command again"
            ) from error

    def _fit(self) -> bool:
        """The loop, with what must be put back behind it."""
        previous = signal.signal(signal.SIGTERM, self._request_stop)
        # Else every full collection looks through all that was imported, built and compiled, 0.15 s
        # of the host's, on each rank at a step of its own.
        gc.collect()
        gc.freeze()
        try:
            return self._loop()
        finally:
            gc.unfreeze()
            signal.signal(signal.SIGTERM, previous)
            self.profiler.close()
            if self.log is not None:
                self.log.close()

    def _loop(self) -> bool:
        config, every = self.config, self.config.logging.every_steps
        if self.finished:
            if self.log is not None:
                self.log.say("it had finished before; raise train.total_tokens to train further")
            return True
        batches = self.loader.steps(self.step)
        if self.step == 0:
            self._report_health()
        self.stopwatch.read()
        while self.step < config.total_steps:
            began = time.perf_counter()
            try:
                micro_batches = next(batches)
            except ValueError as error:
                raise RankError(
                    f"rank {self.world.rank} cannot read the data of step {self.step + 1}: {error}"
                ) from error
            self.stopwatch.waited += time.perf_counter() - began
            self._train_step(micro_batches)
            self.step += 1
            self.profiler.after_step(self.step)
            last = self.step == config.total_steps
            saving = self._due(config.checkpoint.every_tokens) or last
            if saving:  # it may be the last one: then what was trained since is reported, too
                self._hear_of_last_step()
            if self.step % every == 0 or last or self.stopping:
                self._report()
            if self._due(config.eval.every_tokens) and not last:
                self._evaluate()
            if saving or self.stopping:
                self._save()
            if self.stopping and not last:
                return False
        self._evaluate()
        if self.log is not None:
            done = {"step": self.step, "tokens": self.tokens}
            write_json(config.run_dir / "DONE", done)
            self.log.say(
                f"finished: {config.run_dir} has {self.step} steps, {self.tokens:,} tokens"
            )
        return True

    def _train_step(self, micro_batches: list[AnyBatch]) -> None:
        """One optimizer step."""
        engine, config = self.engine, self.config
        self._set_learning_rates()
        torch.manual_seed(step_seed(config.seed, self.step, self.world.rank))
        micro_batches = [_to_device(batch, self.world.device) for batch in micro_batches]
        valid = torch.stack([batch.loss_mask.sum() for batch in micro_batches]).sum()
        # A fill: a copy of a number would wait for the device.
        asked = torch.full_like(valid, self.stop_requested)
        counts = torch.stack([valid, asked])
        dist.all_reduce(counts)
        scale = self.world.size * self.grad_accum_steps / counts[0].clamp(min=1)
        sums, groups = torch.zeros_like(self.window), dict[str, Tensor]()
        statistics: dict[str, Tensor] = {}
        for slot, batch in enumerate(micro_batches):
            state = self.carried[slot] if config.train.carry_state else None
            output = engine(state=state, **batch.model_inputs())
            losses = [value for name, value in output.aux.items() if name.endswith("_loss")]
            auxiliary = torch.stack(losses).sum() if losses else torch.zeros_like(output.loss_sum)
            engine.backward((output.loss_sum + auxiliary) * scale)
            sums[0] += output.loss_sum.detach()
            sums[1] += auxiliary.detach()
            for name, counted in batch.target_groups().items():
                found = torch.stack([(output.nll * counted).sum(), counted.sum()])
                groups[name] = groups.get(name, 0) + found.double()
            for name, value in output.aux.items():
                if not name.endswith("_loss"):
                    statistics[name] = statistics.get(name, 0) + value.detach()
            if config.train.carry_state:  # truncated backpropagation: the next segment sees values
                self.carried[slot] = map_state(Tensor.detach, output.state)
            if slot + 1 < len(micro_batches):
                engine.step()  # counts the micro-batch; no update before the last one
        sums[2] += valid
        self.window_steps += 1
        self.grad_norm, applied = take_step(engine, config.optim.grad_clip)
        # One NaN would be that of all steps until the next report.
        kept = applied.to(sums.device)
        self.window += torch.where(kept, sums, 0)
        for name, group in groups.items():
            self.groups[name] = self.groups.get(name, 0) + torch.where(kept, group, 0)
        self._hear_of_last_step()
        self.last_step.put(self.step + 1, torch.stack([counts[1], (~applied).to(counts)]))
        if config.zero.stage == 0 and not (statistics or config.train.carry_state):
            return
        self._hear_of_last_step()
        if not applied:  # the states may hold the NaN as well: every lane begins anew
            self.carried = [None] * self.grad_accum_steps
        elif statistics:
            for name in sorted(statistics):
                dist.all_reduce(statistics[name])
            engine.module.update_buffers(statistics)

    def _set_learning_rates(self) -> None:
        train = self.config.train
        after = self.tokens + train.global_batch_tokens  # so that the first step moves
        factor = schedule_factor(after, train.total_tokens, self.config.schedule)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor

    def _hear_of_last_step(self) -> None:
        """What the host was not told when it happened, unless it has heard of it by now."""
        heard = self.last_step.take()
        if heard is None:
            return
        step, (asked, skipped) = heard
        self.stopping = self.stopping or asked > 0
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if skipped and self.config.zero.stage == 0:
            self.engine.skipped_steps += 1  # other stages count
        limit = self.config.train.max_consecutive_skips
        if self.skipped_in_a_row < limit:
            return
        raise TrainingError(
            f"gradients were not finite in {limit} steps in a row, up to step {step}; all were "
            f"skipped, no weight holds a NaN (last checkpoint: {self._last_saved()}). Lower "
            f"optim.learning_rate, lengthen schedule.warmup_fraction, or look at the data there"
        )

    def _report(self) -> None:
        self._hear_of_last_step()
        dist.all_reduce(self.window)
        nll, auxiliary, valid = self.window.tolist()
        steps, self.window_steps = self.window_steps, 0
        self.window.zero_()
        groups, self.groups = metrics.means_over_ranks(self.groups), {}
        seconds, waited = self.stopwatch.read()
        if self.log is None:
            return
        config, loss = self.config, nll / valid if valid else math.nan
        rate = steps * config.train.global_batch_tokens / seconds
        values = {
            "loss": loss,
            **{f"loss/{name}": mean for name, mean in groups.items()},
            **metrics.bits_per_byte_of(loss, self.facts.bytes_per_token),
            "grad_norm": float(self.grad_norm),
            "skipped_steps": float(self.engine.skipped_steps),
            **metrics.speed(rate, self.world.size, self.train_flops, self.world.device),
            "data_fraction": waited / seconds,
            "eta_seconds": (config.total_steps - self.step) * seconds / steps,
        }
        if auxiliary:
            values["auxiliary_loss"] = auxiliary / max(1.0, valid)
        for group in self.engine.optimizer.param_groups:
            values[f"lr/{group['name']}"] = group["lr"]
        values["lr"] = self.engine.optimizer.param_groups[0]["lr"]
        if skipped := self.engine.skipped_steps - self.skips_reported:
            self.skips_reported += skipped
            self.log.say(
                f"step {self.step}: gradients not finite in {skipped} of the last {steps} steps, "
                f"update skipped on all ranks; their losses are not in the mean"
            )
        self.log.row(self.step, self.tokens, values)
        self.log.say(metrics.console_line(self.step, config.total_steps, self.tokens, values))

    def _report_health(self) -> None:
        """Memory horizons and codebooks; a row of their own, before the first step too."""
        found = health.read_health(self.engine.module)
        if self.log is not None and found:
            self.log.row(self.step, self.tokens, health.scalars(found))
            self.log.histograms(self.step, health.distributions(found))
            self.log.say(health.console_line(self.step, found))

    def _evaluate(self) -> None:
        self._report_health()
        if self.evaluate is not None:
            self._validate(self.evaluate)
        self.stopwatch.read()  # evaluation does not count as training time
        self.window_steps = 0

    def _validate(self, evaluate: Evaluate) -> None:
        module = self.engine.module
        module.eval()
        with (
            preserved_random_state(),
            torch.no_grad(),
            autocast(self.config, self.world.device),
        ):
            values = evaluate(module)
        module.train()
        if self.log is not None:
            self.log.row(self.step, self.tokens, values)
            listed = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
            self.log.say(f"step {self.step:>6}  {listed}")

    def _save(self) -> None:
        self._hear_of_last_step()
        try:
            position = self.loader.state(self.step)
        except ValueError as error:  # it may lie behind text that has yet to be read
            raise RankError(
                f"rank {self.world.rank} cannot read the data behind step {self.step}: {error}"
            ) from error
        path = self.saver.save(
            self.engine,
            step=self.step,
            tokens=self.tokens,
            data=position,
            carried=self.carried if self.config.train.carry_state else None,
        )
        self.saved_step = self.step
        self.stopwatch.read()
        self.window_steps = 0
        if self.log is not None:
            self.log.say(f"saved {path}")

    def _last_saved(self) -> str:
        return f"step {self.saved_step}" if self.saved_step >= 0 else "none"

    def _due(self, every_tokens: int) -> bool:
        """Whether this step crossed a multiple of `every_tokens`; 0 means never."""
        before = self.tokens - self.config.train.global_batch_tokens
        return every_tokens > 0 and self.tokens // every_tokens > before // every_tokens

    def _request_stop(self, signum: int, frame: object) -> None:
        self.stop_requested = True


def _to_device(batch: AnyBatch, device: torch.device) -> AnyBatch:
    return map_state(lambda part: part.to(device, non_blocking=True), batch)
