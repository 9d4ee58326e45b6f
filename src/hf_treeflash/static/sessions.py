"""What one call leaves to the next with the same pair: caches, compiled models and recorded graphs."""

import itertools

import torch

from .launch import Launcher

# Each holds caches for its batch.
KEPT = 2
# Slots of a batch together, below which capacities do not differ; above it there are two for each power of two.
SMALLEST_CAPACITY, SMALLEST_OF_A_ROW = 2048, 256


class Sessions(dict):
    """Launchers by what they were made for, kept on the drafter; copies and files of a drafter take none along."""

    def __deepcopy__(self, memo):
        return Sessions()

    def __reduce__(self):
        return Sessions, ()

    def take(self, key: tuple, capacity: int) -> Launcher | None:
        """Return a launcher with room for a number of slots, for this call alone, or None."""
        launcher = self.pop(key, None)
        return launcher if launcher is not None and launcher.round.capacity >= capacity else None

    def keep(self, key: tuple, launcher: Launcher) -> None:
        """Give a launcher back."""
        self[key] = launcher
        for oldest in list(self)[:-KEPT]:
            self.pop(oldest, None)


def sessions_of(drafter) -> Sessions:
    """Return what is kept for a drafter."""
    return vars(drafter).setdefault("_treeflash_sessions", Sessions())


def session_key(decoding, cache) -> tuple:
    """Return what the recorded work of a call depends on, the length of the text aside.

    Args:
        decoding ([`StaticDecoding`]):
            The call, after prefill.
        cache ([`DynamicCache`]):
            The target's.
    """
    config = decoding.generation_config
    compiling = None if config.compile_config is None else repr(config.compile_config.to_dict())
    return (
        id(decoding.target),
        cache.layers[0].keys.shape[0],
        config.do_sample,
        decoding.generator.knobs,
        decoding.generator.temperature,
        _processors(decoding.processor.processors),
        (compiling, config.disable_compile),
        (cache.layers[0].keys.dtype, cache.layers[0].keys.device),
        *(_weights(model) for model in (decoding.target, decoding.drafter)),
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


__all__ = ["round_up", "session_key", "sessions_of"]
