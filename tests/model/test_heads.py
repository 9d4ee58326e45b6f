"""Heads of token vectors: rows follow their formulas, trees are exact, and the text is plain decoding's."""

import itertools

import pytest
import torch

from hf_treeflash import TreeFlashDraftModel
from hf_treeflash.knobs import DraftingKnobs
from hf_treeflash.tree import build_on_device, build_tree
from tests.helpers.drafting import drafting_inputs
from tests.helpers.misuse import refuse
from tests.helpers.tiny import VOCAB, prompt, tiny_drafter, tiny_target, with_knobs

HEADS = {
    "markov": {"ar_head": "markov", "head_rank": 6},
    "gated, shifted": {"ar_head": "markov", "head_rank": 6, "head_gated": True, "first_slot": 0},
    "selector": {"ar_head": "selector", "head_rank": 6, "selector_top_k": 7},
    "selector and convolutions": {"ar_head": "selector", "head_rank": 6, "selector_top_k": 7, "conv_kernel_size": 2},
}
every_head = pytest.mark.parametrize("fields", HEADS.values(), ids=HEADS)


@pytest.fixture(scope="module")
def target():
    return tiny_target()


def noise_of(batch: int, depth: int) -> torch.Tensor:
    uniform = torch.rand(batch, depth, VOCAB, generator=torch.Generator().manual_seed(3))
    return -(-uniform.log()).log()


def rows_by_formula(drafter, target, anchor: int, context, noise=None, temperature: float = 1.0) -> torch.Tensor:
    """Return the log-probabilities of every token after every token, `(depth, vocab, vocab)`, one text."""
    embed, config, head = target.get_input_embeddings(), drafter.config, drafter.ar_head
    block = embed(torch.tensor([[anchor, *[config.mask_token_id] * (config.block_size - 1)]]))
    normed = drafter.norm(drafter.backbone(block, context, None, None, None))[0, config.first_slot :]
    base = target.lm_head(normed) + (0 if noise is None else noise)
    previous, following, rows = head.previous.weight, head.following.weight, []
    for state, own in zip(normed, base, strict=True):
        of_slot = []
        for vector in previous:
            code = vector
            if config.ar_head == "selector":
                code = vector * (head.project.weight @ state)
            elif config.head_gated:
                code = vector * torch.sigmoid(head.gate.weight @ torch.cat([state, vector]) + head.gate.bias)
            logits = own + following @ code
            if config.ar_head == "selector":
                logits[own < own.topk(config.selector_top_k).values[-1]] = float("-inf")
            of_slot.append((logits / temperature).log_softmax(-1))
        rows.append(torch.stack(of_slot))
    return torch.stack(rows)


@torch.no_grad()
@every_head
@pytest.mark.parametrize("noisy", [False, True], ids=["greedy", "with noise"])
def test_rows_follow_the_formula(target, fields, noisy):
    drafter = tiny_drafter(**fields)
    anchors, context, embed, lm_head = drafting_inputs(drafter, target)
    noise = noise_of(1, drafter.config.num_drafted) if noisy else None
    knobs = DraftingKnobs(num_candidates=5, branching=4, draft_temperature=0.7)
    got = drafter.draft(anchors, context, embed, lm_head, knobs=knobs, draw_noise=noise)
    wanted = rows_by_formula(drafter, target, 4, context, None if noise is None else noise[0], 0.7)
    reached = {(0, 0): 4}
    for depth, row in itertools.product(range(wanted.shape[0]), range(5)):
        if (depth, row) not in reached:
            continue
        best = wanted[depth, reached[depth, row]].topk(4)
        assert got.token_ids[0, depth, row].tolist() == best.indices.tolist()
        torch.testing.assert_close(got.log_probs[0, depth, row], best.values, atol=1e-5, rtol=1e-5)
        links = torch.stack([got.token_ids[0, depth, row], got.next_row[0, depth, row]], dim=1).tolist()
        reached |= {(depth + 1, below): token for token, below in links if below >= 0}
    assert len(reached) > 2 * wanted.shape[0]


@torch.no_grad()
@every_head
@pytest.mark.parametrize("budget", [2, 9, 40])
@pytest.mark.parametrize("builder", [build_tree, build_on_device], ids=["host", "device"])
def test_trees_are_the_likeliest_paths_of_all(target, fields, budget, builder):
    """Against every path of the vocabulary, scored by the formula."""
    drafter = tiny_drafter(**fields, block_size=3 + fields.get("first_slot", 1))
    inputs = drafting_inputs(drafter, target)
    rows = rows_by_formula(drafter, target, 4, inputs[1])
    paths = {}
    for depth in range(1, 4):
        for path in itertools.product(range(VOCAB), repeat=depth):
            before = (4, *path)
            paths[path] = sum(float(rows[i, before[i], path[i]]) for i in range(depth))
    wanted = sorted(paths.items(), key=lambda item: -item[1])[: budget - 1]
    knobs = DraftingKnobs(num_candidates=VOCAB, branching=VOCAB, draft_temperature=1.0)
    tree = builder(drafter.draft(*inputs, knobs=knobs), inputs[0], budget)
    assert tree.token_ids.shape[1] == budget
    for node, (path, score) in enumerate(wanted, start=1):
        chain = tree.ancestor_mask[0, node].nonzero().flatten()
        assert tuple(tree.token_ids[0, chain[1:]].tolist()) == path
        assert abs(float(tree.path_log_probs[0, node]) - score) < 1e-4


@every_head
@pytest.mark.parametrize("batch", [1, 3])
def test_rows_on_demand_give_the_same_trees(target, fields, batch):
    drafter = tiny_drafter(**fields)
    inputs = drafting_inputs(drafter, target, batch=batch)
    for noise in (None, noise_of(batch, drafter.config.num_drafted)):
        options = {"knobs": DraftingKnobs(num_candidates=5, branching=4), "draw_noise": noise}
        whole = build_tree(drafter.draft(*inputs, **options), inputs[0], 20)
        for likely in (20, 0):
            tree = build_tree(drafter.draft(*inputs, **options, on_demand=likely), inputs[0], 20)
            assert torch.equal(tree.token_ids, whole.token_ids) and torch.equal(tree.parents, whole.parents)
            torch.testing.assert_close(tree.path_log_probs, whole.path_log_probs)


@every_head
@pytest.mark.parametrize("cache", [None, "static"])
def test_greedy_texts_are_those_of_plain_decoding(target, fields, cache, caplog):
    drafter = with_knobs(tiny_drafter(**fields), tree_budget=24, draft_temperature=4.0)  # broad trees
    settings = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    for batch in (1, 3):
        ids = prompt(6, batch=batch)
        output = target.generate(
            ids, assistant_model=drafter, return_dict_in_generate=True, cache_implementation=cache, **settings
        )
        assert torch.equal(output.sequences, target.generate(ids, **settings))
        assert output.block_efficiency > 1.05
    assert "does not cover" not in caplog.text


@every_head
@pytest.mark.parametrize("knobs", [{}, {"draft_lm_head": "float8"}, {"cache_implementation": "static"}], ids=str)
def test_same_seed_same_text_as_plain_sampling(target, fields, knobs):
    drafter, settings = tiny_drafter(**fields), {"do_sample": True, "temperature": 0.8, "top_k": 0}
    cache = {name: knobs[name] for name in knobs if name == "cache_implementation"}
    with_knobs(drafter, tree_budget=16, **({} if cache else knobs))
    for seed in range(3):
        ids = prompt(6, seed=seed)
        torch.manual_seed(seed)
        plain = target.generate(ids, max_new_tokens=20, **settings)
        torch.manual_seed(seed)
        assert torch.equal(
            target.generate(ids, max_new_tokens=20, assistant_model=drafter, **cache, **settings), plain
        )


@every_head
def test_a_fresh_head_drafts_the_marginal_trees(target, fields):
    drafter = tiny_drafter(**fields)
    torch.nn.init.zeros_(drafter.ar_head.following.weight)
    drafter.ar_head.top_k = VOCAB  # which the marginals do not narrow to
    headless = tiny_drafter(head=False, **{key: value for key, value in fields.items() if key != "ar_head"})
    headless.load_state_dict(drafter.state_dict(), strict=False)
    inputs, knobs = (
        drafting_inputs(drafter, target),
        DraftingKnobs(num_candidates=VOCAB, branching=VOCAB, draft_temperature=1.0),
    )
    trees = [build_tree(one.draft(*inputs, knobs=knobs), inputs[0], 16) for one in (drafter, headless)]
    assert torch.equal(trees[0].token_ids, trees[1].token_ids) and torch.equal(trees[0].parents, trees[1].parents)


@torch.no_grad()
def test_fresh_convolutions_change_nothing(tmp_path):
    plain = tiny_drafter(head=False)
    convolved = TreeFlashDraftModel(type(plain.config)(**{**plain.config.to_dict(), "conv_kernel_size": 2})).eval()
    convolved.load_state_dict(plain.state_dict(), strict=False)
    noise, context = torch.randn(1, 8, 32), torch.randn(1, 5, 64)
    torch.testing.assert_close(convolved(noise, context)[0], plain(noise, context)[0])
    # What was stored is not initialised again.
    for name, parameter in convolved.named_parameters():
        if "_conv" in name:
            torch.nn.init.normal_(parameter)
    convolved.save_pretrained(tmp_path)
    again = TreeFlashDraftModel.from_pretrained(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in convolved.state_dict().items())


def test_vectors_for_another_vocabulary_are_refused(target):
    drafter = tiny_drafter(**HEADS["markov"], vocab_size=VOCAB - 1)
    refuse(target, drafter, "vocab_size")
    with pytest.raises(ValueError, match="vocab_size"):
        tiny_drafter(**HEADS["markov"], vocab_size=None)


def test_other_tokens_than_it_has_vectors_for_are_refused():
    with pytest.raises(ValueError, match="ar_head='markov'"):
        tiny_drafter(**HEADS["markov"]).set_draft_vocabulary(torch.arange(4))


class TestReducedVocabulary:
    """The drafter's own output layer beside the target's rows."""

    KEPT = torch.tensor([0, 1, 3, 4, 6, 9, 10, 13, 17, 18, 22, 23])

    def drafter(self, target, **fields):
        drafter = tiny_drafter(**{"head": False, "draft_vocab_size": len(self.KEPT), **fields})
        drafter.d2t.copy_(self.KEPT - torch.arange(len(self.KEPT)))
        drafter.draft_lm_head.weight.data.copy_(target.lm_head.weight[self.KEPT])
        return drafter

    def test_a_copy_of_the_rows_is_not_spoken_of(self, target, caplog):
        drafter = self.drafter(target)
        drafter.draft_lm_head.weight.data = drafter.draft_lm_head.weight.data.bfloat16().float()
        target.generate(prompt(6), assistant_model=drafter, max_new_tokens=4)
        assert "no copy" not in caplog.text

    def test_other_rows_are_used_as_stored_and_named_once(self, target, caplog):
        drafter = self.drafter(target)
        drafter.draft_lm_head.weight.data.mul_(1.1)
        ids, settings = prompt(6), {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        for _ in range(2):
            text = target.generate(ids, assistant_model=drafter, **settings)
        assert torch.equal(text, target.generate(ids, **settings))
        said = [record.message for record in caplog.records if "no copy of this target's rows" in record.message]
        assert len(said) == 1 and "10 % of their norm" in said[0] and "used as stored" in said[0]

    def test_tokens_that_the_target_does_not_know_are_refused(self, target):
        drafter = self.drafter(target)
        drafter.d2t[-1] += 5
        refuse(target, drafter, "d2t")

    @pytest.mark.parametrize("cache", [None, "static"])
    def test_texts_are_those_of_plain_decoding(self, target, cache):
        drafter = with_knobs(self.drafter(target, head=True, **HEADS["markov"]), tree_budget=16)
        settings = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
        ids = prompt(6, batch=2)
        text = target.generate(ids, assistant_model=drafter, cache_implementation=cache, **settings)
        assert torch.equal(text, target.generate(ids, **settings))
