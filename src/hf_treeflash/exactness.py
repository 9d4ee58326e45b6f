"""The exactness probe: whether a target's pass over a tree gives what its passes over one token at a time give.

Nearly every target's does. Where it does not, nothing in the config need say so, and the text would silently differ
from plain decoding's. So the first time a target is used, a tree of three nodes is compared with plain decoding's own
steps, three passes in all, before a token is emitted, and again behind each length that the config names.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from .cache import PrefixCache, recording_past
from .compat import CACHE
from .lengths import Lengths
from .memory import recall, remember
from .round_state import RoundState
from .sequences import Sequences
from .storage import StoredLayer
from .tree import DraftTree
from .verify import Verifier

logger = logging.get_logger(__name__)

# How far logits may be apart, of their spread: the largest difference in full precision, the mean one in half.
FULL, HALF = 3e-4, {torch.float16: 0.03, torch.bfloat16: 0.25}
SMALL_BUFFER = 1 << 16  # elements; larger ones are weights

SHARED_PASS = "what a token gives depends on what else is in its pass"
OTHER_PREFIX = "a node of a tree does not see just its ancestors, or does not stand where its depth says"
MOVING = "the same pass twice does not give the same: it keeps a state, or draws random numbers"


def plain_step(target, cache, input_ids: torch.Tensor, model_kwargs: dict, new_tokens: int):
    """Run the target over the newest token of each row exactly as plain decoding does.

    Args:
        target ([`PreTrainedModel`]):
            The target.
        cache ([`Cache`]):
            Of all that stands before these tokens.
        input_ids (`torch.LongTensor` of shape `(batch, length)`):
            The texts, the newest tokens included.
        model_kwargs (`dict`):
            What `generate` prepared for the prompts.
        new_tokens (`int`):
            Tokens since then, the newest included.
    """
    before = CausalLMOutputWithPast(**{CACHE: cache})
    model_kwargs = target._update_model_kwargs_for_generation(before, dict(model_kwargs), num_new_tokens=new_tokens)
    inputs = target.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **model_kwargs)
    return target(**inputs, return_dict=True)


class Exactness:
    """Says before each pass how many nodes it may have for its logits to be those of plain decoding.

    Args:
        verifier ([`Verifier`]):
            Runs the target over trees.
        model_kwargs (`dict`):
            What `generate` prepared for the prompts.
        forward_kwargs (`dict`):
            What each verify pass is given.
    """

    def __init__(self, verifier: Verifier, model_kwargs: dict, forward_kwargs: dict):
        self.probe = Probe(verifier, model_kwargs, forward_kwargs)
        self.target, self.lengths = verifier.target, Lengths.of(verifier.target)
        self.before = [(layer, dict(vars(layer))) for layer in model_kwargs[CACHE].layers]
        self.faults: dict[int, str | None] = {}  # by how many of the named lengths a root stands behind

    def start(self, state: RoundState, input_ids: torch.Tensor, logits: torch.Tensor) -> None:
        """Look at the target once the prompts are read.

        Args:
            state ([`RoundState`]):
                Of the prompts.
            input_ids (`torch.LongTensor` of shape `(batch, length)`):
                Their tokens.
            logits (`torch.Tensor` of shape `(batch, vocab)`):
                The target's at their ends.

        Raises:
            ValueError: If passes over trees give other logits than plain decoding; the cache is left as it was given.
        """
        before, self.before = self.before, []  # of a cache as it was given, which is not to be held for longer
        self.tokens = logits.topk(3, dim=-1).indices.to(input_ids.device)  # (batch, 3), likely ones
        columns, positions = input_ids.shape[1], (state.positions + 1).flatten().tolist()
        # Where a root stands, counted from its column among the ids.
        self.offsets = {0, state.prefix.length - columns, *(position - columns for position in positions)}
        if self.target.training or self._room([columns]) < 3 or self._is_border(state, columns):
            return
        behind = self._behind([columns])
        fault = self.probe.fault(state.prefix, state.positions + 1, input_ids, self.tokens, 1, behind)
        if fault is not None and behind == 0:
            for layer, fields in before:
                vars(layer).update(fields)
            raise ValueError(
                f"{type(self.target).__name__} cannot be verified over trees: {fault}. Its text beside a drafter "
                "would not be plain decoding's. Leave `assistant_model` out; `hf_treeflash.check(target, drafter)` "
                "prints what is known of the pair."
            )
        self._note(behind, fault)

    def room(self, state: RoundState, sequences: Sequences) -> int:
        """Return how many nodes the next pass may have."""
        columns = [sequences.lengths[row] - 1 for row in state.rows]
        room = self._room(columns)
        if room == 1 or self.target.training:
            return room
        behind = self._behind(columns)
        if behind not in self.faults:
            if len(sequences.lengths) > 1:  # rows that stand apart take no step of plain decoding's together
                foreign = not type(self.target).__module__.startswith("transformers.")
                self._note(behind, "this was not looked at in a batch" if foreign else None)
            elif room < 3:
                return 1
            else:
                ids, new = sequences.prefix(0), sequences.lengths[0] - sequences.prompt_length
                tokens = torch.cat([state.anchor_ids[:, None], self.tokens[:, 1:]], dim=1)  # (1, 3)
                self._note(behind, self.probe.fault(state.prefix, state.positions, ids[:, :-1], tokens, new, behind))
        return room if self.faults[behind] is None else 1

    def is_border(self, state: RoundState, sequences: Sequences) -> bool:
        """Whether the next pass is the first behind a length, where some targets read the text anew."""
        return len(sequences.lengths) == 1 and self._is_border(state, sequences.lengths[0] - 1)

    def _is_border(self, state: RoundState, column: int) -> bool:
        return any(state.prefix.length <= length <= column for length in self.lengths.named)

    def _room(self, columns: list[int]) -> int:
        return self.lengths.nodes(*(column + offset for column in columns for offset in self.offsets))

    def _behind(self, columns: list[int]) -> int:
        return self.lengths.behind(max(columns) + max(self.offsets))

    def _note(self, behind: int, fault: str | None) -> None:
        self.faults[behind] = fault
        if fault is not None:
            logger.warning_once(
                f"From here on {type(self.target).__name__} is decoded token by token, as it computes otherwise in "
                f"texts of this length: {fault}."
            )


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

    def fault(
        self,
        prefix: PrefixCache,
        positions: torch.Tensor,
        input_ids: torch.Tensor,
        tokens: torch.Tensor,
        new_tokens: int,
        behind: int,
    ) -> str | None:
        """Return what is wrong with the target's passes over trees, None if nothing is; remembered with the target.

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
            seen[key] = self._look(prefix, positions, input_ids, tokens, new_tokens)
        return seen[key]

    def key(self, behind: int) -> tuple:
        """Return what the answer may depend on: the config, the adapters in use, dtypes and the device."""
        config = self.verifier.config
        return repr(vars(config)), adapters_of(self.target), self.verifier.dtype, self.target.device, behind

    @torch.no_grad()
    def _look(self, prefix, positions, input_ids, tokens, new_tokens) -> str | None:
        tree = small_tree(tokens)
        with kept_state(self.target):
            together = self._together(tree, prefix, positions)
            alone = self._one_by_one(tree, prefix, input_ids, new_tokens)
            full = [apart(*pair) for pair in zip(together, alone, strict=True)]
            tolerance = self._tolerance(together[0])
            errors = [largest if tolerance == FULL else mean for largest, mean in full]
            if max(errors) <= tolerance:
                return None
            again = self._together(tree, prefix, positions)
        if apart(together[0], again[0])[0] > tolerance:
            why = MOVING
        else:
            why = SHARED_PASS if errors[0] > tolerance else OTHER_PREFIX
        return f"{why} (logits differ by {max(errors):.1e} of their spread, where rounding explains {tolerance:.0e})"

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
    sees = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool, device=device)
    return DraftTree(
        token_ids,
        torch.tensor([-1, 0, 0], device=device).expand(batch, -1),
        torch.tensor([0, 1, 1], device=device).expand(batch, -1),
        sees.expand(batch, -1, -1),
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


__all__ = ["Exactness", "Probe", "plain_step"]
