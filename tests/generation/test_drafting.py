"""What shapes the draft but never the text: pruning, temperature, automatic budget, prompt lookup, draft window."""

import itertools

import pytest
import torch
from transformers import StoppingCriteriaList

from hf_treeflash import decoding
from hf_treeflash.lookup import PromptLookup, graft
from hf_treeflash.memory import recall
from hf_treeflash.sequences import Sequences
from hf_treeflash.tree import build_tables, tree_from_tables
from tests.helpers.tiny import VOCAB, prompt, tiny_drafter, tiny_target, with_knobs


@pytest.fixture(scope="module")
def target():
    return tiny_target()


def run(target, drafter, ids=None, **settings):
    settings = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, **settings}
    ids = prompt() if ids is None else ids
    plain = target.generate(ids, **{k: v for k, v in settings.items() if k != "prompt_lookup_num_tokens"})
    output = target.generate(ids, assistant_model=drafter, return_dict_in_generate=True, **settings)
    assert torch.equal(plain, output.sequences)
    return output


def test_pruning_spends_no_node_on_what_cannot_be_emitted(target, monkeypatch):
    trees = []
    draft = decoding.TreeDecoding.draft

    def recording(self, state):
        trees.append(draft(self, state))
        return trees[-1]

    monkeypatch.setattr(decoding.TreeDecoding, "draft", recording)
    allowed = [5, 9, 14, 20]
    drafter = with_knobs(tiny_drafter(), tree_budget=24)
    run(target, drafter, prefix_allowed_tokens_fn=lambda row, ids: allowed)
    assert all(token in allowed for tree in trees for token in tree.token_ids[0, 1:].tolist())
    trees.clear()
    run(target, drafter, suppress_tokens=[4, 5, 6, 7, 8])
    assert not any(token in (4, 5, 6, 7, 8) for tree in trees for token in tree.token_ids[0, 1:].tolist())


def json_like(row, ids):
    """Permit only digits where the grammar has a value, and one forced token everywhere else."""
    at = (len(ids) - 7) % 6
    return {0: [4], 1: [5], 2: [6, 7, 8, 9, 10, 11], 3: [12], 4: [6, 7, 8, 9, 10, 11]}.get(at, [13])


def test_a_grammar_raises_block_efficiency(target, monkeypatch):
    """Forced tokens are certain, so a draft that knows the grammar gets further on the same budget."""
    drafter = with_knobs(tiny_drafter(), tree_budget=16, num_candidates=VOCAB, branching=VOCAB)
    pruned = run(target, drafter, prefix_allowed_tokens_fn=json_like, max_new_tokens=60).block_efficiency
    monkeypatch.setattr("hf_treeflash.lookahead.MASKING", ())
    blind = run(target, drafter, prefix_allowed_tokens_fn=json_like, max_new_tokens=60).block_efficiency
    assert pruned > 1.5 * blind


def test_a_draft_is_given_what_the_next_draws_add_to_logits(target, monkeypatch):
    """The Gumbel noise of `multinomial` at the call's temperature, slot by slot; nothing where nothing is drawn."""
    seen, drafter = [], tiny_drafter()
    draft = drafter.draft
    monkeypatch.setattr(drafter, "draft", lambda *args, **kw: seen.append(kw["draw_noise"]) or draft(*args, **kw))
    settings = {"assistant_model": drafter, "max_new_tokens": 40, "eos_token_id": None}
    target.generate(prompt(), do_sample=False, **settings)
    assert set(seen) == {None}
    seen.clear()
    settings |= {"do_sample": True, "temperature": 0.6, "top_k": 0, "return_dict_in_generate": True}
    torch.manual_seed(4)
    lengths = target.generate(prompt(), **settings).acceptance_lengths[0]
    torch.manual_seed(4)
    noise = torch.cat([torch.empty(1, VOCAB).exponential_() for _ in range(48)])
    for done, given in zip(itertools.accumulate([1, *lengths]), seen, strict=False):
        torch.testing.assert_close(given, -0.6 * noise[None, done : done + 7].log())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_sliding"])
def test_automatic_budget_keeps_the_text(family, batch):
    drafter = with_knobs(tiny_drafter(), tree_budget="auto")
    for seed in range(2):
        run(tiny_target(family), drafter, prompt(batch=batch, seed=seed), max_new_tokens=60)


@pytest.mark.parametrize("batch", [1, 2])
def test_prompt_lookup_keeps_the_text(target, batch):
    ids = prompt(40, batch=batch).remainder(3) + 6  # repeats itself: something is always found
    drafter = with_knobs(tiny_drafter(seed=7), tree_budget=16)
    bias = {"sequence_bias": [[[9], -50.0]], "max_new_tokens": 50}
    without = run(target, drafter, ids, **bias)
    grafted = run(target, drafter, ids, prompt_lookup_num_tokens=8, **bias)
    assert torch.equal(without.sequences, grafted.sequences)


def test_grafted_trees_stay_within_the_budget_and_keep_the_best_of_both():
    from tests.helpers.drafting import random_transitions

    rows = random_transitions(3, depth=5, rows=4, branching=4).rows()
    (drafted,) = build_tables(rows, torch.tensor([7]), 12)
    chain = [49, 48, drafted.token_ids[1], 47]
    merged = graft(drafted, chain, [0.9] * 4, 12)
    assert len(merged.token_ids) == 12 and merged.token_ids[0] == 7
    tree = tree_from_tables([merged])
    node, path = 0, []
    while (node, chain[len(path)]) in tree.children[0]:
        node = tree.children[0][node, chain[len(path)]]
        path.append(tree.token_ids[0, node].item())
        if len(path) == len(chain):
            break
    assert path == chain
    assert merged.path_log_probs == sorted(merged.path_log_probs, reverse=True)
    # A chain nobody trusts displaces no drafted node.
    assert graft(drafted, chain, [1e-6] * 4, 12).token_ids == drafted.token_ids
    # A chain that is in the tree already costs nothing.
    known = [drafted.token_ids[1]]
    assert sorted(graft(drafted, known, [0.9], 12).token_ids) == sorted(drafted.token_ids)


def lookup_of(target, text, **settings):
    """Return a lookup, and what it finds after a text."""
    config = target.generation_config.__class__(prompt_lookup_num_tokens=4, max_length=100, **settings)
    lookup = PromptLookup(config, 1)
    return lookup, *lookup.find([0], Sequences(torch.tensor([text]), StoppingCriteriaList()))


def test_lookup_takes_the_longest_match_and_of_those_the_latest(target):
    assert lookup_of(target, [5, 6, 7, 8, 1, 7, 9, 2, 5, 6, 7])[1] == [[8, 1, 7, 9]]
    assert lookup_of(target, [7, 8, 1, 2, 3, 7, 9, 2, 4, 7])[1] == [[9, 2, 4, 7]]
    assert lookup_of(target, [5, 6, 7, 8, 1, 7, 9, 2, 5, 6, 7], max_matching_ngram_size=1)[1] == [[9, 2, 5, 6]]
    assert lookup_of(target, [1, 2, 3])[1] == [[]]
    (trusts,) = lookup_of(target, [5, 6, 7, 8, 1, 7, 9, 2, 5, 6, 7])[2]
    assert len(trusts) == 4 and trusts == sorted(set(trusts))  # every token that agrees makes the match longer


def test_lookup_learns_how_far_to_trust_a_match_of_each_length(target):
    lookup = lookup_of(target, [5, 6, 7, 8, 1, 2, 5, 6])[0]
    chain, start = lookup.chains[0], lookup.trusts(0)
    for _ in range(10):
        lookup.observe(0, [*chain, 9])
    assert all(now > before for now, before in zip(lookup.trusts(0), start, strict=True)) and lookup.trusts(0)[0] > 0.8
    for _ in range(20):
        lookup.observe(0, [9])
    assert lookup.trusts(0)[0] < start[0] and lookup.trusts(0)[1] > start[1]


@pytest.mark.parametrize("window", [1, 6, 20])
def test_draft_window_bounds_the_drafters_cache(target, monkeypatch, window):
    lengths = []
    commit = decoding.TreeDecoding.commit

    def recording(self, *args):
        lengths.append(self.generator.prefix.cache.layers[0].keys.shape[2])
        return commit(self, *args)

    monkeypatch.setattr(decoding.TreeDecoding, "commit", recording)
    drafter = with_knobs(tiny_drafter(), draft_window=window)
    for batch in (1, 3):
        run(target, drafter, prompt(12, batch=batch), max_new_tokens=50)
    assert max(lengths) <= window


def test_long_runs_grow_by_the_caches_alone(target):
    """A thousand tokens: as many columns in both caches as tokens, nothing else kept per token."""
    drafter = with_knobs(tiny_drafter(), draft_window=16)
    model = tiny_target(max_position_embeddings=2048)
    output = run(model, drafter, max_new_tokens=1000)
    assert output.past_key_values.get_seq_length() == 7 + 999
    assert recall("context", output.past_key_values, drafter)[2].cache.layers[0].keys.shape[2] <= 16
