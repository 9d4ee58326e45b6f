"""Outputs are those of plain `generate`: greedy token for token, sampled seed for seed and in distribution."""

import pytest
import torch

from tests.helpers.distribution import check_distribution, text_distribution
from tests.helpers.tiny import prompt, tiny_drafter, tiny_target, with_knobs

SAMPLERS = {
    "temperature": {"temperature": 0.7},
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.8, "temperature": 1.3},
    "repetition penalty": {"repetition_penalty": 1.4},
    "all": {"temperature": 1.2, "top_k": 10, "top_p": 0.9, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
}


@pytest.fixture(scope="module")
def targets():
    return {family: tiny_target(family) for family in ("qwen3", "llama", "qwen3_moe")}


@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen3_moe"])
@pytest.mark.parametrize("head", [True, False], ids=["head", "marginal"])
@pytest.mark.parametrize("budget", [2, 16, 64])
@pytest.mark.parametrize("candidates", [1, 4, 16])
def test_greedy_equals_plain_generate(targets, family, head, budget, candidates):
    target = targets[family]
    drafter = with_knobs(tiny_drafter(head), tree_budget=budget, num_candidates=candidates, draft_temperature=1.0)
    for seed in (0, 1):
        ids = prompt(5 + 4 * seed, seed=seed)
        settings = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
        plain = target.generate(ids, **settings)
        output = target.generate(ids, assistant_model=drafter, return_dict_in_generate=True, **settings)
        assert torch.equal(output.sequences, plain)
        assert sum(output.acceptance_lengths[0]) == 39  # the first token is prefill's
        if budget > 2:  # trees this wide over 24 tokens must help, or the test shows nothing
            assert output.block_efficiency > 1.05


@pytest.mark.parametrize("settings", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("head", [True, False], ids=["head", "marginal"])
def test_same_seed_same_text_as_plain_sampling(targets, settings, head):
    target, drafter = targets["qwen3"], with_knobs(tiny_drafter(head), tree_budget=32)
    settings = {"top_k": 0, **settings}
    for seed in range(8):
        ids = prompt(6, seed=seed)
        torch.manual_seed(seed)
        plain = target.generate(ids, do_sample=True, max_new_tokens=25, **settings)
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        tree = target.generate(ids, do_sample=True, max_new_tokens=25, assistant_model=drafter, **settings)
        assert torch.equal(plain, tree)
        assert torch.equal(torch.get_rng_state(), state)  # not one draw more or less


@pytest.mark.parametrize(("batch", "samples", "length"), [(1, 500, 2), (100, 4000, 3)])
def test_sampled_texts_have_the_targets_law(batch, samples, length):
    """Sampled texts over five tokens against the exact distribution."""
    target = tiny_target(vocab_size=5, eos_token_id=None, bos_token_id=None, pad_token_id=None, initializer_range=0.15)
    drafter = with_knobs(tiny_drafter(vocab_size=5, mask_token_id=4, block_size=4), tree_budget=8, num_candidates=3)
    drafter.generation_config.branching = 3
    ids = torch.tensor([[1, 2]])
    distribution = text_distribution(target, ids, length)
    torch.manual_seed(1234)
    texts: list[list[int]] = []
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": length, "pad_token_id": 0}
    for _ in range(samples // batch):
        ids_and_texts = target.generate(ids.expand(batch, -1), assistant_model=drafter, **settings)
        texts += ids_and_texts[:, 2:].tolist()
    check_distribution(distribution, texts)


def test_node_logits_equal_their_path_run_alone(targets):
    """What a node's row of logits says is what the target says after that path alone."""
    from transformers import DynamicCache

    from hf_treeflash.cache import PrefixCache, recording_past
    from hf_treeflash.tree import build_tree
    from hf_treeflash.verify import Verifier
    from tests.helpers.drafting import random_transitions

    for family in ("qwen3", "qwen3_sliding", "mistral"):
        target = tiny_target(family)
        ids = prompt(20)
        transitions = random_transitions(4, depth=5, rows=4, branching=4)
        transitions.token_ids.remainder_(24)
        tree = build_tree(transitions, torch.tensor([9]), 24)
        cache = DynamicCache(config=target.config)
        with torch.no_grad():
            target(ids, past_key_values=cache)
            prefix = PrefixCache(cache)
            with recording_past(cache):
                logits = Verifier(target)(tree, prefix, torch.tensor([20]), {}).logits[0]
            for node in range(24):
                path = tree.token_ids[:, tree.ancestor_mask[0, node]]
                alone = target(torch.cat([ids, path], dim=1)).logits[0, -1]
                torch.testing.assert_close(logits[node], alone, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_sliding", "mistral"])
def test_cache_after_the_call_equals_a_plain_forwards(family):
    """After a commit the cache is that of a plain forward over the committed tokens, below and beyond the window."""
    target, drafter = tiny_target(family), with_knobs(tiny_drafter(), tree_budget=24)
    for new_tokens in (4, 30):
        settings = {"do_sample": False, "max_new_tokens": new_tokens, "eos_token_id": None}
        settings["return_dict_in_generate"] = True
        plain = target.generate(prompt(), **settings)
        output = target.generate(prompt(), assistant_model=drafter, **settings)
        assert torch.equal(plain.sequences, output.sequences)
        caches = plain.past_key_values, output.past_key_values
        assert caches[0].get_seq_length() == caches[1].get_seq_length() == 6 + new_tokens
        for mine, theirs in zip(caches[1].layers, caches[0].layers, strict=True):
            assert mine.get_seq_length() == theirs.get_seq_length()
            torch.testing.assert_close(mine.keys, theirs.keys, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(mine.values, theirs.values, atol=1e-4, rtol=1e-4)
            assert not getattr(mine, "record_past", False)
