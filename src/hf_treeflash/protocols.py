"""What the loop needs of the two models: whatever has it will do, wrapped, dispatched or loaded from a repository."""

from typing import Any, Protocol

import torch
from torch import nn


class Model(Protocol):
    """What both have."""

    config: Any
    generation_config: Any

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __call__(self, *args, **kwargs) -> Any: ...


class Target(Model, Protocol):
    """The model whose text is kept: a causal language model of transformers."""

    def get_input_embeddings(self) -> nn.Module: ...

    def get_output_embeddings(self) -> nn.Module: ...

    def get_decoder(self) -> nn.Module: ...

    def forward(self, *args, **kwargs) -> Any: ...

    def prepare_inputs_for_generation(self, *args, **kwargs) -> dict: ...

    def _prefill(self, input_ids, generation_config, model_kwargs: dict) -> Any: ...


class Drafter(Model, Protocol):
    """A [`TreeFlashDraftModel`], or what passes its attributes on."""

    fc: nn.Module

    def draft(self, *args, **kwargs) -> Any:
        """Return [`Transitions`], or on demand any [`Proposal`]; see [`~TreeFlashDraftModel.draft`]."""


__all__ = ["Drafter", "Target"]
