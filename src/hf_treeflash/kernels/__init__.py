"""
The Triton kernels of a TreeFlash round, each with its plain torch oracle.

Every function runs its kernel where the tensors are on a CUDA device and triton is installed, its oracle elsewhere.
Importing this package does not import triton.
"""

from .accept import accept, accept_reference
from .ancestor_words import dense_tree_mask, pack_ancestor_words, unpack_ancestor_words
from .build_tree import Tree, build_tree, build_tree_reference
from .compact import compact, compact_reference, pointer_table
from .head_select import head_select, head_select_reference
from .tree_attention import default_num_splits, is_tileable, tree_attention, tree_attention_reference

__all__ = [
    "Tree",
    "accept",
    "accept_reference",
    "build_tree",
    "build_tree_reference",
    "compact",
    "compact_reference",
    "default_num_splits",
    "dense_tree_mask",
    "head_select",
    "head_select_reference",
    "is_tileable",
    "pack_ancestor_words",
    "pointer_table",
    "tree_attention",
    "tree_attention_reference",
    "unpack_ancestor_words",
]
