"""The paper's sets of prompts: which rows, in what words, and what is said when they cannot be had."""

import random

import pytest

datasets = pytest.importorskip("datasets")

from hf_treeflash.bench.tasks import TASKS, load_task  # noqa: E402

ROWS = {
    "gsm8k": lambda index: {"question": f"How much is {index} and {index}?", "answer": "much"},
    "math500": lambda index: {"problem": f"Simplify ${index}x$.", "answer": "x"},
    "humaneval": lambda index: {"prompt": f"def f{index}():", "test": ""},
    "mbpp": lambda index: {"prompt": f"Write function {index}.", "code": ""},
    "mt-bench": lambda index: {"prompt": [f"Name {index}.", "Again."], "category": "writing"},
}


@pytest.fixture
def sources(monkeypatch):
    """Stand in for the Hub; the returned list is what was asked for."""
    asked = []

    def load_dataset(*source, split):
        asked.append((*source, split))
        name = next(name for name, task in TASKS.items() if task.source == source)
        return [ROWS[name](index) for index in range(100)]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize("name", TASKS)
def test_the_papers_rows_in_the_papers_words(name, sources):
    conversations = load_task(name)
    indices = sorted(random.Random(42).sample(range(100), 64))
    assert len(conversations) == 64 and len(sources) == 1
    row, turns = ROWS[name](indices[5]), conversations[5]
    assert len(turns) == (2 if name == "mt-bench" else 1)
    text = row.get("question") or row.get("problem") or row["prompt"]
    assert (text[0] if isinstance(text, list) else text) in turns[0]
    assert ("\\boxed{}" in turns[0]) == (name in ("gsm8k", "math500"))
    assert ("```python\n" in turns[0]) == (name == "humaneval")


def test_fewer_rows(sources):
    assert len(load_task("mbpp", 7)) == 7


def test_rows_without_a_prompt_are_named(monkeypatch):
    rows = [{"question": "" if index == 3 else "?"} for index in range(5)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *source, split: rows)
    with pytest.raises(ValueError, match="1 rows of openai/gsm8k have no question: rows 3 of the test split"):
        load_task("gsm8k")


def test_what_cannot_be_had_is_said(monkeypatch):
    def load_dataset(*source, split):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(OSError, match="HuggingFaceH4/MATH-500 for math500 could not be loaded"):
        load_task("math500")
    with pytest.raises(ValueError, match="the tasks are gsm8k, math500"):
        load_task("gsm9k")
