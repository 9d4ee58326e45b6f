"""Ranks that run one target together, by tensor parallelism: what the first of them decides holds for all."""

from typing import Any

import torch


class Ranks:
    """The processes among which a target's layers are split.

    Each has the whole text and the whole drafter. A round whose trees differed in shape would never end, and one whose
    trees differed in tokens would be wrong, so the first rank's are everybody's.

    Args:
        group (`ProcessGroup`):
            Of these processes.
    """

    def __init__(self, group):
        self.group, self.first = group, torch.distributed.get_global_rank(group, 0)

    @classmethod
    def of(cls, target) -> "Ranks | None":
        """Return a target's ranks, None where one process runs it alone."""
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return None
        if (getattr(target, "_tp_size", None) or 1) == 1:
            return None
        mesh = target._device_mesh
        return cls(mesh.get_group("tp") if mesh.ndim > 1 else mesh.get_group())

    def agree(self, value: Any) -> Any:
        """Return the first rank's value; the others' are dropped."""
        values = [value]
        torch.distributed.broadcast_object_list(values, self.first, self.group)
        return values[0]


__all__ = ["Ranks"]
