"""Batches whose rows advance together, so that what the caller supplied sees what plain `generate` shows it."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from transformers import (
    EosTokenCriteria,
    LogitsProcessor,
    MaxLengthCriteria,
    MaxTimeCriteria,
    PrefixConstrainedLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
)

from .effects import changes_nothing
from .logits_process import ROW_BY_ROW
from .tree import DraftTree, chain_words
from .verify import Verdict
from .walker import Walker

# They judge each row by its own text, and keep nothing between calls.
STATELESS_CRITERIA = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria)


def advances_together(
    batch: int,
    processors: Iterable[LogitsProcessor],
    stopping_criteria: StoppingCriteriaList,
    streamer,
    inputs: dict,
) -> bool:
    """Return whether the rows of a call must not go ahead of each other.

    A streamer is handed columns; processors and criteria that we do not know may keep a state, look at other rows or
    count their calls; and inputs that may have an entry for every row want every row in the batch.

    Args:
        batch (`int`):
            Rows of the call.
        processors (`Iterable[LogitsProcessor]`), stopping_criteria ([`StoppingCriteriaList`]), streamer:
            Of the call.
        inputs (`dict`):
            What the call passes to each of the target's forwards.
    """
    if batch == 1:
        return False
    if streamer is not None or not all(type(criterion) in STATELESS_CRITERIA for criterion in stopping_criteria):
        return True
    return not all(map(_is_row_by_row, processors)) or any(
        _may_have_entries(value, batch) for value in inputs.values()
    )


def _is_row_by_row(processor: LogitsProcessor) -> bool:
    if type(processor) is PrefixConstrainedLogitsProcessor:
        return changes_nothing(processor._prefix_allowed_tokens_fn)
    return type(processor) in ROW_BY_ROW


def _may_have_entries(value, batch: int) -> bool:
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return False
    if isinstance(value, torch.Tensor):
        return batch in value.shape
    if isinstance(value, dict):
        return any(_may_have_entries(entry, batch) for entry in value.values())
    if isinstance(value, list | tuple):
        return len(value) == batch or any(_may_have_entries(entry, batch) for entry in value)
    return True  # nobody knows what is in it


class LockstepWalker(Walker):
    """Chooses the tokens of all rows column by column.

    Processors, criteria and streamer are asked once per column, in plain decoding's order, with the ids of all rows. A
    round ends with the column at which the first row leaves its tree. Rows that have ended stay in the batch and are
    padded, as plain decoding pads them: their trees are chains of padding.

    Args:
        pad_token_id (`torch.LongTensor`):
            What rows that have ended are padded with, a scalar; None where nothing ends before the others.
        others:
            As in [`Walker`].
    """

    def __init__(self, pad_token_id: Any, *others):
        super().__init__(*others)
        self.pad_token_id = pad_token_id

    def __call__(
        self, rows: list[int], children: list[dict[tuple[int, int], int]], logits: torch.Tensor
    ) -> list[Verdict]:
        """Follow the target's choices through all trees; arguments as in [`Walker`]."""
        nodes = [0] * len(rows)
        paths: list[list[int]] = [[0] for _ in rows]
        chosen: list[list[int]] = [[] for _ in rows]
        while True:
            column = torch.stack([logits[row, node] for row, node in enumerate(nodes)])  # (batch, vocab)
            token_ids, finished = self.column(column)
            for own, token in zip(chosen, token_ids, strict=True):
                own.append(token)
            following = [own.get(key) for own, key in zip(children, zip(nodes, token_ids, strict=True), strict=True)]
            nodes = [node for node in following if node is not None]
            if finished or len(nodes) < len(rows):
                return [Verdict(*verdict, finished) for verdict in zip(paths, chosen, strict=True)]
            for path, node in zip(paths, nodes, strict=True):
                path.append(node)

    def column(self, logits: torch.Tensor) -> tuple[list[int], bool]:
        """Choose a token for every row as one step of plain decoding does; return them, and whether all rows ended.

        Args:
            logits (`torch.Tensor` of shape `(batch, vocab)`):
                The target's, after the texts so far.
        """
        texts = self.sequences
        raw = logits.to(self.device, torch.float32, copy=True)  # (batch, vocab)
        scores = self.processor(texts.ids, raw)
        for row in range(len(raw)):
            self.recorder.token(row, scores[row, None], raw[row, None])
        if self.noise is not None:
            token_ids = self.noise.draw(list(range(len(raw))), scores)
        else:
            token_ids = scores.argmax(dim=-1)
        if texts.pads:
            token_ids = torch.where(texts.unfinished, token_ids, self.pad_token_id)
        texts.extend(token_ids)
        finished = texts.judge(self.recorder.scores_of_all())
        if self.streamer is not None:
            self.streamer.put(token_ids.cpu())
        return token_ids.tolist(), finished

    def prepared(self, tree: DraftTree) -> DraftTree:
        """Return the trees with chains of padding for rows that have ended.

        Args:
            tree ([`DraftTree`]):
                The drafted trees of all rows.
        """
        texts, nodes = self.sequences, tree.token_ids.shape[1]
        if not texts.pads or bool(texts.unfinished.all()):
            return tree
        device = tree.token_ids.device
        ended, places = (
            ~texts.unfinished.to(device)[:, None],
            torch.arange(nodes, device=device),
        )  # (batch, 1), (nodes,)
        return dataclasses.replace(
            tree,
            token_ids=torch.where(ended & (places > 0), self.pad_token_id.to(device), tree.token_ids),
            parents=torch.where(ended, places - 1, tree.parents),
            depths=torch.where(ended, places, tree.depths),
            ancestor_words=torch.where(ended[..., None], chain_words(nodes).to(device), tree.ancestor_words),
            path_log_probs=tree.path_log_probs.masked_fill(ended, 0.0),
        )


__all__ = ["LockstepWalker", "advances_together"]
