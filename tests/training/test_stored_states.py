import pytest
import torch

from hf_treeflash.training import AnchorCollator
from hf_treeflash.training import stored_states as module
from hf_treeflash.training.blocks import target_states
from hf_treeflash.training.stored_states import StoredStates

from .conftest import make_drafter, make_samples, make_target
from .test_trainer import changed, weights

LAYERS = [0, 2, 3]


def ids(count: int, **options) -> list[list[int]]:
    return [sample["input_ids"] for sample in make_samples(count, **options)]


def test_kept_states_are_those_of_a_fresh_pass_bit_for_bit(target, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 20000)  # several shards
    samples = ids(3) + ids(3, length=11)
    StoredStates(tmp_path, target, LAYERS, torch.float32).add(samples)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    states = StoredStates(tmp_path, target, LAYERS, torch.float32)  # from disk alone
    for sample in samples[::-1]:
        taps, final = target_states(target, torch.tensor([sample]), LAYERS)
        for kept, fresh in zip(states(sample), (taps[0], final[0]), strict=True):
            assert torch.equal(kept, fresh)
    half = StoredStates(tmp_path / "half", target, LAYERS)
    half.add(samples)
    assert torch.equal(half(samples[0])[0], states(samples[0])[0].bfloat16())


def test_samples_are_computed_once(target, tmp_path, monkeypatch):
    states, passes = StoredStates(tmp_path, target, LAYERS), []
    monkeypatch.setattr(module, "target_states", lambda *args: passes.append(1) or target_states(*args))
    states.add(ids(2) + ids(2))
    assert len(passes) == 2
    again = StoredStates(tmp_path, target, LAYERS)
    again.add(ids(5))
    assert len(passes) == 2 + 1 + 3  # one known sample is looked at again


def test_states_of_anything_else_are_refused(target, tmp_path):
    StoredStates(tmp_path, target, LAYERS).add(ids(1))
    with pytest.raises(ValueError, match=r"holds states of .*bfloat16.*wanted are .*float32"):
        StoredStates(tmp_path, target, LAYERS, torch.float32)
    with pytest.raises(ValueError, match="wanted are"):
        StoredStates(tmp_path, target, [1, 2, 3])
    other = make_target()
    torch.nn.init.normal_(other.model.layers[1].mlp.down_proj.weight)
    with pytest.raises(ValueError, match="another target"):
        StoredStates(tmp_path, other, LAYERS).add(ids(2))


def test_a_batch_carries_the_states_of_its_rows(target, tmp_path):
    states = StoredStates(tmp_path, target, LAYERS, torch.float32)
    samples = make_samples(1) + make_samples(1, length=12)
    states.add(sample["input_ids"][:16] for sample in samples)
    batch = AnchorCollator(0, num_anchors=4, max_length=16, states=states)(samples)
    taps, final = target_states(target, batch["input_ids"], LAYERS)
    inside = batch["document_ids"] == 0
    torch.testing.assert_close(batch["taps"][inside], taps[inside])
    torch.testing.assert_close(batch["final"][inside], final[inside])
    assert batch["taps"].shape == taps.shape and not batch["taps"][~inside].any()


def test_training_from_kept_states_equals_training_from_fresh_ones(train, target, tmp_path, monkeypatch):
    def trained(**options):
        drafter = make_drafter(trained=True)
        # One sample a batch: the same passes, hence the same bits.
        train(drafter, make_samples(4), stage="joint", per_device_train_batch_size=1, **options)
        return weights(drafter)

    fresh = trained()
    kept = {"target_states": str(tmp_path / "states"), "target_states_dtype": "float32"}
    assert changed(fresh, trained(**kept)) == set()
    monkeypatch.setattr("hf_treeflash.training.blocks.target_states", lambda *args: pytest.fail("the target ran"))
    trained(**kept)
    with pytest.raises(ValueError, match="whole target"):
        trained(**kept, shard_target=True)
