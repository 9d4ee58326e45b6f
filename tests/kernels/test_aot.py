"""Ahead-of-time gate: every kernel compiles for Hopper and Ampere without spills and within ceilings."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Registers per thread and bytes of shared memory per program. K1's main tile must leave room for two programs per
# multiprocessor (65536 registers, 227 KB on Hopper, 163 KB on Ampere).
CEILINGS = {
    "attention bf16 d128 g4 split": (255, 96 * 1024),
    "attention": (255, 104 * 1024),
    "merge": (128, 4096),
    "tile maxima with noise": (80, 1024),
    "tile maxima": (64, 1024),
    "select": (80, 1024),
    "build 64": (80, 1024),
    "build 256": (160, 1024),
    "accept": (64, 2048),
    "compact": (168, 1024),
    "gated delta preparation": (160, 8 * 1024),
    "gated delta, one node": (160, 8 * 1024),
    "gated delta": (255, 16 * 1024),
    "add path": (168, 1024),
}


def has_assembler() -> bool:
    """Whether the triton wheel carries NVIDIA's tools, found out without importing triton."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return False
    tools = Path(spec.origin).parent / "backends" / "nvidia" / "bin"
    return (tools / "ptxas").exists() and (tools / "cuobjdump").exists()


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[int, dict[str, dict]]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if not has_assembler():
        pytest.skip("the triton wheel carries no ptxas or cuobjdump for this platform")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, str(Path(__file__).with_name("aot.py")), "90", "80"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[int, dict[str, dict]] = {90: {}, 80: {}}
    for line in run.stdout.splitlines():
        report = json.loads(line)
        found[report["capability"]][report["name"]] = report
    return found


@pytest.mark.parametrize("capability", [90, 80])
def test_no_spills_and_within_ceilings(reports, capability):
    assert len(reports[capability]) >= 30
    for name, report in reports[capability].items():
        registers, shared = next(limits for prefix, limits in CEILINGS.items() if name.startswith(prefix))
        assert report["stack"] == 0, (name, report)
        assert 0 < report["registers"] <= registers, (name, report)
        assert report["shared"] <= shared, (name, report)


def test_hopper_attention_uses_warp_group_matrix_instructions(reports):
    names = "d128 g4 split 1", "d128 g4 split 8", "d128 g4 split 8, merged", "d64 g2 split 4"
    for name in (f"attention bf16 {shape}" for shape in names):
        assert reports[90][name]["wgmma"], name


def test_ampere_attention_uses_matrix_instructions(reports):
    assert reports[80]["attention bf16 d128 g4 split 8"]["mma"]
