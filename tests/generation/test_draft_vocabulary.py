"""Drafting some of the target's tokens: the text is plain decoding's, and the rows follow the target."""

import gc
import weakref

import pytest
import torch
from torch import nn

from hf_treeflash import TreeFlashDraftModel
from hf_treeflash.draft_head import DraftHead
from hf_treeflash.draft_vocabulary import kept_rows, kept_tokens
from tests.generation.test_draft_head import OwnLinear, biased_target
from tests.helpers.batches import padded
from tests.helpers.drafting import drafting_inputs
from tests.helpers.tiny import VOCAB, keeping, prompt, tiny_drafter, tiny_target, with_knobs

KEPT = (1, 4, 6, 7, 9, 12, 13, 17, 20, 22)
GREEDY = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}


def drafter_of(head: bool = True, *tokens: int, **knobs):
    return with_knobs(keeping(tiny_drafter(head), *(tokens or KEPT)), **{"tree_budget": 16, **knobs})


def tied_target():
    return tiny_target("llama", tie_word_embeddings=True, initializer_range=0.4)


TARGETS = {"plain": tiny_target, "biased": biased_target, "tied": tied_target}


@pytest.fixture(scope="module")
def targets():
    return {name: make() for name, make in TARGETS.items()}


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 6}], ids=str)
@pytest.mark.parametrize("head", [True, False], ids=["head", "marginal"])
@pytest.mark.parametrize(("kind", "batch"), [("plain", 1), ("plain", 3), ("biased", 1), ("tied", 2)])
def test_greedy_equals_plain_generate(targets, kind, batch, head, options):
    target, inputs = targets[kind], padded(batch)
    plain = target.generate(**inputs, **GREEDY)
    for knobs in ({}, {"draft_lm_head": "float8"}):
        output = target.generate(**inputs, **GREEDY, **options, assistant_model=drafter_of(head, **knobs))
        assert torch.equal(output, plain)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_same_seed_same_text_as_plain_sampling(targets, batch, options):
    settings = {"do_sample": True, "temperature": 0.8, "top_k": 0, "max_new_tokens": 25, **padded(batch)}
    drafter = drafter_of()
    for seed in range(3):
        torch.manual_seed(seed)
        plain = targets["plain"].generate(**settings)
        torch.manual_seed(seed)
        assert torch.equal(plain, targets["plain"].generate(**settings, **options, assistant_model=drafter))


def test_grammars_prune_within_the_vocabulary_and_speak_without_it(targets):
    settings = {**GREEDY, "prefix_allowed_tokens_fn": lambda row, ids: [2, 5, 6 + int(ids[-1]) % 3, 9, 23]}
    plain = targets["plain"].generate(prompt(), **settings)
    assert torch.equal(targets["plain"].generate(prompt(), **settings, assistant_model=drafter_of()), plain)
    # Tokens that are never drafted are written all the same.
    assert set(plain[0, 7:].tolist()) - set(KEPT)


@pytest.mark.parametrize("on_demand", [None, 4])
@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("kind", ["plain", "biased", "its own kind"])
def test_the_draft_is_a_softmax_over_the_vocabulary(targets, kind, noise, on_demand):
    """Whether rows are gathered, or columns picked from a layer that does not show its rows."""
    target, drafter = targets.get(kind, targets["plain"]), drafter_of()
    anchors, context, embed, lm_head = drafting_inputs(drafter, target, batch=2)
    draw_noise = torch.randn(2, 7, VOCAB) if noise else None
    outside = torch.ones(VOCAB, dtype=torch.bool)
    outside[list(KEPT)] = False
    everything = tiny_drafter()
    wanted = everything.draft(
        anchors, context, embed, lambda states: lm_head(states).masked_fill(outside, -1e9), draw_noise=draw_noise
    )
    if kind == "its own kind":
        layer = OwnLinear(32, VOCAB, bias=False)
        layer.weight, lm_head = lm_head.weight, layer
    head = DraftHead(lm_head, d2t=drafter.d2t)
    got = drafter.draft(anchors, context, embed, head, draw_noise=draw_noise, on_demand=on_demand)
    if on_demand is None:
        # Behind the kept ones the other candidates and tokens come, which are impossible.
        token_ids, log_probs, _ = (table[:, :, : len(KEPT), : len(KEPT)] for table in wanted)
        assert torch.equal(got.token_ids, token_ids)
        torch.testing.assert_close(got.log_probs, log_probs, atol=1e-5, rtol=1e-5)
    else:
        row = got.rows().read(0, 0, 0)
        assert row.token_ids == wanted.token_ids[0, 0, 0, : len(KEPT)].tolist()


def test_one_token_is_a_vocabulary(targets):
    drafter = drafter_of(True, 9)
    assert torch.equal(
        targets["plain"].generate(prompt(), **GREEDY),
        targets["plain"].generate(prompt(), **GREEDY, assistant_model=drafter),
    )


def test_it_is_saved_and_taken_back(tmp_path):
    drafter = keeping(tiny_drafter(), 20, 4, 9)
    drafter.save_pretrained(tmp_path)
    again = TreeFlashDraftModel.from_pretrained(tmp_path)
    assert kept_tokens(again.d2t).tolist() == [4, 9, 20] and again.config.draft_vocab_size == 3
    assert not hasattr(again, "draft_lm_head")
    again.set_draft_vocabulary(None)
    again.save_pretrained(tmp_path)
    whole = TreeFlashDraftModel.from_pretrained(tmp_path)
    assert whole.config.draft_vocab_size is None and "d2t" not in whole.state_dict()


def test_rows_are_gathered_once_and_follow_the_target():
    lm_head, d2t = nn.Linear(16, 50), torch.tensor([3, 3, 40])
    rows = kept_rows(lm_head, d2t)
    assert kept_rows(lm_head, d2t) is rows
    assert torch.equal(rows.weight, lm_head.weight[[3, 4, 42]]) and torch.equal(rows.bias, lm_head.bias[[3, 4, 42]])
    for changed in (lm_head.weight, lm_head.bias, d2t, None):
        with torch.no_grad():
            if changed is None:
                lm_head.double()
            elif changed is d2t:
                d2t.sub_(1)
            else:
                changed.neg_()
        rows = kept_rows(lm_head, d2t)
        assert torch.equal(rows.weight, lm_head.weight[kept_tokens(d2t)])
        assert torch.equal(rows.bias, lm_head.bias[kept_tokens(d2t)])
    gone = weakref.ref(rows)
    del rows, lm_head
    gc.collect()
    assert gone() is None


def test_a_target_that_was_changed_is_drafted_for(targets):
    """Rows that were gathered before would draft for the target of then."""
    target, drafter = tiny_target(), drafter_of()
    target.generate(prompt(), **GREEDY, assistant_model=drafter)
    with torch.no_grad():
        target.lm_head.weight.copy_(target.lm_head.weight.flip(0))
    changed = target.generate(prompt(), **GREEDY, assistant_model=drafter, return_dict_in_generate=True)
    fresh = target.generate(prompt(), **GREEDY, assistant_model=drafter_of(), return_dict_in_generate=True)
    assert changed.acceptance_lengths == fresh.acceptance_lengths
    assert torch.equal(changed.sequences, target.generate(prompt(), **GREEDY))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "list of different tokens"),
        ([4, 4], "list of different tokens, found 1"),
        ([[4, 5]], "list of different tokens"),
        ([-1, 3], "tokens of the target, 0 to 23; found -1 to 3"),
        ([3, VOCAB], "tokens of the target, 0 to 23; found 3 to 24"),
    ],
    ids=str,
)
def test_what_is_no_vocabulary_is_refused(tokens, message):
    drafter = tiny_drafter()
    with pytest.raises(ValueError, match=message):
        drafter.set_draft_vocabulary(torch.tensor(tokens))
    assert drafter.config.draft_vocab_size is None and not hasattr(drafter, "d2t")


def test_a_layer_of_its_own_is_not_replaced():
    with pytest.raises(ValueError, match="an output layer of its own for 12 tokens"):
        tiny_drafter(draft_vocab_size=12).set_draft_vocabulary(torch.tensor([4]))


def test_tokens_that_the_target_has_no_row_for_are_refused():
    drafter = keeping(tiny_drafter(vocab_size=None), 4, VOCAB + 3)
    with pytest.raises(ValueError, match=f"`d2t`.* holds token {VOCAB + 3}.*{VOCAB} rows"):
        tiny_target().generate(prompt(), **GREEDY, assistant_model=drafter)
