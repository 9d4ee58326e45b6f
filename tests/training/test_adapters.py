"""Every way to an adapted drafter drafts the same, and adapters that cannot learn are refused."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel

from hf_treeflash import TreeFlashDraftModel
from hf_treeflash.training.adapters import LORA_TARGET_MODULES, forget_base_path

from .conftest import make_drafter, make_samples

PROMPT = torch.tensor([make_samples(1)[0]["input_ids"][:8]])


def lora(**options) -> LoraConfig:
    return LoraConfig(task_type=None, r=4, lora_alpha=8, target_modules=LORA_TARGET_MODULES, **options)


def generate(target, drafter, max_new_tokens=20):
    return target.generate(
        PROMPT, assistant_model=drafter, max_new_tokens=max_new_tokens, do_sample=False, return_dict_in_generate=True
    )


@pytest.fixture
def base_folder(tmp_path):
    make_drafter(trained=True).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapters(base_folder, train, tmp_path):
    """Two trained adapters of the drafter in `base_folder`."""
    folders = []
    for name, seed in (("first", 5), ("second", 6)):
        torch.manual_seed(seed)
        adapted = get_peft_model(TreeFlashDraftModel.from_pretrained(base_folder), lora())
        train(adapted, make_samples(16), stage="joint", learning_rate=0.1, output_dir=str(tmp_path / "t"), seed=seed)
        adapted.save_pretrained(tmp_path / name)
        folders.append(tmp_path / name)
    return folders


@torch.no_grad()
def drafted(drafter) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    noise, context, previous = (torch.randn(1, n, w, generator=generator) for n, w in ((4, 32), (6, 96), (4, 32)))
    return drafter(noise, context, previous_embeds=previous).corrected_hidden_state


def test_target_modules_are_projections_of_layers_and_head():
    adapted = get_peft_model(make_drafter(trained=True), lora())
    names = {name.split(".lora_A")[0].removeprefix("base_model.model.") for name, _ in adapted.named_modules()
             if name.endswith("lora_A")}  # fmt: skip
    attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    expected = {f"layers.{i}.self_attn.{name}" for i in range(2) for name in attention}
    expected |= {f"layers.{i}.mlp.{name}" for i in range(2) for name in mlp}
    assert names == expected | {"ar_head.up_gate_proj", "ar_head.down_proj"}


def test_every_route_to_an_adapter_gives_the_same_drafter(target, base_folder, adapters, tmp_path):
    first, second = adapters
    wrapped = PeftModel.from_pretrained(TreeFlashDraftModel.from_pretrained(base_folder), first, adapter_name="first")
    wrapped.load_adapter(second, adapter_name="second")
    auto = {folder.name: AutoModel.from_pretrained(folder) for folder in adapters}
    assert all(type(drafter) is TreeFlashDraftModel for drafter in auto.values())
    plain = target.generate(PROMPT, max_new_tokens=20, do_sample=False)
    for name in ("first", "second", "first"):  # switched per call
        wrapped.set_adapter(name)
        torch.testing.assert_close(drafted(wrapped), drafted(auto[name]))
        by_wrapped, by_auto = generate(target, wrapped), generate(target, auto[name])
        assert torch.equal(by_wrapped.sequences, plain) and torch.equal(by_auto.sequences, plain)
        assert by_wrapped.acceptance_lengths == by_auto.acceptance_lengths
    assert not torch.allclose(drafted(auto["first"]), drafted(auto["second"]))
    assert not torch.allclose(drafted(auto["first"]), drafted(make_drafter(trained=True)))

    wrapped.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = TreeFlashDraftModel.from_pretrained(tmp_path / "merged")
    assert set(merged.state_dict()) == set(make_drafter().state_dict())
    torch.testing.assert_close(drafted(merged), drafted(auto["first"]), atol=1e-4, rtol=1e-4)


def test_adapters_are_small_and_name_no_folder(base_folder, adapters):
    folder = adapters[0]
    weights = (folder / "adapter_model.safetensors").stat().st_size
    assert weights < 0.6 * (base_folder / "model.safetensors").stat().st_size
    forget_base_path(folder, "someone/their-drafter")
    assert (
        json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "someone/their-drafter"
    )
    for file in ("adapter_config.json", "README.md"):
        assert str(base_folder) not in (folder / file).read_text()


@pytest.mark.parametrize("options, name", [({"use_dora": True}, "DoRA"), ({"init_lora_weights": "pissa"}, "PiSSA")])
def test_adapters_that_cannot_learn_on_an_untrained_head_are_refused(train, samples, options, name):
    with pytest.raises(ValueError, match=f"{name} on an untrained AR head"):
        train(get_peft_model(make_drafter(), lora(**options)), samples)
    train(get_peft_model(make_drafter(trained=True), lora(**options)), samples, max_steps=1)


def test_the_mixin_adapter_trains_too(train, samples, attaching_peft):
    drafter = make_drafter(trained=True)
    before = drafted(drafter)
    drafter.add_adapter(lora(), "domain")
    train(drafter, samples, stage="joint")
    assert not torch.allclose(drafted(drafter), before)
    drafter.disable_adapters()
    torch.testing.assert_close(drafted(drafter), before)
