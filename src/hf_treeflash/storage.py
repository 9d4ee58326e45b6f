"""Keys and values of one text's layers in one tensor: passes append in place, a commit moves all layers at once."""

from collections.abc import Iterator

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from .choice import Choice

ROOM = 256  # columns kept free; a full storage is copied to a larger one
LAYERS = 8  # of one storage at most: while it is copied to a larger one, their memory is needed twice

Views = tuple[torch.Tensor, ...]


class Unwritten:
    """Keys and values of a pass that its attention writes to their storages, as it reads them.

    Attributes:
        states (`dict[int, tuple[torch.Tensor, torch.Tensor]]`):
            Those that are still to be written, by the id of the keys that the attention is given.
    """

    def __init__(self):
        self.states: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def take(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the states of a layer's pass, to be written behind the others of its keys.

        Args:
            keys (`torch.Tensor`):
                What the layer's cache returned.

        Raises:
            RuntimeError: If the keys came from elsewhere, or were changed on their way.
        """
        if id(keys) not in self.states:
            raise RuntimeError("keys reached the attention in another form than the cache gave them")
        return self.states.pop(id(keys))


class Storage:
    """The states of layers of one shape, for a single text; it answers to the verbs of layers that such a text needs.

    Args:
        layers (`list[DynamicLayer]`):
            Layers to take over, of batch size 1.
    """

    def __init__(self, layers: list[DynamicLayer]):
        self.begin = 0  # columns before it were trimmed
        parts = [states for layer in layers for states in (layer.keys, layer.values)]
        length = parts[0].shape[2]
        self.states = parts[0].new_empty(len(parts), *_with_columns(parts[0], length + ROOM))
        torch.stack(parts, out=self.states.narrow(3, 0, length))
        self.lengths = [length] * len(layers)  # during a pass some layers are ahead of others
        self._views_of: tuple[int, int] | None = None
        self.unwritten: Unwritten | None = None  # while passes leave their columns to their attention

    def views(self, length: int, new: int) -> tuple[Views, Views]:
        """Return the columns a pass writes and those it reads afterwards: keys and values of each layer in turn.

        Args:
            length (`int`):
                Columns before the pass.
            new (`int`):
                Columns it adds.
        """
        if self._views_of != (length, new):  # made for all layers at once, with the first layer that asks
            self._reserve(length + new)
            self._views = (
                self.states.narrow(3, self.begin + length, new).unbind(0),
                self.states.narrow(3, self.begin, length + new).unbind(0),
            )
            self._views_of = length, new
        return self._views

    def commit(self, choice: Choice) -> None:
        """Keep the chosen columns of a pass."""
        if choice.moves:
            tail = self.states[:, :, :, self.begin + choice.length :]  # (parts, 1, heads, nodes, size)
            kept = tail.index_select(3, choice.index.on(tail.device)[0])
            tail[:, :, :, : kept.shape[3]] = kept
        self.rollback(choice.new_length)

    def rollback(self, length: int) -> None:
        """Drop all columns but the first."""
        self.lengths = [length] * len(self.lengths)

    def trim(self, columns: int) -> None:
        """Keep the last columns."""
        self.begin += self.lengths[0] - columns
        self.rollback(columns)
        self._views_of = None

    def _reserve(self, columns: int) -> None:
        if self.begin + columns > self.states.shape[3]:
            kept = self.states[:, :, :, self.begin :]
            self.states = kept.new_empty(len(kept), *_with_columns(kept[0], columns + ROOM))
            self.states[:, :, :, : kept.shape[3]] = kept
            self.begin = 0


class StoredLayer(DynamicLayer):
    """A layer whose keys and values are a part of a [`Storage`].

    Args:
        storage ([`Storage`]):
            Where they are.
        index (`int`):
            Its place there.
        layer ([`DynamicLayer`]):
            The layer it stands in for.
    """

    def __init__(self, storage: Storage, index: int, layer: DynamicLayer):
        # Not the parent's, which sets what is computed here.
        self.storage, self.index, self.layer = storage, index, layer
        self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.keys.device, True

    @property
    def keys(self) -> torch.Tensor:
        """Keys so far, `(1, heads, columns, head_dim)`."""
        return self._part(2 * self.index)

    @property
    def values(self) -> torch.Tensor:
        """Values so far, of the same shape."""
        return self._part(2 * self.index + 1)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Append a pass's columns; return all keys and values."""
        new, first = key_states.shape[2], 2 * self.index
        written, read = self.storage.views(self.get_seq_length(), new)
        if self.storage.unwritten is not None and not torch.compiler.is_compiling():
            self.storage.unwritten.states[id(read[first])] = key_states, value_states
        else:
            written[first].copy_(key_states)
            written[first + 1].copy_(value_states)
        self.storage.lengths[self.index] += new
        return read[first], read[first + 1]

    def get_seq_length(self) -> int:
        """Return the number of columns."""
        return self.storage.lengths[self.index]

    def _part(self, place: int) -> torch.Tensor:
        return self.storage.states[place].narrow(2, self.storage.begin, self.get_seq_length())


def share(cache: Cache) -> list[Storage]:
    """Move a cache's full-attention layers into storages; `release` undoes it.

    Args:
        cache ([`Cache`]):
            Of batch size 1; layers of other kinds are left as they are.
    """
    storages = []
    for places in _groups(cache):
        layers = [cache.layers[place] for place in places]
        storage = Storage(layers)
        for index, (place, layer) in enumerate(zip(places, layers, strict=True)):
            cache.layers[place] = StoredLayer(storage, index, layer)
            layer.keys = layer.values = None  # not kept twice
        storages.append(storage)
    return storages


def release(cache: Cache) -> None:
    """Give a cache its own layers back, with what was written since."""
    for place, layer in enumerate(cache.layers):
        if isinstance(layer, StoredLayer):
            layer.layer.keys, layer.layer.values = layer.keys.contiguous(), layer.values.contiguous()
            cache.layers[place] = layer.layer


def _groups(cache: Cache) -> Iterator[list[int]]:
    """Yield the places of layers that can share a storage."""
    alike: dict[tuple, list[int]] = {}
    for place, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            keys, values = ((part.shape, part.dtype, part.device) for part in (layer.keys, layer.values))
            if keys == values:
                alike.setdefault(keys, []).append(place)
    for places in alike.values():
        yield from (places[start : start + LAYERS] for start in range(0, len(places), LAYERS))


def _with_columns(states: torch.Tensor, columns: int) -> tuple[int, int, int, int]:
    batch, heads, _, size = states.shape
    return batch, heads, columns, size


__all__ = ["Storage", "StoredLayer", "Unwritten", "release", "share"]
