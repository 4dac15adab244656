"""torch.profiler traces of chosen optimizer steps (`profile.steps=10:13`), one file per rank."""

import torch
from torch.profiler import ProfilerActivity, profile

from pretrain.config import RunConfig
from pretrain.training.engine import World


class StepProfiler:
    """Records steps [first, last) of `profile.steps` to RUN/profile/rank_*.json (Chrome format).

    Steps count from 1, as on the console: step 10 is recorded when 9 have been taken.
    """

    def __init__(self, config: RunConfig, world: World, step: int) -> None:
        steps = config.profile.steps
        self.first, self.last = (int(part) for part in steps.split(":")) if steps else (-1, -1)
        self.path = config.run_dir / "profile" / f"rank_{world.rank:05d}.json"
        self.active: profile | None = None
        self.after_step(step)

    def after_step(self, step: int) -> None:
        """Starts or ends the recording when `step` optimizer steps have been taken."""
        if step + 1 == self.first:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self.active = profile(activities=activities, record_shapes=True)
            self.active.__enter__()
        elif step + 1 == self.last:
            self.close()

    def close(self) -> None:
        """Writes the trace of a recording under way."""
        if self.active is None:
            return
        self.active.__exit__(None, None, None)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.active.export_chrome_trace(str(self.path))
        self.active = None
