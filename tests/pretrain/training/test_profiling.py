"""Which optimizer steps a trace holds."""

import json
from pathlib import Path

import torch

from pretrain.config import RunConfig
from pretrain.training.engine import World
from pretrain.training.profiling import StepProfiler


def test_trace_holds_the_steps_that_the_console_numbers_so(tmp_path: Path) -> None:
    config = RunConfig(name="run", out_dir=str(tmp_path))
    config.profile.steps = "2:4"
    profiler = StepProfiler(config, World(0, 1, torch.device("cpu")), step=0)
    for step in range(1, 6):
        with torch.profiler.record_function(f"this is step {step}"):
            torch.ones(2).sum()
        profiler.after_step(step)
    trace = json.loads((tmp_path / "run" / "profile" / "rank_00000.json").read_text())
    names = {event.get("name", "") for event in trace["traceEvents"]}
    assert {n for n in names if n.startswith("this is")} == {"this is step 2", "this is step 3"}
