"""Which recurrent layers a target has, and letting them run over trees."""

import functools
import inspect
import sys
from collections.abc import Callable

from torch import nn

from ..states import STATEFUL
from ..taps import decoder_layers
from .tree_pass import dispatcher
from .walkers import OVER_TREES


@functools.cache
def walked_by(forward: Callable) -> frozenset[str]:
    """Return the functions of [`OVER_TREES`] that a layer's forward calls."""
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return frozenset(OVER_TREES).intersection(code.co_names if code is not None else ())


def mixers_of(module: nn.Module) -> list[nn.Module]:
    """Return the recurrent layers within a module that are known."""
    return [part for part in module.modules() if walked_by(type(part).forward)]


def check_mixers(target) -> None:
    """Refuse a target with a recurrent layer that cannot run over trees.

    Args:
        target ([`PreTrainedModel`]):
            With `layer_types` in its config.

    Raises:
        ValueError: Naming the layer, its class and the reason.
    """
    kinds = target.config.get_text_config(decoder=True).layer_types
    for place, (kind, layer) in enumerate(zip(kinds, decoder_layers(target) or (), strict=True)):
        mixers = mixers_of(layer)
        name = f"Layer {place} of {type(target).__name__}, a {kind!r} layer"
        if kind in STATEFUL and not mixers:
            raise ValueError(
                f"{name} ({type(layer).__name__}), keeps a state in a way that is not known here, so that the "
                "rejected tokens of a tree could not be kept out of it; generate without a drafter."
            )
        for mixer in mixers:
            if not type(mixer).__module__.startswith("transformers.models."):
                raise ValueError(
                    f"{name}, is remote code ({type(mixer).__name__}), which may differ from the layers known here; "
                    "load the model with `trust_remote_code=False` if transformers has it."
                )
            if "mamba_selective_scan" in walked_by(type(mixer).forward) and hasattr(mixer, "n_mamba_heads"):
                raise ValueError(
                    f"{name}, splits its channels into heads with a state each ({type(mixer).__name__}), which is not "
                    "known here; generate without a drafter."
                )
            if not _runs_its_own_forward(mixer):
                raise ValueError(
                    f"{name}, is replaced as a whole by a kernel ({type(mixer).__name__}), which knows no trees; load "
                    "the model with `use_kernels=False`."
                )


def check_going_on(target) -> None:
    """Refuse to read several tokens behind a cache where transformers starts from an empty state.

    Args:
        target ([`PreTrainedModel`]):
            One that [`check_mixers`] lets pass.

    Raises:
        ValueError: Naming the layer and what to do.
    """
    for mixer in mixers_of(target):
        if "mamba_selective_scan" in walked_by(type(mixer).forward):
            raise ValueError(
                f"{type(target).__name__} cannot go on from a cache: its Mamba-1 layers ({type(mixer).__name__}) read "
                "a prompt from an empty state whatever the cache holds, in transformers already. Leave the cache out "
                "and pass the whole text."
            )


def _runs_its_own_forward(module: nn.Module) -> bool:
    forward = getattr(module, "_old_forward", module.forward)  # where accelerate keeps it
    return getattr(forward, "__func__", None) is type(module).forward


def install(target) -> None:
    """Let the target's recurrent layers look up functions that also run over trees.

    The functions of transformers' modelling modules are replaced, once. They do what they did until a tree is in force
    on the thread that calls them, see [`tree_in_force`].

    Args:
        target ([`PreTrainedModel`]):
            One that [`check_mixers`] lets pass.
    """
    for mixer in {type(mixer) for mixer in mixers_of(target)}:
        module = sys.modules[mixer.__module__]
        for name in walked_by(mixer.forward):
            function = getattr(module, name)
            if not hasattr(function, "_over_trees"):
                setattr(module, name, dispatcher(function, OVER_TREES[name]))


__all__ = ["check_going_on", "check_mixers", "install", "mixers_of"]
