"""Which calls the static path covers; the others decode with dynamic caches, and are told why."""

from collections.abc import Iterator

from transformers import GenerationMixin

from ..cache import is_left_padded
from ..decoding import PROMPT_KWARGS, TreeDecoding
from ..logits_process import PREFIX_INDEPENDENT
from ..round_state import RoundState

# Rotary embeddings that depend on the longest position of a pass, which they read on the host.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def why_dynamic(decoding: TreeDecoding, state: RoundState) -> str | None:
    """Return what the static path does not cover in a call that has been prefilled, None if it covers everything."""
    return next(_uncovered(decoding, state), None)


def _uncovered(decoding: TreeDecoding, state: RoundState) -> Iterator[str]:
    config, target = decoding.generation_config, decoding.target
    if decoding.verifier.recurrent is not None:
        yield "recurrent layers"
    if "chunked_attention" in decoding.verifier.windows:
        yield "chunked attention"
    if decoding.auto is not None:
        yield "`tree_budget='auto'`"
    if decoding.together:
        yield "a batch with a streamer, or with processors, criteria or inputs of the caller's own"
    if decoding.lookup is not None:
        yield "`prompt_lookup_num_tokens`"
    if decoding.generator.knobs.draft_window is not None:
        yield "`draft_window`"
    for processor in decoding.processor.processors:
        if type(processor) not in PREFIX_INDEPENDENT:
            yield f"{type(processor).__name__}, which may look at the text before a token"
    for name in ("output_scores", "output_logits", "output_hidden_states", "output_attentions"):
        if config.return_dict_in_generate and getattr(config, name):
            yield f"`{name}`"
    given = {name for name, value in decoding.model_kwargs.items() if value is not None}
    if extra := sorted(given - PROMPT_KWARGS - {"use_cache"}):
        yield f"the model input `{extra[0]}`"
    if type(target).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation:
        yield f"{type(target).__name__}, which prepares its inputs in its own way"
    rope = str(getattr(target.config.get_text_config(decoder=True), "rope_parameters", None))
    if any(f"'{kind}'" in rope for kind in LENGTH_DEPENDENT_ROPE):
        yield "a rotary embedding that changes with the length"
    devices = set(getattr(target, "hf_device_map", {}).values())
    if len(devices) > 1 or decoding.generator.device != target.device:
        yield "models on several devices"
    if decoding.ranks is not None:
        yield "a target split over devices by tensor parallelism"
    left = max(map(decoding.sequences.room, state.rows), default=0)
    if left and decoding.exactness.room(state, decoding.sequences) <= left:
        yield "a text that may pass a length at which the target may change"
    if state.positions.ndim != 1:
        yield "several position axes"
    if not is_left_padded(state.prefix.valid):
        yield "padding that is not on the left"


__all__ = ["why_dynamic"]
