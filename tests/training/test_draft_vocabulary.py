"""Which tokens a draft vocabulary holds."""

import pytest

from hf_treeflash.training.draft_vocabulary import frequent_tokens, response_tokens


def test_the_most_frequent_tokens_in_ascending_order():
    assert frequent_tokens([[9, 4, 9], [7, 4, 9, 2]], 2).tolist() == [4, 9]
    assert frequent_tokens([[9, 4, 9], [7, 4, 9, 2]], 3).tolist() == [2, 4, 9]  # of 2 and 7, the smaller


def test_small_ids_make_up_the_number():
    assert frequent_tokens([[9, 1, 9]], 5).tolist() == [0, 1, 2, 3, 9]
    assert frequent_tokens([], 2).tolist() == [0, 1]


def test_prompts_do_not_count():
    samples = [{"input_ids": [5, 5, 5, 8, 3], "prompt_length": 3}, {"input_ids": [5, 8], "prompt_length": 1}]
    assert frequent_tokens(response_tokens(samples), 2).tolist() == [3, 8]


@pytest.mark.parametrize("size", [0, -1])
def test_no_tokens_are_no_vocabulary(size):
    with pytest.raises(ValueError, match="`size`: expected a positive number"):
        frequent_tokens([[1]], size)
