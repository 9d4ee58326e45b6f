"""A verify pass as its recurrent layers see it: the trees, the layer that runs, and what its nodes would add."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, wraps
from typing import Any

import torch

from ..cache import PrefixCache
from ..choice import Uploaded
from ..states import State, Terms
from ..tree import DraftTree
from .levels import Level, levels_of, reached_columns

_here = threading.local()


class TreePass:
    """One pass of a target over trees.

    A recurrent layer convolves first, and what it convolves is the tensor its cache layer holds: that tells which
    layer runs. Its scan then starts from that layer's state and leaves its terms for it.

    Args:
        tree ([`DraftTree`]):
            The nodes.
        prefix ([`PrefixCache`]):
            The target's cache.
    """

    def __init__(self, tree: DraftTree, prefix: PrefixCache):
        self.cache = prefix.cache
        self.parents, self.mask = tree.parents, Uploaded(tree.ancestor_mask)
        self.kept = {kept.layer: kept for kept in prefix.of_layers if isinstance(kept, State)}
        self.convolved: list[Any] = []
        self._reached: dict[int, Uploaded] = {}

    @cached_property
    def levels(self) -> list[Level]:
        """The nodes of each depth."""
        return levels_of(self.parents)

    def reached(self, kernel: int, device: torch.device) -> torch.Tensor:
        """Return the columns of each node's convolution window, see [`reached_columns`]."""
        if kernel not in self._reached:
            self._reached[kernel] = Uploaded(reached_columns(self.parents, kernel))
        return self._reached[kernel].on(device)

    def begin_layer(self, columns: torch.Tensor) -> None:
        """Note that a layer convolves the columns its cache holds."""
        for layer in self.kept:
            if layer.conv_states[0] is columns and layer not in self.convolved:
                self.convolved.append(layer)
                return
        raise ValueError(strange(f"A layer behind {len(self.convolved)} other recurrent ones"))

    @property
    def state(self) -> torch.Tensor:
        """The state of the layer that runs."""
        if not self.convolved or self.kept[self.convolved[-1]].terms is not None:
            raise ValueError(strange("A layer with a scan and no convolution before it"))
        return self.convolved[-1].recurrent_states[0]

    def end_layer(self, terms: Terms) -> torch.Tensor:
        """Leave the terms of the layer that runs; return its state, which stays as it is."""
        state = self.state
        self.kept[self.convolved[-1]].terms = terms
        return state

    def unseen(self) -> int | None:
        """Return the place of a layer that did not run over the tree, None if all did."""
        for place, layer in enumerate(self.cache.layers):
            if layer in self.kept:
                convolved = layer.conv_states[0] is None or layer in self.convolved
                scanned = layer.recurrent_states[0] is None or self.kept[layer].terms is not None
                if not (convolved and scanned):
                    return place
        return None


@contextmanager
def tree_in_force(tree: DraftTree, prefix: PrefixCache) -> Iterator[None]:
    """Let the recurrent layers of this thread's passes run over trees.

    Args:
        tree ([`DraftTree`]):
            The nodes of the pass.
        prefix ([`PrefixCache`]):
            The target's cache, which gets every layer's terms.

    Raises:
        ValueError: If a layer runs in some other way, before it has written its state.
    """
    run = TreePass(tree, prefix)

    def keep_state(states: torch.Tensor, layer_idx: int, *args, **kwargs) -> torch.Tensor:
        layer = run.cache.layers[layer_idx]
        if run.kept[layer].terms is None:
            raise ValueError(strange(f"Layer {layer_idx}"))
        return layer.recurrent_states[0]

    _here.tree_pass = run
    run.cache.update_recurrent_state = keep_state
    try:
        yield
        if (place := run.unseen()) is not None:
            raise ValueError(strange(f"Layer {place}"))
    finally:
        _here.tree_pass = None
        del run.cache.update_recurrent_state


def strange(layer: str) -> str:
    """Return why a layer is refused that did not run as its class is known to."""
    return (
        f"{layer} of the target did not run over the tree: its class, or a function that it calls, was "
        "replaced. Load the model without such replacements, or generate without a drafter."
    )


def dispatcher(plain: Callable, over_trees: Callable) -> Callable:
    """Return a function that runs `over_trees` within [`tree_in_force`] on this thread, and `plain` otherwise.

    Args:
        plain (`Callable`):
            A function of transformers.
        over_trees (`Callable`):
            What stands for it: takes the [`TreePass`], then the same arguments.
    """

    @wraps(plain)
    def dispatch(*args, **kwargs):
        run = getattr(_here, "tree_pass", None)
        return plain(*args, **kwargs) if run is None else over_trees(run, *args, **kwargs)

    setattr(dispatch, "_over_trees", over_trees)
    return dispatch


__all__ = ["TreePass", "dispatcher", "tree_in_force"]
