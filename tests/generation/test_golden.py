"""Trees and acceptance lengths of independent implementations on trained pairs, round by round."""

import pytest
import torch

from hf_treeflash import decoding
from tests.golden_small import reference
from tests.helpers.tiny import with_knobs

KEYS = {
    "official": ("treeflash_acceptance", "first_tree"),
    "dflash": ("marginal_tree_acceptance", "marginal_first_tree"),
}


def paths(tokens, parents):
    """Return the set of root-to-node token paths."""
    result = []
    for token, parent in zip(tokens, parents, strict=True):
        result.append((*result[parent], token) if parent >= 0 else (token,))
    return set(result)


@pytest.fixture
def first_tree(monkeypatch):
    """Record the first drafted tree of each call."""
    trees = []
    draft = decoding.TreeDecoding.draft

    def recording(self, state):
        tree = draft(self, state)
        if not self.acceptance_lengths[0]:
            trees.append(tree)
        return tree

    monkeypatch.setattr(decoding.TreeDecoding, "draft", recording)
    return trees


@pytest.mark.parametrize("name", ["official", "dflash"])
def test_reference_outputs_trees_and_acceptance(golden, golden_target, golden_drafters, name, first_tree):
    meta = golden["meta"]
    knobs = {"tree_budget": meta["tree_size"], "num_candidates": meta["top_m"], "branching": meta["top_k"]}
    drafter = with_knobs(golden_drafters[name], draft_temperature=meta["drafter_temperature"], **knobs)
    acceptance_key, tree_key = KEYS[name]
    for case in golden["prompts"]:
        ids = torch.tensor([case["prompt_ids"]])
        output = golden_target.generate(
            ids,
            assistant_model=drafter,
            max_new_tokens=meta["max_new_tokens"],
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
        )
        new = output.sequences[0, ids.shape[1] :].tolist()
        assert new == case["output_ids"][-meta["max_new_tokens"] :]
        mine, reference = output.acceptance_lengths[0], case[acceptance_key]
        rounds = len(mine) - 1
        assert mine[:rounds] == reference[:rounds]
        assert mine[rounds] <= reference[rounds]  # only the last round may be cut
        tree, wanted = first_tree[-1], case[tree_key]
        assert paths(tree.token_ids[0].tolist(), tree.parents[0].tolist()) == paths(
            wanted["tokens"], wanted["parents"]
        )
        torch.testing.assert_close(
            tree.path_log_probs[0].sort().values,
            torch.tensor(wanted["cum_logprob"]).sort().values,
            atol=1e-3,
            rtol=1e-3,
        )


@pytest.mark.parametrize("name", ["official", "dflash"])
@pytest.mark.parametrize(("budget", "candidates"), [(8, 2), (16, 4), (64, 16)])
def test_other_settings_keep_the_text(golden, golden_target, golden_drafters, name, budget, candidates):
    drafter = with_knobs(golden_drafters[name], tree_budget=budget, num_candidates=candidates)
    for case in golden["prompts"][:4]:
        ids = torch.tensor([case["prompt_ids"][10:]])
        settings = {"max_new_tokens": 48, "do_sample": False, "eos_token_id": None}
        plain = golden_target.generate(ids, **settings)
        output = golden_target.generate(ids, assistant_model=drafter, return_dict_in_generate=True, **settings)
        assert torch.equal(plain, output.sequences)
        assert output.block_efficiency > 1.5


def test_the_small_references_are_those_of_plain_torch():
    target, drafter = reference.load_pair()
    stored = reference.stored_references()
    found = reference.references(target, drafter, [stored["prompts"][0]["prompt_ids"]])["prompts"][0]
    wanted = stored["prompts"][0]
    assert found.pop("min_top2_gap") == pytest.approx(wanted.pop("min_top2_gap"), abs=1e-3)
    for tree in ("first_tree", "marginal_first_tree"):
        assert found[tree].pop("cum_logprob") == pytest.approx(wanted[tree].pop("cum_logprob"), abs=1e-3)
    assert found == wanted
