"""Prompts and samples from chats and from plain text; rows that cannot be used are named."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from transformers.utils import logging

from ..bench.prompts import conversation

logger = logging.get_logger(__name__)


class Prompt(NamedTuple):
    """What the target continues.

    Attributes:
        input_ids (`list[int]`):
            Its tokens, chat template applied.
        source (`str`):
            Where it is from: file and line, or data set and row.
        messages (`list[dict]`, *optional*):
            The conversation, where it is one.
    """

    input_ids: list[int]
    source: str
    messages: list[dict] | None = None


class BadRows:
    """Reports rows that cannot be used, each with its place, and skips or refuses them."""

    def __init__(self, on_bad_row: str):
        if on_bad_row not in ("refuse", "skip"):
            raise ValueError(f"`on_bad_row` must be 'refuse' or 'skip', got {on_bad_row!r}.")
        self.on_bad_row = on_bad_row

    def report(self, source: str, reason: str) -> None:
        """Report one row.

        Raises:
            ValueError: If bad rows are refused.
        """
        message = f"{source}: {reason}"
        if self.on_bad_row == "refuse":
            raise ValueError(f"{message} Repair it, or skip such rows with `on_bad_row='skip'`.")
        logger.warning(f"skipped {message}")


def chat_prompts(
    tokenizer,
    source: str | os.PathLike,
    *,
    enable_thinking: bool,
    split: str = "train",
    on_bad_row: str = "refuse",
) -> list[Prompt]:
    """Read conversations and render what the assistant has to answer last.

    Args:
        tokenizer ([`PreTrainedTokenizerBase`]):
            The target's; its chat template is applied.
        source (`str` or `os.PathLike`):
            A `.jsonl` file, or the name of a data set for the `datasets` library. A row holds `messages`, a list of
            `{"role", "content"}`, or `prompt`, a string. Answers after the last user message are dropped.
        enable_thinking (`bool`):
            Passed to the chat template. Drafters work best in the mode they were trained for, so there is no default.
        split (`str`, *optional*, defaults to `"train"`):
            Of a data set.
        on_bad_row (`str`, *optional*, defaults to `"refuse"`):
            `"refuse"` or `"skip"` rows that are no conversation, or that template or tokenizer cannot take; both name
            their place.

    Returns:
        `list[Prompt]`
    """
    if tokenizer.chat_template is None:
        raise ValueError("The tokenizer has no chat template; set `tokenizer.chat_template`, or use `text_prompts`.")
    bad_rows, prompts = BadRows(on_bad_row), []
    for place, row in _rows(source, split, bad_rows):
        messages = conversation(row)
        if messages is None:
            bad_rows.report(place, "expected `messages` with a user message, or a `prompt` string.")
            continue
        try:
            input_ids = _render(tokenizer, messages, enable_thinking)
        except Exception as error:  # of a template or a tokenizer, which may raise anything
            bad_rows.report(place, f"it cannot be rendered ({_in_words(error)}).")
            continue
        if input_ids:
            prompts.append(Prompt(input_ids, place, messages))
        else:
            bad_rows.report(place, "the chat template makes no token of it.")
    return prompts


def _render(tokenizer, messages: list[dict], enable_thinking: bool) -> list[int]:
    for message in messages:
        message["content"].encode()  # JSON can spell characters that are none
    encoded = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=enable_thinking, return_dict=True
    )
    return list(encoded["input_ids"])


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _rows(source, split: str, bad_rows: BadRows) -> Iterator[tuple[str, object]]:
    if Path(source).suffix != ".jsonl":
        from datasets import load_dataset

        for index, row in enumerate(load_dataset(str(source), split=split)):
            yield f"{source}:{split}[{index}]", row
        return
    with open(source, "rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{source}:{number}"
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    bad_rows.report(place, f"not a line of JSON ({_in_words(error)}).")
                    continue
                yield place, row


def text_prompts(
    tokenizer, files: Iterable[str | os.PathLike], *, length: int, stride: int, on_bad_row: str = "refuse"
) -> list[Prompt]:
    """Cut plain text files into prompts of `length` tokens, one every `stride` tokens.

    Args:
        tokenizer ([`PreTrainedTokenizerBase`]):
            The target's.
        files (`Iterable[str]`):
            UTF-8 text; others, and what cannot be read, are bad rows.
        length, stride (`int`):
            In tokens.
        on_bad_row (`str`, *optional*, defaults to `"refuse"`):
            See [`chat_prompts`].

    Returns:
        `list[Prompt]`
    """
    bad_rows, prompts = BadRows(on_bad_row), []
    for file in files:
        try:
            data = Path(file).read_bytes()
            ids = tokenizer(data.decode())["input_ids"]
        except UnicodeDecodeError as error:
            line = data[: error.start].count(b"\n") + 1
            bad_rows.report(f"{file}:{line}", "not UTF-8 text.")
            continue
        except Exception as error:  # of the file system or the tokenizer
            bad_rows.report(str(file), f"it cannot be read ({_in_words(error)}).")
            continue
        for start in range(0, len(ids) - length + 1, stride):
            prompts.append(Prompt(ids[start : start + length], f"{file}:token {start}"))
    return prompts


def text_samples(tokenizer, files: Iterable[str | os.PathLike], *, length: int, on_bad_row: str = "refuse"):
    """Cut plain text files into samples whose responses are the text itself, not the target's.

    Args:
        tokenizer, files, on_bad_row:
            See [`text_prompts`].
        length (`int`):
            Tokens per sample.

    Returns:
        `list[dict]`: Samples of [`AnchorCollator`].
    """
    windows = text_prompts(tokenizer, files, length=length, stride=length, on_bad_row=on_bad_row)
    return [{"input_ids": window.input_ids, "prompt_length": 1} for window in windows]
