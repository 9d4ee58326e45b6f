"""A target's states of the training samples, computed once and kept on disk: later epochs cost the drafter only."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from .blocks import target_states

SHARD_BYTES = 256 << 20
# How far states may be from fresh ones of the same target on another machine, as a share of their norm.
TOLERANCE = 0.05


class StoredStates:
    """States of a target at its tapped layers and after its last one, sample by sample, in safetensors shards.

    A sample is found by its tokens, so samples may be added, left out and shuffled freely. Each shard says what it
    holds; an interrupted call keeps its finished shards.

    Args:
        folder (`str` or `os.PathLike`):
            Where the shards are.
        target ([`PreTrainedModel`]):
            The target.
        layer_ids (`list[int]`):
            Its tapped layers.
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`):
            Of what is kept: 2 bytes for each of `(taps + 1) * hidden_size` values a token. With the target's own dtype
            they are those of a fresh pass over the sample, bit for bit.

    Raises:
        ValueError: If the folder holds states of other layers, of another dtype or of another target.
    """

    def __init__(self, folder: str | os.PathLike, target, layer_ids: list[int], dtype: torch.dtype = torch.bfloat16):
        self.folder, self.target, self.layer_ids, self.dtype = Path(folder), target, list(layer_ids), dtype
        self.made = json.dumps({"layer_ids": self.layer_ids, "dtype": str(dtype).removeprefix("torch.")})
        self.places: dict[str, tuple[Path, int, int]] = {}  # by sample: its shard, first row and end
        self._open: dict[Path, safe_open] = {}
        for shard in sorted(self.folder.glob("*.safetensors")):
            self._read_contents(shard)

    def add(self, samples: Iterable[Sequence[int]]) -> None:
        """Compute and keep the states of samples that are not there yet.

        Args:
            samples (`Iterable[Sequence[int]]`):
                Token ids of each sample.
        """
        samples = [list(sample) for sample in samples]
        known = next((sample for sample in samples if key_of(sample) in self.places), None)
        if known is not None:
            self._check(known)
        missing = list({key_of(sample): sample for sample in samples if key_of(sample) not in self.places}.values())
        if missing:
            self.folder.mkdir(parents=True, exist_ok=True)
        states = self._computed(tqdm(missing, desc="target states", disable=not missing))
        for part in in_parts(states, SHARD_BYTES):
            self._write(part)

    def __call__(self, sample: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Read a sample's states.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Those at the tapped layers, of shape `(length, taps * hidden_size)`,
            and the final ones, of shape `(length, hidden_size)`.
        """
        shard, start, end = self.places[key_of(sample)]
        if shard not in self._open:
            self._open[shard] = safe_open(shard, "pt")
        return tuple(self._open[shard].get_slice(name)[start:end] for name in ("taps", "final"))

    def _computed(self, samples: Iterable[Sequence[int]]) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        # One sample a pass, so that its states do not depend on its neighbours.
        for sample in samples:
            ids = torch.tensor([list(sample)], device=self.target.device)
            taps, final = target_states(self.target, ids, self.layer_ids)
            yield key_of(sample), taps[0].to("cpu", self.dtype), final[0].to("cpu", self.dtype)

    def _check(self, sample: Sequence[int]) -> None:
        [(_, *fresh)] = self._computed([sample])
        for kept, computed in zip(self(sample), fresh, strict=True):
            if (kept.float() - computed.float()).norm() > TOLERANCE * computed.float().norm():
                raise ValueError(
                    f"{self.folder} holds states of another target: a sample's states are not those that this one "
                    "computes. Name another folder, or remove it."
                )

    def _write(self, part: list[tuple[str, torch.Tensor, torch.Tensor]]) -> None:
        keys, taps, final = zip(*part, strict=True)
        lengths = {key: len(states) for key, states in zip(keys, final, strict=True)}
        shard = self.folder / f"{hashlib.sha256(''.join(keys).encode()).hexdigest()[:16]}.safetensors"
        unfinished = shard.with_suffix(".unfinished")
        tensors = {"taps": torch.cat(taps), "final": torch.cat(final)}
        save_file(tensors, unfinished, {"made": self.made, "lengths": json.dumps(lengths)})
        unfinished.rename(shard)
        self._read_contents(shard)

    def _read_contents(self, shard: Path) -> None:
        with safe_open(shard, "pt") as file:
            contents = file.metadata()
        if contents["made"] != self.made:
            raise ValueError(
                f"{shard} holds states of {contents['made']}, wanted are {self.made}. Name another folder, or "
                "remove it."
            )
        start = 0
        for key, length in json.loads(contents["lengths"]).items():
            self.places[key] = (shard, start, start + length)
            start += length


def key_of(sample: Sequence[int]) -> str:
    """Return what a sample is found by: a hash of its tokens."""
    return hashlib.sha256(json.dumps(list(sample)).encode()).hexdigest()[:32]


def in_parts(states: Iterable[tuple[str, torch.Tensor, torch.Tensor]], limit: int) -> Iterator[list]:
    """Collect states to parts of at least `limit` bytes, the last one apart."""
    part, size = [], 0
    for item in states:
        part.append(item)
        size += sum(tensor.nbytes for tensor in item[1:])
        if size >= limit:
            yield part
            part, size = [], 0
    if part:
        yield part
