"""A look at a target: whether its pass over a tree gives what plain decoding's steps give."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from transformers.cache_utils import DynamicLayer

from .cache import PrefixCache, recording_past
from .memory import recall, remember
from .plain import plain_step
from .storage import StoredLayer
from .tree import DraftTree
from .verify import Verifier

# How far logits may be apart, of their spread: the largest difference in full precision, the mean one in half.
FULL, HALF = 3e-4, {torch.float16: 0.03, torch.bfloat16: 0.25}
LOOKS = 2  # at a target in one state: three passes each, one more where the first finds a fault
SMALL_BUFFER = 1 << 16  # elements; larger ones are weights

SHARED_PASS = "what a token gives depends on what else is in its pass"
OTHER_PREFIX = "a node of a tree does not see just its ancestors, or does not stand where its depth says"
MOVING = "the same pass twice does not give the same: it keeps a state, or draws random numbers"


class Look(NamedTuple):
    """What a look at a target showed.

    Attributes:
        apart (`float`), tolerance (`float`):
            How far logits of the two ways differ, and how far rounding explains, in shares of the logits' spread.
        fault (`str`, *optional*):
            What is wrong, in words; None if nothing is.
    """

    apart: float
    tolerance: float
    fault: str | None


UNSEEN = Look(float("nan"), float("nan"), "its config names more lengths than are looked behind")


class Probe:
    """Compares a target's passes over a tree with plain decoding's steps.

    Args:
        verifier ([`Verifier`]):
            Runs the target over trees.
        model_kwargs (`dict`):
            What `generate` prepared for the prompts.
        forward_kwargs (`dict`):
            What each verify pass is given.
    """

    def __init__(self, verifier: Verifier, model_kwargs: dict, forward_kwargs: dict):
        self.target, self.verifier = verifier.target, verifier
        self.model_kwargs, self.forward_kwargs = model_kwargs, forward_kwargs

    def __call__(
        self,
        prefix: PrefixCache,
        positions: torch.Tensor,
        input_ids: torch.Tensor,
        tokens: torch.Tensor,
        new_tokens: int,
        behind: int,
    ) -> Look:
        """Compare the target's pass over a small tree with its steps; what is seen is remembered with the target.

        Args:
            prefix ([`PrefixCache`]):
                Of all that stands before the root.
            positions (`torch.LongTensor` of shape `(..., batch)`):
                The root's.
            input_ids (`torch.LongTensor` of shape `(batch, length)`):
                The texts before the root.
            tokens (`torch.LongTensor` of shape `(batch, 3)`):
                A root and two children for each row.
            new_tokens (`int`):
                How many of the texts' tokens are new, the root included.
            behind (`int`):
                How many of the lengths that the config names the root stands behind.
        """
        seen = recall("exactness", self.target)
        if seen is None:
            seen = {}
            remember("exactness", seen, self.target)
        key = self.key(behind)
        if key not in seen:
            before = [look for other, look in seen.items() if other[:-1] == key[:-1]]
            if len(before) >= LOOKS:
                return UNSEEN
            if behind and (first := seen.get((*key[:-1], 0))) is not None and first.fault is not None:
                return first
            seen[key] = self._look(prefix, positions, input_ids, tokens, new_tokens, again=not (behind or before))
        return seen[key]

    def key(self, behind: int) -> tuple:
        """Return what the answer may depend on: the config, the adapters in use, dtypes and the device."""
        config = self.verifier.config
        return repr(vars(config)), adapters_of(self.target), self.verifier.dtype, self.target.device, behind

    @torch.no_grad()
    def _look(self, prefix, positions, input_ids, tokens, new_tokens, again: bool) -> Look:
        tree = small_tree(tokens)
        with kept_state(self.target):
            together = self._together(tree, prefix, positions)
            alone = self._one_by_one(tree, prefix, input_ids, new_tokens)
            full = [apart(*pair) for pair in zip(together, alone, strict=True)]
            tolerance = self._tolerance(together[0])
            errors = [largest if tolerance == FULL else mean for largest, mean in full]
            if max(errors) <= tolerance:
                return Look(max(errors), tolerance, None)
            repeated = self._together(tree, prefix, positions) if again else together
        if apart(together[0], repeated[0])[0] > tolerance:
            why = MOVING
        else:
            why = SHARED_PASS if errors[0] > tolerance else OTHER_PREFIX
        why += f" (logits differ by {max(errors):.1e} of their spread, where rounding explains {tolerance:.0e})"
        return Look(max(errors), tolerance, why)

    def _together(self, tree: DraftTree, prefix: PrefixCache, positions: torch.Tensor) -> list[torch.Tensor]:
        """Return the logits of the root and its second child from one pass."""
        try:
            with recording_past(prefix.cache):
                logits = self.verifier(tree, prefix, positions, self.forward_kwargs).logits  # (batch, 3, vocab)
        finally:
            prefix.rollback()
        return [logits[:, 0], logits[:, 2]]

    def _one_by_one(self, tree: DraftTree, prefix: PrefixCache, input_ids, new_tokens: int) -> list[torch.Tensor]:
        """Return the same from two steps of plain decoding."""
        cache, logits = borrowed(prefix.cache), []
        try:
            for step, node in enumerate((0, 2)):
                input_ids = torch.cat([input_ids, tree.token_ids[:, node : node + 1]], dim=1)  # (batch, length + 1)
                outputs = plain_step(self.target, cache, input_ids, self.model_kwargs, new_tokens + step)
                logits.append(outputs.logits[:, -1])
        finally:
            prefix.rollback()
        return logits

    def _tolerance(self, logits: torch.Tensor) -> float:
        dtypes = {parameter.dtype for parameter in self.target.parameters()} | {logits.dtype}
        if getattr(self.target, "hf_quantizer", None) is not None or min(dtype.itemsize for dtype in dtypes) == 1:
            return max(HALF.values())
        if logits.is_cuda and torch.backends.cuda.matmul.allow_tf32:
            dtypes.add(torch.float16)  # the same number of digits
        return max(HALF.get(dtype, FULL) for dtype in dtypes)


def small_tree(token_ids: torch.Tensor) -> DraftTree:
    """Return a root with two children for each row.

    Args:
        token_ids (`torch.LongTensor` of shape `(batch, 3)`):
            The root's token, and its children's.
    """
    batch, device = len(token_ids), token_ids.device
    words = torch.tensor([[0b001], [0b011], [0b101]], device=device)  # each node sees the root and itself
    return DraftTree(
        token_ids,
        torch.tensor([-1, 0, 0], device=device).expand(batch, -1),
        torch.tensor([0, 1, 1], device=device).expand(batch, -1),
        words.expand(batch, -1, -1),
        torch.zeros(batch, 3, device=device),
    )


def apart(one: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """Return how far logits are apart, of their spread: the largest difference and the mean (root of squares).

    Args:
        one, other (`torch.Tensor` of shape `(batch, vocab)`):
            The rows are compared; what is no number in both is equal.
    """
    one, other = one.double(), other.to(one.device).double()
    both = one.isfinite() & other.isfinite()
    if not torch.equal(one.isfinite(), other.isfinite()):
        return float("inf"), float("inf")
    if not both.any():
        return 0.0, 0.0
    spread = other[both].std().clamp(min=1e-12)
    difference = (one - other)[both] / spread
    return float(difference.abs().max()), float(difference.square().mean().sqrt())


def borrowed(cache):
    """Return a cache that plain decoding may go on with: only what it would trim is a copy."""
    other = copy.copy(cache)
    in_place = DynamicLayer, StoredLayer
    other.layers = [layer if type(layer) in in_place else copy.deepcopy(layer) for layer in cache.layers]
    for layer in other.layers:
        if hasattr(layer, "record_past"):
            layer.record_past = False
    return other


def adapters_of(target) -> tuple:
    """Return which adapters a target runs with, layer by layer where they differ."""
    if not hasattr(target, "peft_config"):
        return ()
    layers = [module for module in target.modules() if hasattr(module, "merged_adapters")]
    states = {(*layer.active_adapters, layer.disable_adapters, *layer.merged_adapters) for layer in layers}
    return tuple(sorted(map(repr, states)))


@contextmanager
def kept_state(model) -> Iterator[None]:
    """Put back what passes change on a model's modules, and the random numbers they draw."""
    random = torch.get_rng_state()
    fields = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if buffer.numel() <= SMALL_BUFFER]
    try:
        yield
    finally:
        for module, attributes, named in fields:
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(named)
        for buffer, value in buffers:
            buffer.copy_(value)
        if not torch.equal(random, torch.get_rng_state()):
            torch.set_rng_state(random)


__all__ = ["Look", "Probe"]
