"""What an installation has, and what stands in for what it lacks."""

import importlib.metadata
import logging
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from ..compat import kernels

NEEDED = ("hf-treeflash", "torch", "transformers", "accelerate", "huggingface-hub", "safetensors")
# Optional packages, and what is done without them.
OPTIONAL = {
    "triton": "kernels run as plain torch",
    "typer": "no command line",
    "rich": "no command line",
    "peft": "no LoRA",
    "datasets": "chats from .jsonl files only",
    "matplotlib": "cards without a plot",
}
FLOAT8_SINCE = (8, 9)  # compute capability of the first devices with matrix units for eight bits


class Fact(NamedTuple):
    """Something about an installation: what, what was found, and what that means where something is amiss."""

    what: str
    found: str
    meaning: str = ""


def surroundings() -> list[Fact]:
    """Return versions, devices, kernels, and what falls back and why."""
    facts = [Fact("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    facts += [Fact(name, version(name) or "not installed") for name in NEEDED]
    facts += [
        Fact(name, found) if (found := version(name)) else Fact(name, "not installed", without)
        for name, without in OPTIONAL.items()
    ]
    return [*facts, *devices(), kernels_here(), static_caches(), float8()]


def version(package: str) -> str | None:
    """Return the version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices() -> Iterator[Fact]:
    """Yield the devices that models can run on."""
    yield Fact("cpu", f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        found = f"{card.name}, {card.total_memory / 2**30:.0f} GiB, compute capability {card.major}.{card.minor}"
        yield Fact(f"cuda:{index}", found)
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        yield Fact("cuda", "none", "no driver or no card" if built else "this torch was built without CUDA")


def kernels_here() -> Fact:
    """Say whether the Triton kernels run."""
    if not torch.cuda.is_available():
        return Fact("Triton kernels", "no", "they need a CUDA device; plain torch does their work")
    with warnings_of("hf_treeflash.kernels._launch") as said:
        runs = kernels is not None and kernels.use_triton(torch.empty(1, device="cuda"))
    return Fact("Triton kernels", "yes") if runs else Fact("Triton kernels", "no", " ".join(said) or "no triton")


def static_caches() -> Fact:
    """Say what `cache_implementation="static"` does here."""
    if torch.cuda.is_available():
        return Fact("static caches", "compiled models, rounds replayed as CUDA graphs")
    return Fact("static caches", "yes, uncompiled", "compiled with a compile_config; graphs need a CUDA device")


def float8() -> Fact:
    """Say whether `draft_lm_head="float8"` pays here."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= FLOAT8_SINCE:
        return Fact("float8 output layer", "on matrix units")
    return Fact("float8 output layer", "emulated in float32", "right, but slow: leave draft_lm_head out")


@contextmanager
def warnings_of(name: str) -> Iterator[list[str]]:
    """Collect what a logger of ours says, instead of printing it.

    Args:
        name (`str`):
            Of the logger.
    """
    logger, said = logging.getLogger(name), list[str]()

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler, propagates = Collector(), logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


__all__ = ["Fact", "surroundings", "warnings_of"]
