"""Conversations: every answer is plain `generate`'s for the whole conversation, and caches stay between turns."""

import io
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_treeflash import TreeFlashDraftModel
from hf_treeflash.bench.conversation import Conversation
from hf_treeflash.bench.pairs import encode_messages
from tests.helpers.pair_on_disk import save_pair

testing = pytest.importorskip("typer.testing")
rich_console = pytest.importorskip("rich.console")

from hf_treeflash.cli import app  # noqa: E402
from hf_treeflash.cli.writing import Writer  # noqa: E402

# Turns grow at their end alone, so that caches hold the beginning of the next prompt.
STABLE = (
    "{% for m in messages %}{{ {'user': 'u', 'assistant': 'a', 'system': 's'}[m.role] ~ m.content }}"
    "{{ 'e' if m.role == 'user' else '' }}{% endfor %}{{ 'a' if add_generation_prompt else '' }}"
)
# An opened answer is written in another way once it is past, as by templates that drop empty thoughts.
REWRITTEN = STABLE.replace("{{ 'a' if", "{{ 'att' if")
TURNS = ("bcd", "k", "fghij")


def pair(folder, template):
    places = save_pair(folder, template)
    target = AutoModelForCausalLM.from_pretrained(places["--target"], dtype=torch.float32)
    drafter = TreeFlashDraftModel.from_pretrained(places["--drafter"], dtype=torch.float32)
    return target, AutoTokenizer.from_pretrained(places["--target"]), drafter


@pytest.fixture(scope="module", params=["stable", "rewritten", "none"])
def models(request, tmp_path_factory):
    template = {"stable": STABLE, "rewritten": REWRITTEN, "none": None}[request.param]
    return request.param, *pair(tmp_path_factory.mktemp(request.param), template)


def count_read(target):
    """Return a list to which each pass of the target adds how many tokens it reads."""
    read = []
    handle = target.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return read, handle


@pytest.mark.parametrize("lookup", [None, 3])
@pytest.mark.parametrize("settings", [{"do_sample": False}, {"do_sample": True, "temperature": 0.7, "top_k": 8}])
def test_every_turn_equals_plain_generate(models, settings, lookup):
    kind, target, tokenizer, drafter = models
    conversation = Conversation(target, tokenizer, drafter, seed=3, lookup=lookup, max_new_tokens=12, **settings)
    messages, text = [], torch.zeros(1, 0, dtype=torch.long)
    for turn, said in enumerate(TURNS):
        answer = conversation.say(said)
        messages.append({"role": "user", "content": said})
        if kind == "none":
            prompt = torch.cat([text, tokenizer(said, return_tensors="pt").input_ids], dim=1)
        else:
            prompt = encode_messages(tokenizer, messages)
        torch.manual_seed(3 + turn)
        text = target.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, **settings)
        plain = text[0, prompt.shape[1] :].tolist()
        assert answer.token_ids == plain
        assert conversation.say_plainly().token_ids == plain
        messages.append({"role": "assistant", "content": tokenizer.decode(plain, skip_special_tokens=True)})
    assert conversation.messages == messages


def test_what_was_read_is_not_read_again(models):
    kind, target, tokenizer, drafter = models
    settings = {
        "max_new_tokens": 12,
        "do_sample": False,
        "suppress_tokens": [0, 1, 2, 3],
    }  # texts without special ones
    conversation = Conversation(target, tokenizer, drafter, **settings)
    conversation.say(TURNS[0])
    length = conversation.text.shape[1]
    read, handle = count_read(target)
    try:
        conversation.say(TURNS[1])
    finally:
        handle.remove()
    new = conversation.prompt.shape[1] - length
    if kind == "rewritten":  # up to where the template writes something else
        assert read[0] < conversation.prompt.shape[1] - 3
    else:
        assert read[0] == new + 1


def test_an_interrupted_turn_leaves_the_conversation_as_it_was(models):
    _, target, tokenizer, drafter = models
    conversation = Conversation(target, tokenizer, drafter, max_new_tokens=12, do_sample=False)
    conversation.say(TURNS[0])
    before = conversation.messages.copy(), conversation.text.clone(), conversation.turns

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.say(TURNS[1], interrupt)
    assert conversation.messages == before[0] and conversation.turns == before[2]
    assert torch.equal(conversation.text, before[1])
    again = Conversation(target, tokenizer, drafter, max_new_tokens=12, do_sample=False)
    again.say(TURNS[0])
    assert conversation.say(TURNS[1]).token_ids == again.say(TURNS[1]).token_ids


def test_a_window_that_has_moved_on_is_read_anew(tmp_path):
    from tests.helpers.tiny import tiny_target

    _, tokenizer, drafter = pair(tmp_path, REWRITTEN)
    target = tiny_target("mistral")
    target.generation_config.eos_token_id = None
    conversation = Conversation(target, tokenizer, drafter, max_new_tokens=16, do_sample=False)
    for said in TURNS:
        answer = conversation.say(said)
        prompt = conversation.prompt
        plain = target.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False)
        assert answer.token_ids == plain[0, prompt.shape[1] :].tolist()


def chat(folder, template, lines, *options):
    places = save_pair(folder, template)
    words = ["chat", "--target", places["--target"], "--drafter", places["--drafter"], *options]
    return places, testing.CliRunner().invoke(app, words, input="".join(f"{line}\n" for line in lines))


def test_the_command_prints_what_plain_generate_writes(tmp_path):
    places, result = chat(
        tmp_path,
        STABLE,
        ["bcd", "", "k", "/plain", "/reset", "bcd", "/nope", "/quit", "never"],
        *("--max-new-tokens", "10", "--system", "xx", "--show-draft", "--lookup", "3"),
    )
    assert result.exit_code == 0, result.output
    target = AutoModelForCausalLM.from_pretrained(places["--target"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(places["--target"])
    messages, written = [{"role": "system", "content": "xx"}], []
    for said in ("bcd", "k"):
        messages.append({"role": "user", "content": said})
        prompt = encode_messages(tokenizer, messages)
        plain = target.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=10, do_sample=False)
        written.append(tokenizer.decode(plain[0, prompt.shape[1] :], skip_special_tokens=True))
        messages.append({"role": "assistant", "content": written[-1]})
    first, second = written
    shown = [line.strip() for line in result.stdout.splitlines() if line.strip()]
    assert shown == ["drafted and accepted, the target's own", first, second, second, first]
    assert "plain decoding: the same text, 10 tokens" in result.stderr and "times as fast" in result.stderr
    assert "There is no command /nope" in result.stderr and "a new conversation" in result.stderr
    assert re.search(r"10 tokens, τ \d\.\d\d, [\d.]+ tokens/s", result.stderr)


def test_a_turn_that_cannot_be_answered_is_said_and_the_conversation_goes_on(tmp_path):
    _, result = chat(tmp_path, STABLE, ["/plain", "b" * 600, "bcd"], "--max-new-tokens", "5")
    assert result.exit_code == 0
    assert "say something first" in result.stderr and "more than the 512" in result.stderr
    assert "5 tokens" in result.stderr


def test_unnamed_it_is_the_chat_model_that_is_at_hand(tmp_path, monkeypatch):
    places = save_pair(tmp_path, STABLE)
    monkeypatch.setattr("hf_treeflash.bench.demo.chat_pair", lambda console: (places["--target"], places["--drafter"]))
    result = testing.CliRunner().invoke(app, ["chat", "--max-new-tokens", "5"], input="bcd\n")
    assert result.exit_code == 0 and "5 tokens" in result.stderr and "embedded pair" not in result.stderr
    monkeypatch.setattr("hf_treeflash.bench.demo.chat_pair", lambda console: None)
    assert "embedded pair" in testing.CliRunner().invoke(app, ["chat"], input="/quit\n").stderr


class Letters:
    """A tokenizer whose token 0 is a line's end, 1 and 2 the halves of a character, and others letters."""

    def decode(self, ids, skip_special_tokens=True):
        text = "".join({0: "\n", 1: "<", 2: ">"}.get(token, chr(token)) for token in ids)
        text = text.replace("<>", "é").replace("<", "\ufffd")
        return text


def write(rounds, **console):
    file = io.StringIO()
    screen = rich_console.Console(file=file, highlight=False, width=40, height=8, **console)
    with Writer(Letters(), colours=True, console=screen) as writer:
        for tokens in rounds:
            writer.round(tokens, 2.5, 10.0)
    return file.getvalue()


TEXT = [[97, 98], [0, 99, 1], [2, 100], [0, 0, 101] + [102] * 100]
PLAIN = "ab\ncéd\n\ne" + "f" * 100 + "\n"


def test_off_a_terminal_there_is_the_text_alone():
    assert write(TEXT) == PLAIN


def test_on_a_terminal_there_are_colours_and_a_line_of_figures():
    written = write(TEXT, force_terminal=True, color_system="standard", _environ={"TERM": "xterm"})
    assert "τ 2.50, 10.0 tokens/s" in written
    assert "\x1b[32m" in written and "\x1b[1;33m" in written
    assert screen(written) == PLAIN.splitlines()
    # A line that would fill more than half of the screen is cut where the screen ends.
    written = write([[103] * 150, [103] * 60], force_terminal=True, _environ={"TERM": "xterm"})
    assert screen(written) == ["g" * 40] * 5 + ["g" * 10]


def screen(written):
    """Return the lines that are on a terminal after all was written to it."""
    lines, row, column = [""], 0, 0
    for sign in re.findall(r"\x1b\[[\d;?]*[A-Za-z]|[^\x1b]", written):
        if sign == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif sign == "\r":
            column = 0
        elif sign.endswith("A"):
            row -= int(sign[2:-1] or 1)
        elif sign == "\x1b[2K":
            lines[row] = ""
        elif not sign.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + sign + lines[row][column + 1 :]
            column += 1
    while lines and not lines[-1]:
        lines.pop()
    return lines
