"""Prompts from files: JSON lines, JSON, plain text and chats; rows that cannot be used are named by their lines."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MESSAGES = "`messages` with a user message, or a `prompt` that is a string and not empty"
SHOWN = 3  # bad rows that an error names; the others are counted


def read_prompts(path: Path, limit: int | None = None) -> list[list[dict[str, str]]]:
    """Read the conversations of a file.

    Args:
        path (`Path`):
            `.jsonl`: a row per line, `.json`: a list of rows; a row is a string, or holds `prompt`, a string, or
            `messages`, a list of `{"role", "content"}`, whose answers after the last user message are dropped.
            Anything else is text, a prompt per line.
        limit (`int`, *optional*):
            The first so many.

    Returns:
        `list[list[dict[str, str]]]`: The messages of each; those of a plain prompt are one, of the user.

    Raises:
        ValueError: If it holds no prompt, or rows that are none; the message names their places.
        OSError: If it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 text.") from error
    conversations, bad = [], []
    for place, row in _rows(path, text):
        messages = row if isinstance(row, str) else conversation(row)
        if isinstance(row, ValueError):
            bad.append(f"{place}: {row}")
        elif messages:
            conversations.append(in_messages(messages))
        else:
            bad.append(f"{place}: expected {MESSAGES}, found {_short(row)}")
    if bad:
        more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise ValueError(f"{path} has {len(bad)} rows that are no prompts. {'; '.join(bad[:SHOWN])}{more}.")
    if not conversations:
        raise ValueError(f"{path} holds no prompt.")
    return conversations[:limit]


def in_messages(prompt: str | list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the messages of a prompt, which may be a string."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def conversation(row: Any) -> list[dict[str, str]] | None:
    """Return a row's messages up to the last user message, None where it has none."""
    if not isinstance(row, dict):
        return None
    if isinstance(row.get("prompt"), str) and row["prompt"]:
        return in_messages(row["prompt"])
    messages = row.get("messages")
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    ):
        return None
    users = [index for index, message in enumerate(messages) if message["role"] == "user"]
    return messages[: users[-1] + 1] if users else None


def _rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Yield the place of each row, and what stands there; an error where that is no JSON."""
    if path.suffix == ".json":
        rows = _parsed(text)
        if isinstance(rows, ValueError):
            raise ValueError(f"{path} is no JSON: {rows}. A file of JSON lines is called .jsonl.")
        if not isinstance(rows, list):
            raise ValueError(f"{path}: expected a list of prompts, found {_short(rows)}.")
        yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))
        return
    lines = [(f"line {number}", line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if path.suffix == ".jsonl":
        yield from ((place, _parsed(line)) for place, line in lines)
    elif lines and all(isinstance(_parsed(line), dict) for _, line in lines):
        raise ValueError(f"{path} holds JSON lines: rename it to end in .jsonl, or each line is taken as it is.")
    else:
        yield from lines


def _parsed(text: str) -> Any:
    """Return what a JSON text says, or the error that it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return ValueError(f"not JSON ({error})")


def _short(row: Any) -> str:
    shown = json.dumps(row)
    return shown if len(shown) <= 60 else f"{shown[:60]}..."


__all__ = ["conversation", "in_messages", "read_prompts"]
