"""The hook: our loop for TreeFlash drafters, transformers' own path for everybody else."""

import gc
import threading

import pytest
import torch
from transformers import GenerationMixin

import hf_treeflash
from hf_treeflash import decoding, generation
from tests.helpers.tiny import prompt, tiny_drafter, tiny_target, with_knobs


@pytest.fixture(scope="module")
def target():
    return tiny_target()


def greedy(target, **settings):
    settings = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, **settings}
    return target.generate(prompt(), **settings)


def test_other_assistants_take_transformers_own_path(target, monkeypatch):
    def unexpected(*args, **kwargs):
        raise AssertionError("our loop ran for another assistant")

    assistant = tiny_target(num_hidden_layers=1)
    hf_treeflash.remove_hook()
    torch.manual_seed(0)
    before = greedy(target, assistant_model=assistant), greedy(target, prompt_lookup_num_tokens=3)
    sampled = greedy(target, assistant_model=assistant, do_sample=True)
    hf_treeflash.install_hook()
    monkeypatch.setattr(generation, "tree_decoding", unexpected)
    torch.manual_seed(0)
    after = greedy(target, assistant_model=assistant), greedy(target, prompt_lookup_num_tokens=3)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(sampled, greedy(target, assistant_model=assistant, do_sample=True))


def test_installing_twice_and_removing():
    hooked = GenerationMixin._assisted_decoding
    hf_treeflash.install_hook()
    assert GenerationMixin._assisted_decoding is hooked
    hf_treeflash.remove_hook()
    original = GenerationMixin._assisted_decoding
    assert original is not hooked and original.__name__ == "_assisted_decoding"
    hf_treeflash.remove_hook()
    assert GenerationMixin._assisted_decoding is original
    hf_treeflash.install_hook()
    assert GenerationMixin._assisted_decoding is not original


def test_peft_wrapped_target_and_drafter(target):
    peft = pytest.importorskip("peft")
    plain = greedy(target)
    drafter = peft.get_peft_model(tiny_drafter(), peft.LoraConfig(target_modules=["q_proj", "up_gate_proj"]))
    torch.nn.init.normal_(drafter.base_model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    assert torch.equal(plain, greedy(target, assistant_model=drafter))
    wrapped = peft.get_peft_model(tiny_target(), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    torch.nn.init.normal_(wrapped.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    assert torch.equal(greedy(wrapped), greedy(wrapped, assistant_model=drafter))


def test_drafter_of_another_dtype(target):
    plain = greedy(target)
    assert torch.equal(plain, greedy(target, assistant_model=tiny_drafter().bfloat16()))


def test_dispatched_target(tmp_path, target):
    """A target whose parts accelerate moves at run time, as it does across devices."""
    accelerate = pytest.importorskip("accelerate")
    plain = greedy(target)
    spread = accelerate.cpu_offload(tiny_target(), execution_device="cpu")
    assert torch.equal(plain, greedy(spread, assistant_model=tiny_drafter()))


def test_threads_do_not_disturb_each_other(target):
    ids = [prompt(seed=seed) for seed in range(4)]
    settings = {"max_new_tokens": 25, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    drafter = with_knobs(tiny_drafter(), tree_budget=32)
    alone = [target.generate(one, assistant_model=drafter, **settings) for one in ids]
    results = [None] * 4

    def work(index):
        results[index] = target.generate(ids[index], assistant_model=drafter, **settings)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, expected in zip(results, alone, strict=True):
        assert torch.equal(mine.sequences, expected.sequences)
        assert mine.acceptance_lengths == expected.acceptance_lengths


class Interrupting:
    """A stopping criterion that raises in the middle of a round."""

    def __init__(self, error, after):
        self.error, self.left = error, after

    def __call__(self, input_ids, scores, **kwargs):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("callback")], ids=["interrupt", "error"])
def test_an_exception_leaves_models_and_cache_usable(target, error):
    from transformers import DynamicCache

    drafter = with_knobs(tiny_drafter(), tree_budget=32)
    for family in ("qwen3", "qwen3_sliding"):
        model = tiny_target(family)
        plain = greedy(model)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        for after in (0, 5, 9):
            cache = DynamicCache(config=model.config)
            with pytest.raises(type(error)):
                greedy(
                    model,
                    assistant_model=drafter,
                    stopping_criteria=[Interrupting(error, after)],
                    past_key_values=cache,
                )
            committed = cache.get_seq_length()
            assert committed >= 7
            again = model.generate(
                plain[:, : committed + 1],
                past_key_values=cache,
                max_new_tokens=36 - committed,
                do_sample=False,
                eos_token_id=None,
                attention_mask=torch.ones(1, committed + 1),  # untrained text may hold the pad token
            )
            assert torch.equal(again, plain)
        assert not any(module._forward_hooks for module in model.modules())
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
        assert torch.equal(greedy(model, assistant_model=drafter), plain)


def test_nothing_outlives_the_call(target):
    import weakref

    seen = []
    original = decoding.TreeDecoding.prefill

    def spy(self, taps):
        seen.append(weakref.ref(self))
        return original(self, taps)

    decoding.TreeDecoding.prefill = spy
    try:
        greedy(target, assistant_model=tiny_drafter())
    finally:
        decoding.TreeDecoding.prefill = original
    gc.collect()
    assert seen[0]() is None
