import json
import re
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_treeflash.training import chat_prompts, load_samples, regenerate, text_prompts, text_samples
from hf_treeflash.training.data import Prompt

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    "{% if enable_thinking %}think {% endif %}{% if add_generation_prompt %}answer{% endif %}"
)
WORDS = ["<end>", "<unk>", "user", "assistant", "system", "think", "answer", "a", "b", "c"]


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", pad_token="<end>", unk_token="<unk>", chat_template=TEMPLATE
    )


def write_lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def words(tokenizer, prompt) -> str:
    return tokenizer.decode(prompt.input_ids)


def test_chats_are_rendered_up_to_the_last_question(tokenizer, tmp_path):
    turns = [("system", "c"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "a")]
    messages = [{"role": role, "content": content} for role, content in turns]
    file = write_lines(tmp_path / "chats.jsonl", {"messages": messages}, "", {"prompt": "b"})
    plain = chat_prompts(tokenizer, file, enable_thinking=False)
    assert [words(tokenizer, prompt) for prompt in plain] == [
        "system c user a assistant b user c answer",
        "user b answer",
    ]
    assert [prompt.source for prompt in plain] == [f"{file}:1", f"{file}:3"]
    assert words(tokenizer, chat_prompts(tokenizer, file, enable_thinking=True)[1]) == "user b think answer"


def test_bad_rows_are_named_and_refused_or_skipped(tokenizer, tmp_path, monkeypatch):
    good, warnings = {"prompt": "a"}, []
    monkeypatch.setattr("hf_treeflash.training.data.logger", SimpleNamespace(warning=warnings.append))
    bad = [
        '{"prompt": ',
        [1],
        {"messages": "hi"},
        {"messages": [{"role": "assistant", "content": "a"}]},
        {"text": "a"},
    ]
    file = write_lines(tmp_path / "chats.jsonl", good, *bad, good)
    prompts = chat_prompts(tokenizer, file, enable_thinking=False, on_bad_row="skip")
    assert [prompt.source for prompt in prompts] == [f"{file}:1", f"{file}:7"]
    assert [f"{file}:{line}:" in warning for line, warning in enumerate(warnings, start=2)] == [True] * 5
    with pytest.raises(ValueError, match=r"chats\.jsonl:2: not a line of JSON"):
        chat_prompts(tokenizer, file, enable_thinking=False)
    with pytest.raises(ValueError, match="on_bad_row"):
        chat_prompts(tokenizer, file, enable_thinking=False, on_bad_row="ignore")


def nested(depth: int) -> str:
    return '{"prompt": "a", "more": ' + "[" * depth + "]" * depth + "}"


ODD_ROWS = {
    "lone surrogate": (r'{"prompt": "a \ud83d b"}', "surrogates not allowed"),
    "lone low surrogate in a turn": (
        r'{"messages": [{"role": "user", "content": "\udc00"}]}',
        "surrogates not allowed",
    ),
    "surrogate as a role": (
        r'{"messages": [{"role": "\ud83d", "content": "a"}, {"role": "user", "content": "a"}]}',
        "cannot be rendered",
    ),
    "deep JSON": (nested(200_000), "not a line of JSON .RecursionError"),
    "very long number": ('{"prompt": "a", "n": ' + "1" * 5000 + "}", "not a line of JSON .ValueError"),
    "bytes that are no text": (b'{"prompt": "\xff"}', "not a line of JSON .UnicodeDecodeError"),
    "a role the template refuses": (
        {"messages": [{"role": "tool", "content": "a"}, {"role": "user", "content": "a"}]},
        "TemplateError: no tools",
    ),
    "turns the template stumbles over": (
        {"messages": [{"role": "user", "content": "a", "calls": 3}]},
        "cannot be rendered .TypeError",
    ),
    "division by nothing": ({"messages": [{"role": "user", "content": "a", "share": 0}]}, "ZeroDivisionError"),
    "nothing to say": ({"messages": [{"role": "user", "content": "quiet"}]}, "makes no token"),
    "words in parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, "expected `mess"),
    "messages of None": ({"messages": [None]}, "expected `mess"),
}
PICKY = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{% for call in m.calls or [] %}{{ call }}{% endfor %}{% if m.share is defined %}{{ 1 / m.share }}{% endif %}"
    "{% if m.content != 'quiet' %}{{ m.role }} {{ m.content }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(("row", "reason"), ODD_ROWS.values(), ids=ODD_ROWS)
def test_odd_rows_are_named_too(tokenizer, tmp_path, monkeypatch, row, reason):
    warnings = []
    monkeypatch.setattr("hf_treeflash.training.data.logger", SimpleNamespace(warning=warnings.append))
    monkeypatch.setattr(tokenizer, "chat_template", PICKY)
    lines = [row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()]
    good = b'{"prompt": "a"}'
    file = tmp_path / "chats.jsonl"
    file.write_bytes(b"\n".join([good, *lines, good]))
    prompts = chat_prompts(tokenizer, file, enable_thinking=False, on_bad_row="skip")
    assert [prompt.source for prompt in prompts] == [f"{file}:1", f"{file}:3"]
    (warning,) = warnings
    assert warning.startswith(f"skipped {file}:2: ") and re.search(reason, warning), warning
    with pytest.raises(ValueError, match=rf"chats\.jsonl:2: .*{reason}"):
        chat_prompts(tokenizer, file, enable_thinking=False)


@pytest.mark.parametrize("name", ["missing.txt", "."])
def test_text_files_that_cannot_be_read_are_named(tokenizer, tmp_path, monkeypatch, name):
    warnings = []
    monkeypatch.setattr("hf_treeflash.training.data.logger", SimpleNamespace(warning=warnings.append))
    (tmp_path / "good.txt").write_text("a b c a")
    files = [tmp_path / name, tmp_path / "good.txt"]
    assert len(text_prompts(tokenizer, files, length=2, stride=2, on_bad_row="skip")) == 2
    assert str(tmp_path / name) in warnings[0] and "cannot be read" in warnings[0]
    with pytest.raises(ValueError, match="cannot be read"):
        text_prompts(tokenizer, files, length=2, stride=2)


def test_a_tokenizer_without_template_is_refused(tokenizer, tmp_path):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no chat template"):
        chat_prompts(bare, tmp_path / "chats.jsonl", enable_thinking=False)


def test_data_sets_are_read_by_name(tokenizer, monkeypatch):
    rows = [{"prompt": "a"}, {"prompt": ""}]
    monkeypatch.setattr(
        "datasets.load_dataset", lambda name, split: rows if (name, split) == ("set", "test") else None
    )
    prompts = chat_prompts(tokenizer, "set", split="test", enable_thinking=False, on_bad_row="skip")
    assert [prompt.source for prompt in prompts] == ["set:test[0]"]


def test_text_is_cut_into_prompts_and_samples(tokenizer, tmp_path):
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text("a b c a b c a b c a")
    bad.write_bytes(b"a\nb \xff c")
    prompts = text_prompts(tokenizer, [good, bad], length=4, stride=3, on_bad_row="skip")
    assert [words(tokenizer, prompt) for prompt in prompts] == ["a b c a"] * 3
    with pytest.raises(ValueError, match=r"bad\.txt:2: not UTF-8"):
        text_prompts(tokenizer, [bad], length=4, stride=3)
    samples = text_samples(tokenizer, [good], length=5)
    assert [len(sample["input_ids"]) for sample in samples] == [5, 5] and samples[0]["prompt_length"] == 1


def make_prompts() -> list[Prompt]:
    ids = torch.randint(2, 64, (7, 9), generator=torch.Generator().manual_seed(0)).tolist()
    return [Prompt(row[: 3 + index], f"p{index}") for index, row in enumerate(ids)]


def test_responses_are_the_targets_own(target, tokenizer, tmp_path):
    prompts = make_prompts()
    samples = regenerate(target, tokenizer, prompts, tmp_path / "out.jsonl", batch_size=3, max_new_tokens=6)
    for prompt, sample in zip(prompts, samples, strict=True):
        alone = target.generate(torch.tensor([prompt.input_ids]), max_new_tokens=6, do_sample=False)[0].tolist()
        assert sample["input_ids"] == alone and sample["prompt_length"] == len(prompt.input_ids)
        assert sample["source"] == prompt.source


def test_an_interrupted_regeneration_goes_on(target, tokenizer, tmp_path):
    options = {"batch_size": 2, "max_new_tokens": 5, "do_sample": True, "seed": 3}
    whole = regenerate(target, tokenizer, make_prompts(), tmp_path / "whole.jsonl", **options)
    regenerate(target, tokenizer, make_prompts(), tmp_path / "part.jsonl", **options)
    lines = (tmp_path / "part.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "part.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    before = target.generate
    calls = []
    target.generate = lambda **kwargs: calls.append(kwargs) or before(**kwargs)
    try:
        assert regenerate(target, tokenizer, make_prompts(), tmp_path / "part.jsonl", **options) == whole
    finally:
        del target.generate
    assert len(calls) == 3  # one finished batch of four was kept
    with pytest.raises(ValueError, match="other settings"):
        regenerate(target, tokenizer, make_prompts(), tmp_path / "part.jsonl", **options | {"seed": 4})


def test_provenance_and_parquet(target, tokenizer, tmp_path):
    file = tmp_path / "data" / "out.parquet"
    extra = {"enable_thinking": False}
    samples = regenerate(target, tokenizer, make_prompts(), file, max_new_tokens=4, provenance_extra=extra)
    assert load_samples(file) == samples == load_samples(file.with_suffix(".jsonl"))
    record = json.loads((tmp_path / "data" / "out.jsonl.provenance.json").read_text())
    assert record["generate"] == {"max_new_tokens": 4} and record["enable_thinking"] is False
    assert record["prompts"] == 7 and len(record["chat_template_sha256"]) == 64
