"""Lossless tree speculative decoding inside `model.generate(assistant_model=drafter)`."""

import sys
from pathlib import PurePath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .bench.check import check
    from .candidate_generator import TreeFlashCandidateGenerator
    from .configuration_treeflash import TreeFlashConfig
    from .generation import install_hook, remove_hook
    from .hub import export_drafter
    from .memory import forget
    from .modeling_treeflash import TreeFlashDraftModel
    from .tracing import trace

__version__ = "0.1.0"


def _register() -> None:
    """Make drafters known to transformers' Auto classes, hook into `generate()`, and hold the names at hand."""
    from transformers import AutoConfig, AutoModel

    from .candidate_generator import TreeFlashCandidateGenerator
    from .configuration_treeflash import TreeFlashConfig
    from .generation import install_hook, remove_hook
    from .memory import forget
    from .modeling_treeflash import TreeFlashDraftModel

    AutoConfig.register("treeflash", TreeFlashConfig, exist_ok=True)
    AutoModel.register(TreeFlashConfig, TreeFlashDraftModel, exist_ok=True)
    install_hook()
    names = TreeFlashCandidateGenerator, TreeFlashConfig, TreeFlashDraftModel, forget, install_hook, remove_hook
    globals().update({name.__name__: name for name in names})


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
    if name in __all__ and name not in globals():
        _register()
        return globals()[name]
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

# Where Python was started for the command line (as `hf-treeflash`, or by -m, which stands there while this is found),
# its help does not wait for torch: commands import what they use.
if PurePath(sys.argv[0] if sys.argv else "").stem not in ("hf-treeflash", "-m"):
    _register()
