"""
Registers tree attention with transformers under the name `"tree_attention"`.

A verify forward passes the ancestor words as `attention_mask` (int64, 4-D: transformers hands those through untouched)
and the lengths as extra keyword arguments of the model, which reach every layer:

```python
register_tree_attention()
model.set_attn_implementation("tree_attention")
model(
    input_ids=tokens,  # (batch, nodes)
    position_ids=positions,  # (batch, nodes): of the root plus depth
    attention_mask=ancestor_words[:, None],  # (batch, 1, nodes, words)
    past_key_values=cache,
    tree_prefix=prefix_length,  # (batch,)
    tree_start=kv_start,  # (batch,)
    tree_arrivals=new_arrivals(device),  # spares each layer a launch; made once
)
```

All other calls behave as with `"sdpa"`.
"""

import math

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .ancestor_words import dense_tree_mask
from .tree_attention import default_num_splits, tree_attention

TREE_ATTENTION = "tree_attention"
# A program that reads so many slots takes no longer than the host needs for a layer's other launches.
SLOTS_OF_A_LAUNCH = 2048
# Keyword arguments of attention functions that change the scores in ways neither path here knows.
UNSUPPORTED = ("position_bias", "indices", "block_indices", "sinks", "cache")


# To its callers the operator changes nothing: arrivals are zero before and after it.
@torch.library.custom_op("hf_treeflash::tree_attention", mutates_args=())
def tree_attention_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ancestor_words: torch.Tensor,
    prefix_length: torch.Tensor,
    kv_start: torch.Tensor,
    scaling: float,
    arrivals: torch.Tensor | None = None,
) -> torch.Tensor:
    """[`tree_attention`] as an operator that `torch.compile` does not look into."""
    splits = default_num_splits(query, key)
    inputs = query, key, value, ancestor_words, prefix_length, kv_start, scaling, splits
    return tree_attention(*inputs, arrivals=arrivals)


@tree_attention_op.register_fake
def _(query, key, value, ancestor_words, prefix_length, kv_start, scaling, arrivals=None):
    batch, heads, nodes, head_dim = query.shape
    return query.new_empty(batch, nodes, heads, head_dim)


def _sliding_window(module: nn.Module, kwargs: dict) -> int | None:
    """The window of this layer; models that do not tell it to the attention function keep it in the config."""
    if "sliding_window" in kwargs:
        return kwargs["sliding_window"]
    config = getattr(module, "config", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and layer_types[getattr(module, "layer_idx", 0)] == "full_attention":
        return None
    return getattr(config, "sliding_window", None)


def _refuse_unknown(module: nn.Module, kwargs: dict) -> None:
    """Raises where the dense rule "prefix and ancestors, perhaps within a window" is not that of the layer."""
    given = [name for name in UNSUPPORTED if kwargs.get(name) is not None]
    if given:
        raise NotImplementedError(f"tree attention does not support {', '.join(given)} in {type(module).__name__}")
    config = getattr(module, "config", None)
    layer_types = getattr(config, "layer_types", None)
    layer_type = layer_types[getattr(module, "layer_idx", 0)] if layer_types is not None else None
    if layer_type not in (None, "full_attention", "sliding_attention"):
        raise NotImplementedError(f"tree attention does not support layers of type {layer_type!r}")


def _softmax_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention with a soft-cap or sinks, which SDPA does not know; softmax in fp32."""
    if mask is None and query.shape[2] > 1 and getattr(module, "is_causal", True):
        # No mask means plain causal from slot 0 on, also over a static cache with room to spare.
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.mT).float() * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        column = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[2]].to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous()


def tree_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    tree_prefix: torch.Tensor | None = None,
    tree_start: torch.Tensor | None = None,
    tree_unwritten=None,
    tree_arrivals: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    Attention function of transformers. Chooses per layer: [`tree_attention`] where its rule is the layer's, SDPA with
    an equivalent dense mask for sliding windows and unequal head sizes, explicit softmax for soft-caps and sinks.

    Args:
        module (`nn.Module`):
            The attention layer.
        query (`torch.Tensor` of shape `(batch, heads, nodes, head_dim)`):
            Queries.
        key (`torch.Tensor` of shape `(batch, kv_heads, slots, head_dim)`):
            Keys from the cache, those of the nodes included.
        value (`torch.Tensor` of shape `(batch, kv_heads, slots, head_dim)`):
            Values from the cache, those of the nodes included.
        attention_mask (`torch.Tensor`, *optional*):
            In a tree call the ancestor words, int64 of shape `(batch, 1, nodes, ceil(nodes / 64))`, else SDPA's mask.
        dropout (`float`, *optional*, defaults to 0.0):
            Attention dropout; must be 0 in a tree call.
        scaling (`float`, *optional*):
            Factor of the scores, `head_dim ** -0.5` if not given.
        tree_prefix (`torch.LongTensor` of shape `(batch,)`, *optional*):
            Slot of node 0. Its presence makes this a tree call.
        tree_start (`torch.LongTensor` of shape `(batch,)`, *optional*):
            First valid slot (left padding), 0 if not given.
        tree_unwritten ([`Unwritten`], *optional*):
            Where a cache left the keys and values of the nodes, for this function to write to their slots.
        tree_arrivals (`torch.IntTensor`, *optional*):
            Of [`new_arrivals`], for passes that run one after the other.

    Returns:
        `tuple` of the output `(batch, nodes, heads, head_dim)` and None.

    Raises:
        ValueError: if mask and lengths do not make a tree call, or dropout is asked of one.
        NotImplementedError: if the layer's attention is of a kind that neither path computes.
    """
    if scaling is None:
        scaling = 1 / math.sqrt(query.shape[-1])
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    if tree_prefix is None:
        if attention_mask is not None and attention_mask.dtype == torch.int64:
            raise ValueError("ancestor words were given as attention_mask, but no tree_prefix")
        if softcap is not None or sinks is not None:
            if dropout:
                raise NotImplementedError("attention dropout together with a soft-cap or sinks")
            return _softmax_attention(module, query, key, value, attention_mask, scaling, softcap, sinks), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )

    if attention_mask is None or attention_mask.dtype != torch.int64 or attention_mask.dim() != 4:
        raise ValueError("a tree call needs the ancestor words as an int64 attention_mask (batch, 1, nodes, words)")
    if dropout:
        raise ValueError("tree attention has no dropout: put the model in eval mode")
    _refuse_unknown(module, kwargs)
    words = attention_mask[:, 0]
    tree_start = torch.zeros_like(tree_prefix) if tree_start is None else tree_start
    window = _sliding_window(module, kwargs)
    plain = window is None and softcap is None and sinks is None
    if plain and key.shape == value.shape and query.shape[-1] == key.shape[-1]:
        inputs = query, key, value, words, tree_prefix, tree_start, scaling
        if torch.compiler.is_compiling():
            return tree_attention_op(*inputs, tree_arrivals), None
        # Launched one by one, passes wait for the host, which an operator of our own and more splits would keep.
        new = None if tree_unwritten is None else tree_unwritten.take(key)
        splits = default_num_splits(query, key, SLOTS_OF_A_LAUNCH)
        return tree_attention(*inputs, splits, new, tree_arrivals), None
    mask = dense_tree_mask(words, tree_prefix, tree_start, key.shape[2], sliding_window=window)
    if softcap is not None or sinks is not None:
        return _softmax_attention(module, query, key, value, mask, scaling, softcap, sinks), None
    kwargs["is_causal"] = False
    return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)


def register_tree_attention() -> str:
    """
    Registers the attention function and, for calls that are not tree calls, SDPA's mask. Safe to repeat.

    Returns:
        `str`: the name to give to `set_attn_implementation`.
    """
    AttentionInterface.register(TREE_ATTENTION, tree_attention_forward)
    AttentionMaskInterface.register(TREE_ATTENTION, sdpa_mask)
    return TREE_ATTENTION
