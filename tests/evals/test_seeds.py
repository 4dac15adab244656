"""Seeds of one recipe are one row: their mean, with the spread between seeds stated apart."""

import dataclasses

import numpy as np
import pytest
from scipy.stats import ttest_ind

from evals import compare, report, seeds, stats
from evals.perplexity import suite as perplexity
from evals.perplexity.suite import PerplexityOptions
from pretrain.config import RunConfig
from tests.evals.toy_models import Bigram, markov_documents

OPTIONS = PerplexityOptions(contexts=(16, 64), protocols=("fixed", "stream"), stream_tokens=100)
DOCUMENTS, TABLE = markov_documents([300] * 20, vocab_size=12)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    out = tmp_path_factory.mktemp("base")
    perplexity.run(
        Bigram(TABLE), DOCUMENTS, OPTIONS, out, name="base", train_length=32, progress=False
    )
    return compare.load(out)


def trained(base, row, seed, shift):
    """The run as another training whose losses are `shift` nat per token higher everywhere."""
    tables = {
        name: dataclasses.replace(table, nll=table.nll + np.float32(shift))
        for name, table in base.tables.items()
    }
    model = {**base.result["model"], "recipe_sha256": row, "seed": seed, "trained_steps": 9}
    name = f"{row}_seed{seed}"
    return compare.EvalRun(name, {**base.result, "name": name, "model": model}, tables)


def test_runs_that_differ_in_the_seed_alone_are_one_row_with_the_mean_of_their_losses(base):
    shifts = (0.0, 0.1, 0.5)
    runs = [trained(base, "swa", seed, shift) for seed, shift in enumerate(shifts)]
    other = trained(base, "bst", 0, 0.3)
    row, alone = seeds.group([runs[0], other, *runs[1:]])
    assert (row.name, alone.name) == ("swa", "bst_seed0")
    assert row.seeds == tuple(runs)
    assert row.level("stream-100", "nll") == pytest.approx(
        base.level("stream-100", "nll") + 0.2, abs=1e-6
    )
    (nll,) = [m for m in row.result["metrics"] if (m["name"], m["protocol"]) == ("nll", "stream")]
    assert nll["value"] == pytest.approx(row.level("stream-100", "nll"))


def test_other_recipes_and_repeated_seeds_stay_apart(base):
    again = dataclasses.replace(trained(base, "swa", 0, 0.1), name="again")
    runs = [trained(base, "swa", 0, 0.0), again, base]
    assert seeds.group(runs) == runs


def test_a_recipe_is_everything_but_seed_name_and_what_is_written():
    config, other = RunConfig(), RunConfig(seed=3, name="b", out_dir="elsewhere")
    other.logging.every_steps = 99
    assert seeds.recipe_sha256(config) == seeds.recipe_sha256(other)
    other.optim.learning_rate *= 2
    assert seeds.recipe_sha256(config) != seeds.recipe_sha256(other)


def test_a_key_that_comes_later_leaves_older_recipes_alone(monkeypatch):
    @dataclasses.dataclass
    class LaterConfig(RunConfig):
        later: int = 7

    before = seeds.recipe_sha256(RunConfig())
    monkeypatch.setattr("pretrain.config.RunConfig", LaterConfig)
    assert seeds.recipe_sha256(LaterConfig()) == before
    assert seeds.recipe_sha256(LaterConfig(later=8)) != before


def test_a_difference_that_seeds_could_make_is_said_to_be_within_seeds(base):
    """Both differ alike on documents; only of one pair do the seeds agree."""
    for spread, words in ((0.001, "a better"), (0.5, "a better (within seeds)")):
        a, b = seeds.group(
            [
                trained(base, row, seed, shift + spread * (seed - 1))
                for row, shift in (("a", 0.0), ("b", 0.1))
                for seed in range(3)
            ]
        )
        ((_, _, verdicts),) = compare.compare([a, b])
        assert {v.verdict for v in verdicts} == {words}
        (v, *_) = [v for v in verdicts if (v.pass_name, v.metric) == ("stream-100", "nll")]
        levels = [[seed.level("stream-100", "nll") for seed in row.seeds] for row in (a, b)]
        oracle = ttest_ind(*levels, equal_var=False).confidence_interval()
        assert v.between_seeds == pytest.approx((oracle.low, oracle.high))
        assert v.difference.value == pytest.approx(-0.1, abs=1e-6)


def test_seeds_of_many_rows_differ_somewhere_by_chance(base):
    """t = 3.5 with four degrees of freedom: beyond 95 % of one pair, not of three."""
    runs = [
        trained(base, row, seed, shift + 0.035 * (seed - 1))
        for row, shift in (("a", 0.0), ("b", 0.1), ("c", 0.1))
        for seed in range(3)
    ]
    a, b, c = seeds.group(runs)
    (alone,) = compare.compare([a, b])
    assert {v.verdict for v in alone.verdicts} == {"a better"}
    among = compare.compare([a, b, c])[0]
    assert {v.verdict for v in among.verdicts} == {"a better (within seeds)"}
    assert among.verdicts[0].between_seeds == alone.verdicts[0].between_seeds


def test_one_seed_has_no_interval_between_seeds():
    assert stats.welch([1.0, 2.0], [1.0]) is None
    assert stats.welch([1.0, 1.0], [0.5, 0.5]) == (0.5, 0.5)


def test_the_page_states_the_spread_between_seeds_apart(base, tmp_path):
    runs = seeds.group([trained(base, row, s, 0.1 * s) for row in "ab" for s in range(2)])
    page = report.write(runs, tmp_path, compare.compare(runs)).read_text()
    for words in ("between seeds", "bpb of each seed", "within seeds", "±"):
        assert words in page
    assert "a_seed1" in page, "gates, cost and provenance are each training's own"


def test_seeds_evaluated_in_other_ways_are_refused(base):
    runs = [trained(base, "swa", seed, 0.0) for seed in range(2)]
    data = {**base.result["data"], "n_docs": 3}
    runs[1] = dataclasses.replace(runs[1], result={**runs[1].result, "data": data})
    with pytest.raises(ValueError, match=r"swa_seed0 and swa_seed1, seeds .*data.n_docs=20"):
        seeds.group(runs)


def test_what_is_allowed_between_runs_is_allowed_between_seeds_and_said(base):
    runs = [trained(base, "swa", seed, 0.0) for seed in range(2)]
    policy = {**base.result["policy"], "start": "nothing in front"}
    runs[1] = dataclasses.replace(runs[1], result={**runs[1].result, "policy": policy})
    with pytest.raises(ValueError, match="say allow=policy"):
        seeds.group(runs)
    (row,) = seeds.group(runs, allow=["policy"])
    assert row.seeds == tuple(runs)
    (line,) = compare.allowed([row], ["policy"])
    assert line.startswith("policy=")
    assert "nothing in front" in line
    assert line.endswith("of swa_seed1")
