"""launch/evaluate.py as a user starts it: alone, under torchrun and deepspeed, killed and again."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from launch import evaluate, prepare
from tests.distributed.launching import REPOSITORY, TIMEOUT, finish, free_port, start

SCRIPT = REPOSITORY / "launch" / "evaluate.py"
SENTENCE = "in the beginning was a small corpus of bytes for a test and it was enough, "
MODEL = """
model:
  d_model: 32
  n_layers: 2
  layers: {pattern: [bst, swa]}
  mixers:
    swa: {n_heads: 2, window_size: 16}
    bst: {n_heads: 2, block_size: 16, n_modes: 4, chunk_size: 16}
  d_ff: 64
"""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As many as torchrun gives its processes: results state it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def torchrun(words: list[str], *, processes: int) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*launcher, f"--master_port={free_port()}", str(SCRIPT), *words],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("report.html") == 1, "one process speaks"


def content(folder: Path) -> dict[str, Any]:
    """Of result.json, without time stamps, costs and the folder's own name."""
    result = json.loads((folder / "result.json").read_text())
    return {k: v for k, v in result.items() if k not in ("created", "command", "cost", "name")}


@pytest.mark.distributed
def test_two_processes_write_what_one_writes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=300, **sizes, **heads, max_position_embeddings=128)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    symbols = ["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = tokenizers.Tokenizer(models.BPE({s: k for k, s in enumerate(symbols)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    tokenizer.save_pretrained(tmp_path / "llama")
    for k in range(5):
        (tmp_path / f"{k}.txt").write_text(SENTENCE * (k + 3))

    words = [f"hf={tmp_path}/llama", f"text={tmp_path}/*.txt", "contexts=16,64", "device=cpu"]
    words += ["protocols=fixed,position,nonoverlap"]
    torchrun([*words, f"out={tmp_path}/two"], processes=2)
    assert evaluate.main([*words, f"out={tmp_path}/one"]) == 0
    folders = [tmp_path / name / "eval/perplexity" for name in ("one", "two")]
    assert content(folders[0]) == content(folders[1])
    assert (folders[0] / "curve.csv").read_bytes() == (folders[1] / "curve.csv").read_bytes()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for split, count in (("train", 6), ("validation", 9)):
        texts = [(SENTENCE[i:] + SENTENCE[:i]) * (8 + i) for i in range(count)]
        rows = (json.dumps({"text": text}) for text in texts)
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    words = [f"data={folder}/train.jsonl", f"splits.validation={folder}/validation.jsonl"]
    assert prepare.main([*words, "tokenizer=bytes", f"out={folder}/out", "workers=1"]) == 0
    return folder / "out"


def train(folder: Path, corpus: Path, stage: int) -> Path:
    """A run of two processes, so that ZeRO has something to cut."""
    (folder / "model.yaml").write_text(MODEL)
    words = [f"model={folder}/model.yaml", f"data.path={corpus}", f"out_dir={folder}"]
    words += ["train.seq_len=32", "train.global_batch_tokens=256", "train.micro_batch_size=4"]
    words += ["train.total_tokens=2560", "train.precision=fp32", "eval.documents=0"]
    words += [f"zero.stage={stage}", f"name=stage{stage}"]
    script = REPOSITORY / "launch" / "train.py"
    code, output = finish(start(script, words, processes=2))
    assert code == 0, output[-4000:]
    return folder / f"stage{stage}"


@pytest.mark.slow
@pytest.mark.distributed
def test_runs_of_every_zero_stage_evaluate_alike(tmp_path: Path, corpus: Path) -> None:
    losses = []
    for stage in range(4):
        run = train(tmp_path, corpus, stage)
        assert evaluate.main([f"run={run}", "contexts=16..256", "device=cpu"]) == 0
        metrics = content(run / "eval/perplexity")["metrics"]
        losses.append([m["value"] for m in metrics if m["name"] == "nll"])
    for other in losses[1:]:
        # fp32 sums in other orders, over ten steps.
        assert other == pytest.approx(losses[0], abs=1e-3)


@pytest.mark.slow
@pytest.mark.distributed
def test_killed_and_resumed_by_any_launcher_it_writes_the_same(
    tmp_path: Path, corpus: Path
) -> None:
    run = train(tmp_path, corpus, 1)
    words = [f"run={run}", "contexts=16..256", "device=cpu", "protocols=fixed,stream,sliding"]
    assert evaluate.main([*words, "name=whole"]) == 0
    whole = content(run / "eval/whole")

    process = start(SCRIPT, [*words, "name=killed"], processes=1)
    while process.poll() is None and not list((run / "eval").glob("killed/tokens/parts/*.npz")):
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (run / "eval/killed/result.json").exists(), "killed before it was done"
    torchrun([*words, "name=killed"], processes=4)
    code, output = finish(start(SCRIPT, [*words, "name=deepspeed"], processes=2))
    assert code == 0, output[-4000:]
    for name in ("killed", "deepspeed"):
        assert content(run / "eval" / name) == whole
        assert {path.suffix for path in (run / "eval" / name / "tokens").iterdir()} == {".npz"}
