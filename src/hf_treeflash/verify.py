"""One target forward over a tree, and the walk from the root along the target's own choices."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property
from typing import NamedTuple

import torch
from transformers.utils import logging

from .attention import (
    attention_dtype,
    attention_windows,
    other_attention,
    replaced_attention,
    tree_masks,
    without_plans,
)
from .cache import PrefixCache
from .compat import CACHE
from .hybrids import recurrent_layers
from .kernel_attention import PrefixAttention, kernel_attention
from .tree import DraftTree

logger = logging.get_logger(__name__)


class Verdict(NamedTuple):
    """What one row accepted in a round.

    Attributes:
        path (`list[int]`):
            Accepted nodes, root first; the token of each but the root was the target's choice at the node before.
        token_ids (`list[int]`):
            The target's choice at each node of the path; the last is the new anchor.
        finished (`bool`):
            Whether a stopping criterion was met by the last token.
    """

    path: list[int]
    token_ids: list[int]
    finished: bool


def walk(children: dict[tuple[int, int], int], choose: Callable[[int], int], emit: Callable[[int], bool]) -> Verdict:
    """Follow the target's choices from the root until one is no child of its node or ends the text.

    Args:
        children (`dict[tuple[int, int], int]`):
            Child node by (node, token), see [`DraftTree.children`].
        choose (`Callable[[int], int]`):
            The target's token at a node: the argmax or one draw. Called once per emitted token, in order.
        emit (`Callable[[int], bool]`):
            Takes a token as emitted; True ends the text.

    Source: arXiv 2606.03819, equality verification; for any tree the text has the target's distribution.
    """
    path, token_ids = [0], []
    while True:
        token = choose(path[-1])
        token_ids.append(token)
        if emit(token):
            return Verdict(path, token_ids, True)
        child = children.get((path[-1], token))
        if child is None:
            return Verdict(path, token_ids, False)
        path.append(child)


class Verifier:
    """Runs a target over trees, each node seeing the prefix, its ancestors and itself.

    Args:
        target ([`PreTrainedModel`]):
            The model whose text is kept.
    """

    def __init__(self, target):
        self.target = target
        # Looked up once: each look-up costs as much as a small tensor operation.
        self.config = target.config.get_text_config(decoder=True)
        self.windows = attention_windows(self.config)
        self.dtype = attention_dtype(target)
        self.recurrent = recurrent_layers(self.config)
        if self.recurrent is not None:
            self.recurrent.install(target)
        self.by_kernel = PrefixAttention(target)
        self.proven: set[bool] = set()  # whether passes through the kernel that ran wrote their columns by it

    def __call__(self, tree: DraftTree, prefix: PrefixCache, anchor_positions: torch.Tensor, model_kwargs: dict):
        """Run the target once over the nodes.

        Args:
            tree ([`DraftTree`]):
                The nodes.
            prefix ([`PrefixCache`]):
                The target's cache; afterwards it also holds one column per node, for `commit` to choose from.
            anchor_positions (`torch.LongTensor` of shape `(..., batch)`):
                Position of each row's anchor; leading dimensions as the target's position ids have them.
            model_kwargs (`dict`):
                What else the call passes to the target's forward.

        Returns:
            The target's output; `logits` has one row per node.
        """

        def run(attention_mask=None, **arguments):
            inputs = self.target.prepare_inputs_for_generation(
                tree.token_ids,
                attention_mask=attention_mask,
                position_ids=anchor_positions[..., None] + tree.depths,
                is_first_iteration=False,
                **{CACHE: prefix.cache},
                **model_kwargs,
            )
            if "logits_to_keep" in inputs:
                inputs["logits_to_keep"] = tree.token_ids.shape[1]
            return self.target(**inputs, **arguments, return_dict=True)

        arguments = None
        # A bare root is plain decoding; recurrent layers run over a tree in a pass of their own.
        if self.recurrent is None and (tree.token_ids.shape[1] > 1 or prefix.valid is not None):
            arguments = self.by_kernel.arguments(prefix, prefix.length, tree.ancestor_words)
        if arguments is not None:
            with kernel_attention(self.config):
                outputs = self._attempt(run, arguments, prefix)
            if outputs is not None:
                return outputs
        in_force = nullcontext() if self.recurrent is None else self.recurrent.tree_in_force(tree, prefix)
        with without_plans(tree.depths.device), replaced_attention(self.config, self.attention), in_force:
            return run(tree_masks(self.config, self.windows, tree, prefix, self.dtype))

    @cached_property
    def attention(self) -> str | None:
        """The attention of passes with masks, None for the target's own."""
        return other_attention(self.target)

    def _attempt(self, run: Callable, arguments: dict, prefix: PrefixCache):
        """Run a pass through the kernel; where the first one fails, there is none, and masks are used from then on."""
        writes = None
        try:
            with prefix.unwritten() as unwritten:
                writes = unwritten is not None
                outputs = run(tree_unwritten=unwritten, **arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if writes in self.proven:
                raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            logger.warning_once(f"{type(self.target).__name__} runs without the tree attention kernel. {reason}")
            self.by_kernel.runs = False
            prefix.rollback()
            return None
        self.proven.add(writes)
        return outputs


__all__ = ["Verdict", "Verifier", "walk"]
