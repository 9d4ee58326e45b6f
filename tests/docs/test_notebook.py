"""The notebook runs from top to bottom, offline."""

import json
import os
import sys

import pytest

from tests.docs.blocks import ROOT

NOTEBOOK = ROOT / "examples" / "tour.ipynb"


def test_it_is_kept_without_outputs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in cells)


def test_it_runs(tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="nbclient runs the notebook: pip install nbclient ipykernel")
    nbclient = pytest.importorskip("nbclient", reason="nbclient runs the notebook: pip install nbclient ipykernel")
    pytest.importorskip("ipykernel", reason="nbclient runs the notebook: pip install nbclient ipykernel")
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
    }  # threads of several processes on few cores wait for each other
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    manager = AsyncKernelManager()  # this very Python, whatever kernels are installed
    manager._kernel_spec = KernelSpec(argv=command, display_name="here", language="python", env=environment)
    client = nbclient.NotebookClient(
        notebook, km=manager, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    printed = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not any(output.output_type == "error" for output in printed)
    assert any("image/svg+xml" in output.get("data", {}) for output in printed)
