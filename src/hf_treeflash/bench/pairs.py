"""A target and its drafter as tools use them: loading both, encoding prompts, views of a drafter."""

import copy
import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)

from ..modeling_treeflash import TreeFlashDraftModel


def load_pair(
    target: str, drafter: str, *, device: str | None = None, dtype: str | None = None
) -> tuple[Any, Any, Any]:
    """Load a target, its tokenizer and a drafter of any layout.

    Args:
        target (`str`), drafter (`str`):
            Folders or Hub repositories.
        device (`str`, *optional*):
            A CUDA device if there is one, by default.
        dtype (`str`, *optional*):
            As `from_pretrained` takes it; by default what is stored, and float32 on a CPU.

    Returns:
        `tuple`: The target, its tokenizer and the drafter, both models in evaluation mode.
    """
    model, tokenizer = load_target(target, device=device, dtype=dtype)
    draft_model = TreeFlashDraftModel.from_pretrained(drafter, dtype=model.dtype, device_map=model.device).eval()
    return model, tokenizer, draft_model


def load_target(target: str, *, device: str | None = None, dtype: str | None = None) -> tuple[Any, Any]:
    """Load a target and its tokenizer; arguments as for [`load_pair`]."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("float32" if device == "cpu" else "auto")
    model_class = auto_class(AutoConfig.from_pretrained(target))
    model = model_class.from_pretrained(target, dtype=dtype, device_map=device).eval()
    return model, AutoTokenizer.from_pretrained(target)


def auto_class(config):
    """Return the Auto class that makes a target of a config: some decoders are only known with their vision."""
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForCausalLM if known else AutoModelForImageTextToText


def encode_prompt(tokenizer, prompt: str, enable_thinking: bool = False) -> torch.Tensor:
    """Turn a user's text into ids of shape `(1, length)`, by the chat template where the tokenizer has one.

    Args:
        enable_thinking (`bool`, *optional*, defaults to `False`):
            Passed to the chat template; a drafter works best in the mode it was trained for.
    """
    return encode_messages(tokenizer, [{"role": "user", "content": prompt}], enable_thinking)


def encode_messages(tokenizer, messages: list[dict[str, str]], enable_thinking: bool = False) -> torch.Tensor:
    """Turn a conversation into ids of shape `(1, length)`, with what opens the answer.

    Args:
        messages (`list[dict[str, str]]`):
            Each with `role` and `content`. A tokenizer without a chat template takes a single one, as plain text.
        enable_thinking (`bool`, *optional*, defaults to `False`):
            Passed to the chat template.

    Raises:
        ValueError: If there is no chat template for several messages, or it refuses them.
    """
    if tokenizer.chat_template is None:
        if len(messages) != 1:
            raise ValueError(
                f"The target's tokenizer has no chat template, which {len(messages)} messages need: give plain text."
            )
        return tokenizer(messages[0]["content"], return_tensors="pt").input_ids
    try:
        return tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=True,
            enable_thinking=enable_thinking,
            return_tensors="pt",
            return_dict=True,
        ).input_ids
    except Exception as error:  # of a template, which may raise anything
        raise ValueError(f"The target's chat template refuses these messages: {error}") from error


def describe_pair(target, tokenizer, drafter, enable_thinking: bool = False) -> dict[str, Any]:
    """Say in plain data which models a measurement is about, down to revision, chat template and thinking mode."""
    template = tokenizer.chat_template
    return {
        "target": {
            "id": _identifier(target),
            "revision": revision_of(target),
            "dtype": str(target.dtype).removeprefix("torch."),
        },
        "drafter": {
            "id": _identifier(drafter),
            "revision": revision_of(drafter),
            "parameters": drafter.num_parameters(),
        },
        "chat_template_sha256": template and hashlib.sha256(template.encode()).hexdigest(),
        "enable_thinking": enable_thinking if template else None,
    }


def _identifier(model) -> str:
    """Return where a model came from: its Hub id, or its folder's name."""
    name = model.config.name_or_path
    return os.path.basename(os.path.normpath(name)) if os.path.isdir(name) else name


def revision_of(model) -> str | None:
    """Return the commit a model was read from; None for a folder, and where the local cache holds several of them.

    Models do not tell: transformers kept the commit in the config once, and does no longer.
    """
    folder = "--".join(["models", *model.config.name_or_path.split("/")])
    commits = [path.name for path in Path(constants.HF_HUB_CACHE, folder, "snapshots").glob("*")]
    return commits[0] if len(commits) == 1 else None


def with_knobs(drafter, **knobs):
    """Return a view of a drafter, sharing its weights, with other drafting knobs."""
    view = copy.copy(drafter)
    view.generation_config = copy.deepcopy(drafter.generation_config)
    for knob, value in knobs.items():
        setattr(view.generation_config, knob, value)
    return view


def with_vocabulary(drafter, token_ids: torch.Tensor):
    """Return a view of a drafter, sharing its weights, that drafts these tokens only."""
    view = with_knobs(drafter)
    view._buffers, view.config = dict(drafter._buffers), copy.deepcopy(drafter.config)
    view.set_draft_vocabulary(token_ids)
    return view


def without_head(drafter):
    """Return a view of a drafter, sharing its weights, that drafts from its marginals (of a PEFT model's base)."""
    base = drafter.get_base_model() if hasattr(drafter, "get_base_model") else drafter
    view = copy.copy(base)
    view._modules = {**base._modules, "ar_head": None}
    view.config = copy.deepcopy(base.config)
    view.config.ar_head = None
    return view
