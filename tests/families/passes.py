"""One verify pass of a target over trees, and the same nodes' logits by plain steps."""

import copy

import torch
from transformers import DynamicCache

from hf_treeflash.cache import PrefixCache, recording_past
from hf_treeflash.compat import CACHE
from hf_treeflash.kernels import pack_ancestor_words
from hf_treeflash.tree import DraftTree
from hf_treeflash.verify import Verifier
from tests.helpers.tiny import VOCAB
from tests.kernels.trees import ancestor_mask


def tree_of(parents: torch.Tensor, anchor_ids: torch.Tensor, generator: torch.Generator) -> DraftTree:
    """Return a tree of random tokens.

    Args:
        parents (`torch.LongTensor` of shape `(batch, nodes)`):
            Parents before children, -1 for the root.
        anchor_ids (`torch.LongTensor` of shape `(batch,)`):
            Tokens of the roots.
    """
    token_ids = torch.randint(4, VOCAB - 4, parents.shape, generator=generator)
    token_ids[:, 0] = anchor_ids
    mask = ancestor_mask(parents)
    return DraftTree(token_ids, parents, mask.sum(-1) - 1, pack_ancestor_words(mask), torch.zeros(parents.shape))


@torch.no_grad()
def prefilled(target, inputs: dict):
    """Return a target's cache of some prompts, and the positions of the tokens that follow."""
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    outputs = target(**inputs, position_ids=positions, use_cache=True, **{CACHE: DynamicCache(config=target.config)})
    return outputs[CACHE], positions[:, -1] + 1


@torch.no_grad()
def tree_logits(target, cache, mask: torch.Tensor, positions: torch.Tensor, tree: DraftTree, walkers: bool = True):
    """Run one verify pass on a copy of a cache; return the logits, and the cache with its pass uncommitted."""
    prefix = PrefixCache(copy.deepcopy(cache), mask.bool())
    verifier = Verifier(target)
    if not walkers:
        verifier.recurrent = None
    with recording_past(prefix.cache):
        outputs = verifier(tree, prefix, positions, {})
    return outputs.logits, prefix


@torch.no_grad()
def step_logits(
    target, cache, mask: torch.Tensor, positions: torch.Tensor, tree: DraftTree, row: int, path: list[int]
):
    """Run one row's path a token at a time, as plain decoding does; return the logits of its nodes."""
    steps, cache = [], copy.deepcopy(cache)
    batch = len(mask)
    for step, node in enumerate(path):
        mask = torch.cat([mask, mask.new_ones(batch, 1)], dim=1)
        token_ids = tree.token_ids[:, node, None]
        outputs = target(
            token_ids, attention_mask=mask, position_ids=(positions + step)[:, None], use_cache=True, **{CACHE: cache}
        )
        steps.append(outputs.logits[row, 0])
    return torch.stack(steps)


def leaves(parents: torch.Tensor) -> list[list[int]]:
    """Return the paths of one tree, `(nodes,)`, from its root to each of its leaves."""
    inner, paths = set(parents.tolist()), []
    for node in range(len(parents)):
        if node not in inner:
            path = [node]
            while parents[path[-1]] >= 0:
                path.append(int(parents[path[-1]]))
            paths.append(path[::-1])
    return paths


__all__ = ["leaves", "prefilled", "step_logits", "tree_logits", "tree_of"]
