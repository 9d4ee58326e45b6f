"""Which tokens a draft vocabulary holds."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_treeflash import TreeFlashDraftModel
from hf_treeflash.draft_vocabulary import kept_tokens
from hf_treeflash.training.draft_vocabulary import frequent_tokens, response_tokens

from .conftest import make_drafter


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


def test_training_computes_it_and_saves_it(train, samples, tmp_path):
    trainer = train(make_drafter(), samples, draft_vocabulary=20, eval_prompts=[[5, 6, 7]])
    trainer.save_model(str(tmp_path / "saved"))
    saved = TreeFlashDraftModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(kept_tokens(saved.d2t), frequent_tokens(response_tokens(samples), 20))
    again = train(saved, samples)  # goes on, with labels of the whole vocabulary
    assert again.model.config.draft_vocab_size == 20


def test_adapters_cannot_carry_it(train, samples):
    adapted = get_peft_model(make_drafter(), LoraConfig(task_type=None, target_modules=["fc"]))
    with pytest.raises(ValueError, match="`draft_vocabulary` is saved with a drafter, not with adapters"):
        train(adapted, samples, draft_vocabulary=20)
