"""Publishing: a drafter as a Hub repository, or in the form of vLLM's speculators."""

from .export import export_drafter
from .speculators import export_speculators
from .upload import push

__all__ = ["export_drafter", "export_speculators", "push"]
