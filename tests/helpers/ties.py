"""Near-ties: where rounding may decide between two tokens that are equally good."""

import torch

TIE = 1e-4  # so close are two scores


def gap_at_first_difference(plain, tree: torch.Tensor) -> float:
    """Return the smallest distance of plain decoding's two best scores where rows first differ; infinite if none do.

    Args:
        plain ([`GenerateDecoderOnlyOutput`]):
            Plain decoding's output, with scores.
        tree (`torch.LongTensor` of shape `(batch, length)`):
            The other texts.
    """
    start = plain.sequences.shape[1] - len(plain.scores)
    gaps = []
    for row, ids in enumerate(plain.sequences):
        width = min(len(ids), tree.shape[1])
        differs = (ids[:width] != tree[row, :width]).nonzero()
        if len(differs):
            best = plain.scores[int(differs[0]) - start][row].topk(2).values
            gaps.append(float(best[0] - best[1]))
    return min(gaps, default=float("inf"))


__all__ = ["TIE", "gap_at_first_difference"]
