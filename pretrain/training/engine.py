"""From our configuration to a running DeepSpeed engine: process group, optimizer, ZeRO, precision.

The default is ZeRO-1 with `torch_autocast`: parameters stay fp32 in storage (DeepSpeed's `bf16`
casts *every* parameter, decay rates included, and knows no exception) and matmuls run in bf16.
Surprising: DeepSpeed accepts unknown top-level keys in silence, so they are checked here, and an
omitted `gradient_clipping` means 1.0, so it is always written.
"""

import difflib
import logging
import os
import socket
import sys
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import deepspeed
import deepspeed.comm  # registers the module whose shared-memory op is replaced below
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from pretrain.config import RunConfig
from pretrain.models.block import keep_states
from pretrain.training.compiled_blocks import compile_blocks
from pretrain.training.compiled_check import verify_compiled
from pretrain.training.cuda_graphs import RecordedForward
from pretrain.training.optim import parameter_groups

# What `zero.extra` may hold. The batch triple, clipping and precision have keys of their own.
PASSED_ON = (
    "zero_optimization",
    "torch_autocast",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "wall_clock_breakdown",
    "memory_breakdown",
    "comms_logger",
    "flops_profiler",
    "aio",
    "compile",
)

# Of what is passed on, settings that another key makes.
OWN_KEYS = {
    ("zero_optimization", "stage"): "zero.stage",
    ("torch_autocast", "enabled"): "train.precision",
    ("torch_autocast", "dtype"): "train.precision",
}


@dataclass(frozen=True)
class World:
    """This process's place among the data-parallel ranks."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start_process_group(config: RunConfig) -> World:
    """Joins the ranks that the launcher started, or makes a group of one for a plain `python`."""
    if "RANK" not in os.environ:
        # Without these DeepSpeed looks for an MPI launcher and fails on a missing mpi4py.
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        one_process = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({key: str(value) for key, value in one_process.items()})
        os.environ["MASTER_PORT"] = str(port)
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # DeepSpeed calls collectives under names that torch 2.13 renames.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    local_rank = int(os.environ["LOCAL_RANK"])
    on_gpu = get_accelerator().device_name() == "cuda"  # DS_ACCELERATOR=cpu overrides a GPU
    if on_gpu:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        # On CPU, DeepSpeed compiles a shared-memory all-reduce (g++, ninja, 20 s), and every rank
        # leaves a 69 MB /dev/shm/deepspeed_allreduce_buffer_* file behind, after a clean exit too.
        # gloo does the same work. (`import deepspeed.comm.torch as x` would give torch itself.)
        # deepspeed/comm/torch.py, TorchBackend.__init__; tests/distributed holds /dev/shm to this.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    if not dist.is_initialized():
        timeout = timedelta(minutes=config.train.process_group_timeout_minutes)
        deepspeed.init_distributed(
            dist_backend="nccl" if on_gpu else "gloo", timeout=timeout, verbose=False
        )
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    return World(dist.get_rank(), dist.get_world_size(), device)


def deepspeed_config(
    config: RunConfig, world_size: int, *, universal: bool = False
) -> dict[str, Any]:
    """DeepSpeed's configuration for a run; `zero.extra` is merged into it last.

    Args:
        config: the run.
        world_size: number of data-parallel ranks.
        universal: load the next checkpoint in the universal format.

    Raises:
        ValueError: when `zero.extra` holds the stage, or a key that DeepSpeed would ignore.
    """
    zero: dict[str, Any] = {"stage": config.zero.stage}
    if config.zero.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    grad_accum_steps = config.grad_accum_steps(world_size)
    generated: dict[str, Any] = {
        "train_batch_size": config.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": grad_accum_steps,
        # At stage 0 `take_step` clips: DeepSpeed takes one parameter after the other.
        "gradient_clipping": config.optim.grad_clip if config.zero.stage else 0.0,
        "steps_per_print": sys.maxsize,  # our own console line reports
        # Its stopwatch waits for the device twice per micro-batch. (deepspeed/utils/timer.py)
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # Offload otherwise refuses torch's AdamW and wants its own, which needs a compiler.
        "zero_force_ds_cpu_optimizer": False,
    }
    if config.train.precision == "bf16":
        # The list names the modules whose gradients (and ZeRO-3 weights) travel in bf16; what
        # autocast computes in does not depend on it. Empty: gradients are summed in fp32, so world
        # size and accumulation do not change them. `zero.extra.torch_autocast.
        # lower_precision_safe_modules=[torch.nn.Linear]` halves that traffic; subclasses count by
        # their own names only: pretrain.models.layers.GateUpLinear and .SwiGLULinear.
        generated["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        }
    if universal:
        generated["checkpoint"] = {"load_universal": True}
    for key in config.zero.extra:
        if key not in PASSED_ON:
            close = difflib.get_close_matches(str(key), PASSED_ON, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(PASSED_ON)}"
            raise ValueError(f"zero.extra.{key}: DeepSpeed would ignore it in silence; {hint}")
    for (section, key), own in OWN_KEYS.items():
        settings = config.zero.extra.get(section, {})
        place = f"zero.extra.{section}"
        if not isinstance(settings, dict):
            raise ValueError(f"{place}={settings}: must be a mapping; set {place}.KEY=VALUE")
        if key in settings:
            raise ValueError(
                f"{place}.{key}: it has a key of its own, which checkpoints record and the rest of "
                f"training follows; use {own}"
            )
    return _merge(generated, config.zero.extra)


def build_engine(
    config: RunConfig,
    model: nn.Module,
    world: World,
    *,
    target_length: int = 0,
    universal: bool = False,
) -> deepspeed.DeepSpeedEngine:
    """Wraps `model` into a DeepSpeed engine with AdamW on `world.device`.

    Args:
        config: of the run.
        model: fp32, on any device.
        world: this rank.
        target_length: tokens of a row's targets in encoder-decoder training, else 0.
        universal: see `deepspeed_config`.

    Raises:
        ValueError: for a complex parameter: ZeRO-1 and -2 would silently drop its imaginary part;
            CUDA graphs without a GPU; a compiled block that computes something else.
    """
    if config.train.cuda_graphs and world.device.type != "cuda":
        raise ValueError(
            f"train.cuda_graphs=true: this run is on the {world.device.type}; leave it out, or run "
            f"on a GPU"
        )
    for name, parameter in model.named_parameters():
        if parameter.is_complex():
            raise ValueError(
                f"parameter '{name}' is {parameter.dtype}: ZeRO drops imaginary parts; store "
                f"torch.view_as_real(...) and view it as complex in forward"
            )
    model.to(world.device)
    keep_states(model, config.train.carry_state)
    if config.train.compile:
        compile_blocks(model)  # before initialize: ZeRO's hooks then wrap compiled blocks
        verify_compiled(model, config, world.device, target_length=target_length)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.optim),
        betas=config.optim.betas,
        eps=config.optim.eps,
        fused=True,
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=deepspeed_config(config, world.size, universal=universal),
    )
    if world.size == 1 and config.zero.stage == 0:
        # There is nothing to sum, and DeepSpeed would copy every gradient into a buffer and back.
        engine.enable_backward_allreduce = False
    for buffer in model.buffers():  # DeepSpeed broadcasts parameters at initialize, never buffers
        dist.broadcast(buffer, 0)
    if config.train.cuda_graphs:
        model.forward = RecordedForward(model, carry_state=config.train.carry_state)
    return engine


def take_step(engine: deepspeed.DeepSpeedEngine, grad_clip: float) -> tuple[Tensor | float, Tensor]:
    """Optimizer step on the accumulated gradients, skipped on all ranks when they are not finite.

    Stages 1 to 3 clip and skip by themselves and compute the norm, for which the host waits. Stage
    0 does not skip, and one NaN would reach every weight: there AdamW's kernel is told, nothing
    waits, and the caller counts `engine.skipped_steps`.

    Args:
        engine: behind the backward of a step's last micro-batch.
        grad_clip: largest norm of the gradients, as in `deepspeed_config`; 0: any.

    Returns:
        The global gradient norm before clipping, inf if it was skipped, and whether the step was
        applied, () bool; both on the device at stage 0, else on the host.
    """
    if engine.zero_optimization_stage() > 0:
        engine.step()
        if not engine.was_step_applied():
            return float("inf"), torch.tensor(False)
        return engine.get_global_grad_norm(), torch.tensor(True)
    # At the boundary, stage 0's gradients are already averaged over ranks: the norm is global.
    parameters = [p for p in engine.module.parameters() if p.requires_grad]
    for parameter in parameters:  # as where DeepSpeed sums: no part in the loss is a gradient of 0
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    finite = torch.isfinite(norm)
    if grad_clip > 0:
        nn.utils.clip_grads_with_norm_(parameters, grad_clip, norm)
    engine.optimizer.found_inf = (~finite).float()  # what GradScaler tells it (torch/optim/adam.py)
    engine.step()
    return torch.where(finite, norm, torch.inf), finite


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged
