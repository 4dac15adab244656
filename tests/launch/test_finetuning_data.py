"""Which examples a fine-tuning reads where fewer are asked for."""

import pytest

from evals.downstream.examples import Example
from evals.downstream.tasks import Splits
from launch.finetuning_data import limited


@pytest.mark.parametrize("count", range(1, 12))
def test_fewer_examples_are_those_of_lowest_rank_in_their_order(count: int) -> None:
    """Some stand in the file more than once, and put out none of a lower rank."""
    texts = [f"{number * 7 % 5}" for number in range(9)] + ["last", "0"]
    examples = [Example(str(row), text, ("a",)) for row, text in enumerate(texts)]
    splits = Splits(examples, examples, {"test": examples})
    found = limited(splits, train=count, validation=0, test=count)
    assert sorted(e.rank() for e in found.train) == sorted(e.rank() for e in examples)[:count]
    assert found.train == [example for example in examples if example in found.train]
    assert found.validation == examples
    assert found.tests == {"test": found.train}
