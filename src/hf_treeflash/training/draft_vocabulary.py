"""The tokens that a target writes most often, which are worth drafting."""

from collections import Counter
from collections.abc import Iterable, Sequence

import torch


def frequent_tokens(texts: Iterable[Sequence[int]], size: int) -> torch.Tensor:
    """Return the most frequent tokens of some texts, in ascending order.

    Where the texts hold fewer tokens, the smallest other ids make up the number: those are what a tokenizer made by
    merging learnt first. Ties go to the smaller id.

    Args:
        texts (`Iterable[Sequence[int]]`):
            Token ids of each text: the target's own responses, without prompts (see [`response_tokens`]).
        size (`int`):
            How many tokens, at least 1 and at most the target's vocabulary.

    Returns:
        `torch.LongTensor` of shape `(size,)`.

    Raises:
        ValueError: If the size is not positive.

    Source: FR-Spec (arXiv 2502.14856).
    """
    if size < 1:
        raise ValueError(f"`size`: expected a positive number of tokens, found {size}.")
    counts: Counter[int] = Counter()
    for text in texts:
        counts.update(text)
    kept = sorted(counts, key=lambda token: (-counts[token], token))[:size]
    others = (token for token in range(len(counts) + size) if token not in counts)
    kept += [next(others) for _ in range(size - len(kept))]
    return torch.tensor(sorted(kept))


def held_out_share(texts: Sequence[Sequence[int]], size: int) -> float:
    """Return what share of the odd texts' tokens is among the even ones' most frequent.

    It shows whether the texts are enough to choose a vocabulary by: the share of texts that were counted themselves is
    always high.

    Args:
        texts (`Sequence[Sequence[int]]`), size (`int`):
            As [`frequent_tokens`] takes them; at least two texts that are not empty.
    """
    known = set(frequent_tokens(texts[::2], size).tolist())
    tokens = [token for text in texts[1::2] for token in text]
    return sum(token in known for token in tokens) / max(1, len(tokens))


def response_tokens(samples: Iterable[dict]) -> Iterable[list[int]]:
    """Return what the target wrote in samples of [`regenerate`], their prompts left out."""
    return (sample["input_ids"][sample["prompt_length"] :] for sample in samples)


__all__ = ["frequent_tokens", "held_out_share", "response_tokens"]
