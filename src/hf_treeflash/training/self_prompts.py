"""Prompts without a data set: a chat model writes the user's turns itself (Magpie, arXiv 2406.08464)."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from tqdm import tqdm

from .data import Prompt, chat_prompts
from .responses import begin, end_tokens, left_padded, provenance

# How user turns start, in turn. Left alone a model mostly asks for advice; these keep the other kinds from being rare.
OPENINGS = (
    "",
    "Write a Python function that",
    "How many",
    "Rewrite the following",
    "List",
    "",
    "What is",
    "```python\n",
    "Solve",
    "Summarize the following text:\n\n",
    "Give me",
    "",
    "Why",
    "Write a program",
    "Calculate",
    "Correct the mistakes in this text:\n\n",
    "Make a list of",
    "",
    "Write a short",
    "Fix the bug in this code:\n\n```",
    "A",
    "Translate",
    "Can you",
    "",
    "Explain",
    "Write a SQL query",
    "If",
    "Edit this",
    "Name",
    "How do I",
)
MARK = "\N{BLACK HEART SUIT}user\N{BLACK HEART SUIT}"
ALIKE = 0.6  # share of common token pairs from which two prompts are near-duplicates
SHORTEST = 4  # tokens
MOST_EMPTY_BATCHES = 10


def self_prompts(
    target,
    tokenizer,
    count: int,
    output_file: str | os.PathLike,
    *,
    enable_thinking: bool,
    batch_size: int = 48,
    seed: int = 0,
    max_new_tokens: int = 96,
    openings: Sequence[str] = OPENINGS,
    **generate_kwargs,
) -> list[Prompt]:
    """Have a chat model write prompts: it continues its own template where the user would speak.

    An interrupted call goes on where it stopped, and a later call may ask for more.

    Args:
        target ([`PreTrainedModel`]), tokenizer ([`PreTrainedTokenizerBase`]):
            The target and its tokenizer, which needs a chat template.
        count (`int`):
            Prompts to have in the end; those that nearly repeat an earlier one do not count.
        output_file (`str` or `os.PathLike`):
            A `.jsonl` file of `{"prompt": ..., "opening": ...}`, which [`chat_prompts`] reads, too.
        enable_thinking (`bool`):
            Passed to the chat template, see [`chat_prompts`].
        batch_size (`int`, *optional*, defaults to 48):
            User turns written at a time.
        seed (`int`, *optional*, defaults to 0):
            Each batch is drawn with `seed` plus its number.
        max_new_tokens (`int`, *optional*, defaults to 96):
            Turns that do not end within so many tokens are dropped.
        openings (`Sequence[str]`, *optional*):
            What user turns start with, in turn; `""` leaves the model free.
        generate_kwargs:
            Of `generate`; by default temperature 1 and `top_p` 0.95.

    Returns:
        `list[Prompt]`

    Raises:
        ValueError: If the chat template cannot be cut at the user's turn, or the file was begun with other settings.
        RuntimeError: If the target writes no usable turns.
    """
    output_file, turn = Path(output_file), UserTurn(target, tokenizer, enable_thinking)
    options = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 0, **generate_kwargs}
    options["max_new_tokens"] = max_new_tokens
    settings = {"batch_size": batch_size, "seed": seed, "openings": list(openings), "enable_thinking": enable_thinking}
    begin(output_file, provenance(target, tokenizer, options, **settings))
    rows, empty = finished_rows(output_file), 0
    seen = NearDuplicates(turn.ids(row["prompt"].lower()) for row in rows)
    number = rows[-1]["batch"] + 1 if rows else 0
    with open(output_file, "a") as file, tqdm(total=count, initial=len(rows), desc="prompts") as bar:
        while len(rows) < count:
            torch.manual_seed(seed + number)
            starts = [openings[(number * batch_size + row) % len(openings)] for row in range(batch_size)]
            written = zip(starts, turn.written(starts, options), strict=True)
            new = [
                {"prompt": text, "opening": start, "batch": number}
                for start, text in written
                if seen.adds(turn.ids(text.lower()))
            ]
            file.write("".join(json.dumps(row) + "\n" for row in new))
            file.flush()
            rows, number, empty = rows + new, number + 1, 0 if new else empty + 1
            bar.update(len(new))
            if empty == MOST_EMPTY_BATCHES:
                raise RuntimeError(
                    f"The target wrote no new prompt in {empty} batches: its user turns do not end within "
                    f"{max_new_tokens} tokens, or repeat each other. Raise `max_new_tokens`, give other `openings`, "
                    "or use prompts of your own."
                )
    return chat_prompts(tokenizer, output_file, enable_thinking=enable_thinking)[:count]


class UserTurn:
    """The place in a chat template where the user speaks.

    Args:
        target ([`PreTrainedModel`]), tokenizer ([`PreTrainedTokenizerBase`]):
            The target and its tokenizer.
        enable_thinking (`bool`):
            Passed to the chat template.

    Raises:
        ValueError: If the template does not show where the turn starts and ends.
    """

    def __init__(self, target, tokenizer, enable_thinking: bool):
        if tokenizer.chat_template is None:
            raise ValueError("The tokenizer has no chat template, which `self_prompts` needs; use `text_prompts`.")
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": MARK}], tokenize=False, enable_thinking=enable_thinking
        )
        before, *after = rendered.split(MARK)
        if len(after) != 1 or not after[0]:
            raise ValueError("The chat template does not show where a user's turn ends; use prompts of your own.")
        self.target, self.tokenizer, self.before = target, tokenizer, before
        self.ends = {self.ids(after[0])[0], *end_tokens(target)}

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a text, without any that a tokenizer adds."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def written(self, openings: Sequence[str], options: dict) -> list[str]:
        """Sample a turn after each opening; an empty one where it did not end, or is no text."""
        pad_token_id = next(iter(self.ends)) if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        inputs = left_padded([self.ids(self.before + start) for start in openings], pad_token_id, self.target.device)
        ends = {"eos_token_id": sorted(self.ends), "pad_token_id": pad_token_id}
        output = self.target.generate(**inputs, **ends, **options)
        return [
            self._text(start, row)
            for start, row in zip(openings, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True)
        ]

    def _text(self, opening: str, row: list[int]) -> str:
        end = next((index for index, token in enumerate(row) if token in self.ends), None)
        if end is None or set(row[:end]) & set(self.tokenizer.all_special_ids):
            return ""
        text = (opening + self.tokenizer.decode(row[:end])).strip()
        return "" if "\N{REPLACEMENT CHARACTER}" in text else text


class NearDuplicates:
    """Texts that differ: a new one shares less than 60 % of its token pairs with any other.

    Args:
        texts (`Iterable[Sequence[int]]`, *optional*):
            Token ids of texts that are known to differ.
    """

    def __init__(self, texts: Iterable[Sequence[int]] = ()):
        self.sizes: list[int] = []
        self.texts_with: dict[tuple[int, int], list[int]] = {}
        for text in texts:
            self._add(set(pairwise(text)))

    def adds(self, ids: Sequence[int]) -> bool:
        """Take a text in unless it is too short or nearly repeats an earlier one; return whether it was taken."""
        pairs = set(pairwise(ids))
        common = Counter(index for pair in pairs for index in self.texts_with.get(pair, ()))
        alike = any(n >= ALIKE * (len(pairs) + self.sizes[index] - n) for index, n in common.items())
        if len(ids) < SHORTEST or alike:
            return False
        self._add(pairs)
        return True

    def _add(self, pairs: set[tuple[int, int]]) -> None:
        for pair in pairs:
            self.texts_with.setdefault(pair, []).append(len(self.sizes))
        self.sizes.append(len(pairs))


def finished_rows(file: Path) -> list[dict]:
    """Return the rows of a file, and drop the last batch of one whose last line is half written."""
    text = file.read_text() if file.exists() else ""
    rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    if text and not text.endswith("\n"):
        rows = [row for row in rows if row["batch"] < rows[-1]["batch"]]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows
