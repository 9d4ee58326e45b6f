"""A trace tells what a call did, and changes nothing of it."""

import json
import math
import threading

import pytest
import torch

import hf_treeflash
from hf_treeflash.budget import auto_budget
from hf_treeflash.decoding import TreeDecoding
from hf_treeflash.generation import DECODING
from hf_treeflash.tracing import round_picture, write_trace
from hf_treeflash.tracing.rounds import DRAFTED, FOUND, OWN, TracedRound, TracedText, lanes, pieces
from hf_treeflash.tree import NodeTable, root_only, tree_from_tables
from hf_treeflash.verify import Verdict
from tests.helpers.pair_on_disk import letter_tokenizer
from tests.helpers.tiny import tiny_drafter, tiny_target

PROMPT = torch.tensor([[4, 5, 6, 7, 8]])
CALL = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True}


@pytest.fixture(scope="module")
def pair():
    target, drafter = tiny_target(), tiny_drafter()
    target.generation_config.eos_token_id = None
    drafter.generation_config.tree_budget = 12
    return target, drafter


def traced(pair, ids=PROMPT, mask=None, **call):
    """Return the trace of a call, and its output."""
    target, drafter = pair
    mask = torch.ones_like(ids) if mask is None else mask
    with hf_treeflash.trace() as trace:
        output = target.generate(ids, attention_mask=mask, assistant_model=drafter, **CALL | call)
    return trace, output


def untraced(pair, ids=PROMPT, mask=None, **call):
    target, drafter = pair
    mask = torch.ones_like(ids) if mask is None else mask
    return target.generate(ids, attention_mask=mask, assistant_model=drafter, **CALL | call)


def texts_of(trace) -> list[list[int]]:
    return [[token for round in text.rounds for token in round.emitted] for text in trace.texts]


def test_off_it_is_not_there(pair):
    assert DECODING.get() is TreeDecoding
    traced(pair)
    assert DECODING.get() is TreeDecoding
    with pytest.raises(RuntimeError, match="on purpose"), hf_treeflash.trace():
        raise RuntimeError("on purpose")
    assert DECODING.get() is TreeDecoding


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"do_sample": True, "temperature": 0.9},
        {"prompt_lookup_num_tokens": 4},
        {"repetition_penalty": 1.3},
        {"cache_implementation": "static"},
    ],
    ids=["greedy", "sampled", "lookup", "processor", "static"],
)
def test_texts_and_rounds_are_those_of_the_call(pair, call):
    torch.manual_seed(1)
    expected = untraced(pair, **call)
    torch.manual_seed(1)
    trace, output = traced(pair, **call)
    assert torch.equal(output.sequences, expected.sequences)
    assert output.acceptance_lengths == expected.acceptance_lengths
    (text,) = trace.texts
    assert texts_of(trace) == output.sequences[:, PROMPT.shape[1] :].tolist()
    assert [len(round.emitted) for round in text.rounds[1:]] == output.acceptance_lengths[0]
    assert text.prompt_ids == PROMPT[0].tolist()


def test_rows_have_texts_of_their_own(pair):
    ids = torch.tensor([[0, 0, 4, 5, 6], [9, 10, 11, 12, 13]])
    trace, output = traced(pair, ids, (ids > 0).long())
    assert [text.prompt_ids for text in trace.texts] == [[4, 5, 6], [9, 10, 11, 12, 13]]
    assert texts_of(trace) == output.sequences[:, 5:].tolist()
    assert [[len(round.emitted) for round in text.rounds[1:]] for text in trace.texts] == output.acceptance_lengths


def test_a_round_tells_its_tree_its_path_and_both_models_probabilities(pair):
    target, _ = pair
    trace, _ = traced(pair)
    (text,) = trace.texts
    written = list(text.prompt_ids)
    drafted = 0
    for round in text.rounds[1:]:
        written += text.rounds[0].emitted if round is text.rounds[1] else []
        assert round.token_ids[0] == written[-1] and round.parents[0] == -1
        assert len(round.token_ids) <= 12
        assert [round.token_ids[node] for node in round.path[1:]] == round.emitted[: len(round.path) - 1]
        assert [round.parents[node] for node in round.path[1:]] == round.path[:-1]
        assert set(round.milliseconds) == {"draft", "verify", "walk", "commit", "rest"}
        below_root = [node for node, parent in enumerate(round.parents) if parent == 0]
        assert sum(round.drafter[node] for node in below_root) <= 1 + 1e-5
        with torch.no_grad():
            expected = target(torch.tensor([written])).logits[0, -1].softmax(dim=-1)
        assert [round.target[node] for node in below_root] == pytest.approx(
            [float(expected[round.token_ids[node]]) for node in below_root], abs=1e-4
        )
        assert round.certainty[0] == pytest.approx(float(expected[round.emitted[0]]), abs=1e-4)
        written += round.emitted
        drafted += len(round.token_ids) - 1
    assert drafted > 0


def test_where_tokens_came_from():
    tree = {"token_ids": [5, 6, 7], "parents": [-1, 0, 1], "drafter": [1.0] * 3, "target": [1.0] * 3}
    found = [False, True, False]
    whole = TracedRound(**tree, found=found, path=[0, 1, 2], emitted=[6, 7, 8], certainty=[1.0] * 3)
    assert whole.origins == [FOUND, DRAFTED, OWN]
    cut = TracedRound(**tree, found=found, path=[0, 1], emitted=[6], certainty=[1.0])
    assert cut.origins == [FOUND]


def test_nodes_that_a_smaller_tree_lacks_are_left_out():
    small = NodeTable([5, 6], [-1, 0], [0, 1], [0.0, -1.0], [1, 3])
    large = NodeTable([5, 6, 7], [-1, 0, 1], [0, 1, 2], [0.0, -1.0, -1.5], [1, 3, 7])
    tree = tree_from_tables([small, large])
    logits = torch.zeros(3, 24)
    round = TracedRound.of_walk(tree, 0, Verdict([0], [9], False), logits, chain=[6, 7])
    assert round.token_ids == [5, 6] and round.parents == [-1, 0] and round.found == [False, True]
    assert round.drafter == pytest.approx([1.0, math.exp(-1)]) and round.target[1] == pytest.approx(1 / 24)
    bare = TracedRound.of_walk(root_only(torch.tensor([5])), 0, Verdict([0], [9], False), logits[:1], chain=[])
    assert bare.token_ids == [5] and bare.origins == [OWN]


def test_what_lookup_found_is_told_from_what_was_drafted(pair):
    ids = torch.tensor([[4, 5, 6, 7, 8, 9] * 4])
    trace, _ = traced(pair, ids, prompt_lookup_num_tokens=4)
    (text,) = trace.texts
    assert any(any(round.found) for round in text.rounds)
    trace, _ = traced(pair, ids)
    (text,) = trace.texts
    assert not any(any(round.found) for round in text.rounds)


def test_an_automatic_budget_learns_nothing_from_a_trace():
    target, drafter = tiny_target(), tiny_drafter()
    target.generation_config.eos_token_id = None
    drafter.generation_config.tree_budget = "auto"
    untraced((target, drafter))
    kept = auto_budget(drafter, 1)
    before = repr(vars(kept))
    traced((target, drafter))
    assert auto_budget(drafter, 1) is kept and repr(vars(kept)) == before


def test_another_thread_is_not_traced(pair):
    with hf_treeflash.trace() as trace:
        thread = threading.Thread(target=untraced, args=(pair,))
        thread.start()
        thread.join()
    assert trace.texts == []
    with pytest.raises(ValueError, match="trace is empty"):
        write_trace(trace, "unused", letter_tokenizer())


def test_lines_of_a_tree_never_meet():
    parents = [-1, 0, 0, 1, 1, 2, 3, 3, 5]
    drafter = [1, 0.5, 0.3, 0.4, 0.6, 0.9, 0.5, 0.2, 0.8]
    lane = lanes(parents, drafter, path=[0, 2])
    depths = [0] * len(parents)
    for node, parent in enumerate(parents):
        depths[node] = depths[parent] + 1 if parent >= 0 else 0
    places = list(zip(depths, lane, strict=True))
    assert len(set(places)) == len(places)
    assert lane[0] == lane[2] == 0 and (2, 0) not in places  # the target's own token stands there
    for depth in range(1, max(depths) + 1):  # no two edges cross
        column = sorted((node for node in range(len(parents)) if depths[node] == depth), key=lane.__getitem__)
        above = [lane[parents[node]] for node in column]
        assert above == sorted(above)


def test_a_character_of_several_tokens_comes_with_the_last():
    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode(errors="replace")

    text = "a\N{GREEK SMALL LETTER TAU}\N{ROCKET}b".encode()
    assert pieces(Bytes(), [65], list(text)) == ["a", "", "\N{GREEK SMALL LETTER TAU}", "", "", "", "\N{ROCKET}", "b"]
    assert "".join(pieces(Bytes(), [], list(text)[:3])) == "a\N{GREEK SMALL LETTER TAU}"


def test_files_say_the_same_and_the_picture_is_one_document(pair, tmp_path):
    from xml.etree import ElementTree

    trace, output = traced(pair)
    tokenizer = letter_tokenizer()
    as_json, as_page = write_trace(trace, tmp_path / "new" / "folder", tokenizer)
    data = json.loads(as_json.read_text())
    assert data == json.loads(json.dumps(trace.to_dict(tokenizer)))
    told = "".join(piece for round in data["texts"][0]["rounds"] for piece in round["pieces"])
    assert told == tokenizer.decode(output.sequences[0, PROMPT.shape[1] :])
    assert "{{" not in as_page.read_text()
    picture = ElementTree.fromstring(round_picture(data, 1, most_nodes=6))
    assert len(picture.findall("{*}g")) >= 7  # six nodes and the target's own token


def test_a_text_cannot_break_out_of_the_page():
    from hf_treeflash.tracing import render_page

    text = TracedText([1], {"target": "</script><script>alert(1)</script>"})
    text.rounds.append(TracedRound.of_prompt([1], 2))
    data = {"texts": [text.to_dict(letter_tokenizer())], "tokens": {"1": "<!--", "2": "</script>"}}
    assert render_page(data).count("</script>") == 2  # the data's and the page's own
