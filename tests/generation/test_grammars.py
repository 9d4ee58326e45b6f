"""Grammars that advance token by token: the text stays plain `generate`'s, and drafts obey them ahead of time."""

import copy
import json

import pytest
import torch
from transformers import AutoTokenizer, LogitsProcessor, LogitsProcessorList

from hf_treeflash import decoding
from tests.helpers.batches import padded
from tests.helpers.tiny import VOCAB, tiny_drafter, tiny_target, with_knobs


class Digits(LogitsProcessor):
    """A user's grammar with a state per row: token 4, then two of five letters, the same ones in every period."""

    def __init__(self, rows: int):
        self.state: list[list[int]] = [[] for _ in range(rows)]
        self.started = False

    def fork(self, row: int) -> "Digits":
        twin = copy.copy(self)
        twin.state = [list(self.state[row])]
        return twin

    def __call__(self, input_ids, scores):
        for row, ids in zip(self.state, input_ids.tolist(), strict=True):
            if self.started:
                row.append(ids[-1])
            assert all((token == 4) == (index % 3 == 0) for index, token in enumerate(row))
        self.started = True
        masks = torch.full_like(scores, float("-inf"))
        for row, mask in zip(self.state, masks, strict=True):
            mask[[4] if len(row) % 3 == 0 else [token for token in range(6, 11) if token not in row[-1:]]] = 0
        return scores + masks


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture
def drafter():
    return with_knobs(tiny_drafter(), tree_budget=16, num_candidates=VOCAB, branching=VOCAB)


def same_text(target, drafter, new_processor, batch: int, lookup: int | None = None, **settings):
    """Compare texts under a fresh processor each, greedy and, for one row, sampled; return the drafted output."""
    settings = {"max_new_tokens": 36, "eos_token_id": None, "return_dict_in_generate": True, **settings}
    outputs = []
    for sampling in ({"do_sample": True}, {"do_sample": False})[batch > 1 :]:
        for assistant in ({}, {"assistant_model": drafter, "prompt_lookup_num_tokens": lookup}):
            torch.manual_seed(3)
            processors = LogitsProcessorList([new_processor()])
            outputs.append(
                target.generate(**padded(batch), logits_processor=processors, **assistant, **settings, **sampling)
            )
        assert torch.equal(outputs[-2].sequences, outputs[-1].sequences)
    return outputs[-1]


@pytest.mark.parametrize("batch", [1, 3])
def test_a_processor_that_forks_prunes_the_draft(target, drafter, batch, monkeypatch):
    pruned = same_text(target, drafter, lambda: Digits(batch), batch)
    monkeypatch.setattr(decoding, "askable", lambda processors: [])
    blind = same_text(target, drafter, lambda: Digits(batch), batch)
    assert pruned.block_efficiency > 1.3 * blind.block_efficiency


def test_looking_ahead_leaves_the_processor_where_it_is(target, drafter):
    mine = Digits(1)
    settings = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": None, "assistant_model": drafter}
    text = target.generate(**padded(1), logits_processor=LogitsProcessorList([mine]), **settings)
    assert mine.state == [text[0, 14:-1].tolist()]


def test_looked_up_tokens_obey_the_grammar_too(target, drafter, monkeypatch):
    trees = []
    draft = decoding.TreeDecoding.draft
    monkeypatch.setattr(decoding.TreeDecoding, "draft", lambda *args: trees.append(draft(*args)) or trees[-1])
    same_text(target, drafter, lambda: Digits(1), 1, lookup=6)
    tokens = {token for tree in trees for token in tree.token_ids[0].tolist()}
    assert tokens <= {4, 6, 7, 8, 9, 10}


FIRST = 'root ::= "abc" [d-i] "jk" [d-i] root'
SECOND = 'root ::= [l-t] [a-c] "de" root'
ENDING = 'root ::= "ab" [c-f] [c-f] "gh" [c-f]'


def grammars(*sources: str):
    """Compile grammars over the tiny vocabulary, one letter per token from 4 on."""
    xgrammar = pytest.importorskip("xgrammar")
    letters = ["<bos>", "</s>", "<pad>", "<mask>", *(chr(ord("a") + index) for index in range(VOCAB - 4))]
    info = xgrammar.TokenizerInfo(letters, vocab_size=VOCAB, stop_token_ids=[1])
    compiled = [xgrammar.GrammarCompiler(info).compile_grammar(source) for source in sources]
    return lambda: xgrammar.contrib.hf.LogitsProcessor(compiled)


@pytest.mark.parametrize(
    "sources", [[FIRST], [SECOND], [FIRST, SECOND, FIRST]], ids=["first", "second", "a grammar for each row"]
)
def test_xgrammar(target, drafter, sources, monkeypatch):
    processor, batch = grammars(*sources), len(sources)
    pruned = same_text(target, drafter, processor, batch)
    monkeypatch.setattr(decoding, "askable", lambda processors: [])
    blind = same_text(target, drafter, processor, batch)
    assert pruned.block_efficiency > 1.3 * blind.block_efficiency


def test_one_grammar_for_all_rows_of_a_batch_that_end_at_their_own_pace(target, drafter):
    for source in (FIRST, ENDING):
        output = same_text(target, drafter, grammars(source), 3, eos_token_id=1, pad_token_id=2)
        assert source == FIRST or output.sequences.shape[1] == 14 + 8


@pytest.mark.parametrize("golden_folder", ["trained on code"], indirect=True)  # the small pair has no words
def test_a_json_schema_raises_block_efficiency_on_the_reference_pair(
    golden_folder, golden_target, golden_drafters, monkeypatch
):
    xgrammar = pytest.importorskip("xgrammar")
    tokenizer = AutoTokenizer.from_pretrained(golden_folder / "target")
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=golden_target.config.vocab_size)
    kinds = {"enum": ["int", "str", "float", "bool"]}
    argument = {"name": {"type": "string", "maxLength": 8}, "type": kinds, "optional": {"type": "boolean"}}
    items = {"type": "object", "properties": argument, "required": list(argument)}
    arguments = {"type": "array", "items": items, "minItems": 3}
    fields = {"name": {"type": "string", "maxLength": 12}, "arguments": arguments}
    schema = {"type": "object", "properties": fields, "required": list(fields)}
    grammar = xgrammar.GrammarCompiler(info).compile_json_schema(json.dumps(schema), any_whitespace=False)
    ids = tokenizer("def parse(path, mode):\n    ", return_tensors="pt").input_ids
    drafter, settings = with_knobs(golden_drafters["official"], tree_budget=16), {"max_new_tokens": 64}

    def run(assistant, **sampling):
        torch.manual_seed(1)
        processors = [xgrammar.contrib.hf.LogitsProcessor(grammar)]
        options = {"logits_processor": processors, "return_dict_in_generate": True, "eos_token_id": 0, **settings}
        return golden_target.generate(ids, assistant_model=assistant, **options, **sampling)

    for do_sample in (False, True):
        plain, pruned = run(None, do_sample=do_sample), run(drafter, do_sample=do_sample)
        with monkeypatch.context() as patch:
            patch.setattr(decoding, "askable", lambda processors: [])
            blind = run(drafter, do_sample=do_sample)
        assert torch.equal(plain.sequences, pruned.sequences) and torch.equal(plain.sequences, blind.sequences)
        assert pruned.block_efficiency > (1.05 if do_sample else 1.15) * blind.block_efficiency
