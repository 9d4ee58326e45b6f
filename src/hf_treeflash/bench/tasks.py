"""The five sets of prompts that drafters are compared on, as the TreeFlash paper uses them (arXiv 2606.03819)."""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .pairs import encode_messages

REASONING = "Please reason step by step, and put your final answer within \\boxed{}."
PROGRAMMING = "Write a solution to the following problem and make sure that it passes the tests:"
SAMPLES, SUBSET_SEED = 64, 42
SHOWN = 3  # bad rows that an error names


class Task(NamedTuple):
    """A set of prompts.

    Args:
        source (`tuple[str, ...]`):
            Data set on the Hub, and its configuration where it has several.
        split (`str`):
            The part that is used.
        columns (`tuple[str, ...]`):
            What a row must hold.
        turns (`Callable`):
            Makes a row's user messages.
    """

    source: tuple[str, ...]
    split: str
    columns: tuple[str, ...]
    turns: Callable[[dict[str, Any]], list[str]]


TASKS = {
    "gsm8k": Task(("openai/gsm8k", "main"), "test", ("question",), lambda row: [f"{row['question']}\n{REASONING}"]),
    "math500": Task(("HuggingFaceH4/MATH-500",), "test", ("problem",), lambda row: [f"{row['problem']}\n{REASONING}"]),
    "humaneval": Task(
        ("openai/openai_humaneval",),
        "test",
        ("prompt",),
        lambda row: [f"{PROGRAMMING}\n```python\n{row['prompt']}\n```"],
    ),
    "mbpp": Task(("google-research-datasets/mbpp", "sanitized"), "test", ("prompt",), lambda row: [row["prompt"]]),
    "mt-bench": Task(("HuggingFaceH4/mt_bench_prompts",), "train", ("prompt",), lambda row: list(row["prompt"])),
}


def load_task(name: str, samples: int = SAMPLES) -> list[list[str]]:
    """Load a set of prompts with `datasets`, from the Hub or its local cache.

    Args:
        name (`str`):
            `gsm8k`, `math500`, `humaneval`, `mbpp` or `mt-bench`.
        samples (`int`, *optional*, defaults to 64):
            How many rows, drawn with the paper's seed and kept in their order.

    Returns:
        `list[list[str]]`: The user's messages of each conversation; MT-Bench has two.

    Raises:
        ValueError: If there is no such set, or rows of it lack a column; they are named by their numbers.
        OSError: If it can neither be reached nor is in the cache.
    """
    if name not in TASKS:
        raise ValueError(f"There is no task {name!r}; the tasks are {', '.join(TASKS)}.")
    from datasets import load_dataset

    task = TASKS[name]
    try:
        rows = load_dataset(*task.source, split=task.split)
    except Exception as error:  # of many kinds, from connections to scripts that are no longer run
        raise OSError(
            f"The data set {task.source[0]} for {name} could not be loaded ({type(error).__name__}: {error}). It is "
            "read from the Hub, or offline from the cache of an earlier run; prompts of your own go by a file."
        ) from error
    chosen = sorted(random.Random(SUBSET_SEED).sample(range(len(rows)), min(samples, len(rows))))
    bad = [index for index in chosen if not all(rows[index].get(column) for column in task.columns)]
    if bad:
        shown = ", ".join(map(str, bad[:SHOWN])) + (", ..." if len(bad) > SHOWN else "")
        raise ValueError(
            f"{len(bad)} rows of {task.source[0]} have no {' and '.join(task.columns)}: rows {shown} of the "
            f"{task.split} split. The data set has changed, or its cache is damaged."
        )
    return [task.turns(rows[index]) for index in chosen]


def encoded_turns(
    target, tokenizer, conversations: list[list[dict[str, str]]], max_new_tokens: int, enable_thinking: bool = False
) -> list[torch.Tensor]:
    """Return the prompts of conversations: one for each message that an answer follows.

    Args:
        target ([`PreTrainedModel`]), tokenizer ([`PreTrainedTokenizerBase`]):
            Write the answers between two messages of the user, greedily.
        conversations (`list[list[dict[str, str]]]`):
            Messages, the last of a user.
        max_new_tokens (`int`):
            Of such an answer.
        enable_thinking (`bool`, *optional*, defaults to `False`):
            Passed to the chat template.

    Returns:
        `list[torch.LongTensor]` of shape `(1, length)`.
    """
    prompts = []
    for messages in conversations:
        said: list[dict[str, str]] = []
        for message in messages:
            if said and said[-1]["role"] == message["role"] == "user":
                ids = encode_messages(tokenizer, said, enable_thinking).to(target.device)
                prompts.append(ids)
                output = target.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False
                )
                answer = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
                said.append({"role": "assistant", "content": answer})
            said.append(message)
        prompts.append(encode_messages(tokenizer, said, enable_thinking))
    return prompts


__all__ = ["SAMPLES", "TASKS", "encoded_turns", "load_task"]
