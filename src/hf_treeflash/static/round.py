"""One round as a function of device tensors: no host synchronisation, no shape that depends on a value."""

import torch
from transformers import Cache

from ..attention import masked_attention
from ..candidate_generator import TreeFlashCandidateGenerator
from ..context import Context
from ..kernels import Tree, accept, build_tree
from ..logits_process import TreeLogitsProcessor
from .attention import BlockAttention, TreeAttention
from .cache import StaticTreeCache
from .sampling import choose, noise_of, without_waits
from .steps import Steps


class StaticRound:
    """The state of a batch on the device, and the round that advances it.

    Slots are columns of the caches; the anchor of a row stands at slot `lengths`. The round is repeated by
    `run`, which reads and writes only tensors that are allocated here.

    Args:
        target ([`PreTrainedModel`]):
            The model whose text is kept.
        generator ([`TreeFlashCandidateGenerator`]):
            The drafter with its knobs, and the target's embeddings.
        processor ([`TreeLogitsProcessor`]):
            The call's processors, all independent of the prefix.
        temperature (`float`):
            Of sampling; 0 takes the target's argmax.
        cache ([`DynamicCache`]):
            The target's after the prompt, for its shapes.
        batch (`int`), capacity (`int`):
            Rows, and slots per row.
        ahead (`int`):
            Rounds that are launched before the results of an earlier one are read.

    Attributes:
        longest (`int`):
            Nodes of the longest path, and tokens that a round emits at most.
        emitted (`torch.LongTensor` of shape `(batch, longest + 1)`):
            After a round: each row's new tokens, and in the last column how many there are.
        noise (`torch.FloatTensor` of shape `(batch, 2 * longest, vocab)`, *optional*):
            Where [`Noise`] keeps that of the coming draws, for sampling; half of it where no round is launched ahead.
        active (`torch.BoolTensor` of shape `(batch,)`):
            Rows still being written; the others stand still.
    """

    def __init__(
        self,
        target,
        generator: TreeFlashCandidateGenerator,
        processor: TreeLogitsProcessor,
        temperature: float,
        cache: Cache,
        batch: int,
        capacity: int,
        ahead: int,
    ):
        config, states = generator.drafter.config, cache.layers[0].keys
        self.knobs, self.processors = generator.knobs, without_waits(processor.processors)
        self.block, self.longest = config.block_size, config.num_drafted + 1
        self.device, self.capacity, self.ahead = states.device, capacity, ahead
        shapes = [(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in cache.layers]
        self.target_cache = StaticTreeCache(shapes, batch, capacity, states.dtype, self.device)
        own_shapes = [(config.num_key_value_heads, config.head_dim, config.head_dim)] * config.num_hidden_layers
        self.drafter_cache = StaticTreeCache(own_shapes, batch, capacity, generator.dtype, self.device)

        # Each in memory of its own: what is compiled writes in place only where nothing else may be meant.
        integers = [torch.zeros(batch, dtype=torch.long, device=self.device) for _ in range(7)]
        self.lengths, self.anchors, self.pending_counts = integers[:3]  # change from round to round
        self.first, self.starts, self.offsets, self.limits = integers[3:]  # of one text
        width = len(config.target_layer_ids) * config.hidden_size
        self.pending = torch.zeros(batch, self.longest, width, dtype=target.dtype, device=self.device)
        self.active = torch.zeros(batch, dtype=torch.bool, device=self.device)
        self.emitted = torch.zeros(batch, self.longest + 1, dtype=torch.long, device=self.device)
        vocab_size = target.config.get_text_config(decoder=True).vocab_size
        self.temperature, self.noise = temperature, None
        if temperature > 0:  # rounds under way may ask for the draws of so many tokens
            self.noise = torch.ones(batch, self.longest * (1 + ahead), vocab_size, device=self.device)
        self.attention = TreeAttention(target, self.starts, shapes)
        self.block_attention = BlockAttention(generator.drafter, self.starts, own_shapes)
        self.steps_uncompiled()
        self.hold(target, generator)

    def hold(self, target, generator: TreeFlashCandidateGenerator) -> None:
        """Take a call's models, which are those the round was made with."""
        self.target, self.generator, self.drafter = target, generator, generator.drafter
        self.attention.model, self.block_attention.model = target, self.drafter

    def let_go(self) -> None:
        """Hold no model between calls."""
        del self.target, self.generator, self.drafter
        self.attention.model = self.block_attention.model = None

    @property
    def state(self) -> list[torch.Tensor]:
        """What a round changes, the caches aside, which hold nothing before `lengths` that it overwrites."""
        return [self.lengths, self.anchors, self.pending_counts, self.pending, self.active, self.emitted]

    @property
    def tail(self) -> int:
        """Slots behind `lengths` that a round writes to."""
        return max(self.knobs.tree_budget, self.block + self.longest)

    @property
    def by_kernel(self) -> bool:
        """Whether the tree attention kernel runs in some pass."""
        return self.attention.by_kernel or self.block_attention.by_kernel

    @property
    def spanless(self) -> bool:
        """Whether the cost of a round does not depend on how many slots it looks at."""
        return self.attention.spanless and self.block_attention.spanless

    def without_kernel(self) -> None:
        """Give every pass masks instead of the tree attention kernel."""
        self.attention.by_kernel = self.block_attention.by_kernel = False

    def steps_uncompiled(self) -> None:
        """Run everything as it is."""
        self.steps = Steps()

    @torch.no_grad()
    def start(
        self, cache: Cache, context: Context, starts: torch.Tensor, anchors: torch.Tensor, room: torch.Tensor
    ) -> None:
        """Take a batch of prompts over after prefill.

        Args:
            cache ([`DynamicCache`]):
                The target's; it is emptied.
            context ([`Context`]):
                The target's states at the prompts.
            starts (`torch.LongTensor` of shape `(batch,)`):
                Left padding of each row.
            anchors (`torch.LongTensor` of shape `(batch,)`):
                First new tokens.
            room (`torch.LongTensor` of shape `(batch,)`):
                Tokens that each row may still grow by.
        """
        length = context.position_ids.shape[1]
        # The call's first token is the anchor, at slot `length`; the draw after it is the second, number 1.
        first = length - 1
        for own, value in ((self.lengths, length), (self.first, first), (self.pending_counts, 0), (self.active, 1)):
            own.fill_(value)
        self.starts.copy_(starts)
        self.anchors.copy_(anchors)
        self.offsets.copy_(context.position_ids[:, -1] - (length - 1))
        self.limits.copy_(length + room)
        for static in (self.target_cache, self.drafter_cache):
            static.clear()
        self.target_cache.take_over(cache, length)
        self._read_prompt(context)

    def _read_prompt(self, context: Context) -> None:
        """Fill the drafter's cache; keys and values of a context do not depend on what is seen, so masks are none."""
        positions = context.position_ids.to(self.device)
        batch, length = positions.shape
        slots = torch.arange(length + 1, device=self.device).expand(batch, -1)
        self.drafter_cache.place(slots, length + 1)
        with masked_attention(self.drafter):
            self.drafter(
                noise_embeds=self._embed(self.anchors[:, None]),
                context_hidden_states=context.hidden_states.to(self.device, self.generator.dtype),
                position_ids=torch.cat([positions, positions[:, -1:] + 1], dim=1),
                attention_mask=dict.fromkeys(self.drafter.config.layer_types),
                cache=self.drafter_cache,
            )

    @torch.no_grad()
    def run(self, span: int) -> None:
        """Draft, verify, walk and commit.

        Args:
            span (`int`):
                Slots to look at, at least `lengths + tail`.
        """
        tree = self.draft(span)
        choices, states = self.verify(tree, span)
        self.commit(tree, choices, states)

    def draft(self, span: int) -> Tree:
        """Read the states of the last path and draft the next trees."""
        slots, positions = self.steps.place_block(
            self.lengths, self.pending_counts, self.offsets, self.longest, self.block
        )
        self.drafter_cache.place(slots, span)
        with self.block_attention.chosen():
            transitions = self.steps.draft(
                self.drafter,
                self.anchors,
                self.pending.to(self.generator.dtype),
                self._embed,
                self.generator.draft_head,
                position_ids=positions,
                cache=self.drafter_cache,
                knobs=self.knobs,
                draw_noise=self.draw_noise(),
                **self.block_attention.arguments(self.lengths, span, self.generator.dtype),
            )
        tables = transitions.token_ids, transitions.log_probs, transitions.next_row
        return build_tree(*tables, self.knobs.tree_budget)

    def draw_noise(self) -> torch.Tensor | None:
        """Return what the draws at all depths add to logits, of shape `(batch, longest - 1, vocab)`."""
        if self.noise is None:
            return None
        depths = torch.arange(self.longest - 1, device=self.device)
        tokens = (self.lengths - self.first)[:, None] + depths  # (batch, depths)
        return noise_of(self.noise, tokens).log_().mul_(-self.temperature)

    def verify(self, tree: Tree, span: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the target over the trees; return its choice after every node, and its states for the drafter."""
        rows = self.anchors, self.lengths, self.limits, self.offsets, self.first
        token_ids, slots, positions, draws = self.steps.place_tree(tree.token_ids, tree.depths, *rows)
        self.target_cache.place(slots, span)
        with self.attention.chosen():
            logits, states = self.steps.verify(
                self.target,
                self.drafter.config.target_layer_ids,
                token_ids,
                positions,
                self.target_cache,
                self.attention.arguments(tree, self.lengths, span),
            )
        return choose(logits, self.processors, self.noise, draws), states

    def commit(self, tree: Tree, choices: torch.Tensor, states: torch.Tensor) -> None:
        """Walk along the choices, keep the path and its states, and say which tokens were emitted."""
        path, counts, _ = accept(tree.token_ids, tree.parents, tree.ancestor_words, tree.num_nodes, choices)
        path = path[:, : self.longest]
        self.target_cache.commit(path, counts, self.lengths)
        self.steps.follow(path, counts, choices, states, self.limits, *self.state)

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.generator.target_embed(token_ids).to(self.generator.dtype)


__all__ = ["StaticRound"]
