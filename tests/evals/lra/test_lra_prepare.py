"""Examples on disk are those that were drawn: no two alike, the same for any number of workers."""

import json

import numpy as np
import pytest

from data.folder_lock import lock_folder
from evals.lra.examples import Examples
from evals.lra.files import Text
from evals.lra.listops import ListOps
from evals.lra.prepare import SPLITS, generate, prepare

# Few enough expressions that many are drawn twice.
TINY = ListOps(max_depth=2, max_args=3, min_length=3, max_length=6)
SIZES = (700, 40, 30)


def ragged(rng, n, per_example=1):
    sequences = [
        rng.integers(256, size=size, dtype=np.uint8).tobytes()
        for size in rng.integers(1, 9, n * per_example)
    ]
    return Examples.of(sequences, rng.integers(10, size=n)), sequences


@pytest.mark.parametrize("per_example", [1, 2])
def test_taking_joining_padding_and_saving_keep_every_sequence(per_example, tmp_path):
    rng = np.random.default_rng(0)
    (a, in_a), (b, in_b) = (ragged(rng, n, per_example) for n in (5, 3))
    joined = Examples.join([a, b])
    joined.save(tmp_path)
    loaded = Examples.load(tmp_path)
    assert loaded.per_example == per_example
    every = in_a + in_b
    assert [loaded.sequence(s).tobytes() for s in range(len(every))] == every
    indices = np.array([6, 0, 3])
    chosen = loaded.take(indices)
    wanted = [every[per_example * i + k] for i in indices for k in range(per_example)]
    assert [chosen.sequence(s).tobytes() for s in range(len(wanted))] == wanted
    assert chosen.labels.tolist() == joined.labels[indices].tolist()
    longest = chosen.lengths().max()
    rows, lengths = chosen.padded([longest - 1, longest, longest + 4])
    assert rows.shape[1] == longest
    assert [row[:n].tobytes() for row, n in zip(rows, lengths, strict=True)] == wanted
    assert all((row[n:] == 0).all() for row, n in zip(rows, lengths, strict=True))
    assert joined.first(5).symbols.tobytes() == a.symbols.tobytes()


def test_no_example_comes_twice_nor_in_two_splits():
    splits = generate(TINY, SIZES, seed=0, workers=1)
    assert tuple(len(splits[split].labels) for split in SPLITS) == SIZES
    drawn = [
        part.sequence(s).tobytes() for part in splits.values() for s in range(len(part.labels))
    ]
    assert len(set(drawn)) == len(drawn) == sum(SIZES)


def test_a_folder_is_filled_once_and_refuses_other_settings(tmp_path, monkeypatch):
    given = {"sizes": SIZES, "seed": 0, "source": None, "workers": 1}
    hashes = prepare(TINY, tmp_path, **given)
    assert set(hashes) == set(SPLITS)
    assert json.loads((tmp_path / "data.json").read_text())["settings"]["max_args"] == 3
    monkeypatch.setattr("evals.lra.prepare.generate", None)  # not called again
    assert prepare(TINY, tmp_path, **given) == hashes
    with pytest.raises(ValueError, match=r"holds .*'seed': 0.* and not .*'seed': 1"):
        prepare(TINY, tmp_path, **(given | {"seed": 1}))


def test_a_folder_that_another_command_fills_is_left_alone_until_it_is_full(tmp_path):
    given = {"sizes": SIZES, "seed": 0, "source": None, "workers": 1}
    with lock_folder(tmp_path, AssertionError()):
        with pytest.raises(ValueError, match="another command is filling it; wait for it"):
            prepare(TINY, tmp_path, **given)
        assert not list(tmp_path.iterdir())
    hashes = prepare(TINY, tmp_path, **given)
    with lock_folder(tmp_path, AssertionError()):  # reading needs no lock
        assert prepare(TINY, tmp_path, **given) == hashes


def test_published_data_need_a_source(tmp_path):
    with pytest.raises(ValueError, match="source= is missing: the folder of the published Text"):
        prepare(Text(), tmp_path, sizes=(), seed=0, source=None, workers=1)


@pytest.mark.slow
def test_any_number_of_workers_draws_the_same():
    one, two = (generate(ListOps(), (600, 20, 20), seed=0, workers=n) for n in (1, 2))
    for split in SPLITS:
        for a, b in zip(one[split], two[split], strict=True):
            np.testing.assert_array_equal(a, b)
