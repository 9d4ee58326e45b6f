"""The exact distribution of a tiny target's texts, and a test of samples against it."""

import itertools
import math

import torch


def text_distribution(target, ids: torch.Tensor, length: int) -> dict[tuple[int, ...], float]:
    """Return the probability of every text of a length after a prompt of shape `(1, prompt)`."""
    distribution = {}
    for text in itertools.product(range(target.config.vocab_size), repeat=length):
        with torch.no_grad():
            logits = target(torch.cat([ids, torch.tensor([text])], dim=1)).logits[0, ids.shape[1] - 1 : -1]
        distribution[text] = float(logits.log_softmax(-1).gather(1, torch.tensor(text)[:, None]).sum().exp())
    assert math.isclose(sum(distribution.values()), 1, abs_tol=1e-4)
    return distribution


def check_distribution(distribution: dict[tuple[int, ...], float], texts: list[list[int]]) -> None:
    """Compare sampled texts with their distribution by a chi-squared test."""
    counts = dict.fromkeys(distribution, 0)
    for text in texts:
        counts[tuple(text)] += 1
    statistic = sum((counts[text] - len(texts) * p) ** 2 / (len(texts) * p) for text, p in distribution.items())
    assert statistic < chi_squared_bound(len(distribution) - 1)


def chi_squared_bound(degrees: int) -> float:
    """Wilson-Hilferty approximation of the 99.9 % quantile."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + 3.09 * math.sqrt(spread)) ** 3
