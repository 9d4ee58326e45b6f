"""Targets whose pass over a tree is not their step-by-step pass: found out, and drafted for only where exact."""

import copy
import inspect

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, Phi3Config
from transformers.utils import logging

from hf_treeflash import probe
from hf_treeflash.compat import CACHE
from hf_treeflash.lengths import ENDLESS, Lengths
from hf_treeflash.memory import forget
from tests.families.models import FAMILIES
from tests.helpers.tiny import SHAPE, prompt, tiny_drafter, tiny_target, with_knobs

LONG = {
    "rope_type": "longrope",
    "factor": 4.0,
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 20,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 3.0, 4.0, 5.0],
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
GREEDY = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": None, "pad_token_id": 2}
# Targets that change at the 20th token: config class and fields.
SWITCHING = {
    "longrope": (LlamaConfig, {"rope_parameters": LONG}),
    "dynamic": (LlamaConfig, {"rope_parameters": DYNAMIC, "max_position_embeddings": 20}),
    "Phi-3, longrope": (Phi3Config, {"rope_parameters": LONG, "original_max_position_embeddings": 20}),
    "Phi-3, default": (Phi3Config, {"original_max_position_embeddings": 20}),
}


def switching(kind: str):
    config_class, fields = SWITCHING[kind]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_class(**{**SHAPE, **copy.deepcopy(fields)})).eval()


def drafter(**knobs):
    return with_knobs(tiny_drafter(), **{"tree_budget": 24, **knobs})


def sizes_of_passes(target) -> list[int]:
    """Return a list that grows by the number of tokens of each of the target's passes."""
    sizes: list[int] = []

    def note(module, args, kwargs):
        sizes.append(kwargs["input_ids"].shape[1])

    target.register_forward_pre_hook(note, with_kwargs=True)
    return sizes


@pytest.mark.parametrize("length", [10, 18, 19, 20, 21, 25])
@pytest.mark.parametrize("kind", SWITCHING)
def test_text_across_a_switch(kind, length):
    ids = prompt(length)
    plain = switching(kind).generate(ids, **GREEDY)
    assert torch.equal(plain, switching(kind).generate(ids, assistant_model=drafter(), **GREEDY))


def test_trees_stand_on_both_sides_of_a_switch():
    target = switching("longrope")
    sizes = sizes_of_passes(target)
    target.generate(prompt(10), assistant_model=drafter(), **GREEDY)
    border = sizes.index(24)  # the first whole tree stands behind the switch
    assert max(sizes[1:border]) == 10  # before it trees shrink to the columns that are left
    assert sizes[border - 3 : border] == [3, 1, 1]  # and behind it the target is looked at anew


def test_dynamic_frequencies_are_decoded_token_by_token_behind_their_length():
    target = switching("dynamic")
    sizes = sizes_of_passes(target)
    target.generate(prompt(10), assistant_model=drafter(), **GREEDY)
    assert max(sizes[:12]) == 10 and set(sizes[-25:]) == {1}


@pytest.mark.parametrize("kind", SWITCHING)
def test_sampled_text_across_a_switch(kind):
    settings = {**GREEDY, "do_sample": True, "temperature": 0.8}
    texts = []
    for assistant in ({}, {"assistant_model": drafter()}):
        target = switching(kind)
        torch.manual_seed(3)
        texts.append(target.generate(prompt(12), **settings, **assistant))
    assert torch.equal(*texts)


@pytest.mark.parametrize("kind", SWITCHING)
def test_batches_that_may_meet_a_switch(kind):
    ids, mask = prompt(12, batch=3), torch.ones(3, 12, dtype=torch.long)
    ids[1, :4], mask[1, :4] = 2, 0
    for new in (6, 30):  # up to the switch, and beyond
        settings = {**GREEDY, "max_new_tokens": new, "attention_mask": mask, "return_dict_in_generate": True}
        plain = switching(kind).generate(ids, **settings)
        tree = switching(kind).generate(ids, assistant_model=drafter(), **settings)
        assert torch.equal(plain.sequences, tree.sequences)
        assert tree.block_efficiency >= 1


@pytest.mark.parametrize("kind", SWITCHING)
def test_padded_prompt_across_a_switch(kind):
    ids, mask = prompt(12), torch.ones(1, 12, dtype=torch.long)
    ids[0, :3], mask[0, :3] = 2, 0
    plain = switching(kind).generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(plain, switching(kind).generate(ids, attention_mask=mask, assistant_model=drafter(), **GREEDY))


@pytest.mark.parametrize("kind", SWITCHING)
def test_a_switch_in_the_second_turn(kind):
    if kind.startswith("Phi-3") and CACHE == "past_key_values":
        pytest.skip("before transformers 5.24 Phi-3 drops what a given cache holds behind its switch, mask aside")
    settings = {**GREEDY, "max_new_tokens": 7, "return_dict_in_generate": True}
    texts = []
    for assistant in ({}, {"assistant_model": drafter()}):
        target, turn, ids = switching(kind), None, prompt(8)
        for _ in range(3):
            past = {} if turn is None else {CACHE: turn[CACHE]}
            turn = target.generate(ids, **past, **settings, **assistant)
            ids = torch.cat([turn.sequences, prompt(2, seed=9)], dim=1)
        texts.append(ids)
    assert torch.equal(*texts)


class Planted(LlamaForCausalLM):
    """A target with a fault that its config says nothing of."""

    def forward(self, input_ids=None, position_ids=None, attention_mask=None, **kwargs):
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": attention_mask, **kwargs}
        self.before(inputs)
        outputs = super().forward(**inputs)
        self.after(inputs, outputs)
        return outputs

    def before(self, inputs):
        pass

    def after(self, inputs, outputs):
        pass


Planted.forward.__signature__ = inspect.signature(LlamaForCausalLM.forward)


class PassSize(Planted):
    def after(self, inputs, outputs):
        outputs.logits[..., 5] += 0.01 * inputs["input_ids"].shape[1]


class PassSizeInside(Planted):
    def before(self, inputs):
        self.model.norm.variance_epsilon = 1e-6 if inputs["input_ids"].shape[1] == 1 else 0.05


class WithoutMask(Planted):
    def before(self, inputs):
        if isinstance(inputs["attention_mask"], torch.Tensor) and inputs["attention_mask"].ndim == 4:
            inputs["attention_mask"] = None


class WithoutPositions(Planted):
    def before(self, inputs):
        inputs["position_ids"] = None


class EndOfPass(Planted):
    """What it does to a token hangs on how far that is from the end of the pass, as with invocation tokens."""

    def after(self, inputs, outputs):
        outputs.logits[:, :-1] *= 1.01


class Counting(Planted):
    calls = 0

    def after(self, inputs, outputs):
        self.calls += 1
        outputs.logits[..., 5] += 0.1 * self.calls


class Remembering(Planted):
    def after(self, inputs, outputs):
        last = getattr(self, "last", outputs.logits.new_zeros(()))
        self.last = outputs.logits[:, -1].mean().detach()
        outputs.logits[..., 5] += last


class Noisy(Planted):
    def after(self, inputs, outputs):
        outputs.logits += 0.1 * torch.randn_like(outputs.logits)


FAULTY = {
    PassSize: "what else is in its pass",
    PassSizeInside: "what else is in its pass",
    WithoutMask: "does not see just its ancestors",
    WithoutPositions: "does not stand where its depth says",
    EndOfPass: "what else is in its pass",
    Counting: "keeps a state",
    Remembering: "keeps a state",
    Noisy: "draws random numbers",
}


def planted(kind, **fields):
    torch.manual_seed(0)
    return kind(LlamaConfig(**{**SHAPE, **fields})).eval()


@pytest.mark.parametrize(("kind", "reason"), FAULTY.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_faulty_target_is_refused_by_name_and_left_as_it_was(kind, reason):
    target, assistant, cache = planted(kind), drafter(), DynamicCache()
    ids = prompt(12)
    with torch.no_grad():
        LlamaForCausalLM.forward(target, ids[:, :8], **{CACHE: cache})
    keys = [layer.keys.clone() for layer in cache.layers]
    random, fields = torch.get_rng_state(), {name: value for name, value in vars(target).items() if name[0] != "_"}
    sizes = sizes_of_passes(target)
    with pytest.raises(ValueError, match=f"{kind.__name__} cannot be verified over trees: .*{reason}"):
        target.generate(ids, assistant_model=assistant, **{CACHE: cache}, **GREEDY)
    assert len(sizes) <= 1 + 6  # the prompt, and the probe
    assert all(torch.equal(own, layer.keys) for own, layer in zip(keys, cache.layers, strict=True))
    if kind not in (Counting, Remembering, PassSizeInside, Noisy):  # these are changed by the prompt itself
        assert {name: value for name, value in vars(target).items() if name[0] != "_"} == fields
        assert torch.equal(random, torch.get_rng_state())
    with pytest.raises(ValueError, match=reason):  # remembered
        target.generate(ids, assistant_model=drafter(), **GREEDY)
    assert len(sizes) <= 1 + 6 + 1


def test_a_batch_and_static_caches_are_refused_alike():
    for settings in ({"input_ids": prompt(12, batch=3)}, {"input_ids": prompt(12), "cache_implementation": "static"}):
        with pytest.raises(ValueError, match="what else is in its pass"):
            planted(PassSize).generate(assistant_model=drafter(), **settings, **GREEDY)


class Named(Planted):
    """Changes for a whole pass once that goes beyond a length of its config, for which transformers has no name."""

    def before(self, inputs):
        beyond = int(inputs["position_ids"].max()) >= self.config.training_seq_length
        self.model.norm.variance_epsilon = 0.3 if beyond else 1e-6


class ByColumn(Planted):
    """The same by columns: how many there are once the pass is done."""

    def before(self, inputs):
        beyond = inputs[CACHE].get_seq_length() + inputs["input_ids"].shape[1] > self.config.training_seq_length
        self.model.norm.variance_epsilon = 0.3 if beyond else 1e-6


class SizeBeyond(Planted):
    """Exact up to a length that the config names; behind it, the size of the pass matters."""

    def after(self, inputs, outputs):
        if int(inputs["position_ids"].max()) >= self.config.training_seq_length and inputs["input_ids"].shape[1] > 1:
            outputs.logits[..., 5] += 1.0


@pytest.mark.parametrize("length", [10, 19, 20, 24])
@pytest.mark.parametrize("kind", [Named, ByColumn, SizeBeyond])
def test_lengths_that_a_config_names(kind, length):
    def target():
        return planted(kind, training_seq_length=20)

    plain = target().generate(prompt(length), **GREEDY)
    beside = target()
    sizes = sizes_of_passes(beside)
    assert torch.equal(plain, beside.generate(prompt(length), assistant_model=drafter(), **GREEDY))
    assert (set(sizes[-20:]) == {1}) == (kind is SizeBeyond)


def test_what_it_costs():
    target = tiny_target("mistral")
    sizes = sizes_of_passes(target)
    first = target.generate(prompt(20), assistant_model=drafter(), **GREEDY)
    assert sizes[:4] == [20, 3, 1, 1] and len(sizes) <= 41 + 6
    sizes.clear()
    assert torch.equal(first, target.generate(prompt(20), assistant_model=drafter(), **GREEDY))
    assert sizes[0] == 20 and 3 not in sizes[:2]  # nothing afterwards
    for change in (lambda: target.double(), lambda: setattr(target.config, "rope_theta", 5.0), lambda: forget(target)):
        change()
        sizes.clear()
        target.generate(prompt(20), assistant_model=drafter(), **GREEDY)
        assert sizes[:4] == [20, 3, 1, 1]


@pytest.mark.parametrize("kind", [Planted, ByColumn, SizeBeyond])
def test_six_passes_at_most_over_several_lengths(kind):
    """Behind the third length texts are decoded token by token; nothing is looked at in later calls."""
    target = planted(kind, training_seq_length=20, max_seq_len=25, n_ctx=30, context_length=35)
    sizes, calls = sizes_of_passes(target), []
    texts = [planted(kind, training_seq_length=20).generate(prompt(10), **GREEDY)]
    for _ in range(3):
        texts.append(target.generate(prompt(10), assistant_model=drafter(), **GREEDY))
        calls.append([*sizes])
        sizes.clear()
    assert all(torch.equal(texts[0], text) for text in texts)
    assert calls[1] == calls[2] and len(calls[0]) == len(calls[1]) + 6
    assert set(calls[1][-16:]) == {1} and max(calls[1][1:8]) > 1


def test_transformers_own_are_looked_at_behind_switches_only():
    target = tiny_target("llama", max_position_embeddings=20)
    sizes = sizes_of_passes(target)
    target.generate(prompt(10), assistant_model=drafter(), **GREEDY)
    assert sizes[:4] == [10, 3, 1, 1]
    first = len(sizes)
    target.generate(prompt(10), assistant_model=drafter(), **GREEDY)
    assert len(sizes) == 2 * first - 3


def test_an_adapter_is_looked_at_anew():
    peft = pytest.importorskip("peft")
    target = tiny_target()
    target.generate(prompt(), assistant_model=drafter(), **GREEDY)
    adapted = peft.get_peft_model(target, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for change in ("none", "disable_adapter_layers", "enable_adapter_layers", "merge_adapter"):
        getattr(adapted.base_model, change, lambda: None)()
        if change == "enable_adapter_layers":
            continue
        sizes = sizes_of_passes(target)
        adapted.generate(prompt(), assistant_model=drafter(), **GREEDY)
        assert sizes[1:4] == [3, 1, 1]
        sizes.clear()
        adapted.generate(prompt(), assistant_model=drafter(), **GREEDY)
        assert sizes[1:4] != [3, 1, 1]


def test_it_is_forgotten_with_the_target():
    from hf_treeflash import memory

    target = tiny_target()
    target.generate(prompt(), assistant_model=drafter(), **GREEDY)
    held = len(memory._kept)
    del target
    assert len(memory._kept) < held


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_rounding_is_no_fault(dtype):
    for family in ("llama", "mistral", "qwen3_moe", "qwen3_sliding"):
        if (family, dtype) == ("qwen3_moe", torch.float64):
            continue  # torch has no grouped product of doubles
        target = tiny_target(family).to(dtype)
        target.generate(prompt(9), assistant_model=drafter().to(dtype), **{**GREEDY, "max_new_tokens": 8})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_a_real_fault_is_still_found(dtype):
    with pytest.raises(ValueError, match="does not see just its ancestors"):
        planted(WithoutMask).to(dtype).generate(prompt(12), assistant_model=drafter().to(dtype), **GREEDY)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_how_far_rounding_is_from_the_tolerance(family, monkeypatch):
    """Every supported family stays ten times below it."""
    seen = []
    measure = probe.apart
    monkeypatch.setattr(probe, "apart", lambda *pair: seen.append(measure(*pair)) or seen[-1])
    target = family.build()
    target.generate(**family.inputs(3), assistant_model=drafter(), **{**GREEDY, "max_new_tokens": 2})
    assert len(seen) == 2 and max(largest for largest, _ in seen) < probe.FULL / 10


def test_activated_lora_is_refused_by_name():
    peft = pytest.importorskip("peft")
    target, tokens = tiny_target(), [7, 8]
    activated = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], alora_invocation_tokens=tokens)
    adapted = peft.get_peft_model(target, activated)
    for model in (adapted, target):  # through the wrapper, and without it
        with pytest.raises(ValueError, match="'default' is an activated LoRA"):
            model.generate(input_ids=prompt(), assistant_model=drafter(), **GREEDY)
    adapted.base_model.disable_adapter_layers()
    plain = target.generate(prompt(), **GREEDY)
    assert torch.equal(plain, target.generate(prompt(), assistant_model=drafter(), **GREEDY))


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
def test_virtual_tokens_are_refused_by_name(kind):
    peft = pytest.importorskip("peft")
    target = tiny_target()
    adapted = peft.get_peft_model(target, getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="virtual tokens before the text"):
        adapted.generate(input_ids=prompt(), assistant_model=drafter(), **GREEDY)


@pytest.mark.parametrize("mode", ["last_loop", "per_loop"])
def test_looped_targets(mode):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "DoryConfig"):
        pytest.skip("not in this release of transformers")
    layers = {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1, "recurrent_kv_cache_mode": mode}
    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_config(transformers.DoryConfig(**{**SHAPE, **layers})).eval()
    if mode == "last_loop":
        with pytest.raises(ValueError, match="`recurrent_kv_cache_mode`"):
            target.generate(prompt(), assistant_model=drafter(), **GREEDY)
    else:
        plain = target.generate(prompt(), **GREEDY)
        assert torch.equal(plain, target.generate(prompt(), assistant_model=drafter(), **GREEDY))


def test_lengths_are_read_from_a_config():
    lengths = Lengths((20, 50), (20,), ENDLESS, None)
    assert [lengths.nodes(root) for root in (5, 19, 20, 49)] == [15, 1, 30, 1] and lengths.nodes(50) == ENDLESS
    assert lengths.nodes(10, 17) == 3  # counted in two ways
    assert lengths.switch_between(10, 19) is None and lengths.switch_between(10, 20) == 20
    assert lengths.switch_between(20, 30) is None
    scaled = Lengths(period=8)  # queries of columns 7, 15, ... begin a new scale
    assert [scaled.nodes(root) for root in (0, 6, 7, 14)] == [7, 1, 8, 1]
    assert Lengths.of(switching("Phi-3, default")).switches == (20,)
    assert Lengths.of(tiny_target()).switches == () and Lengths.of(tiny_target()).named == (512,)


@pytest.fixture(autouse=True)
def quiet():
    logging.set_verbosity_error()
    yield
    logging.set_verbosity_warning()
