"""Checks of a call before anything runs: a clear error instead of a wrong or slow text."""

import inspect

import torch
from transformers import Cache, GenerationConfig
from transformers.generation import GenerationMode

from .compat import CACHE
from .draft_head import check_head, home_of
from .draft_vocabulary import compare_output_rows
from .hybrids import check_layers, recurrent_layers
from .knobs import DraftingKnobs
from .protocols import Drafter, Target
from .taps import decoder_layers

PADDED_ROWS = 256  # that padding or new tokens may add to a vocabulary


def check_drafter(drafter: Drafter) -> None:
    """Refuse a drafter without weights, or whose config was changed into something it was not built for.

    Raises:
        ValueError: Naming the field.
    """
    config = drafter.config
    config._check_drafter()
    width = getattr(drafter.fc, "in_features", None)
    if width is not None and width != len(config.target_layer_ids) * config.hidden_size:
        raise ValueError(
            f"The drafter's config names {len(config.target_layer_ids)} target layers (`target_layer_ids`), but its "
            f"weights were built for {width // config.hidden_size}."
        )
    if home_of(drafter.fc).type == "meta":
        raise ValueError("The drafter has no weights: it is on the meta device. Load it with `from_pretrained`.")


def check_pair(target: Target, drafter: Drafter) -> None:
    """Refuse a drafter that was not made for a target of this shape.

    Raises:
        ValueError: Naming the field, the drafter's value and the target's.
    """
    config, draft = target.config.get_text_config(decoder=True), drafter.config
    fits = {
        "hidden_size": draft.hidden_size == config.hidden_size,
        "vocab_size": fits_vocabulary(draft.vocab_size, config.vocab_size),
    }
    if draft.ar_head in ("markov", "selector"):  # whose vectors are added to the target's logits, token by token
        fits["vocab_size"] = draft.vocab_size == config.vocab_size
    for field, does in fits.items():
        if not does:
            raise ValueError(
                f"The drafter does not fit this target: its `{field}` is {getattr(draft, field)}, the target's is "
                f"{getattr(config, field)}. Load the drafter that was trained for this target."
            )
    for module, field in (
        (target.get_input_embeddings(), "embedding_dim"),
        (target.get_output_embeddings(), "in_features"),
    ):
        width = getattr(module, field, draft.hidden_size)
        if width != draft.hidden_size:
            raise ValueError(
                f"{type(target).__name__} has token embeddings {width} wide and states {config.hidden_size} wide; "
                "a drafter shares embeddings and output layer with its target, so they must be of one width."
            )
    if draft.mask_token_id >= config.vocab_size:
        raise ValueError(
            f"The drafter does not fit this target: its `mask_token_id` is {draft.mask_token_id}, but the target's "
            f"vocabulary has {config.vocab_size} tokens."
        )
    count = len(decoder_layers(target) or ())  # some configs count otherwise
    if max(draft.target_layer_ids) >= count:
        raise ValueError(
            f"The drafter reads target layer {max(draft.target_layer_ids)} (`target_layer_ids`), but this target has "
            f"{count} layers, 0 to {count - 1}."
        )
    if draft.num_target_layers not in (None, count, config.num_hidden_layers):
        raise ValueError(
            f"The drafter was made for a target of {draft.num_target_layers} layers (`num_target_layers`), this one "
            f"has {config.num_hidden_layers}."
        )
    if getattr(drafter, "draft_lm_head", None) is not None:
        compare_output_rows(target, drafter)


def check_chain(drafter, generation_config: GenerationConfig) -> None:
    """Refuse transformers' own chain for a drafter that it would run in another way than it was trained.

    Raises:
        ValueError: Naming the field.
    """
    if generation_config.speculation_type is None:
        return
    known: dict[str, tuple] = {
        "first_slot": (1,),
        "input_embedding_scale": (None,),
        "window_rule": ("inclusive", "strict"),
    }
    if not getattr(drafter.config, "tie_draft_head", False):  # else the chain drafts with all of the target's layer
        known["draft_vocab_size"] = (None,)
    for field, values in known.items():
        value = getattr(drafter.config, field, values[0])
        if value not in values:
            raise ValueError(
                f"transformers' own chain would run this drafter in another way than it was trained (`{field}` is "
                f"{value!r}): leave out `speculation_type`."
            )


def check_target(target: Target) -> None:
    """Refuse targets whose passes cannot carry a tree, and those without weights.

    Raises:
        ValueError: Naming what stands in the way and what works.
    """
    check_family(target)
    if home_of(target.get_input_embeddings()).type == "meta":
        raise ValueError("The target has no weights: it is on the meta device. Load it with `from_pretrained`.")


def check_family(target: Target) -> None:
    """Refuse targets whose passes cannot carry a tree, whatever their weights.

    Raises:
        ValueError: Naming what stands in the way and what works.
    """
    if target.config.is_encoder_decoder:
        raise ValueError(
            f"{type(target).__name__} is an encoder-decoder model; a TreeFlash drafter needs a decoder-only target."
        )
    config = target.config.get_text_config(decoder=True)
    check_layers(target, config)
    if getattr(config, "recurrent_kv_cache_mode", None) == "last_loop":
        raise ValueError(
            f"{type(target).__name__} keeps only the last loop's keys and values (`recurrent_kv_cache_mode`), which "
            "makes what a token gives depend on what else is in its pass. Set the mode to 'per_loop'."
        )
    if (states := getattr(config, "altup_num_inputs", 1)) > 1:
        raise ValueError(
            f"Layer 0 of {type(target).__name__}, like all of its layers, gives several states per token "
            f"(`altup_num_inputs` is {states}), where a drafter reads one. It has no drafters yet."
        )
    if decoder_layers(target) is None:
        raise ValueError(
            f"{type(target).__name__} does not keep its decoder layers in `layers` or `h`, where drafters read."
        )
    if not takes_positions(target):
        raise ValueError(
            f"{type(target).__name__} takes no `position_ids`, which the nodes of a tree need: siblings share one."
        )


def takes_positions(target: Target) -> bool:
    """Whether a target's forward takes `position_ids`, be it behind one that passes on whatever it is given."""
    own = inspect.signature(target.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in own):
        forwards = [vars(kind)["forward"] for kind in type(target).__mro__ if "forward" in vars(kind)]
    else:
        forwards = [target.forward]
    return any("position_ids" in inspect.signature(forward).parameters for forward in forwards)


def fits_vocabulary(drafter_size: int | None, target_size: int) -> bool:
    """Whether a vocabulary is a drafter's, or that with rows padded or cut: nothing in a drafter has this size."""
    if drafter_size is None:  # a checkpoint that does not name it was made for its target's
        return True
    return -max(1, target_size // 50) <= target_size - drafter_size < PADDED_ROWS


def check_adapters(target) -> None:
    """Refuse PEFT adapters whose effect on a token hangs on its place in a pass.

    Raises:
        ValueError: Naming the kind of adapter.
    """
    # Beside virtual tokens PEFT prepares the inputs itself, without the positions of a tree's nodes.
    wrapper = getattr(target.prepare_inputs_for_generation, "__self__", target)
    kind = getattr(wrapper, "active_peft_config", None)
    if kind is not None and kind.is_prompt_learning:
        raise ValueError(
            f"{type(target).__name__} is adapted by {kind.peft_type.value}: PEFT puts virtual tokens before the text "
            "and drops the positions that the nodes of a tree need. LoRA and its kin work."
        )
    if not hasattr(target, "peft_config"):
        return
    layers = (module for module in target.modules() if hasattr(module, "merged_adapters"))
    active = {name for layer in layers if not layer.disable_adapters for name in layer.active_adapters}
    for name in sorted(active & set(target.peft_config)):
        if getattr(target.peft_config[name], "alora_invocation_tokens", None):
            raise ValueError(
                f"The adapter {name!r} is an activated LoRA (`alora_invocation_tokens`), which counts its tokens from "
                "the end of a pass; the nodes of a tree do not stand in the order of the text. Merge or disable it."
            )


def check_batch(target: Target, input_ids: torch.Tensor, cache: Cache) -> None:
    """Refuse prompts that a target cannot read in trees' company, though it can read others.

    Args:
        target ([`PreTrainedModel`]):
            The target.
        input_ids (`torch.LongTensor` of shape `(batch, length)`):
            The prompts.
        cache ([`Cache`]):
            What it goes on from, empty at the beginning of a conversation.

    Raises:
        ValueError: Naming the field or the layer, and what works.
    """
    config = target.config.get_text_config(decoder=True)
    if len(input_ids) > 1 and getattr(config, "attn_temperature_tuning", False):
        raise ValueError(
            f"{type(target).__name__} scales queries by their column (`attn_temperature_tuning`), and rows of a batch "
            "that accept drafts at their own pace stand in other columns than in plain decoding. Pass one prompt at a "
            "time, or turn the tuning off where the texts are short."
        )
    if (recurrent := recurrent_layers(config)) is not None and cache.get_seq_length() > 0:
        recurrent.check_going_on(target)


def check_prompt(input_ids: torch.Tensor, generation_config: GenerationConfig, model_kwargs: dict) -> None:
    """Refuse ids of a wrong shape, a mask that does not cover the prompt, and a cache that leaves nothing of it.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, length)`):
            The prompts.
        generation_config ([`GenerationConfig`]):
            Of the call.
        model_kwargs (`dict`):
            What else `generate` prepared for the target.

    Raises:
        ValueError: With the shape or both lengths.
    """
    if input_ids.ndim > 2:
        raise ValueError(f"`input_ids` must have the shape (batch, length), got {tuple(input_ids.shape)}.")
    mask, embeds = model_kwargs.get("attention_mask"), model_kwargs.get("inputs_embeds")
    length = (input_ids if embeds is None else embeds).shape[1]
    cached = model_kwargs[CACHE].get_seq_length()
    if length == 0:
        raise ValueError("The prompt is empty; pass at least one token.")
    if mask is not None and mask.shape[1] not in (length, cached + length):
        raise ValueError(f"`attention_mask` has {mask.shape[1]} columns, but the prompt has {cached + length}.")
    # `generate` drops a mask without padding, and notes its length.
    columns = getattr(generation_config, "_mask_length", length) if mask is None else mask.shape[1]
    if columns == length <= cached:
        raise ValueError(
            f"The cache already holds {cached} columns and the prompt has {length}, so there is no token left to run; "
            "pass the whole text, new tokens included, or crop the cache."
        )


def check_call(
    target: Target, drafter: Drafter, generation_mode, generation_config: GenerationConfig, mode_kwargs: dict
) -> None:
    """Refuse what cannot work beside a TreeFlash drafter, before `generate` runs or prepares anything.

    Args:
        target ([`Target`]), drafter ([`Drafter`]):
            The pair.
        generation_mode ([`GenerationMode`]):
            The mode the call's flags ask for.
        generation_config ([`GenerationConfig`]):
            Of the call.
        mode_kwargs (`dict`):
            Tokenizers, streamer and the like, as `generate` collects them.

    Raises:
        ValueError: Naming the option and what to do.
    """
    knobs = DraftingKnobs.read(drafter.generation_config, generation_config)
    if generation_mode != GenerationMode.ASSISTED_GENERATION:
        raise ValueError(
            f"A TreeFlash drafter works with greedy decoding and sampling, not with {generation_mode.value}; "
            "set `num_beams=1`."
        )
    if generation_config.assistant_early_exit is not None:
        raise ValueError("`assistant_early_exit` drafts with the target itself; leave it out beside a drafter.")
    if mode_kwargs.get("synced_gpus"):
        raise ValueError("TreeFlash drafting does not run under `synced_gpus` (FSDP or ZeRO-3 inference).")
    if generation_config.use_cache is False:
        raise ValueError("TreeFlash drafting needs the target's cache; call `generate` with `use_cache=True`.")
    check_target(target)
    check_adapters(target)
    check_drafter(drafter)
    check_pair(target, drafter)
    check_head(target.get_output_embeddings(), knobs)
    if mode_kwargs.get("assistant_tokenizer") is not None:
        raise ValueError("A TreeFlash drafter shares the target's vocabulary; leave out `assistant_tokenizer`.")


__all__ = ["check_batch", "check_call", "check_chain", "check_prompt"]
