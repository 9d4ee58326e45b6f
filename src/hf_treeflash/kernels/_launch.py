"""Delays the import of triton to the first launch and tells whether a launch is possible."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def use_triton(tensor: torch.Tensor) -> bool:
    """Returns whether kernels can run on `tensor`: it lives on a CUDA device and triton is installed."""
    return tensor.is_cuda and _triton_is_installed()


def next_power_of_2(number: int) -> int:
    """Returns the smallest power of two that is not below `number` (at least 1)."""
    return 1 << max(number - 1, 0).bit_length()


class LazyKernel:
    """
    Decorator for the body of a Triton kernel: like `triton.jit`, but importing the module does not import triton.

    The body refers to `triton.language` as `tl`; that name is put into its module when the kernel is first used. It
    may call other decorated functions of its module, which cannot be launched themselves from then on.

    Args:
        function (`Callable`):
            The kernel body.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    @functools.cached_property
    def jitted(self) -> Any:
        """The `triton.JITFunction` of the body (an interpreted one under `TRITON_INTERPRET=1`)."""
        import triton
        import triton.language as tl

        namespace = self.function.__globals__
        namespace["tl"] = tl
        for name in self.function.__code__.co_names:
            if isinstance(namespace.get(name), LazyKernel):
                namespace[name] = namespace[name].jitted
        return triton.jit(self.function)

    def __call__(self, *args: Any) -> Any:
        raise RuntimeError("a kernel is launched over a grid, `kernel[grid](...)`, or called by another kernel")

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return self.jitted[grid]
