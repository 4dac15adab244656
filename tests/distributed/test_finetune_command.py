"""launch/finetune.py in two processes does what it does in one, killed or not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import finetune
from tests.distributed.launching import REPOSITORY, TIMEOUT, finish, free_port, start
from tests.launch.last_letter import ENCODER_DECODER, MODEL, WORDS, write_examples

SCRIPT = REPOSITORY / "launch" / "finetune.py"
LONGVQ = MODEL.replace("default: swa", "default: longvq").replace(
    "swa: {n_heads: 2, window_size: 16}",
    "longvq: {n_heads: 2, block_size: 8, n_modes: 3, chunk_size: 8}",
)

# Of sums in another order, over twelve steps of AdamW.
ROUNDING = {"rtol": 1e-3, "atol": 1e-4}


def words(folder: Path, **changes: str) -> list[str]:
    files = {name: str(folder / WORDS[name]) for name in ("train", "validation", "test")}
    told = {**WORDS, "steps": "12", "check_every": "4", **files, **changes}
    return [f"{key}={value}" for key, value in told.items()]


CASES = {
    "an encoder-decoder writes": {"model": "both.yaml", "beams": "2"},
    "a language model chooses": {"model": "tiny.yaml", "head": "classifier", "test_examples": "1"},
    "a language model writes": {"model": "tiny.yaml", "seeds": "2"},
    "one rank has neither rows nor statistics": {
        "model": "longvq.yaml",
        "batch_size": "1",
        "validation_examples": "1",
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that two processes have done."""
    folder = tmp_path_factory.mktemp("finetune")
    for name, text in {"tiny": MODEL, "both": ENCODER_DECODER, "longvq": LONGVQ}.items():
        (folder / f"{name}.yaml").write_text(text)
    write_examples(folder)
    commands = [{"words": words_of(folder, case, "two"), "interrupt": 0} for case in CASES]
    commands += [
        # Rank 0 alone finds that the folder is of other settings.
        {"words": [*words_of(folder, next(iter(CASES)), "two"), "steps=5"], "interrupt": 0},
        {"words": words_of(folder, "a language model writes", "killed"), "interrupt": 8},
    ]
    (folder / "commands.json").write_text(json.dumps(commands))
    script = REPOSITORY / "tests" / "distributed" / "finetuning_run.py"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, f"--master_port={free_port()}", str(script), str(folder / "commands.json")],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    (folder / "stderr").write_text(done.stderr)
    (folder / "stdout").write_text(done.stdout)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def words_of(folder: Path, case: str, name: str) -> list[str]:
    changes = CASES[case]
    out, model = str(folder / name / case.replace(" ", "_")), str(folder / changes["model"])
    return words(folder, **{**changes, "model": model, "out": out})


def left(folder: Path, name: str, case: str) -> tuple[list[str], list[dict[str, Any]]]:
    """Of each seed the answers, and in numbers all else but the tokens since an interruption."""
    answers, numbers = [], []
    for seed in sorted((folder / name / case.replace(" ", "_")).glob("seed_*")):
        result = json.loads((seed / "result.json").read_text())
        answers.append((seed / "test.jsonl").read_text())
        looks, best = result["history"], torch.load(seed / "best.pt", weights_only=True)
        numbers.append({"looks": looks, "step": result["step"], "weights": best})
    return answers, numbers


def assert_same(
    ours: tuple[list[str], list[dict[str, Any]]], theirs: tuple[list[str], list[dict[str, Any]]]
) -> None:
    assert ours[0] == theirs[0]
    torch.testing.assert_close(ours[1], theirs[1], **ROUNDING)


def seen(folder: Path) -> list[list[dict[str, Any]]]:
    """By command, what each rank saw."""
    ranks = [json.loads((folder / f"commands.{rank}.json").read_text()) for rank in (0, 1)]
    return [list(pair) for pair in zip(*ranks, strict=True)]


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_two_processes_do_what_one_does(case: str, folder: Path) -> None:
    assert finetune.main(words_of(folder, case, "one")) == 0
    assert_same(left(folder, "two", case), left(folder, "one", case))
    first, second = seen(folder)[list(CASES).index(case)]
    assert first["code"] == second["code"] == 0
    assert first["weights"] == second["weights"] != ""


@pytest.mark.distributed
def test_interrupted_in_two_processes_one_goes_on_with_the_same_batches(folder: Path) -> None:
    case = "a language model writes"
    assert [rank["code"] for rank in seen(folder)[-1]] == [None, None]
    (progress,) = (folder / "killed").glob("*/seed_0/progress.pt")
    assert torch.load(progress, weights_only=True)["step"] == 4
    assert finetune.main(words_of(folder, case, "killed")) == 0
    assert_same(left(folder, "killed", case), left(folder, "two", case))


@pytest.mark.distributed
def test_what_rank_0_alone_finds_ends_all_and_is_said_once(folder: Path) -> None:
    assert [rank["code"] for rank in seen(folder)[len(CASES)]] == [finetune.BAD_INPUT] * 2
    errors = [line for line in (folder / "stderr").read_text().splitlines() if "error" in line]
    assert len(errors) == 1
    assert "(steps was 12, is 5); choose another out=" in errors[0]
    assert (folder / "stdout").read_text().count("PairEncoderDecoder") == 1, "one process speaks"


@pytest.mark.distributed
def test_bad_input_is_one_error_of_the_launch(tmp_path: Path) -> None:
    write_examples(tmp_path)
    (tmp_path / "tiny.yaml").write_text(MODEL)
    bad = words(tmp_path, model=f"{tmp_path}/tiny.yaml", out=f"{tmp_path}/out", metrics="acuracy")
    code, output = finish(start(SCRIPT, bad, processes=2))
    assert code == finetune.BAD_INPUT
    assert output.count("error: ") == 1
    assert "metrics=acuracy is not known" in output
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_is_missed_without_a_launcher_and_one_goes_on(
    victim: int, tmp_path: Path
) -> None:
    write_examples(tmp_path)
    (tmp_path / "tiny.yaml").write_text(MODEL)
    looks = {"steps": "40", "check_every": "1", "patience": "40", "model": f"{tmp_path}/tiny.yaml"}
    address = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), *words(tmp_path, **looks, out=f"{tmp_path}/killed")],
            cwd=REPOSITORY,
            env={**os.environ, **address, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    while all(process.poll() is None for process in processes):
        if (tmp_path / "killed/seed_0/progress.pt").exists():
            processes[victim].kill()
            break
        time.sleep(0.001)
    _, errors = processes[1 - victim].communicate(timeout=TIMEOUT)
    assert processes[victim].wait() == -signal.SIGKILL, "killed before it was done"
    assert processes[1 - victim].returncode == finetune.PROCESS_LOST, errors
    said = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(said) == victim, "rank 0 speaks, if it can"
    assert all("another process failed or died" in line for line in said)
    assert "Traceback" not in errors

    for out in ("killed", "whole"):
        assert finetune.main(words(tmp_path, **looks, out=f"{tmp_path}/{out}")) == 0
    assert_same(left(tmp_path, "killed", ""), left(tmp_path, "whole", ""))
