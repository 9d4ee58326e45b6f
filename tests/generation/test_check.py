"""The report on a pair names what is right and what is not, and changes nothing."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_treeflash
from hf_treeflash import TreeFlashDraftModel
from hf_treeflash.bench.demo import EMBEDDED
from tests.generation.test_exactness import PassSize, planted, switching
from tests.helpers.tiny import tiny_drafter, tiny_target, with_knobs


def drafter(**overrides):
    return with_knobs(tiny_drafter(**overrides), tree_budget=16)


def test_a_pair_that_fits():
    target = AutoModelForCausalLM.from_pretrained(EMBEDDED / "target", dtype=torch.float32)
    assistant = TreeFlashDraftModel.from_pretrained(EMBEDDED / "drafter", dtype=torch.float32)
    random, weights = torch.get_rng_state(), {name: weight.clone() for name, weight in target.state_dict().items()}
    told: list[tuple[int, int]] = []
    report = hf_treeflash.check(target, assistant, max_new_tokens=24, progress=lambda *at: told.append(at))
    assert told == [(done, 6) for done in range(1, 7)]
    assert report.ok and all(row.verdict == "ok" for row in report.rows), report
    text = str(report)
    for what in ("versions", "taps", "vocabulary", "chat template", "dtypes", "devices", "attention", "lengths"):
        assert what in text
    assert "single steps" in report["trees are exact"].found and "3 of 3" in report["same text"].found
    taus = [float(tau) for tau in report["tau"].found.split(" tokens")[0].split(" / ")]
    assert len(taus) == 3 and min(taus) > 1.5
    assert max(map(len, text.split("\n"))) < 120
    assert torch.equal(random, torch.get_rng_state())
    hooks = {hook.__qualname__ for module in target.modules() for hook in module._forward_hooks.values()}
    assert all("output_capturing_hook" in hook for hook in hooks)  # transformers' own stay where states were asked for
    assert all(torch.equal(weight, weights[name]) for name, weight in target.state_dict().items())


@pytest.mark.parametrize(
    ("target", "assistant", "what", "words"),
    [
        (tiny_target, lambda: drafter(hidden_size=16), "drafter fits target", "`hidden_size` is 16"),
        (tiny_target, lambda: with_knobs(drafter(), tree_budget=0), "knobs", "`tree_budget` must be"),
        (lambda: planted(PassSize), drafter, "trees are exact", "what else is in its pass"),
        (lambda: tiny_target().to("meta"), drafter, "target can carry trees", "meta device"),
    ],
)
def test_what_stands_in_the_way_is_a_line(target, assistant, what, words):
    report = hf_treeflash.check(target(), assistant(), max_new_tokens=8)
    assert not report.ok and report[what].verdict == "no" and words in report[what].found


@pytest.mark.parametrize(
    ("target", "assistant", "what", "words"),
    [
        (tiny_target, drafter, "tokenizer", "none found"),
        (lambda: switching("dynamic"), drafter, "lengths", "behind 20 tokens the text is decoded token by token"),
        (lambda: switching("longrope"), drafter, "lengths", "changes behind 20"),
        (lambda: tiny_target().train(), drafter, "target", "in training mode"),
        (lambda: tiny_target().bfloat16(), lambda: drafter().bfloat16(), "dtypes", "near-ties may fall either way"),
        (tiny_target, lambda: drafter(head=False), "drafter is whole", "without an AR head"),
    ],
)
def test_what_is_worth_a_look_is_said(target, assistant, what, words):
    report = hf_treeflash.check(target(), assistant(), max_new_tokens=8)
    assert report.ok and words in report[what].found


def test_an_untrained_head_and_a_resized_vocabulary_are_seen():
    target, assistant = tiny_target(), drafter()
    torch.nn.init.zeros_(assistant.ar_head.down_proj.weight)
    target.resize_token_embeddings(32)
    report = hf_treeflash.check(target, assistant, max_new_tokens=8)
    assert "still zero" in report["drafter is whole"].found and report["vocabulary"].verdict == "look"


def test_a_tokenizer_that_is_given():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "target")
    report = hf_treeflash.check(tiny_target(), drafter(), tokenizer, max_new_tokens=8)
    assert report["tokenizer"].verdict == "no"  # it has more tokens than the target
    tokenizer.chat_template = "{{ messages[0].content }}"
    target = AutoModelForCausalLM.from_pretrained(EMBEDDED / "target", dtype=torch.float32)
    assistant = TreeFlashDraftModel.from_pretrained(EMBEDDED / "drafter", dtype=torch.float32)
    report = hf_treeflash.check(target, assistant, tokenizer, max_new_tokens=8)
    assert report.ok and report["chat template"].found.startswith("yes")
