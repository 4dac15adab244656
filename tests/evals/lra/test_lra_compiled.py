"""Compiled trainings: few lengths that hold everything, and the results of uncompiled ones."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from evals.lra import compiled, train
from evals.lra.compiled import bucket_lengths, verify_blocks
from evals.lra.examples import Examples
from evals.lra.train import TrainOptions, run
from pretrain.models import Encoder, EncoderConfig, LayersConfig
from pretrain.models.block import Block, BlockOutput
from pretrain.training.compiled_blocks import compile_blocks

MIXERS = {
    "s4d": {"n_modes": 3, "chunk_size": 8},
    "swa": {"n_heads": 2, "window_size": 8, "qk_norm": True},
}
LAYERS = LayersConfig(default="s4d", at={1: "swa"})
CONFIG = EncoderConfig(
    n_classes=2, vocab_size=4, d_model=16, n_layers=2, layers=LAYERS, mixers=MIXERS, d_ff=16
)
UNCOMPILED = TrainOptions(steps=6, batch_size=8, check_every=3)
COMPILED = replace(UNCOMPILED, compiler="eager")
CPU = torch.device("cpu")


def noise(n: int, low: int, high: int, seed: int = 0) -> Examples:
    rng = np.random.default_rng(seed)
    rows = [rng.integers(4, size=length, dtype=np.uint8) for length in rng.integers(low, high, n)]
    return Examples.of([row.tobytes() for row in rows], rng.integers(2, size=n))


def splits() -> dict[str, Examples]:
    sizes = {"train": 32, "validation": 12, "test": 20}
    return {name: noise(n, 20, 250, n) for name, n in sizes.items()}


def test_few_lengths_hold_every_example_and_each_of_them_is_needed() -> None:
    parts = [noise(1000, 500, 2000), noise(10, 1990, 2100, 1)]
    lengths = bucket_lengths(parts, 5)
    assert len(lengths) == 5
    assert all(length % 128 == 0 for length in lengths)
    every = np.concatenate([part.lengths() for part in parts])
    assert lengths[-1] - 128 < every.max() <= lengths[-1]
    needed = np.bincount(np.searchsorted(lengths, every), minlength=5)
    assert needed.min() > 0.1 * len(every)  # a fifth each, before they are rounded up


def test_sequences_of_one_length_need_one_length() -> None:
    assert bucket_lengths([noise(20, 1024, 1025)]) == [1024]


def test_longer_rows_change_no_output() -> None:
    torch.manual_seed(0)
    model, examples = Encoder(CONFIG), noise(6, 20, 60)
    outputs = [
        model(torch.from_numpy(rows).long(), torch.from_numpy(ends)).logits
        for rows, ends in (examples.padded([length]) for length in (60, 128, 256))
    ]
    for longer in outputs[1:]:
        torch.testing.assert_close(longer, outputs[0], rtol=1e-5, atol=1e-5)  # order of sums


def test_a_compiled_training_gives_the_same_and_compiles_nothing_after_its_check(
    tmp_path, monkeypatch
) -> None:
    want = run(CONFIG, splits(), 1e-2, 0, UNCOMPILED, CPU, tmp_path / "eager.pt")
    torch._dynamo.reset()
    counters.clear()
    checked: list[dict[str, int]] = []

    def watched(*arguments, **options) -> None:
        verify_blocks(*arguments, **options)
        checked.append(dict(counters["frames"]))

    monkeypatch.setattr(train, "verify_blocks", watched)
    got = run(CONFIG, splits(), 1e-2, 0, COMPILED, CPU, tmp_path / "compiled.pt")
    assert [check["step"] for check in got["history"]] == [3, 6]
    for a, b in zip(got["history"], want["history"], strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert got["test"] == want["test"]
    n_lengths = len(bucket_lengths(splits().values()))
    assert checked == [{"total": 2 * n_lengths, "ok": 2 * n_lengths}]  # two kinds of blocks
    # Training and scoring add the norm behind the blocks.
    assert counters["frames"] == {"total": 3 * n_lengths, "ok": 3 * n_lengths}


def test_a_killed_compiled_training_ends_like_one_that_was_not(tmp_path, monkeypatch) -> None:
    def go(name: str) -> dict:
        result = run(CONFIG, splits(), 1e-2, 0, COMPILED, CPU, tmp_path / name)
        return {key: value for key, value in result.items() if not key.startswith("seconds")}

    whole = go("whole.pt")
    calls: list[int] = []
    true_score = train.score

    def killed(*arguments) -> float:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return true_score(*arguments)

    monkeypatch.setattr(train, "score", killed)
    with pytest.raises(KeyboardInterrupt):
        go("killed.pt")
    assert go("killed.pt") == whole


def test_a_check_accepts_what_is_equal_and_finds_what_is_not(monkeypatch) -> None:
    class Wrong(Block):
        def __call__(self, x: torch.Tensor, **options: torch.Tensor) -> BlockOutput:
            output = self.forward(x, **options)
            return output._replace(added=1.2 * output.added)

    torch._dynamo.reset()
    model = Encoder(replace(CONFIG, n_layers=1, layers=LayersConfig(default="s4d")))
    compile_blocks(model, "aot_eager")
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "COMPILED_ERROR", 1e-5)  # fp32, in another order
        verify_blocks(model, [16], 4)
    model.blocks[0].__class__ = Wrong
    with pytest.raises(ValueError, match=r"the compiled 's4d' block .* at 16 symbols"):
        verify_blocks(model, [16], 4)


def test_the_log_has_a_line_per_check_with_the_speed(tmp_path, capsys) -> None:
    result = run(CONFIG, splits(), 1e-2, 0, UNCOMPILED, CPU, tmp_path / "s4d-seed0.pt")
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert [line.split(" loss ")[0] for line in lines] == [
        "s4d-seed0: step 3/6",
        "s4d-seed0: step 6/6",
    ]
    assert all(line.endswith(" ms/step") for line in lines)
    assert 0 < result["seconds_per_step"] < result["seconds"]
