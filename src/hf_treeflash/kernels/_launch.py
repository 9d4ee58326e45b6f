"""Delays the import of triton to the first launch, tells whether a launch is possible, and launches."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import triton.language as tl

logger = logging.getLogger(__name__)

# Triton compiles for Ampere and later.
OLDEST_CAPABILITY = (8, 0)


def use_triton(tensor: torch.Tensor) -> bool:
    """Returns whether kernels can run on `tensor`: it lives on a CUDA device that runs them."""
    return tensor.is_cuda and _runs_kernels(tensor.device)


@functools.cache
def _runs_kernels(device: torch.device) -> bool:
    """Launches a tiny kernel: triton may be missing, or lack a C compiler or a folder to write to."""
    if importlib.util.find_spec("triton") is None:
        return False
    capability = torch.cuda.get_device_capability(device)
    try:
        if capability < OLDEST_CAPABILITY:
            raise RuntimeError(f"compute capability {capability[0]}.{capability[1]} is below 8.0")
        _probe_kernel[(1,)](torch.empty(1, dtype=torch.int32, device=device))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        logger.warning(f"Triton kernels do not run on {device}, plain torch does their work instead. {reason}")
        return False
    return True


def next_power_of_2(number: int) -> int:
    """Returns the smallest power of two that is not below `number` (at least 1)."""
    return 1 << max(number - 1, 0).bit_length()


class LazyKernel:
    """
    Decorator for the body of a Triton kernel: like `triton.jit`, but importing the module does not import triton.

    The body refers to `triton.language` as `tl`; that name is put into its module when the kernel is first used. It
    may call other decorated functions of its module, which cannot be launched themselves from then on. A launch goes
    to the device of the first argument, whichever is current.

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

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            with torch.cuda.device_of(args[0]):
                self.jitted[grid](*args, **kwargs)

        return launch


@LazyKernel
def _probe_kernel(OUT):
    tl.store(OUT, 1)
