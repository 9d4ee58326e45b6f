"""What `generate(return_dict_in_generate=True)` returns: per-token records shaped as plain decoding shapes them."""

from dataclasses import dataclass

import torch
from transformers import GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput

from .cache import PrefixCache
from .compat import CACHE
from .layers import window_of

Rows = list[tuple]  # per sequence, one entry per emitted token


@dataclass
class TreeFlashGenerateOutput(GenerateDecoderOnlyOutput):
    """Output of `generate` with a TreeFlash drafter.

    Args:
        acceptance_lengths (`list[list[int]]`):
            For each sequence, the tokens each verify pass emitted, the extra token included.
        block_efficiency (`float`):
            Emitted tokens per verify pass over all sequences, prefill excluded.
    """

    acceptance_lengths: list[list[int]] | None = None
    block_efficiency: float | None = None


class Recorder:
    """Keeps, per emitted token, what the call asked for; asks for nothing by default."""

    def __init__(self, generation_config: GenerationConfig, batch: int):
        wanted = generation_config.return_dict_in_generate

        def rows(asked: bool) -> Rows | None:
            return [() for _ in range(batch)] if wanted and asked else None

        self.scores = rows(generation_config.output_scores)
        self.logits = rows(generation_config.output_logits)
        self.states = rows(generation_config.output_hidden_states)
        self.attentions = rows(generation_config.output_attentions)
        self.needs_scores = self.scores is not None or self.logits is not None

    def token(self, row: int, scores: torch.Tensor, logits: torch.Tensor) -> None:
        """Record one emitted token's processed and raw scores, each of shape `(1, vocab)`, float32."""
        if self.scores is not None:
            self.scores[row] += (scores,)
        if self.logits is not None:
            self.logits[row] += (logits,)

    def prefill(self, outputs) -> None:
        """Record the prompt's states and attentions, the first token's in plain decoding."""
        for records, name in ((self.states, "hidden_states"), (self.attentions, "attentions")):
            if records is not None:
                for row in range(len(records)):
                    records[row] += (tuple(state[row : row + 1] for state in outputs[name]),)

    def scores_of(self, row: int) -> tuple | None:
        """Return the scores recorded for a row so far, what stopping criteria are shown."""
        return None if self.scores is None else self.scores[row]

    def scores_of_all(self) -> tuple | None:
        """Return the scores of each step so far, of shape `(batch, vocab)`, where rows advance together."""
        return None if self.scores is None else _join(self.scores, len(self.scores[0]))

    def path(self, row: int, index: int, path: list[int], outputs, prefix: PrefixCache) -> None:
        """Record the states and attentions of a path's nodes.

        Args:
            row (`int`), index (`int`):
                The sequence, and its place in the batch of this pass.
            path (`list[int]`):
                Accepted nodes, root first.
            outputs ([`ModelOutput`]):
                Of the verify pass.
            prefix ([`PrefixCache`]):
                The target's cache before the commit.
        """
        if self.states is not None:
            for node in path:
                self.states[row] += (tuple(s[index : index + 1, node : node + 1] for s in outputs.hidden_states),)
        if self.attentions is None:
            return
        filled = prefix.length if prefix.filled is None else prefix.filled[index]
        attending = [layer for layer in prefix.cache.layers if getattr(layer, "keys", None) is not None]
        windows = [window_of(layer) for layer in attending]
        for step, node in enumerate(path, start=1):
            seen = []
            for weights, window in zip(outputs.attentions, windows, strict=True):
                root = weights.shape[-1] - weights.shape[-2]
                columns = [*range(max(0, root - filled), root), *(root + n for n in path[:step])]
                columns = columns if window is None else columns[-window:]
                seen.append(weights[index : index + 1, :, node : node + 1, columns])
            self.attentions[row] += (tuple(seen),)

    def result(
        self, sequences: torch.Tensor, steps: int, cache, acceptance_lengths: list[list[int]]
    ) -> TreeFlashGenerateOutput:
        """Join the rows' records; those of rows that ended early are filled with zeros.

        Args:
            sequences (`torch.LongTensor` of shape `(batch, length)`):
                The texts.
            steps (`int`):
                New tokens of the longest.
            cache ([`Cache`]):
                The target's.
            acceptance_lengths (`list[list[int]]`):
                For each row, the tokens of each verify pass.
        """
        passes = sum(len(lengths) for lengths in acceptance_lengths)
        emitted = sum(sum(lengths) for lengths in acceptance_lengths)
        return TreeFlashGenerateOutput(
            sequences=sequences,
            scores=_join(self.scores, steps),
            logits=_join(self.logits, steps),
            hidden_states=_join_layers(self.states, steps),
            attentions=_join_layers(self.attentions, steps),
            acceptance_lengths=acceptance_lengths,
            block_efficiency=emitted / passes if passes else float("nan"),
            **{CACHE: cache},
        )


def _join(rows: Rows | None, steps: int) -> tuple | None:
    """Turn per-row tuples over steps into one tuple over steps of batched tensors."""
    if rows is None:
        return None
    longest = max(rows, key=len)
    return tuple(
        torch.cat([row[step] if step < len(row) else torch.zeros_like(longest[step]) for row in rows])
        for step in range(steps)
    )


def _join_layers(rows: Rows | None, steps: int) -> tuple | None:
    if rows is None:
        return None
    layers = len(max(rows, key=len)[0])
    by_layer = [_join([tuple(step[layer] for step in row) for row in rows], steps) for layer in range(layers)]
    return tuple(zip(*by_layer, strict=True))


__all__ = ["Recorder", "TreeFlashGenerateOutput"]
