"""Runs the kernels on a CUDA device where there is one, in Triton's interpreter otherwise."""

from __future__ import annotations

import importlib
import importlib.util

import pytest
import torch

KERNEL_MODULES = ("tree_attention", "head_select", "build_tree", "accept", "compact", "gated_delta", "add_path")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")


def kernel_module(name: str):
    """The module of a kernel. The package rebinds its name to the function, so `import ... as` would not do."""
    return importlib.import_module(f"hf_treeflash.kernels.{name}")


@pytest.fixture(scope="package")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def triton_kernels(device: str):
    """Makes the public functions launch their kernels wherever the tensors are."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if device == "cuda":
        yield
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        # Whoever imported triton before us did it without the interpreter: its own functions are compiled ones then.
        for module in (tl, tl.core, tl.standard):
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    patch.setattr(module, name, InterpretedFunction(value.fn))
        for name in KERNEL_MODULES:
            patch.setattr(kernel_module(name), "use_triton", lambda tensor: True)
        yield
