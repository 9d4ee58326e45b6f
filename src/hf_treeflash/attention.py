"""How a pass sees a tree or a block: which columns, as which masks, and with which attention."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging

from .cache import PrefixCache
from .compat import on_cpu
from .memory import recall, remember, take
from .taps import decoder_layers
from .tree import DraftTree

logger = logging.get_logger(__name__)


class Chunk(int):
    """A window of so many tokens that does not slide: a token sees what stands before it in its own chunk."""


def attention_windows(config) -> dict[str | None, int | None]:
    """Return the window of each kind of layer (None: full attention), keyed as the model wants its masks.

    Models with several kinds of attention take one mask per kind; the others take a single mask, keyed None here.
    """
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return {None: window}
    windows: dict[str | None, int | None] = {"full_attention": None, "sliding_attention": window}
    if "chunked_attention" in layer_types:
        windows["chunked_attention"] = Chunk(config.attention_chunk_size)
    windows = {kind: windows[kind] for kind in dict.fromkeys(layer_types) if kind in windows}
    if len(windows) < len(set(layer_types)) and not any(windows.values()):
        return {None: None}  # hybrids name their masks in many ways, but all take a single one
    return windows


def attention_dtype(target) -> torch.dtype:
    """Return the dtype a target attends in: that of the largest weight of its layers, which others may differ from."""
    layers = decoder_layers(target)
    weights = [] if not layers else [weight for weight in layers[0].parameters() if weight.is_floating_point()]
    return max(weights, key=torch.Tensor.numel).dtype if weights else target.dtype


def within(queries: torch.Tensor, keys: torch.Tensor, reach: int) -> torch.Tensor:
    """Return which keys stand at most `reach` tokens from a query, to either side.

    Args:
        queries, keys (`torch.LongTensor` of shape `(batch or 1, queries)` and `(batch or 1, keys)`):
            Their places in the text.
        reach (`int`):
            In tokens.

    Returns:
        `torch.BoolTensor` of shape `(batch or 1, queries, keys)`.
    """
    return (queries[:, :, None] - keys[:, None]).abs() <= reach  # (batch, queries, keys)


def seen_by_nodes(tree: DraftTree, prefix: PrefixCache, columns: int, window: int | None) -> torch.Tensor:
    """Return what the nodes of a tree see: the prefix, their ancestors and themselves, within the window.

    Args:
        tree ([`DraftTree`]):
            The nodes.
        prefix ([`PrefixCache`]):
            The target's cache.
        columns (`int`):
            Columns of the prefix that the layer holds.
        window (`int`, *optional*):
            Tokens that a node sees at most, itself included, or a [`Chunk`]; None for full attention.

    Returns:
        `torch.BoolTensor` of shape `(batch, 1, nodes, columns + nodes)`.
    """
    nodes = tree.ancestor_mask  # (batch, nodes, nodes)
    before = prefix.present(columns, nodes.device)[:, None].expand(*nodes.shape[:2], -1)  # (batch, nodes, columns)
    seen = torch.cat([before, nodes], dim=2)  # (batch, nodes, columns + nodes)
    if window is not None:
        places = torch.arange(-columns, 0, device=nodes.device).expand(len(nodes), -1)  # (batch, columns)
        places = torch.cat([places, tree.depths], dim=1)  # (batch, columns + nodes)
        if isinstance(window, Chunk):
            chunks = (places + prefix.begun(nodes.device)) // window
            seen = seen & (chunks[:, columns:, None] == chunks[:, None])  # (batch, nodes, columns + nodes)
        else:
            seen = seen & within(tree.depths, places, window - 1)
    return seen[:, None]


def tree_masks(
    config, windows: dict[str | None, int | None], tree: DraftTree, prefix: PrefixCache, dtype: torch.dtype
) -> torch.Tensor | dict[str | None, torch.Tensor | None] | None:
    """Return the masks of a verify pass as the target takes them: one, one per kind of layer, or none for a bare root.

    Args:
        config ([`PreTrainedConfig`]):
            The target's, of its text decoder.
        windows (`dict`):
            See [`attention_windows`].
        tree ([`DraftTree`]), prefix ([`PrefixCache`]):
            The nodes, and the target's cache before the pass.
        dtype (`torch.dtype`):
            Of the masks.
    """
    if tree.token_ids.shape[1] == 1 and prefix.valid is None and not any(windows.values()):
        return None
    masks: dict[str | None, torch.Tensor | None] = {}
    for kind, window in windows.items():
        if window is None and prefix.valid is None:  # every node sees the whole prefix
            masks[kind] = additive_mask(tree.ancestor_mask[:, None], dtype, seen=prefix.length)
        else:
            columns = prefix.length
            if window is not None:
                columns = prefix.stored(0 if kind is None else config.layer_types.index(kind))
            masks[kind] = additive_mask(seen_by_nodes(tree, prefix, columns, window), dtype)
    if None in masks:
        return masks[None]
    return dict.fromkeys(config.layer_types) | masks  # recurrent layers, which see by the tree itself, take none


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
    *rows, columns = visible.shape
    columns += seen
    # Rows begin at multiples of 8 in memory: kernels of a CUDA device would copy other masks, layer by layer.
    aligned = torch.zeros(*rows, -(-columns // 8) * 8, dtype=dtype, device=visible.device)
    mask = aligned[..., :columns]
    mask[..., seen:].masked_fill_(~visible, torch.finfo(dtype).min)
    return mask


# Threads that share a target also share its attention setting; passes that want it replaced by another take turns.
# What is remembered of a config as its "attention": its own setting, the present one, passes that use it.
_turns = threading.Condition()

GROUPED = "treeflash_grouped_sdpa"


def grouped_sdpa(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """SDPA that shares keys and values among the heads of a group under a mask, too; arguments are transformers'.

    Under a mask transformers repeats them for every head, as other devices' kernels need it; a CPU's do not.
    """
    if attention_mask is None or not on_cpu(query.device) or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED, grouped_sdpa)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


def chosen_attention(config) -> str:
    """Return the attention a model was given, also while a pass runs with another."""
    with _turns:
        chosen, *_ = recall("attention", config) or (config._attn_implementation or "",)
    return chosen


@contextmanager
def without_plans(device: torch.device) -> Iterator[None]:
    """Keep SDPA from cuDNN, which makes a plan for every new number of keys: tens of milliseconds each.

    Args:
        device (`torch.device`):
            Where a pass runs.
    """
    if device.type != "cuda" or not torch.backends.cuda.cudnn_sdp_enabled():
        yield
        return
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def other_attention(model) -> str | None:
    """Return the attention a model needs under a tree mask in place of its own; None where its own suits.

    FlashAttention takes no masks, FlexAttention would be compiled anew for every shape of tree, and SDPA repeats keys
    and values where a CPU need not.
    """
    config = model.config.get_text_config(decoder=True)
    chosen = chosen_attention(config)
    shared = on_cpu(model.device)
    if "flash" not in chosen and chosen != "flex_attention" and not (shared and chosen == "sdpa"):
        return None
    other = "eager" if not model._supports_sdpa else GROUPED if shared else "sdpa"
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

    def is_free() -> bool:
        now = recall("attention", config)
        return now is None or now[1] == other

    with _turns:
        _turns.wait_for(is_free)
        own, _, passes = recall("attention", config) or (config._attn_implementation, other, 0)
        remember("attention", (own, other, passes + 1), config)
        # Not by `set_attn_implementation`, which would switch parts of the model that see no tree too.
        config._attn_implementation_internal = other
    try:
        yield
    finally:
        with _turns:
            own, _, passes = take("attention", config)
            if passes > 1:
                remember("attention", (own, other, passes - 1), config)
            else:
                config._attn_implementation_internal = own
                _turns.notify_all()


@contextmanager
def masked_attention(model) -> Iterator[None]:
    """Let a model whose own attention does not suit a tree mask run with another, and restore its choice."""
    config = model.config.get_text_config(decoder=True)
    with without_plans(model.device), replaced_attention(config, other_attention(model)):
        yield


__all__ = [
    "additive_mask",
    "attention_windows",
    "chosen_attention",
    "masked_attention",
    "other_attention",
    "replaced_attention",
    "tree_masks",
    "without_plans",
]
