"""The drafter's layers: a block attends to the context and to itself."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache
from transformers.masking_utils import create_bidirectional_mask, create_bidirectional_sliding_window_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm, eager_attention_forward

from .block_convolution import BlockConvolution
from .block_rule import BlockRule, block_rules
from .compat import CACHE
from .configuration_treeflash import TreeFlashConfig
from .rotary import Rotation, rotate


class RMSNorm(Qwen3RMSNorm):
    """The same norm, in one operation where nothing is trained."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Norm states `(..., hidden_size)`."""
        if torch.is_grad_enabled() or hidden_states.dtype != self.weight.dtype:
            return super().forward(hidden_states)
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


class TreeFlashAttention(nn.Module):
    """Attention of a block over the context and itself, without a causal order."""

    def __init__(self, config: TreeFlashConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = False
        self.rope_interleaved = config.rope_interleaved
        is_sliding = (config.layer_types or [])[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if is_sliding else None
        query_size, kv_size = (n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_bias)
        self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        context: torch.Tensor,
        position_embeddings: Rotation,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
        **kwargs,
    ) -> torch.Tensor:
        """Attend from the block.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, slots, hidden_size)`):
                The block.
            context (`torch.Tensor` of shape `(batch, context, hidden_size)`):
                What the drafter has not read before.
            position_embeddings (`tuple[torch.Tensor, torch.Tensor]`):
                Of context and block, see [`rotations`].
            attention_mask (`torch.Tensor` of shape `(batch, 1, slots, keys)`, *optional*):
                Who sees what; None: everything is seen.
            cache ([`Cache`], *optional*):
                Keys and values of earlier context.
        """
        batch, slots, _ = hidden_states.shape
        # One projection for context and block together: their keys and values differ only in where they come from.
        source = torch.cat([context, hidden_states], dim=1)  # (batch, context + slots, hidden_size)
        # All three are (batch, heads, length, head_dim).
        query = self.q_norm(self.q_proj(hidden_states).view(batch, slots, -1, self.head_dim)).transpose(1, 2)
        key = self.k_norm(self.k_proj(source).view(batch, source.shape[1], -1, self.head_dim)).transpose(1, 2)
        value = self.v_proj(source).view(batch, source.shape[1], -1, self.head_dim).transpose(1, 2)
        cos, sin = position_embeddings
        query = rotate(query, cos[:, :, -slots:], sin[:, :, -slots:], self.rope_interleaved)
        key = rotate(key, cos, sin, self.rope_interleaved)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, _ = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.reshape(batch, slots, -1))


class TreeFlashDecoderLayer(GradientCheckpointingLayer):
    """One drafter layer; the context enters as keys and values only and is not updated."""

    def __init__(self, config: TreeFlashConfig, layer_idx: int):
        super().__init__()
        self.self_attn = TreeFlashAttention(config, layer_idx)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention_conv = BlockConvolution(config) if config.conv_kernel_size else None
        self.mlp_conv = BlockConvolution(config) if config.conv_kernel_size else None

    def forward(self, hidden_states: torch.Tensor, context: torch.Tensor, **kwargs) -> torch.Tensor:
        """Run the layer; arguments as in [`TreeFlashAttention`]."""

        def attend(states: torch.Tensor) -> torch.Tensor:
            return self.self_attn(states, context, **kwargs)

        normed = self.input_layernorm(hidden_states)
        attended = attend(normed) if self.attention_conv is None else self.attention_conv.around(attend, normed)
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        return hidden_states + (self.mlp(normed) if self.mlp_conv is None else self.mlp_conv.around(self.mlp, normed))


def layer_masks(
    config: TreeFlashConfig,
    attention_mask: torch.Tensor | dict[str, torch.Tensor] | None,
    noise_embeds: torch.Tensor,
    cache: Cache | None,
) -> dict:
    """Return each kind of layer's mask.

    Args:
        config ([`TreeFlashConfig`]):
            Of the drafter.
        attention_mask (`torch.Tensor` or `dict[str, torch.Tensor]`, *optional*):
            As [`TreeFlashDraftModel`] takes it.
        noise_embeds (`torch.Tensor` of shape `(batch, slots, hidden_size)`), cache ([`Cache`], *optional*):
            The pass's.
    """
    if isinstance(attention_mask, dict):
        return attention_mask
    rules = block_rules(config)
    sees_all = attention_mask is None and all(rule.hides_nothing for rule in rules.values())
    if sees_all or (attention_mask is not None and attention_mask.ndim == 4):
        return dict.fromkeys(rules, attention_mask)
    arguments = {"config": config, "inputs_embeds": noise_embeds, "attention_mask": attention_mask, CACHE: cache}
    builders = {
        "full_attention": create_bidirectional_mask,
        "sliding_attention": create_bidirectional_sliding_window_mask,
    }
    return {kind: builders[kind](**arguments, and_mask_function=overlay(rule)) for kind, rule in rules.items()}


def overlay(rule: BlockRule) -> Callable | None:
    """Return what a rule hides beyond the masks of transformers, which know windows to both sides, inclusively."""
    if rule.window is not None and rule.window_rule not in ("inclusive", "strict"):
        raise ValueError(f"`window_rule` {rule.window_rule!r} needs masks by kind of layer, which `generate` makes.")
    if not rule.is_causal and (rule.window is None or rule.window_rule == "inclusive"):
        return None
    return lambda batch, head, query, key: rule.sees(query, key, query)


__all__ = ["RMSNorm", "TreeFlashDecoderLayer", "layer_masks"]
