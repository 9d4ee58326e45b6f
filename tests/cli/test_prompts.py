"""Files of prompts: JSON lines, JSON, text and chats; what is none is named by its line."""

import json

import pytest

from hf_treeflash.bench.pairs import encode_messages
from hf_treeflash.bench.prompts import read_prompts
from tests.helpers.pair_on_disk import letter_tokenizer


def user(text):
    return [{"role": "user", "content": text}]


CHAT = [{"role": "system", "content": "s"}, *user("a"), {"role": "assistant", "content": "b"}, *user("c")]


@pytest.mark.parametrize(
    ("name", "text", "prompts"),
    [
        ("p.txt", "abc\n\n  def\n", [user("abc"), user("  def")]),
        ("p", "abc", [user("abc")]),
        ("p.md", '{"a": 1}\nplain\n', [user('{"a": 1}'), user("plain")]),
        ("p.jsonl", '{"prompt": "abc"}\n\n"def"\n', [user("abc"), user("def")]),
        ("p.json", '[{"prompt": "abc", "source": "x"}, "def"]', [user("abc"), user("def")]),
        ("p.jsonl", json.dumps({"messages": [*CHAT, {"role": "assistant", "content": "d"}]}), [CHAT]),
        ("p.jsonl", '\ufeff{"prompt": "abc"}', [user("abc")]),
    ],
)
def test_each_form(name, text, prompts, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_prompts(tmp_path / name) == prompts
    assert read_prompts(tmp_path / name, limit=1) == prompts[:1]


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        (
            "p.jsonl",
            '{"prompt": ""}\n',
            r"line 1: expected `messages` with a user message, .* found \{\"prompt\": \"\"\}",
        ),
        ("p.jsonl", '"a"\n{"messages": []}\n', r"1 rows? .*line 2"),
        ("p.jsonl", "nonsense\n" * 5, r"5 rows .*line 1: not JSON .*line 2.*line 3.*; and 2 more"),
        ("p.json", '["a", 3]', "row 2: expected .* found 3"),
        ("p.jsonl", '{"messages": [{"role": "assistant", "content": "b"}]}', "line 1: expected"),
        ("p.jsonl", '{"prompt": "' + "x" * 3 + '", }', "line 1: not JSON"),
        ("p.json", "[" * 100_000, "no JSON"),
    ],
)
def test_bad_rows_are_named(name, text, error, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=error):
        read_prompts(tmp_path / name)


def test_chats_need_a_template():
    with pytest.raises(ValueError, match="no chat template, which 4 messages need"):
        encode_messages(letter_tokenizer(), CHAT)


def test_a_template_that_refuses_is_quoted():
    tokenizer = letter_tokenizer("{{ raise_exception('users only') }}")
    with pytest.raises(ValueError, match="chat template refuses these messages: users only"):
        encode_messages(tokenizer, CHAT)
