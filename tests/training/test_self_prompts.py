import copy
import json

import pytest

from hf_treeflash.training import chat_prompts, self_prompts
from hf_treeflash.training.self_prompts import NearDuplicates

from .conftest import CHAT_TEMPLATE

OPTIONS = {
    "enable_thinking": False,
    "temperature": 4.0,
    "batch_size": 6,
    "max_new_tokens": 24,
    "openings": ("", "w9 w8", "w7"),
}


def test_turns_start_as_asked_end_where_the_user_ends_and_differ(target, tokenizer, tmp_path):
    file = tmp_path / "prompts.jsonl"
    prompts = self_prompts(target, tokenizer, 20, file, **OPTIONS)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(prompts) == 20 <= len(rows) and {row["opening"] for row in rows} == set(OPTIONS["openings"])
    assert all(row["prompt"].startswith(row["opening"]) for row in rows)
    special = set(tokenizer.all_special_ids)
    for prompt, row in zip(prompts, rows, strict=False):
        start, user, *text, turn, start_again, assistant = prompt.input_ids
        assert [start, user, turn, start_again, assistant] == tokenizer.convert_tokens_to_ids(
            ["<start>", "user", "<turn>", "<start>", "assistant"]
        )
        assert tokenizer(row["prompt"])["input_ids"] == text and 4 <= len(text) and not special & set(text)
    assert prompts == chat_prompts(tokenizer, file, enable_thinking=False)[:20]
    assert len({tuple(prompt.input_ids) for prompt in prompts}) == 20


def test_an_interrupted_call_goes_on_and_a_later_one_adds(target, tokenizer, tmp_path):
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    self_prompts(target, tokenizer, 24, whole, **OPTIONS)
    self_prompts(target, tokenizer, 8, parts, **OPTIONS)
    parts.write_text(parts.read_text()[:-7])  # killed while it wrote
    self_prompts(target, tokenizer, 24, parts, **OPTIONS)
    assert parts.read_text() == whole.read_text()
    written = whole.read_text()
    self_prompts(target, tokenizer, 20, whole, **OPTIONS)
    assert whole.read_text() == written
    with pytest.raises(ValueError, match="other settings"):
        self_prompts(target, tokenizer, 24, whole, **OPTIONS | {"seed": 1})


def test_near_duplicates_are_dropped():
    seen = NearDuplicates()
    assert seen.adds(range(10))
    assert not seen.adds(range(10)) and not seen.adds(range(11)) and not seen.adds([*range(9), 30])
    assert not seen.adds([40, 41, 42])  # too short
    assert seen.adds([*range(5), 30, 31, 32]) and seen.adds(range(50, 60))


def test_what_cannot_write_prompts_is_refused(target, tokenizer, tmp_path):
    def written(template: str | None = CHAT_TEMPLATE, **options):
        tokenizer.chat_template = template
        self_prompts(target, tokenizer, 4, tmp_path / "prompts.jsonl", **OPTIONS | options)

    with pytest.raises(ValueError, match="no chat template"):
        written(None)
    with pytest.raises(ValueError, match="where a user's turn ends"):
        written("{{ messages[0]['content'] }}")
    with pytest.raises(RuntimeError, match="no new prompt in 10 batches"):
        written(max_new_tokens=1)


def test_tokens_that_end_turns_are_the_templates_and_the_models(target, tokenizer, tmp_path):
    ended = []
    watched = copy.copy(target)
    watched.generate = lambda **kwargs: ended.append(kwargs["eos_token_id"]) or target.generate(**kwargs)
    self_prompts(watched, tokenizer, 2, tmp_path / "prompts.jsonl", **OPTIONS)
    assert ended[0] == sorted(tokenizer.convert_tokens_to_ids(["<turn>", "<end>"]))
