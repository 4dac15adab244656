"""Nothing is cut unasked."""

import numpy as np
import pytest

from data.tokenizer import BOS_ID, BytesTokenizer
from pretrain.finetuning.encode import Limits, encode, limits_of
from pretrain.finetuning.prompted import prompted
from tests.pretrain.finetuning.models import MIXERS, language_model

TOKENIZER = BytesTokenizer()


def test_a_text_that_is_too_long_is_an_error_that_says_how_long():
    with pytest.raises(
        ValueError,
        match=r"input of train: 2 of 3 have more than 3 tokens, the "
        r"longest 6; truncate=true cuts off their ends, max_input_tokens=",
    ):
        encode(["abc", "abcd", "abcdef"], TOKENIZER, 3, truncate=False, what="input of train")


def test_ends_are_cut_where_that_is_asked_for_and_counted():
    ids, cut = encode(["abc", "abcd"], TOKENIZER, 3, truncate=True, what="input of train")
    assert (TOKENIZER.decode(ids[1]), cut) == ("abc", 1)
    ids, cut = encode(["x" * 5000], TOKENIZER, 0, truncate=False, what="input of train")
    np.testing.assert_equal((len(ids[0]), cut), (5000, 0))


def test_the_lower_of_two_limits_counts():
    options = {"bst": MIXERS["bst"] | {"filters": "unstructured", "train_length": 32}}
    bounded = prompted(language_model("bst", options=options), BOS_ID)
    unbounded = prompted(language_model("bst"), BOS_ID)
    assert limits_of(bounded, 0, 4, truncate=False) == Limits(26, 4)
    assert limits_of(bounded, 10, 4, truncate=False).input == 10
    assert limits_of(bounded, 100, 4, truncate=False).input == 26
    assert limits_of(unbounded, 0, 4, truncate=False).input == 0
    assert limits_of(unbounded, 100, 4, truncate=False).input == 100
