"""What one call leaves to the next with the same pair: caches, compiled models and recorded graphs."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ..draft_head import any_tensor
from ..memory import circumstances, forget, recall, remember
from .launch import Launcher
from .round import StaticRound

# Each holds caches for its batch.
KEPT = 2
# Slots of a batch together, below which capacities do not differ; above it there are two for each power of two.
SMALLEST_CAPACITY, SMALLEST_OF_A_ROW = 2048, 256


@contextmanager
def session(decoding, cache, needed: int, ahead: int) -> Iterator[Launcher]:
    """Lend a call the launcher that an earlier call of the pair left, or a new one; kept again if the call ends well.

    What is kept holds neither model: it goes with the first of them, or with [`forget`]. Inference mode is off
    meanwhile, so that later calls may write to what is allocated, in whatever mode they run.

    Args:
        decoding ([`StaticDecoding`]):
            The call, after prefill.
        cache ([`DynamicCache`]):
            The target's.
        needed (`int`):
            Slots that the longest row may need.
        ahead (`int`):
            Rounds that are launched before the results of an earlier one are read.
    """
    owners = decoding.drafter, decoding.target
    models = decoding.target, decoding.generator

    def make_room() -> None:
        kept.clear()
        for owner in owners:
            forget(owner, "sessions")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def make() -> Launcher:
        batch = cache.layers[0].keys.shape[0]
        capacity = round_up(needed, batch)
        round = StaticRound(*models, decoding.processor, decoding.temperature, cache, batch, capacity, ahead)
        return Launcher(round, decoding.generation_config)

    with torch.inference_mode(False), torch.no_grad():
        key = session_key(decoding, cache)
        kept = recall("sessions", *owners) or {}
        launcher = kept.pop(key, None)  # for this call alone
        if launcher is not None and launcher.round.capacity < needed:
            launcher = None  # freed before a larger one is made
        if launcher is None:
            for oldest in list(kept)[: max(0, len(kept) - KEPT + 1)]:
                kept.pop(oldest, None)
            launcher = _with_room(make, make_room)
        launcher.hold(*models, make_room)
        yield launcher
        launcher.let_go()
        kept[key] = launcher
        remember("sessions", kept, *owners)


def _with_room(make: Callable[[], Launcher], make_room: Callable[[], None]) -> Launcher:
    """Make a launcher; where the memory does not suffice, once more after the caches of other calls have gone."""
    try:
        return make()
    except torch.OutOfMemoryError:
        pass
    make_room()  # behind the handler, where what the failed attempt allocated is free again
    return make()


def session_key(decoding, cache) -> tuple:
    """Return what the recorded work of a call depends on, the length of the text aside.

    Args:
        decoding ([`StaticDecoding`]):
            The call, after prefill.
        cache ([`DynamicCache`]):
            The target's.
    """
    config = decoding.generation_config
    head = decoding.generator.draft_head
    compiling = None if config.compile_config is None else repr(config.compile_config.to_dict())
    return (
        cache.layers[0].keys.shape[0],
        decoding.generator.knobs,
        decoding.temperature,
        _processors(decoding.processor.processors),
        (compiling, config.disable_compile),
        (cache.layers[0].keys.dtype, cache.layers[0].keys.device),
        *((circumstances(model), _weights(model)) for model in (decoding.target, decoding.drafter)),
        any_tensor(head.lm_head).data_ptr() if head.float8 is None else head.float8.rows.data_ptr(),
    )


def round_up(slots: int, batch: int = 1) -> int:
    """Round a capacity up in wide steps: each is compiled, and calls of similar length share a session.

    Args:
        slots (`int`):
            Needed per row.
        batch (`int`, *optional*, defaults to 1):
            Rows.
    """
    smallest = 1 << (max(SMALLEST_CAPACITY // batch, SMALLEST_OF_A_ROW).bit_length() - 1)
    above = 1 << (slots - 1).bit_length()
    return max(smallest, above * 3 // 4 if above * 3 // 4 >= slots else above)


def _processors(processors) -> str:
    """Tell processors with equal settings from others."""
    settings = [
        {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in vars(one).items()}
        for one in processors
    ]
    return repr([(type(one).__name__, own) for one, own in zip(processors, settings, strict=True)])


def _weights(model) -> int:
    """Tell where a model's weights are and how it uses them: a graph reads them where they were."""
    places = [tensor.data_ptr() for tensor in itertools.chain(model.parameters(), model.buffers())]
    adapters = [
        (tuple(module.active_adapters), module.disable_adapters, tuple(module.merged_adapters))
        for module in model.modules()
        if hasattr(module, "adapter_layer_names")
    ]
    return hash((tuple(places), tuple(adapters), model.training, model.config._attn_implementation))


__all__ = ["round_up", "session"]
