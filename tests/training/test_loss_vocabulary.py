import pytest
import torch

from hf_treeflash.training.blocks import make_blocks, output_layer_of
from hf_treeflash.training.loss_vocabulary import LossVocabulary
from hf_treeflash.training.losses import score_rows

from .conftest import make_drafter, make_samples
from .test_trainer import changed, weights


def test_drawn_tokens_stand_for_the_others():
    vocabulary = LossVocabulary(torch.tensor([3, 5, 8]), 64, drawn=4)
    torch.manual_seed(0)
    logits, estimates = torch.randn(64), []
    for _ in range(4000):
        token_ids, log_weights = vocabulary.draw()
        assert token_ids[:3].tolist() == [3, 5, 8] and not set(token_ids[3:].tolist()) & {3, 5, 8}
        estimates.append((logits[token_ids] + log_weights).exp().sum())
    assert torch.stack(estimates).mean() == pytest.approx(logits.exp().sum().item(), rel=0.02)
    assert vocabulary.places[torch.tensor([5, 8, 9])].tolist() == [1, 2, -1]


def test_a_vocabulary_of_all_tokens_is_none(target):
    torch.manual_seed(0)
    states, teacher, labels = torch.randn(1, 6, 32), torch.randn(6, 32), torch.randint(0, 64, (6,))
    step = LossVocabulary(torch.arange(64), 64, drawn=4).draw()
    losses = [
        score_rows(output_layer_of(target, vocabulary=v), states, labels, teacher, num_candidates=4, chunk_rows=4)
        for v in (None, step)
    ]
    assert torch.equal(losses[0].loss, losses[1].loss)


def test_training_over_frequent_tokens_resumes_bitwise(train, tmp_path):
    options = {"max_steps": 6, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 3}
    options |= {"stage": "joint", "loss_vocabulary": 20, "loss_drawn_tokens": 6, "target_states": str(tmp_path / "s")}
    options |= {"train_sampling_strategy": "group_by_length", "eval_strategy": "steps", "eval_steps": 2}
    data = make_samples(8) + make_samples(8, length=13)
    whole, resumed = make_drafter(trained=True), make_drafter(trained=True)
    start = weights(whole)
    train(whole, data, output_dir=str(tmp_path / "a"), eval_dataset=data[:2], **options)
    train(resumed, data, output_dir=str(tmp_path / "b"), resume=str(tmp_path / "a" / "checkpoint-3"),
          eval_dataset=data[:2], **options)  # fmt: skip
    assert changed(weights(whole), weights(resumed)) == set()
    assert changed(start, weights(whole)) == set(start)


def test_a_markov_head_trains_over_frequent_tokens_and_a_selector_is_refused(train, samples):
    drafter = make_drafter(ar_head="markov", head_rank=6)
    before = weights(drafter)
    train(drafter, samples, stage="joint", loss_vocabulary=20, loss_drawn_tokens=6)
    assert changed(before, weights(drafter)) == set(before)
    with pytest.raises(ValueError, match="selector"):
        train(make_drafter(ar_head="selector", head_rank=6), samples, stage="head", loss_vocabulary=20)


def test_rows_of_rare_labels_count_for_nothing(train, target):
    data = [{"input_ids": [2, 3, 4, 5] + [6, 7] * 8, "prompt_length": 4} for _ in range(4)]
    rare = [{"input_ids": [2, 3, 4, 5] + [6, 7] * 7 + [40, 41], "prompt_length": 4}]
    trainer = train(make_drafter(), data * 4 + rare, stage="joint", loss_vocabulary=2, max_steps=1)
    assert trainer.loss_vocabulary.frequent.tolist() == [6, 7]
    batch = trainer.data_collator(rare)
    blocks = make_blocks(trainer.model, target, batch, with_head=True)
    _, known = trainer._score(trainer.model, blocks, {"": torch.randn(len(blocks.labels), 32)})
    assert torch.equal(known, blocks.labels < 40)
