"""The ways to decode that are compared: plain generate, what transformers has, and every way of drafting here."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import CompileConfig

from ..knobs import KNOB_DEFAULTS
from .pairs import with_knobs, without_head

LOOKED_UP = 10  # tokens that prompt lookup drafts, transformers' own habit


@dataclass(frozen=True)
class Arm:
    """One way to decode.

    Args:
        name (`str`):
            How tables call it.
        drafter ([`PreTrainedModel`], *optional*):
            What drafts, with its knobs; None for plain `generate`.
        options (`dict`, *optional*):
            Further arguments of `generate`.
        around (`Callable`, *optional*):
            Makes the context in which it decodes.
        method (`str`, *optional*):
            What plots draw in one line over the budgets; the name by default.
    """

    name: str
    drafter: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    around: Callable[[], AbstractContextManager] = nullcontext
    method: str | None = None

    @property
    def is_static(self) -> bool:
        """Whether it decodes over static caches, where passes may be replayed without a call that could be counted."""
        return self.options.get("cache_implementation") == "static"

    @property
    def is_ours(self) -> bool:
        """Whether this package decodes it, and promises plain decoding's text."""
        return self.drafter is not None and "speculation_type" not in self.options

    @property
    def is_plain(self) -> bool:
        """Whether it decodes token by token."""
        return self.drafter is None and "prompt_lookup_num_tokens" not in self.options

    @property
    def knobs(self) -> dict[str, Any]:
        """The drafting knobs this arm runs with; none where this package does not draft."""
        return {knob: getattr(self.drafter.generation_config, knob) for knob in KNOB_DEFAULTS} if self.is_ours else {}


def plain_compiled() -> Arm:
    """Return plain decoding over static caches, compiled on every device."""
    config = CompileConfig()
    config._compile_all_devices = True  # else transformers compiles on accelerators only
    return Arm("plain, compiled", options={"cache_implementation": "static", "compile_config": config})


def prompt_lookup() -> Arm:
    """Return transformers' own drafting from what the text has said."""
    return Arm("prompt lookup", options={"prompt_lookup_num_tokens": LOOKED_UP})


def chain(drafter) -> Arm:
    """Return transformers' own decoding with a block drafter: one chain of the likeliest tokens."""
    return Arm("chain", drafter, {"speculation_type": "dflash"})


def our_chain(drafter) -> Arm:
    """Return a tree with a single branch, each token conditioned on the one before it where there is a head."""
    view = with_knobs(drafter, tree_budget=drafter.config.num_drafted + 1, num_candidates=1, branching=1)
    return Arm("our chain", view)


def marginal_arm(drafter, **knobs) -> Arm:
    """Return a tree from the drafter's marginals, without its head."""
    view = with_knobs(without_head(drafter), **knobs)
    return Arm(f"marginal tree B{view.generation_config.tree_budget}", view, method="marginal tree")


def tree_arm(drafter, **knobs) -> Arm:
    """Return the TreeFlash tree at some knobs, named after budget and candidates."""
    view = with_knobs(drafter, **knobs)
    config = view.generation_config
    candidates = f"M{config.num_candidates}"
    return Arm(f"TreeFlash tree B{config.tree_budget} {candidates}", view, method=f"TreeFlash tree {candidates}")


def with_lookup(arm: Arm) -> Arm:
    """Return an arm whose trees are also grafted with what the text has said before."""
    return replace(arm, name=f"{arm.name}, lookup", options={**arm.options, **prompt_lookup().options})


def standard_arms(drafter, **knobs) -> list[Arm]:
    """Return plain decoding, the chain, the marginal tree and, for a drafter with a head, the TreeFlash tree.

    Args:
        drafter ([`TreeFlashDraftModel`]):
            The drafter; it is not changed, the arms hold views that share its weights.
        knobs:
            Drafting knobs of the trees; the drafter's own by default.
    """
    arms = [Arm("plain"), chain(drafter), marginal_arm(drafter, **knobs)]
    return arms if drafter.config.ar_head is None else [*arms, tree_arm(drafter, **knobs)]


def all_arms(
    drafter, tree_budgets: Sequence[int | str], num_candidates: Sequence[int], compiled: bool = False
) -> list[Arm]:
    """Return every way to decode: both opponents, both chains, and trees of each budget and number of candidates.

    Args:
        drafter ([`TreeFlashDraftModel`]):
            The drafter; it is not changed.
        tree_budgets (`Sequence[int | str]`):
            Nodes per pass, or `"auto"`.
        num_candidates (`Sequence[int]`):
            Previous tokens per slot, for TreeFlash trees.
        compiled (`bool`, *optional*, defaults to `False`):
            Whether plain decoding comes compiled, too, and trees over static caches.
    """
    arms = [Arm("plain"), prompt_lookup(), chain(drafter), our_chain(drafter)]
    trees = [marginal_arm(drafter, tree_budget=budget) for budget in tree_budgets]
    if drafter.config.ar_head is not None:
        trees += [
            tree_arm(drafter, tree_budget=budget, num_candidates=candidates)
            for budget in tree_budgets
            for candidates in num_candidates
        ]
    if not compiled:
        return [*arms, *trees]
    config = plain_compiled().options
    static = [
        Arm(f"{arm.name}, compiled", arm.drafter, config, method=f"{arm.method}, compiled")
        for arm in trees
        if arm.knobs["tree_budget"] != "auto"  # a budget that changes is not recorded
    ]
    return [arms[0], plain_compiled(), *arms[1:], *trees, *static]


__all__ = [
    "Arm",
    "all_arms",
    "chain",
    "marginal_arm",
    "our_chain",
    "plain_compiled",
    "prompt_lookup",
    "standard_arms",
    "tree_arm",
    "with_lookup",
]
