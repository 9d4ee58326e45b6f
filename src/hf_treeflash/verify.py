"""One target forward over a tree, and the walk from the root along the target's own choices."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging

from .cache import PrefixCache
from .compat import CACHE
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

    Source: arXiv 2606.03819, equality verification; for any tree the text has the target's law.
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
        self.dtype = target.dtype
        self.attention = other_attention(target)

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
        with replaced_attention(self.config, self.attention):
            inputs = self.target.prepare_inputs_for_generation(
                tree.token_ids,
                attention_mask=self.masks(tree, prefix),
                position_ids=anchor_positions[..., None] + tree.depths,
                is_first_iteration=False,
                **{CACHE: prefix.cache},
                **model_kwargs,
            )
            if "logits_to_keep" in inputs:
                inputs["logits_to_keep"] = tree.token_ids.shape[1]
            return self.target(**inputs, return_dict=True)

    def masks(self, tree: DraftTree, prefix: PrefixCache):
        """Return the masks of a pass as the target takes them: one, one per kind of layer, or none for a bare root."""
        if tree.token_ids.shape[1] == 1 and prefix.valid is None and not any(self.windows.values()):
            return None
        masks = {}
        for kind, window in self.windows.items():
            if window is None and prefix.valid is None:  # every node sees the whole prefix
                masks[kind] = additive_mask(tree.ancestor_mask[:, None], self.dtype, seen=prefix.length)
                continue
            layer = prefix.cache.layers[0 if kind is None else self.config.layer_types.index(kind)]
            stored = layer.keys.shape[-2]
            visible = prefix.visible(tree.ancestor_mask, tree.depths, tree.depths, window, stored=stored)
            masks[kind] = additive_mask(visible, self.dtype)
        return masks[None] if None in masks else masks


def attention_windows(config) -> dict[str | None, int | None]:
    """Return the sliding window of each kind of layer (None: full attention), keyed as the model wants its masks.

    Models with several kinds of layers take one mask per kind; the others take a single mask, keyed None here.
    """
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return {None: window}
    return {kind: window if kind == "sliding_attention" else None for kind in dict.fromkeys(layer_types)}


def additive_mask(visible: torch.Tensor, dtype: torch.dtype, seen: int = 0) -> torch.Tensor:
    """Turn a visibility mask into the additive form that every attention implementation takes as it is.

    Args:
        visible (`torch.BoolTensor` of shape `(batch, 1, queries, columns)`):
            Which columns a query sees.
        dtype (`torch.dtype`):
            Of the result.
        seen (`int`, *optional*, defaults to 0):
            How many columns that every query sees stand before these.
    """
    mask = torch.zeros(*visible.shape[:-1], seen + visible.shape[-1], dtype=dtype, device=visible.device)
    mask[..., seen:].masked_fill_(~visible, torch.finfo(dtype).min)
    return mask


# Threads that share a target also share its attention setting; passes that want it replaced by another take turns.
_turns = threading.Condition()
_replaced: dict[int, tuple[str, str, int]] = {}  # by config: its own setting, the present one, passes that use it

GROUPED = "treeflash_grouped_sdpa"


def grouped_sdpa(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """SDPA that shares keys and values among the heads of a group under a mask, too; arguments are transformers'.

    Under a mask transformers repeats them for every head, as other devices' kernels need it; a CPU's do not.
    """
    if attention_mask is None or query.device.type != "cpu" or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED, grouped_sdpa)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


def other_attention(model) -> str | None:
    """Return the attention a model needs under a tree mask in place of its own; None where its own suits.

    FlashAttention takes no masks, FlexAttention would be compiled anew for every shape of tree, and SDPA repeats keys
    and values where a CPU need not.
    """
    config = model.config.get_text_config(decoder=True)
    with _turns:
        chosen, *_ = _replaced.get(id(config), (config._attn_implementation or "",))
    on_cpu = model.device.type == "cpu"
    if "flash" not in chosen and chosen != "flex_attention" and not (on_cpu and chosen == "sdpa"):
        return None
    other = "eager" if not model._supports_sdpa else GROUPED if on_cpu else "sdpa"
    if chosen != "sdpa":
        logger.warning_once(f"{chosen} does not suit a tree mask; verify passes use {other} attention instead.")
    return other


@contextmanager
def replaced_attention(config, other: str | None) -> Iterator[None]:
    """Replace the attention of a model while a pass runs; the model's own returns with the last of such passes.

    Args:
        config ([`PreTrainedConfig`]):
            The model's, of its text decoder.
        other (`str`, *optional*):
            Name of the attention; None keeps the model's own.
    """
    if other is None:
        yield
        return
    key = id(config)
    with _turns:
        _turns.wait_for(lambda: key not in _replaced or _replaced[key][1] == other)
        own, _, passes = _replaced.get(key, (config._attn_implementation, other, 0))
        _replaced[key] = own, other, passes + 1
        # Not by `set_attn_implementation`, which would switch parts of the model that see no tree too.
        config._attn_implementation_internal = other
    try:
        yield
    finally:
        with _turns:
            own, _, passes = _replaced.pop(key)
            if passes > 1:
                _replaced[key] = own, other, passes - 1
            else:
                config._attn_implementation_internal = own
                _turns.notify_all()


@contextmanager
def masked_attention(model) -> Iterator[None]:
    """Let a model whose own attention does not suit a tree mask run with another, and restore its choice."""
    with replaced_attention(model.config.get_text_config(decoder=True), other_attention(model)):
        yield


__all__ = ["Verdict", "Verifier", "attention_windows", "masked_attention", "replaced_attention", "walk"]
