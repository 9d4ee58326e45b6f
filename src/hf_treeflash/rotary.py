"""Rotary embeddings of a drafter: over a whole head or part of it, of halves or neighbours, one per kind of layer."""

import copy
from collections.abc import Iterable

import torch
from torch import nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from .ranges import has_own_rope

Rotation = tuple[torch.Tensor, torch.Tensor]  # cosines and signed sines, `(batch, 1, length, rotated)`


class DraftRotaryEmbedding(Qwen3RotaryEmbedding):
    """The same embedding, which may leave the end of each head as it is (`partial_rotary_factor`)."""

    @staticmethod
    def compute_default_rope_parameters(config, device=None, **kwargs) -> tuple[torch.Tensor, float]:
        """Return the inverse frequencies, and no scale of the result."""
        parameters = config.rope_parameters
        rotated = int(config.head_dim * (parameters.get("partial_rotary_factor") or 1.0))
        exponents = torch.arange(0, rotated, 2, dtype=torch.float, device=device) / rotated
        return 1.0 / parameters["rope_theta"] ** exponents, 1.0


def rotary_embedding(config) -> nn.Module:
    """Return the rotary embedding of a drafter, or one by kind of layer where its config has several."""
    if not has_own_rope(config.rope_parameters):
        return DraftRotaryEmbedding(config)
    embeddings = nn.ModuleDict()
    for kind in dict.fromkeys(config.layer_types):
        own = copy.copy(config)
        own.rope_parameters = config.rope_parameters[kind]
        embeddings[kind] = DraftRotaryEmbedding(own)
    return embeddings


def rotations(
    embedding: nn.Module, layer_types: Iterable[str], like: torch.Tensor, position_ids
) -> dict[str, Rotation]:
    """Return what each kind of layer rotates its queries and keys by.

    Args:
        embedding (`nn.Module`):
            From [`rotary_embedding`].
        layer_types (`Iterable[str]`):
            Of the drafter.
        like (`torch.Tensor`):
            Has the dtype and device of the result.
        position_ids (`torch.LongTensor` of shape `(batch, length)`):
            Absolute positions.
    """
    if isinstance(embedding, nn.ModuleDict):
        return {kind: _signed(*own(like, position_ids)) for kind, own in embedding.items()}
    return dict.fromkeys(layer_types, _signed(*embedding(like, position_ids)))


def _signed(cos: torch.Tensor, sin: torch.Tensor) -> Rotation:
    """Give the first half of the sines the sign that goes with the swap of a head's halves."""
    first, second = sin.chunk(2, dim=-1)
    return cos[:, None], torch.cat([-first, second], dim=-1)[:, None]  # (batch, 1, length, rotated)


def rotate(states: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate pairs of entries of each head.

    Args:
        states (`torch.Tensor` of shape `(batch, heads, length, head_dim)`):
            Queries or keys.
        cos, signed_sin (`torch.Tensor`):
            See [`rotations`]; entries of a head behind their width stay as they are.
        interleaved (`bool`):
            Pairs are neighbours rather than a half apart. They end up a half apart, in queries and keys alike.
    """
    rotated = cos.shape[-1]
    if rotated < states.shape[-1]:
        first = rotate(states[..., :rotated], cos, signed_sin, interleaved)
        return torch.cat([first, states[..., rotated:]], dim=-1)
    if interleaved:
        states = states.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    return torch.addcmul(states * cos, states.roll(rotated // 2, dims=-1), signed_sin)


__all__ = ["rotary_embedding", "rotate", "rotations"]
