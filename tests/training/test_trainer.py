import copy
import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_treeflash import TreeFlashDraftModel
from hf_treeflash.training import TreeFlashTrainingArguments, measure_block_efficiency
from hf_treeflash.training.adapters import LORA_TARGET_MODULES
from tests.families.hybrids import HYBRIDS
from tests.helpers.tiny import prompt, tiny_drafter

from .conftest import make_drafter, make_samples


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed(before: dict, after: dict) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def with_lora(drafter):
    torch.manual_seed(3)
    return get_peft_model(drafter, LoraConfig(task_type=None, r=4, lora_alpha=8, target_modules=LORA_TARGET_MODULES))


def test_head_stage_starts_as_the_marginal_drafter_and_leaves_the_backbone(train, samples):
    drafter = make_drafter()
    before = weights(drafter)
    trainer = train(drafter, samples, stage="head", max_steps=3, eval_dataset=samples, eval_strategy="steps",
                    eval_steps=3, eval_on_start=True)  # fmt: skip
    start = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    for metric in ("accuracy", "simulated_block_efficiency", "accuracy_slot_3"):
        assert start[f"eval_{metric}"] == start[f"eval_base_{metric}"]
    assert changed(before, weights(drafter)) == {name for name in before if name.startswith("ar_head.")}


HEADS = [
    {"ar_head": "markov", "head_rank": 6},
    {"ar_head": "markov", "head_rank": 6, "head_gated": True},
    {"ar_head": "selector", "head_rank": 6, "selector_top_k": 8},
]


@pytest.mark.parametrize("fields", HEADS, ids=str)
def test_heads_of_token_vectors_train_in_the_same_way(train, samples, fields):
    drafter = make_drafter(**fields)
    before = weights(drafter)
    trainer = train(drafter, samples, stage="head", max_steps=30, eval_dataset=samples, eval_strategy="steps",
                    eval_steps=30, eval_on_start=True)  # fmt: skip
    start, end = (entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert start["eval_accuracy"] == start["eval_base_accuracy"]  # it starts as the marginal drafter
    assert end["eval_loss"] < start["eval_loss"] - 1e-3
    assert changed(before, weights(drafter)) == {name for name in before if name.startswith("ar_head.")}


def test_the_joint_stage_trains_them_and_the_convolutions(train, samples):
    drafter = make_drafter(trained=True, conv_kernel_size=2, **HEADS[0])
    before = weights(drafter)
    train(drafter, samples, stage="joint")
    assert changed(before, weights(drafter)) == set(before)


@torch.no_grad()
def test_an_untrained_head_changes_no_bit():
    drafter = make_drafter()
    noise, context = torch.randn(2, 8, 32), torch.randn(2, 5, 96)
    outputs = drafter(noise, context, previous_embeds=torch.randn(2, 8, 32))
    assert torch.equal(outputs.corrected_hidden_state, outputs.last_hidden_state)


def test_backbone_stage_leaves_the_head(train, samples):
    drafter = make_drafter()
    before = weights(drafter)
    train(drafter, samples, stage="backbone")
    assert changed(before, weights(drafter)) == {name for name in before if not name.startswith("ar_head.")}


def test_joint_stage_trains_both_and_keeps_a_floor_under_the_marginals(train, samples):
    drafter = make_drafter(trained=True)
    before = weights(drafter)
    trainer = train(drafter, samples, stage="joint", weight_decay=0.1)
    assert changed(before, weights(drafter)) == set(before)
    rates = {group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert sorted(rates) == pytest.approx([1e-3, 1e-2])
    with pytest.raises(ValueError, match=r"at least 0\.2"):
        TreeFlashTrainingArguments(stage="joint", marginal_loss_weight=0.1)


@pytest.mark.parametrize("adapted", [False, True])
def test_accumulated_micro_batches_equal_one_batch(train, samples, adapted):
    def trained(batch_size: int, accumulation: int) -> dict:
        drafter = make_drafter(trained=True)
        drafter = with_lora(drafter) if adapted else drafter
        train(drafter, samples, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation,
              optim="sgd", max_steps=2, num_anchors=64)  # fmt: skip
        return weights(drafter)

    whole, parts = trained(8, 1), trained(2, 4)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, msg=name)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(train, tmp_path, adapted):
    data = make_samples(24)

    def drafter():
        return with_lora(make_drafter(trained=True)) if adapted else make_drafter(trained=True)

    options = {"max_steps": 8, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 5}
    options |= {"stage": "head"}  # 6 steps an epoch: the second epoch draws other anchors
    uninterrupted, resumed = drafter(), drafter()
    train(uninterrupted, data, output_dir=str(tmp_path / "a"), **options)
    train(resumed, data, output_dir=str(tmp_path / "b"), resume=str(tmp_path / "a" / "checkpoint-5"), **options)
    assert changed(weights(uninterrupted), weights(resumed)) == set()
    assert changed(weights(uninterrupted), weights(drafter()))


def test_the_best_checkpoint_is_chosen_by_real_block_efficiency(train, target, tmp_path):
    data, prompts = make_samples(16), [sample["input_ids"][:6] for sample in make_samples(3)]
    drafter = make_drafter()
    trainer = train(
        drafter, data, max_steps=4, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        eval_dataset=data[:4], eval_prompts=prompts, eval_max_new_tokens=8, load_best_model_at_end=True,
        metric_for_best_model="eval_block_efficiency", greater_is_better=True,
    )  # fmt: skip
    logged = [entry["eval_block_efficiency"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.best_metric == max(logged)
    emitted, passes = measure_block_efficiency(target, drafter, prompts, max_new_tokens=8)
    assert emitted / passes == pytest.approx(max(logged))
    best = Path(trainer.state.best_model_checkpoint)
    assert (best / "command.txt").read_text().startswith("python ")
    again = TreeFlashDraftModel.from_pretrained(best)
    assert changed(weights(drafter), weights(again)) == set()
    assert again.generation_config.tree_budget == drafter.generation_config.tree_budget


def test_block_efficiency_is_the_same_in_batches(target):
    drafter, lengths = make_drafter(trained=True), (4, 9, 6, 5, 7)
    prompts = [sample["input_ids"][:length] for sample, length in zip(make_samples(5), lengths, strict=True)]
    alone = measure_block_efficiency(target, drafter, prompts, max_new_tokens=12)
    assert measure_block_efficiency(target, drafter, prompts, max_new_tokens=12, batch_size=3) == alone


def test_loss_falls_on_a_toy_task(train):
    # Counting: the target plays no part in the cross-entropy, the previous token tells all.
    data = [{"input_ids": [2 + (start + i) % 60 for i in range(24)], "prompt_length": 2} for start in range(32)]
    trainer = train(make_drafter(), data, stage="joint", loss="cross_entropy", max_steps=40,
                    backbone_learning_rate_scale=1.0)  # fmt: skip
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    assert trainer.state.log_history[-2]["accuracy"] > 0.9


def test_a_target_with_recurrent_layers_is_trained_for(train):
    """Its drafter learns the target's own texts, and the texts stay plain decoding's."""
    (family,) = (family for family in HYBRIDS if family.name == "Qwen3.5")
    hybrid, drafter = family.build().requires_grad_(False), tiny_drafter(target_layer_ids=[0, 2, 3])
    settings = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    texts = hybrid.generate(prompt(6, batch=16), **settings)
    samples = [{"input_ids": text, "prompt_length": 6} for text in texts.tolist()]

    def block_efficiency() -> float:
        output = hybrid.generate(
            prompt(6, batch=16),
            assistant_model=drafter.eval(),
            return_dict_in_generate=True,
            **settings | {"eos_token_id": [1]},
        )
        return output.block_efficiency

    before = block_efficiency()
    trainer = train(drafter, samples, target=hybrid, stage="joint", max_steps=60)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert block_efficiency() > before + 0.3
    assert torch.equal(hybrid.generate(prompt(6, batch=16), assistant_model=drafter, **settings), texts)


def test_a_bf16_drafter_trains_in_float32_weights(train, samples):
    drafter = make_drafter().to(torch.bfloat16)
    with pytest.raises(ValueError, match="bf16=True"):
        train(copy.deepcopy(drafter), samples)
    before = weights(drafter)
    prompts = [samples[0]["input_ids"][:6]]
    trainer = train(drafter, samples, bf16=True, eval_dataset=samples[:4], eval_prompts=prompts,
                    eval_max_new_tokens=4, eval_strategy="steps", eval_steps=4)  # fmt: skip
    assert {p.dtype for p in drafter.ar_head.parameters()} == {torch.float32}
    assert drafter.fc.weight.dtype == torch.bfloat16
    after = weights(drafter)
    assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith("ar_head."))
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(math.isfinite(entry["loss"]) for entry in logs)
    assert any("eval_block_efficiency" in entry for entry in trainer.state.log_history)


def test_wrong_arguments_are_named(target, train, samples):
    for options, name in (({"stage": "all"}, "stage"), ({"loss": "mse"}, "loss")):
        with pytest.raises(ValueError, match=f"`{name}`"):
            TreeFlashTrainingArguments(**options)
    with pytest.raises(ValueError, match="needs a head"):
        train(make_drafter(head=False), samples, stage="head")


def test_training_metrics_are_logged(train, samples, tmp_path):
    trainer = train(make_drafter(), samples, stage="joint", output_dir=str(tmp_path))
    entry = trainer.state.log_history[0]
    names = {"accuracy", "base_accuracy", "candidate_recall", "simulated_block_efficiency"}
    assert names <= set(entry) and json.dumps(entry)
