"""Runs the dynamic loop on a CPU with the branches that a CUDA device takes."""

from collections import Counter
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import _disable_current_modes

from hf_treeflash import attention, candidate_generator, decoding, kernels, transitions
from hf_treeflash.kernels import attention_interface
from tests.static.launches import Launches

# What makes the host wait for a device, in the ways that Python sees.
WAITS = ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")


def as_on_cuda(patch) -> None:
    """Take the branches of CUDA; kernels' oracles compute what the kernels would."""
    patch.setattr(kernels, "use_triton", lambda tensor: True)
    patch.setattr(attention, "on_cpu", lambda device: False)
    patch.setattr(candidate_generator, "on_cpu", lambda device: False)
    patch.setattr(transitions, "on_cpu", lambda device: False)


class Round(Launches):
    """Counts what each part of a round launches, and how often the host waits for the device.

    Attributes:
        parts (`list[dict[str, Counter]]`):
            Launches by operator, for each part of each round.
        waits (`list[Counter]`):
            Waits of each round.
    """

    def __init__(self):
        super().__init__()
        self.parts: list[dict[str, Counter]] = []
        self.waits: list[Counter] = []
        self.now: Counter | None = None

    def watch(self, patch) -> None:
        """Count from now on."""
        for module, name, launches in (
            (kernels, "build_tree", 1),
            (kernels, "head_select", 2),
            (attention_interface, "tree_attention", 1),
            (torch.nn.functional, "rms_norm", 1),
        ):
            patch.setattr(module, name, self._kernel(name, getattr(module, name), launches))
        for name in ("draft", "verify", "walk", "commit"):
            patch.setattr(decoding.TreeDecoding, name, self._part(name, getattr(decoding.TreeDecoding, name)))
        for name in WAITS:
            patch.setattr(torch.Tensor, name, self._wait(name, getattr(torch.Tensor, name)))

    def _kernel(self, name: str, oracle: Callable, launches: int) -> Callable:
        def call(*args):
            self.counts[name] += launches
            before, self.now = self.now, None
            with _disable_current_modes():
                result = oracle(*args)
            self.now = before
            return result

        return call

    def _part(self, name: str, method: Callable) -> Callable:
        def call(*args):
            if name == "draft":
                self.parts.append({})
                self.waits.append(Counter())
            self.counts, self.now = Counter(), self.waits[-1]
            with self:
                result = method(*args)
            self.parts[-1][name], self.now = self.counts, None
            return result

        return call

    def _wait(self, name: str, method: Callable) -> Callable:
        def call(tensor, *args, **kwargs):
            if self.now is not None:
                self.now[name] += 1
            before, self.now = self.now, None
            result = method(tensor, *args, **kwargs)
            self.now = before
            return result

        return call
