"""Runs fine-tuning commands one after another in one process group, and writes what each rank saw.

    torchrun --nproc_per_node=2 finetuning_run.py COMMANDS.json

COMMANDS.json is a list of {"words": [...], "interrupt": step or 0}; COMMANDS.RANK.json will have
for each its exit code, null if it was interrupted, and a digest of the weights that it trained.
"""

import contextlib
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch import finetune
from pretrain.finetuning.ranks import join
from pretrain.training.leaving import leave


def run(words: list[str], interrupt: int) -> dict[str, Any]:
    """One command, stopped in all ranks at the look at validation after step `interrupt`."""
    seen: dict[str, Any] = {"code": None, "weights": ""}
    train = finetune.train

    def watched(model: Any, *arguments: Any) -> Any:
        *some, report, ranks = arguments

        def stop(check: dict[str, float]) -> None:
            report(check)
            if check["step"] == interrupt:
                raise KeyboardInterrupt

        result = train(model, *some, stop, ranks)
        digest = hashlib.sha256()
        for value in model.module.state_dict().values():
            digest.update(value.numpy().tobytes())
        seen["weights"] = digest.hexdigest()
        return result

    finetune.train = watched
    with contextlib.suppress(KeyboardInterrupt):
        seen["code"] = finetune.main(words)
    finetune.train = train
    return seen


def main(path: Path) -> int:
    commands = json.loads(path.read_text())
    seen = [run(command["words"], command["interrupt"]) for command in commands]
    path.with_suffix(f".{join().rank}.json").write_text(json.dumps(seen))
    return 0


if __name__ == "__main__":
    leave(main(Path(sys.argv[1])))
