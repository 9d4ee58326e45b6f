"""Counts what a round launches on a CUDA device, by running it on a CPU with the branches of CUDA."""

from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from hf_treeflash.kernels import attention_interface, default_num_splits
from hf_treeflash.kernels.tree_attention import merges_inside
from hf_treeflash.static import cache
from hf_treeflash.static import round as round_module

# Operators that only say how memory is to be read, beside those that are views by their schema, or set memory apart.
NOTHING = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "detach", "lift_fresh", "alias"}
KERNELS = {"head_select": 2}  # of our own


def attention_launches(query, key, value, words, prefix, start, scaling, splits, new, arrivals) -> int:
    """Return what a layer of Qwen3-4B would launch, for 2,048 tokens of context, trees of 64 nodes, blocks of 16."""
    query = torch.empty(1, 32, 16 if query.shape[2] <= 16 else 64, 128, dtype=torch.bfloat16)
    key = torch.empty(1, 8, 2304, 128, dtype=torch.bfloat16)
    return 1 if merges_inside(query, key, default_num_splits(query, key), arrivals) else 2


class Launches(TorchDispatchMode):
    """Counts operators by name; what [`as_kernels`] wraps counts as one each."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if not function.is_view and name not in NOTHING:
            self.counts[name] += KERNELS.get(name, 1)
        return function(*args, **(kwargs or {}))

    @contextmanager
    def as_kernels(self, monkeypatch):
        """Count every call of a kernel's oracle as its launches."""

        def counted(name: str, oracle: Callable) -> Callable:
            def call(*args):
                self.counts[name] += attention_launches(*args) if name == "tree_attention" else KERNELS.get(name, 1)
                with _disable_current_modes():
                    return oracle(*args)

            return call

        with monkeypatch.context() as patch:
            for module, name in (
                (round_module, "build_tree"),
                (round_module, "accept"),
                (cache, "compact"),
                (attention_interface, "tree_attention"),
            ):
                patch.setattr(module, name, counted(name, getattr(module, name)))
            with self:
                yield self


def launches_of_a_round(static_round, monkeypatch) -> dict[str, Counter]:
    """Return what each part of a round launches."""
    parts: dict[str, Counter] = {}

    def part(name: str, call: Callable):
        launches = Launches()
        with torch.no_grad(), launches.as_kernels(monkeypatch):
            result = call()
        parts[name] = launches.counts
        return result

    span = static_round.capacity
    tree = part("draft", lambda: static_round.draft(span))
    choices, states = part("verify", lambda: static_round.verify(tree, span))
    part("commit", lambda: static_round.commit(tree, choices, states))
    return parts
