"""The one hook into `generate()`: drafters of ours reach the tree, all other calls keep their way."""

import functools
import importlib

from transformers import GenerationMixin
from transformers.generation import GenerationMode
from transformers.utils import logging

from .cache import check_restorable
from .compat import CACHE
from .decoding import TreeDecoding
from .lengths import Lengths
from .outputs import TreeFlashGenerateOutput
from .validation import check_batch, check_call, check_chain, check_prompt

logger = logging.get_logger(__name__)


def tree_decoding(
    target,
    input_ids,
    logits_processor,
    stopping_criteria,
    generation_config,
    synced_gpus=False,
    streamer=None,
    inputs_tensor=None,
    assistant_model=None,
    assistant_tokenizer=None,
    tokenizer=None,
    **model_kwargs,
):
    """Decode with a TreeFlash drafter; the decoding method `generate` runs in place of its assisted decoding.

    Arguments and return value are those of `GenerationMixin._assisted_decoding`; a dictionary output also has
    `acceptance_lengths` and `block_efficiency`, see [`TreeFlashGenerateOutput`].
    """
    check_restorable(model_kwargs.get(CACHE))
    check_prompt(input_ids, generation_config, model_kwargs)
    check_batch(target, input_ids, model_kwargs[CACHE])
    if meets_switch(target, input_ids, generation_config, model_kwargs):
        return plain_decoding(
            target, input_ids, logits_processor, stopping_criteria, generation_config, streamer, model_kwargs
        )
    decoding = TreeDecoding
    if getattr(generation_config, "_treeflash_static", False):
        if getattr(model_kwargs[CACHE], "_is_user_defined", False):
            raise ValueError(f"`cache_implementation='static'` makes its own cache; leave out `{CACHE}`.")
        decoding = static_decoding()
    return decoding(
        target,
        assistant_model,
        input_ids=input_ids,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        generation_config=generation_config,
        streamer=streamer,
        model_kwargs=model_kwargs,
    ).run()


def meets_switch(target, input_ids, generation_config, model_kwargs: dict) -> bool:
    """Whether rows of a batch may come to a length at which the target changes for all rows of a pass at once."""
    if len(input_ids) == 1:
        return False
    positions = model_kwargs["position_ids"][..., -1]
    new = generation_config.max_length - input_ids.shape[1]
    first, last = int(positions.min()) + 1, max(int(positions.max()) + 1, input_ids.shape[1]) + new
    return Lengths.of(target).switch_between(first, last) is not None


def plain_decoding(
    target, input_ids, logits_processor, stopping_criteria, generation_config, streamer, model_kwargs: dict
):
    """Decode without a drafter; a dictionary output is one of ours."""
    logger.warning_once(
        f"This batch is decoded without its drafter: it may grow beyond the length at which {type(target).__name__} "
        "changes its rotary embedding, for all rows at once and so in step. Single prompts are drafted for."
    )
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


def is_treeflash(drafter, generation_config) -> bool:
    """Whether a call is ours: by the drafter's config, as its class may be wrapped or loaded from a repository."""
    model_type = getattr(getattr(drafter, "config", None), "model_type", None)
    # `speculation_type="dflash"` asks for transformers' own chain.
    return model_type == "treeflash" and getattr(generation_config, "speculation_type", None) is None


def static_decoding() -> type[TreeDecoding]:
    """Return the decoding of `cache_implementation="static"`, which needs the kernels and so the whole package.

    Raises:
        ValueError: Where only the files of a repository are at hand.
    """
    try:
        return importlib.import_module("hf_treeflash.static").StaticDecoding
    except ImportError as error:
        raise ValueError("`cache_implementation='static'` beside a drafter needs the hf_treeflash package.") from error


def choose_caches(generation_config) -> None:
    """Take a call's wish for static caches over: `generate` prepares the prompt's cache, the static ones are ours."""
    if generation_config.cache_implementation == "static":
        static_decoding()
        generation_config.cache_implementation = None
        generation_config._treeflash_static = True


def install_hook() -> None:
    """Let `generate(assistant_model=drafter)` reach the tree for TreeFlash drafters; all others keep their way."""
    decode, validate = GenerationMixin._assisted_decoding, GenerationMixin._validate_generation_mode
    if hasattr(decode, "_before_treeflash"):
        return

    @functools.wraps(decode)
    def _assisted_decoding(self, *args, **kwargs):
        ours = is_treeflash(kwargs.get("assistant_model"), kwargs.get("generation_config"))
        return (tree_decoding if ours else decode)(self, *args, **kwargs)

    @functools.wraps(validate)
    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        drafter = generation_mode_kwargs.get("assistant_model")
        if is_treeflash(drafter, None):
            check_chain(drafter, generation_config)
        if is_treeflash(drafter, generation_config):
            check_call(self, drafter, generation_mode, generation_config, generation_mode_kwargs)
            choose_caches(generation_config)
            if self._is_stateful:  # transformers' own chains cannot be taken back from a state, a tree can
                generation_mode = GenerationMode.GREEDY_SEARCH
            # What is left to check compares vocabularies, as `check_call` does, but wants one from every drafter.
            generation_mode_kwargs = {k: v for k, v in generation_mode_kwargs.items() if k != "assistant_model"}
        return validate(self, generation_mode, generation_config, generation_mode_kwargs)

    for method, original in ((_assisted_decoding, decode), (_validate_generation_mode, validate)):
        setattr(method, "_before_treeflash", original)
        setattr(GenerationMixin, original.__name__, method)


def remove_hook() -> None:
    """Undo [`install_hook`]."""
    for name in ("_assisted_decoding", "_validate_generation_mode"):
        method = getattr(GenerationMixin, name)
        setattr(GenerationMixin, name, getattr(method, "_before_treeflash", method))


__all__ = ["install_hook", "remove_hook", "tree_decoding"]
