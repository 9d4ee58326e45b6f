"""The comparison's data: plain, complete, and true."""

import json

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from hf_treeflash.bench.arms import standard_arms, tree_arm
from hf_treeflash.bench.compare import RoundRecorder, acceptance_rates, compare, distinct_ngrams
from hf_treeflash.bench.pairs import describe_pair, encode_prompt, revision_of, with_knobs, without_head
from hf_treeflash.bench.tables import text_table
from tests.helpers.pair_on_disk import CHAT_TEMPLATE, letter_tokenizer
from tests.helpers.tiny import prompt, tiny_drafter, tiny_target


@pytest.fixture(scope="module")
def pair():
    target = tiny_target()
    target.generation_config.eos_token_id = None
    return target, tiny_drafter()


def test_comparison_is_plain_data_about_identical_texts(pair):
    target, drafter = pair
    prompts = [prompt(seed=1), prompt(length=4, seed=2)]
    result = compare(target, standard_arms(drafter, tree_budget=8), prompts, max_new_tokens=12, repeats=2, seed=3)
    assert json.loads(json.dumps(result)) == result
    names = ["plain", "chain", "marginal tree B8", "TreeFlash tree B8 M16"]
    assert [arm["name"] for arm in result["arms"]] == names
    assert all(arm["identical"] and arm["tokens"] == 24 for arm in result["arms"])
    plain, chain, _, tree = result["arms"]
    assert plain["tau"] == 1 and plain["passes"] == 22 and plain["acceptance_rates"] == []
    assert plain["speedup"]["all"] == [1.0, 1.0] and len(tree["tokens_per_second"]["all"]) == 2
    assert (chain["knobs"], tree["knobs"]["tree_budget"]) == ({}, 8)
    assert result["environment"]["transformers"] and result["settings"]["seed"] == 3
    assert all(name in text_table(result) for name in names)


def test_sampled_trees_equal_sampled_plain_text(pair):
    target, drafter = pair
    result = compare(
        target, standard_arms(drafter), [prompt()], max_new_tokens=10, repeats=0, do_sample=True, temperature=0.9
    )
    assert [arm["identical"] for arm in result["arms"] if arm["name"] != "chain"] == [True] * 3
    assert result["arms"][0]["speedup"] is None


def test_recorder_sees_what_generate_reports(pair):
    target, drafter = pair
    seen = []
    recorder = RoundRecorder(seen.append)
    with recorder.watching(target):
        out = target.generate(
            prompt(),
            assistant_model=drafter,
            streamer=recorder,
            max_new_tokens=15,
            do_sample=False,
            return_dict_in_generate=True,
        )
    assert seen == recorder.rounds
    assert [len(tokens) for tokens in recorder.rounds[1:]] == out.acceptance_lengths[0]
    assert [token for tokens in recorder.rounds for token in tokens] == out.sequences[0, 7:].tolist()


def test_views_share_weights_and_leave_the_drafter_alone(pair):
    _, drafter = pair
    marginal, wide = without_head(drafter), with_knobs(drafter, tree_budget=5)
    assert marginal.ar_head is None and marginal.config.ar_head is None
    assert drafter.ar_head is not None and drafter.config.ar_head == "swiglu"
    assert marginal.fc.weight is drafter.fc.weight and wide.fc.weight is drafter.fc.weight
    assert (wide.generation_config.tree_budget, drafter.generation_config.tree_budget) == (5, 64)
    assert tree_arm(drafter, tree_budget=9).knobs["tree_budget"] == 9


def test_view_of_an_adapted_drafter_has_its_adapters_and_no_head(pair):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_drafter(), peft.LoraConfig(target_modules=["fc"]))
    assert without_head(adapted).ar_head is None
    assert hasattr(without_head(adapted).fc, "lora_A") and adapted.ar_head is not None


def test_rates_and_repetition():
    assert acceptance_rates([1, 3, 3, 1]) == [0.5, 0.5]
    assert acceptance_rates([]) == acceptance_rates([1, 1]) == []
    assert distinct_ngrams([[1, 2, 3, 4, 5]]) == 1
    assert distinct_ngrams([[7] * 8]) == 1 / 5
    assert distinct_ngrams([[1, 2]]) is None


def test_description_names_template_and_thinking_mode(pair):
    target, drafter = pair
    plain, chat = letter_tokenizer(), letter_tokenizer(CHAT_TEMPLATE)
    assert describe_pair(target, plain, drafter)["chat_template_sha256"] is None
    record = describe_pair(target, chat, drafter, enable_thinking=True)
    assert len(record["chat_template_sha256"]) == 64 and record["enable_thinking"] is True
    assert torch.equal(encode_prompt(plain, "abc"), torch.tensor([[4, 5, 6]]))
    assert encode_prompt(chat, "abc", enable_thinking=True).shape == (1, 4)


def test_a_commit_is_known_from_the_local_cache_if_there_is_but_one(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    target, _ = pair
    assert revision_of(target) is None
    repository = tmp_path / "models--acme--target"
    target.save_pretrained(repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    loaded = AutoModelForCausalLM.from_pretrained("acme/target", cache_dir=tmp_path)
    assert revision_of(loaded) == "a" * 40
    (repository / "snapshots" / ("b" * 40)).mkdir()
    assert revision_of(loaded) is None
