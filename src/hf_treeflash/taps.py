"""Taps: the target's states at the layers a drafter reads, taken by hooks that hold on any decoder."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

LAYER_LISTS = ("layers", "h")  # how families call the list of their decoder's layers


def layers_of(module) -> nn.ModuleList | None:
    """Return a decoder's list of layers; None where it has none of a known name."""
    found = (getattr(module, name, None) for name in LAYER_LISTS)
    return next((layers for layers in found if isinstance(layers, nn.ModuleList)), None)


def decoder_of(target) -> Any:
    """Return the module that runs a target's layers: some give another for their decoder."""
    first = target.get_decoder()
    others = target.base_model, getattr(target, "model", None)
    return next((module for module in (first, *others) if layers_of(module) is not None), first)


def decoder_layers(target) -> nn.ModuleList | None:
    """Return the layers of a target's decoder, or None where they are not kept in a list of a known name."""
    return layers_of(decoder_of(target))


def is_compiled(target) -> bool:
    """Whether a target or a part of it was compiled: such code may skip hooks that were set after its first run."""
    modules = [target, decoder_of(target), *(decoder_layers(target) or ())]
    return any(
        module._compiled_call_impl is not None or hasattr(module.forward, "_torchdynamo_orig_callable")
        for module in modules
    )


class Taps:
    """The states of a target's layers, forward by forward.

    Hooks see every version of transformers alike and keep nothing but these layers. Each keeps its layer's latest
    output, as some targets run their layers more than once, and the states are handed out when the decoder ends. Only
    forwards of the thread that made the taps count, so several threads can share a target. A compiled target is asked
    for all its states instead.

    Args:
        target ([`PreTrainedModel`]):
            The target.
        layer_ids (`list[int]`):
            Zero-based decoder layers; the last layer's state is taken after the final norm, as transformers counts,
            and -1 is what the first layer is given.

    Attributes:
        model_kwargs (`dict`):
            What each forward has to be given for its states to come.
    """

    def __init__(self, target, layer_ids: list[int]):
        self.name, self.layer_ids = type(target).__name__, layer_ids
        self.count = len(decoder_layers(target) or ())
        self.asks = is_compiled(target)
        self.model_kwargs: dict[str, Any] = {"output_hidden_states": True} if self.asks else {}
        if getattr(target.config.get_text_config(decoder=True), "num_kv_shared_layers", 0):
            # Layers that share keys and values read the prompt's last token alone, unless it is asked for in this way.
            self.model_kwargs["logits_to_keep"] = torch.tensor([-1], device=target.device)
        self.owner, self.begun = threading.get_ident(), 0
        self.latest: dict[int, torch.Tensor] = {}
        self.collected: list[torch.Tensor] = []

    def clear(self) -> None:
        """Forget the states of forwards that do not count, such as those of a logits processor."""
        self.collected.clear()

    def take(self, outputs) -> torch.Tensor:
        """Return the states of the forwards since the last call, in order.

        Args:
            outputs ([`ModelOutput`]):
                Of the last of these forwards.

        Returns:
            `torch.Tensor` of shape `(batch, length, taps * hidden_size)`.

        Raises:
            RuntimeError: If none arrived.
        """
        if self.asks:
            states = getattr(outputs, "hidden_states", None) or ()
            if len(states) == self.count + 1:
                self._collect({i: states[i + 1] for i in self.layer_ids})
        if not self.collected:
            raise RuntimeError(
                f"No states of {self.name} reached the drafter. Compiled code skips hooks that were set after its "
                "first run: compile the target after its first call with a drafter, or set "
                "`torch._dynamo.config.skip_nnmodule_hook_guards = False` before compiling it."
            )
        states = self.collected[0] if len(self.collected) == 1 else torch.cat(self.collected, dim=1)
        self.clear()
        return states

    @contextmanager
    def hooked(self, target) -> Iterator["Taps"]:
        """Set the hooks while the context is open."""
        decoder, layers = decoder_of(target), decoder_layers(target)
        handles = []
        if not self.asks and layers is not None:
            final = self.count - 1
            modules = {i: decoder if i == final else layers[i] for i in self.layer_ids if i >= 0}
            handles = [module.register_forward_hook(self._keep(i)) for i, module in modules.items()]
            if -1 in self.layer_ids:
                handles.append(layers[0].register_forward_pre_hook(self._keep_first, with_kwargs=True))
            handles.append(decoder.register_forward_hook(self._hand_out))
            handles.append(target.register_forward_pre_hook(self._begin))
            handles.append(target.register_forward_hook(self._end))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, layer_id: int):
        def hook(module, args, output):
            if threading.get_ident() == self.owner:
                # A layer gives its state, alone or first in a tuple; a decoder names it.
                state = getattr(output, "last_hidden_state", output)
                self.latest[layer_id] = state[0] if isinstance(state, tuple | list) else state

        return hook

    def _keep_first(self, module, args, kwargs) -> None:
        if threading.get_ident() == self.owner:
            self.latest[-1] = args[0] if args else kwargs["hidden_states"]

    def _hand_out(self, module, args, output) -> None:
        if threading.get_ident() == self.owner and len(self.latest) == len(set(self.layer_ids)):
            self._collect(self.latest)
            self.latest = {}

    def _begin(self, module, args) -> None:
        if threading.get_ident() == self.owner:
            self.begun = len(self.collected)

    def _end(self, module, args, output) -> None:
        if threading.get_ident() == self.owner:
            del self.collected[self.begun : -1]  # of a decoder that ran more than once, the latest

    def _collect(self, states: dict[int, torch.Tensor]) -> None:
        first = states[self.layer_ids[0]]
        if any(state.ndim != 3 for state in states.values()):
            raise ValueError(
                f"The layers of {self.name} give states of shape {tuple(first.shape)}: several per token, where a "
                "drafter reads one. It has no drafters yet."
            )
        self.collected.append(torch.cat([states[i].to(first.device) for i in self.layer_ids], dim=-1))


@contextmanager
def tapped_states(target, layer_ids: list[int]) -> Iterator[Taps]:
    """Collect the target's states at some layers while the context is open; see [`Taps`]."""
    with Taps(target, layer_ids).hooked(target) as taps:
        yield taps


__all__ = ["Taps", "decoder_layers", "tapped_states"]
