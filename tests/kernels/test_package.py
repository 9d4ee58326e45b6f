"""The package without triton: importing it does not need or load triton, and the oracles answer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import hf_treeflash.kernels

FOLDER = Path(hf_treeflash.kernels.__file__).parent
# The package by itself: what hf_treeflash imports besides (transformers) may load triton for its own purposes.
SCRIPT = """
import sys
sys.path.insert(0, {parent!r})
if {blocked}:
    sys.modules["triton"] = None
import torch
import kernels
assert {blocked} or "triton" not in sys.modules
token_ids, log_probs = kernels.head_select(torch.randn(2, 50), 3, 1.0)
tree = kernels.build_tree(token_ids.view(1, 2, 1, 3), log_probs.view(1, 2, 1, 3), torch.zeros(1, 2, 1, 3).long(), 5)
words, zero = tree.ancestor_words, torch.zeros(1, dtype=torch.int64)
kernels.accept(tree.token_ids, tree.parents, words, tree.num_nodes, tree.token_ids)
query = torch.randn(1, 2, 5, 16)
assert kernels.tree_attention(query, query, query, words, zero, zero, 0.25, 2).shape == (1, 5, 2, 16)
assert {blocked} or "triton" not in sys.modules
for name in ("transformers", "hf_treeflash"):
    assert name not in sys.modules
"""


def run(blocked: bool) -> None:
    script = SCRIPT.format(parent=str(FOLDER.parent), blocked=blocked)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_import_does_not_load_triton():
    run(blocked=False)


def test_oracles_work_without_triton():
    run(blocked=True)
