"""The ways to run a round that `round.py` times: each runs one from the same state again and again."""

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from transformers import DynamicCache

from hf_treeflash import candidate_generator
from hf_treeflash.attention import additive_mask
from hf_treeflash.cache import PrefixCache
from hf_treeflash.candidate_generator import TreeFlashCandidateGenerator
from hf_treeflash.compat import CACHE
from hf_treeflash.context import Context
from hf_treeflash.taps import tapped_states
from hf_treeflash.transitions import Transitions
from hf_treeflash.tree import build_tables, tree_from_tables
from hf_treeflash.verify import Verifier, walk

Stage = Callable[[str], AbstractContextManager]


class Setting(NamedTuple):
    """Where a round starts.

    Attributes:
        target, drafter:
            The pair; the drafter carries its knobs.
        context (`int`):
            Committed tokens whose keys and values the target has; the anchor is the next one.
        accepted (`int`):
            Nodes that the walk accepts, root included, and as many states the drafter has yet to read.
    """

    target: Any
    drafter: Any
    context: int
    accepted: int


class Arm:
    """A way to run a round."""

    def fallen_back(self) -> str | None:
        """Return why what ran is not what the arm is called; None if it is."""
        return None


class Vanilla(Arm):
    """A step of plain decoding: one token."""

    accepted = 1
    inner: list[tuple[Any, str, str]] = []

    def __init__(self, setting: Setting):
        self.target = setting.target
        self.cache = random_cache(self.target, setting.context)
        self.token = torch.tensor([[7]], device=self.target.device)
        self.position = torch.tensor([[setting.context]], device=self.target.device)
        self.rewind = rewinder(self.cache)

    def round(self, stage: Stage) -> None:
        with stage("verify"):
            outputs = self.target(self.token, position_ids=self.position, **{CACHE: self.cache}, logits_to_keep=1)
        with stage("walk"):
            int(outputs.logits[0, -1].argmax())


class Eager(Arm):
    """Our loop over dynamic caches, as `TreeDecoding` runs it for one row."""

    def __init__(self, setting: Setting):
        self.target, self.drafter, self.wanted = setting.target, setting.drafter, setting.accepted
        self.generator = TreeFlashCandidateGenerator(
            self.drafter, self.target.get_input_embeddings(), self.target.get_output_embeddings()
        )
        self.generator.prefix = kept_prefix(self.drafter, setting.context - setting.accepted)
        self.prefix, self.verifier = kept_prefix(self.target, setting.context), Verifier(self.target)
        self.anchor, self.states, positions = pending(setting)
        self.context = Context(self.states, positions, [setting.accepted])
        self.position = torch.tensor([setting.context], device=self.target.device)
        self.lengths = {prefix: prefix.length for prefix in (self.prefix, self.generator.prefix)}
        # Stages within the drafting call: whose method they are and what its own time belongs to.
        self.inner = [
            (self.drafter, "draft", "heads"),
            (self.drafter, "backbone", "draft"),
            (candidate_generator, "build_tree", "build"),
        ]

    def round(self, stage: Stage) -> None:
        with stage("draft"):
            self.tree = self.generator.draft_tree(self.anchor, self.context)
        with stage("verify"), tapped_states(self.target, self.drafter.config.target_layer_ids) as taps:
            outputs = self.verifier(self.tree, self.prefix, self.position, {})
        with stage("walk"):
            outputs.logits.argmax(dim=-1).tolist()  # the target's choices, if its weights meant anything
            path = walk(self.tree.children[0], follow_best(self.tree.children[0], self.wanted), never).path
        with stage("commit"):
            self.prefix.commit([path], tail=self.tree.token_ids.shape[1])
            Context.of_paths(taps.take(outputs), self.position, [path])
        self.accepted = len(path)

    def rewind(self) -> None:
        for prefix, length in self.lengths.items():
            prefix.length = length
            prefix.rollback()


class Reference(Arm):
    """A round the way the method was first published, in our own words.

    A dense additive mask, for which transformers repeats keys and values; all hidden states kept; an unfactored head
    on the anchor's row once per candidate; float32 log-softmax over all rows; a heap on the host, fed by blocking
    copies; a walk that asks the device at every node; compaction layer by layer. The drafter's layers are ours.
    """

    inner: list[tuple[Any, str, str]] = []

    def __init__(self, setting: Setting):
        self.target, self.drafter, self.wanted = setting.target, setting.drafter, setting.accepted
        self.embed, self.lm_head = self.target.get_input_embeddings(), self.target.get_output_embeddings()
        self.start, self.cache = setting.context, random_cache(self.target, setting.context)
        self.draft_cache = random_cache(self.drafter, setting.context - setting.accepted)
        self.anchor, self.states, self.positions = pending(setting)
        self.knobs = self.drafter.generation_config
        self.rewind = rewinder(self.cache, self.draft_cache)

    def round(self, stage: Stage) -> None:
        with stage("draft"):
            noise, hidden, normed = self.draft()
        with stage("heads"):
            transitions = self.heads(noise, hidden, normed)
        with stage("build"):
            tables = build_tables(transitions.rows(), self.anchor, self.knobs.tree_budget)
            self.tree = tree_from_tables(tables).to(self.anchor.device)
        with stage("verify"):
            outputs = self.verify()
        with stage("walk"):
            path = self.walk(outputs.logits)
        with stage("commit"):
            self.commit(path, outputs.hidden_states)
        self.accepted = len(path)

    def draft(self):
        slots, config = self.drafter.config.block_size, self.drafter.config
        tokens = self.anchor.new_full((1, slots), config.mask_token_id)
        tokens[:, 0] = self.anchor
        noise = self.embed(tokens)
        block = torch.arange(self.start, self.start + slots, device=noise.device)[None]
        positions = torch.cat([self.positions, block], dim=1)
        hidden = self.drafter.backbone(noise, self.states, positions, None, self.draft_cache)[:, 1:]
        return noise, hidden, self.drafter.norm(hidden)

    def heads(self, noise, hidden, normed) -> Transitions:
        rows, k, head = self.knobs.num_candidates, self.knobs.branching, self.drafter.ar_head
        shortlist = self.lm_head(normed).float().topk(rows, dim=-1).indices
        anchor = noise[:, :1, None].expand(-1, -1, rows, -1)
        previous = torch.cat([anchor, self.embed(shortlist[:, :-1])], dim=1)
        repeated = normed[:, :, None].expand(-1, -1, rows, -1)
        up, gate = head.up_gate_proj(torch.cat([head.norm(previous), repeated], dim=-1)).chunk(2, dim=-1)
        corrected = self.drafter.norm(hidden[:, :, None] + head.down_proj(F.silu(gate) * up))
        log_probs = (self.lm_head(corrected).float() / self.knobs.draft_temperature).log_softmax(dim=-1)
        top = log_probs.topk(k, dim=-1)
        matches = top.indices[:, :-1, :, :, None] == shortlist[:, :-1, None, None]
        linked = torch.where(matches.any(dim=-1), matches.int().argmax(dim=-1), -1)
        next_row = F.pad(linked, (0, 0, 0, 0, 0, 1), value=-1)
        return Transitions(top.indices, top.values, next_row)

    def verify(self):
        nodes = self.tree.token_ids.shape[1]
        prefix = torch.ones(1, nodes, self.start, dtype=torch.bool, device=self.anchor.device)
        visible = torch.cat([prefix, self.tree.ancestor_mask], dim=2)[:, None]
        return self.target(
            self.tree.token_ids,
            attention_mask=additive_mask(visible, self.target.dtype),
            position_ids=self.start + self.tree.depths,
            **{CACHE: self.cache},
            output_hidden_states=True,
        )

    def walk(self, logits: torch.Tensor) -> list[int]:
        choices, choose = logits.argmax(dim=-1)[0], follow_best(self.tree.children[0], self.wanted)

        def ask(node: int) -> int:
            choices[node].item()  # what the weights would say; the device is waited for
            return choose(node)

        return walk(self.tree.children[0], ask, never).path

    def commit(self, path: list[int], hidden_states) -> None:
        columns = torch.tensor(path, device=self.anchor.device)
        for layer in self.cache.layers:
            for name in ("keys", "values"):
                states = getattr(layer, name)
                kept = states[:, :, self.start : self.start + len(path)]
                kept.copy_(states.index_select(2, self.start + columns))
                setattr(layer, name, states[:, :, : self.start + len(path)])
        for layer in self.draft_cache.layers:
            layer.keys, layer.values = layer.keys[:, :, : self.start], layer.values[:, :, : self.start]
        torch.cat([hidden_states[i + 1] for i in self.drafter.config.target_layer_ids], dim=-1)[:, columns]


def random_cache(model, length: int) -> DynamicCache:
    """Return a cache as a pass over `length` tokens leaves it, with random contents."""
    config = model.config
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        shape = (1, config.num_key_value_heads, length, config.head_dim)
        cache.update(*torch.randn(2, *shape, dtype=model.dtype, device=model.device), layer)
    return cache


def kept_prefix(model, length: int) -> PrefixCache:
    """Return such a cache as it is between two rounds of a call."""
    prefix = PrefixCache(random_cache(model, length))
    prefix.commit([[]], tail=0)
    return prefix


def rewinder(*caches: DynamicCache) -> Callable[[], None]:
    """Return a function that takes caches back to what they hold now; passes over them write to new tensors."""
    before = [[(layer, layer.keys, layer.values) for layer in cache.layers] for cache in caches]

    def rewind() -> None:
        for layer, keys, values in itertools.chain(*before):
            layer.keys, layer.values = keys, values

    return rewind


def pending(setting: Setting) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the anchor, random states of the tokens before it that the drafter has not read, and their positions."""
    drafter, device = setting.drafter, setting.target.device
    width = len(drafter.config.target_layer_ids) * drafter.config.hidden_size
    generator = torch.Generator(device).manual_seed(0)
    states = torch.randn(1, setting.accepted, width, generator=generator, device=device).to(drafter.dtype)
    positions = torch.arange(setting.context - setting.accepted, setting.context, device=device)[None]
    return torch.tensor([7], device=device), states, positions


def follow_best(children: dict[tuple[int, int], int], accepted: int) -> Callable[[int], int]:
    """Return choices that follow every node's best child until `accepted` nodes are on the path."""
    best: dict[int, int] = {}
    for parent, token in children:  # best first
        best.setdefault(parent, token)
    steps = itertools.count(1)
    return lambda node: best.get(node, -1) if next(steps) < accepted else -1


def never(token: int) -> bool:
    """No token ends the text."""
    return False
