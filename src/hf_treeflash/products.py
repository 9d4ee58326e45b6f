"""Products of a few rows with a large weight on a CPU, each in the way that proved fastest there.

Libraries are made for one row or for many. Between them a product may take longer than that of more rows, and the
fastest way to it hangs on machine, shape and rows. So each way is tried while products are needed: layers of one shape
take turns, which also shows every way the weight as a pass finds it, not in the cache.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Way = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of rows (rows, inputs) and a weight (outputs, inputs)

MOST_ROWS = 64
LARGE = 2**18  # entries of a weight from which the way matters
LIKED_ROWS = 16
BLOCKS = (48, 64, 32)  # outputs whose weights fit in a core's own cache
TRIALS = 3  # of each way, the fastest of which counts
WORTH = 0.95  # of the usual time; what gains less is left as it is


def padded(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply as many rows as libraries like; those on top are zeros."""
    return F.linear(F.pad(rows, (0, 0, 0, -len(rows) % LIKED_ROWS)), weight)[: len(rows)]


def turned(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply the weight with the rows as columns."""
    return F.linear(weight, rows).t().contiguous()


def by_onednn(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply by oneDNN, which reads the weight where it is."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")


def in_blocks(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply with a block of outputs at a time."""
    blocks = as_blocks(weight)
    products = torch.bmm(rows.expand(len(blocks), *rows.shape), blocks.transpose(1, 2))  # (blocks, rows, outputs)
    return products.transpose(0, 1).reshape(len(rows), len(weight))


def turned_in_blocks(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply a block of outputs at a time with the rows as columns."""
    blocks, turned = as_blocks(weight), rows.t().contiguous()
    products = torch.bmm(blocks, turned.expand(len(blocks), *turned.shape))  # (blocks, outputs, rows)
    return products.view(len(weight), len(rows)).t().contiguous()


def as_blocks(weight: torch.Tensor) -> torch.Tensor:
    """Return a weight as `(blocks, outputs, inputs)`."""
    return weight.view(-1, block_of(weight), weight.shape[1])


def block_of(weight: torch.Tensor) -> int:
    """Return how many outputs of a weight make a block; 1 if it cannot be cut."""
    return next((size for size in BLOCKS if len(weight) % size == 0), 1)


class Products:
    """What products take by shape, rows and way, and which way is the fastest.

    Attributes:
        seconds (`dict[tuple, dict[Way, list[float]]]`):
            By (rows in fours, outputs, inputs), the times of each way.
        fastest (`dict[tuple, Way]`):
            By the same, the way once it is known.
    """

    def __init__(self):
        self.seconds: dict[tuple, dict[Way, list[float]]] = {}
        self.fastest: dict[tuple, Way] = {}

    def __call__(self, layer: nn.Linear, states: torch.Tensor) -> torch.Tensor:
        """Return what the layer's own forward would, up to rounding.

        Args:
            layer (`nn.Linear`):
                One that [`takes_turns`].
            states (`torch.Tensor` of shape `(..., in_features)`):
                What to multiply.
        """
        count = states.numel() // layer.in_features
        if not 1 < count <= MOST_ROWS:  # plain steps and prompts stay as they are
            return F.linear(states, layer.weight, layer.bias)
        key = -(-count // 4), layer.out_features, layer.in_features
        way = self.fastest.get(key)
        if way is F.linear:
            return F.linear(states, layer.weight, layer.bias)
        rows = states.reshape(count, layer.in_features)
        result = self._try(key, rows, layer.weight) if way is None else way(rows, layer.weight)
        if layer.bias is not None:
            result += layer.bias
        return result.view(*states.shape[:-1], layer.out_features)

    def _try(self, key: tuple, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Multiply in the way that was tried least; decide once all were tried often enough."""
        tried = self.seconds.setdefault(key, {way: [] for way in ways(weight)})
        way = min(tried, key=lambda way: len(tried[way]))
        start = time.perf_counter()
        try:
            result = way(rows, weight)
        except RuntimeError:  # libraries are built in many ways
            if len(tried) == 1:
                raise
            del tried[way]
            return self._try(key, rows, weight)
        tried[way].append(time.perf_counter() - start)
        if min(map(len, tried.values())) >= TRIALS:
            best, usual = min(tried, key=lambda way: min(tried[way])), next(iter(tried))
            self.fastest[key] = best if min(tried[best]) < WORTH * min(tried[usual]) else usual
        return result


def ways(weight: torch.Tensor) -> list[Way]:
    """Return the ways to multiply rows with a weight, the usual one first."""
    listed: list[Way] = [F.linear, turned, padded]
    if torch.backends.mkldnn.is_available():
        listed.append(by_onednn)
    if block_of(weight) > 1:
        listed += [in_blocks, turned_in_blocks]
    return listed


def takes_turns(module: Any) -> bool:
    """Whether a module is a plain linear layer on a CPU that is large enough, and whose forward is nobody else's."""
    if type(module) is not nn.Linear or "forward" in vars(module) or not module.weight.is_cpu:
        return False
    weight = module.weight
    if type(weight) is not nn.Parameter or weight.dtype != torch.float32:
        return False
    return weight.is_contiguous() and weight.numel() >= LARGE


products = Products()


def _on_thread(thread: int, layer: nn.Linear, states: torch.Tensor) -> torch.Tensor:
    """Multiply in the fastest way on one thread; others may be decoding plainly with the same model."""
    if threading.get_ident() != thread:
        return F.linear(states, layer.weight, layer.bias)
    return products(layer, states)


@contextmanager
def quick_products(*models: Any) -> Iterator[None]:
    """Have large linear layers on a CPU multiply a few rows in the fastest way, while the context is open.

    Nothing is changed for other threads, under autocast, or where deterministic algorithms are asked for.

    Args:
        models (`nn.Module`):
            Whose layers; those with a forward of their own keep it.
    """
    left = torch.is_autocast_enabled("cpu") or torch.are_deterministic_algorithms_enabled()
    layers = [] if left else [module for model in models for module in model.modules() if takes_turns(module)]
    layers = list(dict.fromkeys(layers))
    thread = threading.get_ident()
    for layer in layers:
        layer.forward = partial(_on_thread, thread, layer)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


__all__ = ["Products", "quick_products", "takes_turns", "ways"]
