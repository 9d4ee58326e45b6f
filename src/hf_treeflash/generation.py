"""The hook into `generate()` and `pipeline()`: drafters of ours reach the tree, all other calls keep their way."""

import functools
import importlib
from collections.abc import Callable
from contextvars import ContextVar

from transformers import GenerationMixin
from transformers.generation import GenerationMode
from transformers.pipelines import base as pipelines

from .assistants import drafter_behind, drafter_of_pipeline, is_drafter
from .cache import check_restorable
from .compat import CACHE
from .decoding import NoCache, TreeDecoding
from .plain import meets_switch, plain_decoding
from .validation import check_batch, check_call, check_chain, check_prompt

# What the hook replaces.
HOOKED = (
    (GenerationMixin, "_assisted_decoding"),
    (GenerationMixin, "_validate_generation_mode"),
    (pipelines, "load_assistant_model"),
)

# What decodes a call with a drafter. `hf_treeflash.trace` puts a loop there that writes its rounds down.
DECODING: ContextVar[Callable[..., TreeDecoding]] = ContextVar("decoding", default=TreeDecoding)


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
    call = {
        "input_ids": input_ids,
        "logits_processor": logits_processor,
        "stopping_criteria": stopping_criteria,
        "generation_config": generation_config,
        "streamer": streamer,
        "model_kwargs": model_kwargs,
    }
    if (why := meets_switch(target, input_ids, generation_config, model_kwargs)) is not None:
        return plain_decoding(target, why, **call)
    decoding = DECODING.get()
    if getattr(generation_config, "_treeflash_static", False):
        if getattr(model_kwargs[CACHE], "_is_user_defined", False):
            raise ValueError(f"`cache_implementation='static'` makes its own cache; leave out `{CACHE}`.")
        if decoding is TreeDecoding:
            decoding = static_decoding()
    try:
        return decoding(target, assistant_model, **call).run()
    except NoCache as error:
        if not target.training:
            raise
        return plain_decoding(target, f"{error} while it is trained", **call)  # with gradient checkpointing


def is_treeflash(drafter, generation_config) -> bool:
    """Whether a call is ours; `speculation_type="dflash"` asks for transformers' own chain."""
    return is_drafter(drafter) and generation_config.speculation_type is None


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
    decode, validate, load = (getattr(owner, name) for owner, name in HOOKED)
    if hasattr(decode, "_before_treeflash"):
        return

    @functools.wraps(decode)
    def _assisted_decoding(self, *args, **kwargs):
        ours = is_treeflash(kwargs.get("assistant_model"), kwargs.get("generation_config"))
        return (tree_decoding if ours else decode)(self, *args, **kwargs)

    @functools.wraps(validate)
    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        given = generation_mode_kwargs.get("assistant_model")
        drafter = drafter_behind(given, self)
        if drafter is not given:
            generation_mode_kwargs["assistant_model"] = drafter
        if is_drafter(drafter):
            check_chain(drafter, generation_config)
        if is_treeflash(drafter, generation_config):
            check_call(self, drafter, generation_mode, generation_config, generation_mode_kwargs)
            choose_caches(generation_config)
            # What holds for transformers' own chains does not for a tree: it may be taken back from a state, and the
            # sequences of a prompt are rows of a batch.
            generation_mode = GenerationMode.SAMPLE if generation_config.do_sample else GenerationMode.GREEDY_SEARCH
            # What is left to check compares vocabularies, as `check_call` does, but wants one from every drafter.
            generation_mode_kwargs = {k: v for k, v in generation_mode_kwargs.items() if k != "assistant_model"}
        return validate(self, generation_mode, generation_config, generation_mode_kwargs)

    @functools.wraps(load)
    def load_assistant_model(model, assistant_model, assistant_tokenizer):
        drafter = drafter_of_pipeline(assistant_model, model)
        return load(model, assistant_model, assistant_tokenizer) if drafter is None else (drafter, None)

    methods = _assisted_decoding, _validate_generation_mode, load_assistant_model
    for (owner, name), method in zip(HOOKED, methods, strict=True):
        setattr(method, "_before_treeflash", getattr(owner, name))
        setattr(owner, name, method)


def remove_hook() -> None:
    """Undo [`install_hook`]."""
    for owner, name in HOOKED:
        method = getattr(owner, name)
        setattr(owner, name, getattr(method, "_before_treeflash", method))


__all__ = ["DECODING", "install_hook", "remove_hook", "tree_decoding"]
