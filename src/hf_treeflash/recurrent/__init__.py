"""
Trees over recurrent layers: gated delta rule, Kimi's delta attention, Mamba-2, Mamba-1 and short convolutions.

One pass gives every node the output it would have at the end of its own path, from the one stored state and without a
state per node; what the nodes would add to the state waits until a path of them is accepted.
"""

from .mixers import check_going_on, check_mixers, install
from .tree_pass import tree_in_force

__all__ = ["check_going_on", "check_mixers", "install", "tree_in_force"]
