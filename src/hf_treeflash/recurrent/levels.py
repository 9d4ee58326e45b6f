"""The shape of a tree as walkers need it: the levels of its nodes, and the columns a convolution reaches back over."""

from typing import NamedTuple

import torch


class Level(NamedTuple):
    """The nodes of one depth, as many places for every row.

    Attributes:
        nodes (`torch.LongTensor` of shape `(batch, width)`):
            The nodes; the root fills up rows that have fewer.
        slots (`torch.LongTensor` of shape `(batch, width)`):
            The same, with the number of nodes as filler.
        parents (`torch.LongTensor` of shape `(batch, width)`):
            Places of their parents in the level above; 0 for roots.
    """

    nodes: torch.Tensor
    slots: torch.Tensor
    parents: torch.Tensor


def levels_of(parents: torch.Tensor) -> list[Level]:
    """Group the nodes of trees by depth, on the host.

    Args:
        parents (`torch.LongTensor` of shape `(batch, nodes)`):
            Parent of each node, -1 for the root and for unused nodes, which have no level.
    """
    count, rows = parents.shape[1], []
    for row in parents.tolist():
        places, levels = {0: (0, 0)}, [[(0, 0)]]  # by node, its depth and its place there; node and parent's place
        for node, parent in enumerate(row[1:], start=1):
            if parent < 0:
                continue
            depth, place = places[parent]
            if depth + 1 == len(levels):
                levels.append([])
            places[node] = depth + 1, len(levels[depth + 1])
            levels[depth + 1].append((node, place))
        rows.append(levels)
    result = []
    for depth in range(max(map(len, rows))):
        own = [levels[depth] if depth < len(levels) else [] for levels in rows]
        width = max(map(len, own))
        padded = torch.tensor([level + [(count, 0)] * (width - len(level)) for level in own], device=parents.device)
        slots, above = padded.unbind(2)  # (batch, width)
        result.append(Level(slots % count, slots, above))
    return result


def reached_columns(parents: torch.Tensor, kernel: int) -> torch.Tensor:
    """Return where each node's window of a convolution lies, as columns counted from the root's.

    Args:
        parents (`torch.LongTensor` of shape `(batch, nodes)`):
            Parent of each node, -1 for the root: the last stored column, whose parent is the one before it.
        kernel (`int`):
            Width of the window.

    Returns:
        `torch.LongTensor` of shape `(batch, nodes, kernel)`: the oldest column first, the node last.
    """
    columns = [torch.arange(parents.shape[1], device=parents.device).expand_as(parents)]
    for _ in range(kernel - 1):
        newer = columns[-1]
        columns.append(torch.where(newer >= 0, parents.gather(1, newer.clamp(min=0)), newer - 1))
    return torch.stack(columns[::-1], dim=-1)


__all__ = ["Level", "levels_of", "reached_columns"]
