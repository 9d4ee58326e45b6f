import torch

from hf_treeflash.training import AnchorCollator


def sample(length: int, prompt_length: int, start: int = 2) -> dict:
    return {"input_ids": list(range(start, start + length)), "prompt_length": prompt_length}


def test_anchors_have_context_and_a_token_to_predict():
    batch = AnchorCollator(pad_token_id=0, num_anchors=64)([sample(10, 4), sample(6, 0)])
    first = batch["anchors"][0][batch["anchor_mask"][0]]
    second = batch["anchors"][1][batch["anchor_mask"][1]]
    assert first.tolist() == [4, 5, 6, 7, 8] and second.tolist() == [1, 2, 3, 4]
    assert batch["input_ids"][1].tolist() == [2, 3, 4, 5, 6, 7, 0, 0, 0, 0]
    assert batch["document_ids"][1].tolist() == [0] * 6 + [-1] * 4
    assert batch["loss_mask"][0].tolist() == [False] * 4 + [True] * 6


def test_anchors_depend_on_sample_epoch_and_seed_only():
    def drawn(*samples, seed=0, epoch=0):
        collator = AnchorCollator(0, num_anchors=5, seed=seed)
        collator.epoch = epoch
        return collator(list(samples))["anchors"]

    mine, other = sample(40, 4), sample(40, 4, start=9)
    torch.manual_seed(5)
    alone = drawn(mine)
    torch.manual_seed(6)
    assert torch.equal(drawn(other, mine)[1], alone[0])
    assert not torch.equal(drawn(mine, epoch=1), alone)
    assert not torch.equal(drawn(mine, seed=1), alone)
    assert torch.equal(alone, alone.sort().values) and len(alone.unique()) == 5


def test_evaluation_takes_a_fixed_stride_and_long_samples_are_cut():
    batch = AnchorCollator(0, max_length=12, stride=3)([sample(40, 4), sample(5, 4)])
    assert batch["anchors"][0].tolist() == [4, 7, 10] and batch["input_ids"].shape == (2, 12)
    assert batch["anchor_mask"].tolist() == [[True, True, True], [False, False, False]]
