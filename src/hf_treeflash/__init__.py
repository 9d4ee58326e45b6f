"""Lossless tree speculative decoding inside `model.generate(assistant_model=drafter)`."""

from transformers import AutoConfig, AutoModel

from .candidate_generator import TreeFlashCandidateGenerator
from .configuration_treeflash import TreeFlashConfig
from .generation import install_hook, remove_hook
from .memory import forget
from .modeling_treeflash import TreeFlashDraftModel

__version__ = "0.1.0"

AutoConfig.register("treeflash", TreeFlashConfig, exist_ok=True)
AutoModel.register(TreeFlashConfig, TreeFlashDraftModel, exist_ok=True)
install_hook()


def __getattr__(name: str):
    if name == "export_drafter":  # publishing and measuring load with their first use
        from .hub import export_drafter

        return export_drafter
    if name == "check":
        from .bench.check import check

        return check
    if name == "trace":
        from .tracing import trace

        return trace
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, and what every module has."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


__all__ = [
    "TreeFlashCandidateGenerator",
    "TreeFlashConfig",
    "TreeFlashDraftModel",
    "check",
    "export_drafter",
    "forget",
    "install_hook",
    "remove_hook",
    "trace",
]
