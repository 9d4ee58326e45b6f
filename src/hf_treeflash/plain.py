"""Plain decoding, transformers' own, where a tree cannot stand for it: one step, or a whole call."""

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from .compat import CACHE
from .lengths import Lengths
from .outputs import TreeFlashGenerateOutput

logger = logging.get_logger(__name__)


def plain_step(target, cache, input_ids: torch.Tensor, model_kwargs: dict, new_tokens: int):
    """Run the target over the newest token of each row exactly as plain decoding does.

    Args:
        target ([`PreTrainedModel`]):
            The target.
        cache ([`Cache`]):
            Of all that stands before these tokens.
        input_ids (`torch.LongTensor` of shape `(batch, length)`):
            The texts, the newest tokens included.
        model_kwargs (`dict`):
            What `generate` prepared for the prompts.
        new_tokens (`int`):
            Tokens since then, the newest included.
    """
    before = CausalLMOutputWithPast(**{CACHE: cache})
    model_kwargs = target._update_model_kwargs_for_generation(before, dict(model_kwargs), num_new_tokens=new_tokens)
    inputs = target.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **model_kwargs)
    return target(**inputs, return_dict=True)


def meets_switch(target, input_ids: torch.Tensor, generation_config, model_kwargs: dict) -> str | None:
    """Return why a batch has to advance in step, None if it has not.

    Its rows may come to a length at which the target changes for all rows of a pass at once.
    """
    positions = model_kwargs.get("position_ids")
    if len(input_ids) == 1 or positions is None:
        return None
    new = generation_config.max_length - input_ids.shape[1]
    first = int(positions[..., -1].min()) + 1
    last = max(int(positions[..., -1].max()) + 1, input_ids.shape[1]) + new
    switch = Lengths.of(target).switch_between(first, last)
    if switch is None:
        return None
    return (
        f"it may grow beyond {switch} tokens, where {type(target).__name__} changes its rotary embedding for all rows "
        "at once; single prompts are drafted for"
    )


def plain_decoding(
    target,
    why: str,
    *,
    input_ids,
    logits_processor,
    stopping_criteria,
    generation_config,
    streamer,
    model_kwargs: dict,
):
    """Decode without a drafter, after a warning; a dictionary output is one of ours.

    Args:
        target ([`PreTrainedModel`]):
            The target.
        why (`str`):
            For the warning.
        input_ids, logits_processor, stopping_criteria, generation_config, streamer, model_kwargs:
            As `generate` prepares them for a decoding method.
    """
    logger.warning_once(f"This call is decoded without its drafter: {why}.")
    output = target._sample(
        input_ids,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        generation_config=generation_config,
        streamer=streamer,
        **model_kwargs,
    )
    if not generation_config.return_dict_in_generate:
        return output
    ones = [[1] * (output.sequences.shape[1] - input_ids.shape[1] - 1) for _ in input_ids]
    return TreeFlashGenerateOutput(**output, acceptance_lengths=ones, block_efficiency=1.0)


__all__ = ["meets_switch", "plain_decoding", "plain_step"]
