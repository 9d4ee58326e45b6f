"""Batches of sequences with the anchors of their blocks."""

import zlib
from collections.abc import Callable

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence


class AnchorCollator:
    """Pads samples to a batch and chooses where blocks start.

    Anchors depend on the seed, the epoch and the sample alone, so neither the number of processes and workers nor an
    interrupted run changes them.

    Args:
        pad_token_id (`int`):
            Fills rows up at the end; never seen by any block.
        num_anchors (`int`, *optional*, defaults to 128):
            Anchors per sequence, drawn without replacement.
        max_length (`int`, *optional*):
            Longer samples are cut, in tokens.
        seed (`int`, *optional*, defaults to 0):
            Of the anchors.
        stride (`int`, *optional*):
            Take every `stride`-th position instead of random ones (evaluation).
        states (`Callable`, *optional*):
            Gives a sample's target states from disk, see [`StoredStates`].
    """

    def __init__(
        self,
        pad_token_id: int,
        num_anchors: int = 128,
        max_length: int | None = None,
        seed: int = 0,
        stride: int | None = None,
        states: Callable[[list[int]], tuple[torch.Tensor, torch.Tensor]] | None = None,
    ):
        self.pad_token_id, self.num_anchors, self.max_length = pad_token_id, num_anchors, max_length
        self.seed, self.stride, self.states = seed, stride, states
        self.epoch = 0

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        """Collate samples `{"input_ids": list[int], "prompt_length": int}`.

        Returns:
            `dict[str, torch.Tensor]`:
            - `input_ids` of shape `(batch, length)`, padded at the end;
            - `document_ids` of the same shape: 0, and -1 where padded;
            - `loss_mask` of the same shape, bool: the response, which alone is supervised;
            - `anchors` of shape `(batch, blocks)`, ascending, and `anchor_mask`, bool: False for filler;
            - with stored states, `taps` and `final` of shape `(batch, length, ...)`, zero where padded.
        """
        rows = [torch.as_tensor(sample["input_ids"][: self.max_length], dtype=torch.long) for sample in samples]
        length = max(len(row) for row in rows)
        anchors = [self._anchors(row, sample["prompt_length"]) for row, sample in zip(rows, samples, strict=True)]
        blocks = self.num_anchors if self.stride is None else max(1, *(len(row) for row in anchors), 1)
        batch = {
            "input_ids": torch.full((len(rows), length), self.pad_token_id),
            "document_ids": torch.full((len(rows), length), -1),
            "loss_mask": torch.zeros(len(rows), length, dtype=torch.bool),
            "anchors": torch.ones(len(rows), blocks, dtype=torch.long),
            "anchor_mask": torch.zeros(len(rows), blocks, dtype=torch.bool),
        }
        for index, (row, sample, chosen) in enumerate(zip(rows, samples, anchors, strict=True)):
            batch["input_ids"][index, : len(row)] = row
            batch["document_ids"][index, : len(row)] = 0
            batch["loss_mask"][index, sample["prompt_length"] : len(row)] = True
            batch["anchors"][index, : len(chosen)] = chosen
            batch["anchor_mask"][index, : len(chosen)] = True
        if self.states is not None:
            taps, final = zip(*(self.states(row.tolist()) for row in rows), strict=True)
            batch["taps"], batch["final"] = pad_sequence(list(taps), True), pad_sequence(list(final), True)
        return batch

    def _anchors(self, row: torch.Tensor, prompt_length: int) -> torch.Tensor:
        # A block needs context before its anchor and a token after it: 10 tokens, prompt of 4: anchors 4 to 8.
        first, last = max(1, prompt_length), len(row) - 2
        if self.stride is not None:
            return torch.arange(first, last + 1, self.stride)
        key = zlib.crc32(row.numpy().tobytes(), zlib.crc32(f"{self.seed} {self.epoch}".encode()))
        positions = np.arange(first, last + 1)
        count = min(self.num_anchors, len(positions))
        return torch.from_numpy(np.sort(np.random.default_rng(key).choice(positions, count, replace=False)))
