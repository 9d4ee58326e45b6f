"""
The Triton kernels of a TreeFlash round, each with its plain torch oracle.

Every function runs its kernel where the tensors are on a CUDA device and triton is installed, its oracle elsewhere.
Importing this package does not import triton.
"""

from ._launch import use_triton
from .accept import accept, accept_reference
from .add_path import add_path, add_path_reference
from .ancestor_words import dense_tree_mask, pack_ancestor_words, unpack_ancestor_words
from .build_tree import Tree, build_tree, build_tree_reference
from .compact import compact, compact_reference, pointer_table
from .gated_delta import GatedDelta, gated_delta, gated_delta_reference, path_decays
from .head_select import head_select, head_select_reference
from .tree_attention import (
    default_num_splits,
    is_tileable,
    new_arrivals,
    tree_attention,
    tree_attention_reference,
)

__all__ = [
    "GatedDelta",
    "Tree",
    "accept",
    "accept_reference",
    "add_path",
    "add_path_reference",
    "build_tree",
    "build_tree_reference",
    "compact",
    "compact_reference",
    "default_num_splits",
    "dense_tree_mask",
    "gated_delta",
    "gated_delta_reference",
    "head_select",
    "head_select_reference",
    "is_tileable",
    "new_arrivals",
    "pack_ancestor_words",
    "path_decays",
    "pointer_table",
    "tree_attention",
    "tree_attention_reference",
    "unpack_ancestor_words",
    "use_triton",
]
