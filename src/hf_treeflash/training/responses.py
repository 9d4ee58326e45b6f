"""Responses written by the target itself, the text a drafter has to predict."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from ..bench.pairs import revision_of
from .data import Prompt


def provenance(target, tokenizer, generate_kwargs: dict, **extra) -> dict:
    """Describe how responses are made: target, chat template, generation settings, versions."""
    template = tokenizer.chat_template
    return {
        "target": target.config._name_or_path,
        "target_revision": revision_of(target),
        "chat_template_sha256": template and hashlib.sha256(str(template).encode()).hexdigest(),
        "generate": generate_kwargs,
        "transformers": transformers.__version__,
        **extra,
    }


def regenerate(
    target,
    tokenizer,
    prompts: Sequence[Prompt],
    output_file: str | os.PathLike,
    *,
    batch_size: int = 16,
    seed: int = 0,
    provenance_extra: dict | None = None,
    **generate_kwargs,
) -> list[dict]:
    """Have the target answer prompts, in batches; an interrupted call goes on where it stopped.

    Args:
        target ([`PreTrainedModel`]), tokenizer ([`PreTrainedTokenizerBase`]):
            The target and its tokenizer.
        prompts (`Sequence[Prompt]`):
            From [`chat_prompts`] or [`text_prompts`].
        output_file (`str` or `os.PathLike`):
            A `.jsonl` file, one sample per line; `<output_file>.provenance.json` beside it says how it was made. With
            the suffix `.parquet` the finished samples are written as such too.
        batch_size (`int`, *optional*, defaults to 16):
            Prompts per call of `generate`.
        seed (`int`, *optional*, defaults to 0):
            Each batch is drawn with `seed` plus its number.
        provenance_extra (`dict`, *optional*):
            More to record, such as `enable_thinking`.
        generate_kwargs:
            Of `generate`: `max_new_tokens`, `do_sample`, `temperature`, ...

    Returns:
        `list[dict]`: The samples.

    Raises:
        ValueError: If the file was begun with other settings.
    """
    made = provenance(
        target,
        tokenizer,
        generate_kwargs,
        batch_size=batch_size,
        seed=seed,
        prompts=len(prompts),
        **(provenance_extra or {}),
    )
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def respond(batch: Sequence[Prompt], number: int) -> Iterator[dict]:
        torch.manual_seed(seed + number)
        return _respond(target, batch, pad_token_id, generate_kwargs)

    return answer_all(prompts, output_file, made, batch_size, respond)


def answer_all(
    prompts: Sequence[Prompt],
    output_file: str | os.PathLike,
    made: dict,
    batch_size: int,
    respond: Callable[[Sequence[Prompt], int], Iterable[dict]],
) -> list[dict]:
    """Answer prompts in batches, each written as it is done; go on where an interrupted call stopped.

    Args:
        prompts (`Sequence[Prompt]`):
            What to answer.
        output_file (`str` or `os.PathLike`):
            See [`regenerate`].
        made (`dict`):
            How the answers are made.
        batch_size (`int`):
            Prompts per batch.
        respond (`Callable`):
            Takes a batch of prompts and its number, and gives their samples in order.

    Returns:
        `list[dict]`: The samples.

    Raises:
        ValueError: If the file was begun with other settings.
    """
    output_file = Path(output_file)
    lines_file = output_file.with_suffix(".jsonl")
    begin(lines_file, made)
    done = _resume(lines_file, batch_size, len(prompts))
    starts = range(done, len(prompts), batch_size)
    with open(lines_file, "a") as file:
        for start in tqdm(starts, desc="responses", initial=done // batch_size, total=-(-len(prompts) // batch_size)):
            for sample in respond(prompts[start : start + batch_size], start // batch_size):
                file.write(json.dumps(sample) + "\n")
            file.flush()
    samples = load_samples(lines_file)
    if output_file.suffix == ".parquet":
        from datasets import Dataset

        Dataset.from_list(samples).to_parquet(output_file)
    return samples


def _respond(target, batch: Sequence[Prompt], pad_token_id: int, generate_kwargs: dict) -> Iterator[dict]:
    inputs = left_padded([prompt.input_ids for prompt in batch], pad_token_id, target.device)
    output = target.generate(**inputs, **{"pad_token_id": pad_token_id, **generate_kwargs})
    ends = end_tokens(target)
    for prompt, row in zip(batch, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
        end = next((index + 1 for index, token in enumerate(row) if token in ends), len(row))
        yield {
            "input_ids": prompt.input_ids + row[:end],
            "prompt_length": len(prompt.input_ids),
            "source": prompt.source,
        }


def end_tokens(target) -> set[int]:
    """Return the tokens that end a target's text."""
    ends = target.generation_config.eos_token_id
    return set(ends if isinstance(ends, list) else [] if ends is None else [ends])


def left_padded(prompts: Sequence[Sequence[int]], pad_token_id: int, device) -> dict[str, torch.Tensor]:
    """Return prompts of any lengths as `input_ids` and `attention_mask` for `generate`."""
    longest = max(len(prompt) for prompt in prompts)
    pads = [longest - len(prompt) for prompt in prompts]
    rows = [[pad_token_id] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)]
    mask = [[0] * pad + [1] * (longest - pad) for pad in pads]
    return {"input_ids": torch.tensor(rows, device=device), "attention_mask": torch.tensor(mask, device=device)}


def begin(file: Path, made: dict) -> None:
    """Note beside a file how it is made, or compare.

    Raises:
        ValueError: If the file was begun with other settings.
    """
    made = json.loads(json.dumps(made))
    record = file.with_name(file.name + ".provenance.json")
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(made, indent=2) + "\n")
    elif json.loads(record.read_text()) != made:
        raise ValueError(f"{file} was begun with other settings, see {record}; finish it so, or remove both.")


def _resume(lines_file: Path, batch_size: int, count: int) -> int:
    """Return how many prompts are done; drop a half-written batch."""
    if not lines_file.exists():
        return 0
    lines = [line for line in lines_file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    done = len(lines) if len(lines) == count else len(lines) // batch_size * batch_size
    lines_file.write_text("".join(lines[:done]))
    return done


def load_samples(file: str | os.PathLike) -> list[dict]:
    """Read samples that [`regenerate`] wrote, from JSONL or parquet."""
    if Path(file).suffix == ".parquet":
        from datasets import Dataset

        return Dataset.from_parquet(str(file)).to_list()
    with open(file) as lines:
        return [json.loads(line) for line in lines]
