"""launch/sweep.py: which runs it makes of its arguments, and what becomes of those that fail."""

import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from evals.seeds import recipe_sha256
from launch import sweep
from pretrain.config import CONFIG_DIR, RunConfig, load_config

# Stands in for launch/train.py: notes its environment, fails or waits as its seed says.
STUB = """
import os, sys, time
arguments = dict(word.split("=", 1) for word in sys.argv[1:])
seed = int(arguments["seed"])
folder = os.path.join(arguments["out_dir"], arguments["name"])
with open(os.path.join(folder, "port"), "w") as file:
    file.write(os.environ["MASTER_PORT"] + " " + os.environ["OMP_NUM_THREADS"])
with open(os.path.join(folder, "gpu"), "w") as file:
    file.write(os.environ["CUDA_VISIBLE_DEVICES"])
if seed == 1:
    print("error: the first line\\nerror: out of luck", file=sys.stderr)
    sys.exit(2)
if seed == 9:
    import signal
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    open(os.path.join(folder, "ready"), "w").close()
    time.sleep(20)
"""


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    path = tmp_path / "stub.py"
    path.write_text(STUB)
    return path


def words_of(run: sweep.SweepRun) -> set[str]:
    return set(run.arguments)


def test_runs_are_the_product_of_all_values_and_named_by_what_varies() -> None:
    runs = sweep.expand(
        [
            "experiment=quickstart_bst",
            "model=swa_tiny,bst_tiny",
            "optim.learning_rate=1e-3,3e-3",
            "optim.betas=[0.9,0.95]",
            "out_dir=runs/x",
        ]
    )
    names = [str(run.run_dir) for run in runs]
    assert names == [
        "runs/x/swa_tiny_learning_rate1e-3",
        "runs/x/swa_tiny_learning_rate3e-3",
        "runs/x/bst_tiny_learning_rate1e-3",
        "runs/x/bst_tiny_learning_rate3e-3",
    ]
    assert words_of(runs[1]) == {
        "experiment=quickstart_bst",
        "model=swa_tiny",
        "optim.learning_rate=3e-3",
        "optim.betas=[0.9,0.95]",
        "out_dir=runs/x",
        "name=swa_tiny_learning_rate3e-3",
    }
    prefixed = sweep.expand(["name=mine", "experiment=quickstart_bst", "seed=0,1"])
    assert [run.run_dir.name for run in prefixed] == ["mine_seed0", "mine_seed1"]


def test_compare_has_five_rows_of_three_seeds_that_differ_in_the_seed_alone() -> None:
    configs = [run.config for run in sweep.expand(["sweep=compare"])]
    rows: dict[str, list[RunConfig]] = {}
    for config in configs:
        rows.setdefault(config.name.partition("_tiny_seed")[0], []).append(config)
    assert set(rows) == {"swa", "bst", "spade", "longvq", "mamba2"}
    for row in rows.values():
        assert [config.seed for config in row] == [0, 1, 2]
        assert len({recipe_sha256(config) for config in row}) == 1
    assert all(config.train.carry_state for config in configs)


def test_encoder_decoders_are_compared_at_equal_steps_and_batches() -> None:
    study = [run.config for run in sweep.expand(["sweep=denoising_study"])]
    assert {c.name for c in study} == {"spade_t5_mini", "t5_mini", "local_t5_mini"}
    assert {(c.total_steps, c.optim.learning_rate, c.seed) for c in study} == {(8000, 4e-3, 0)}
    short, long = study[0], load_config(["experiment=denoising_study_long"])
    assert long.train.global_batch_tokens == short.train.global_batch_tokens
    assert (long.train.seq_len, long.total_steps) == (8 * short.train.seq_len, 1500)
    base = [run.config for run in sweep.expand(["sweep=denoising_base"])]
    assert {c.train.micro_batch_size * c.train.seq_len for c in base} == {16384}
    assert {(c.total_steps, c.train.global_batch_tokens) for c in base} == {(150, 65536)}
    lengths = {c.name.rpartition("_seq_len")[::2] for c in base}
    assert lengths == {
        ("spade_t5_base", "512"),
        ("t5_base", "512"),
        ("spade_t5_base", "4096"),
        ("t5_base", "4096"),
        ("spade_t5_base", "16384"),
    }


def test_rows_has_every_tiny_model_at_three_rates_and_trains_each_as_it_can_be() -> None:
    runs = sweep.expand(["sweep=rows"])
    models = {path.stem for path in (CONFIG_DIR / "model").glob("*_tiny.yaml")}
    models = {name for name in models if not name.endswith("t5_tiny")}  # of another objective
    configs = [run.config for run in runs]
    assert len(runs) == len({run.run_dir for run in runs}) == len(models) * 3
    assert {config.name.split("_learning_rate")[0] for config in configs} == models
    assert {config.optim.learning_rate for config in configs} == {1.5e-3, 3e-3, 6e-3}
    assert {config.total_steps for config in configs} == {300}
    for config in configs:
        grows = "attention" in config.model.layer_names()
        assert config.train.carry_state == (not grows)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["experiment=quickstart_bst"], "nothing varies"),
        (["seed=0,1", "worker=3"], "worker=3 .*unknown key"),
        (["sweep=row"], "did you mean 'rows'"),
        (["sweep=rows", "model=swa_tiny"], "two runs of this name"),
        (["seed"], "write key=value"),
        (["seed=0,1", "workers=0"], "at least 1"),
        (["seed=0,1", "dry_run=yes"], "true or false"),
    ],
)
def test_bad_arguments_are_refused_before_anything_starts(
    arguments: list[str], reason: str, stub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main(arguments, stub) == sweep.BAD_INPUT
    assert re.search(reason, capsys.readouterr().err)


def test_dry_run_prints_the_commands_and_starts_none(
    tmp_path: Path, stub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main(["seed=0,1", f"out_dir={tmp_path}/runs", "dry_run=true"], stub) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"python launch/train.py out_dir={tmp_path}/runs seed={seed} name=seed{seed}"
        for seed in (0, 1)
    ]
    assert not (tmp_path / "runs").exists()


def test_a_failing_run_is_reported_and_the_others_finish(
    tmp_path: Path,
    stub: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    code = sweep.main(["seed=0,1,2,3", f"out_dir={tmp_path}/runs", "workers=2"], stub)
    assert code == sweep.FAILED
    printed = capsys.readouterr()
    assert printed.out.count("  finished") == 3
    assert "seed1  FAILED (exit code 2): error: out of luck" in printed.out
    assert "3 of 4 runs finished" in printed.out
    assert printed.err == "error: 1 failed: seed1\n"
    notes = [(tmp_path / "runs" / f"seed{seed}" / "port").read_text() for seed in range(4)]
    assert len(set(notes)) == 4  # a port of its own for each
    assert {note.split()[1] for note in notes} == {os.environ.get("OMP_NUM_THREADS", "1")}
    gpus = [(tmp_path / "runs" / f"seed{seed}" / "gpu").read_text() for seed in range(4)]
    assert gpus[:2] == ["3", "5"]  # these two run side by side


def test_sigterm_lets_running_ones_save_and_starts_no_more(
    tmp_path: Path, stub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ready = tmp_path / "runs" / "seed9" / "ready"

    def stop_when_ready() -> None:
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop_when_ready)
    thread.start()
    code = sweep.main(["seed=9,0", f"out_dir={tmp_path}/runs", "workers=1"], stub)
    thread.join()
    assert code == sweep.STOPPED
    assert "seed9  stopped" in capsys.readouterr().out
    assert not (tmp_path / "runs" / "seed0").exists()
