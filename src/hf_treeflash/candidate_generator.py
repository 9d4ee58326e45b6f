"""From the target's states to a draft tree: context features, one drafting pass, the builder."""

import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig
from transformers.utils import logging

from .attention import additive_mask, without_plans
from .block_rule import block_rules, seen_by_block
from .cache import PrefixCache
from .choice import upload
from .compat import on_cpu
from .context import Context
from .draft_head import DraftHead, OutputScale, check_head, draft_embedding, home_of
from .kernel_attention import PrefixAttention, kernel_attention
from .knobs import DraftingKnobs
from .lookahead import Lookahead
from .lookup import graft
from .protocols import Drafter
from .transitions import Proposal
from .tree import WORD_BITS, DraftTree, build_tables, build_tree, tree_from_tables

logger = logging.get_logger(__name__)


class TreeFlashCandidateGenerator:
    """Drafts the trees of one `generate` call with a TreeFlash (or DFlash) drafter.

    Args:
        assistant_model ([`Drafter`]):
            The drafter, which may be PEFT-wrapped or loaded from a repository.
        main_model_input_embeddings (`nn.Module`):
            The target's input embedding, called as a module.
        main_model_output_embeddings (`nn.Module`):
            The target's output layer, called as a module.
        generation_config ([`GenerationConfig`], *optional*):
            The call's; drafting knobs in it go before the drafter's own.
        output_scale ([`OutputScale`], *optional*):
            What target and drafter do to the products of the output layer; nothing by default.
        in_step (`bool`, *optional*, defaults to `False`):
            Whether others run the target's layers at the same time, so that each draft has to call them alike.
    """

    def __init__(
        self,
        assistant_model: Drafter,
        main_model_input_embeddings: nn.Module,
        main_model_output_embeddings: nn.Module,
        generation_config: GenerationConfig | None = None,
        output_scale: OutputScale | None = None,
        in_step: bool = False,
    ):
        self.drafter = assistant_model
        self.target_embed = draft_embedding(main_model_input_embeddings, assistant_model.config)
        # Looked up once: each look-up walks all parameters.
        self.device, self.dtype = assistant_model.device, assistant_model.dtype
        self.embedding_device = home_of(self.target_embed)
        self.in_step = in_step
        self.knobs = DraftingKnobs.read(assistant_model.generation_config, generation_config)
        own_head = getattr(assistant_model, "draft_lm_head", None)  # of a reduced vocabulary
        lm_head = main_model_output_embeddings if own_head is None else own_head
        check_head(lm_head, self.knobs)
        # A drafter may keep tokens of the target alone, and take the rows of the target's layer.
        d2t = getattr(assistant_model, "d2t", None) if own_head is None else None
        self.draft_head = DraftHead(lm_head, self.knobs.draft_lm_head, output_scale, d2t)
        self.prefix = PrefixCache(DynamicCache(config=assistant_model.config))
        self.prefix.cache.activate_past_recording()
        config = assistant_model.config
        shapes = [(config.num_key_value_heads, config.head_dim, config.head_dim)] * config.num_hidden_layers
        self.by_kernel = PrefixAttention(assistant_model, shapes)
        self.sees_all = all(rule.hides_nothing for rule in block_rules(config).values())
        # To the kernel a block is a tree whose nodes all see each other.
        full, rest = divmod(config.block_size, WORD_BITS)
        words = torch.tensor([-1] * full + [(1 << rest) - 1] * (rest > 0), device=self.device)
        self.block_words = words.expand(1, config.block_size, -1)
        self.rounds = self.emitted = 0

    def draft_tree(
        self,
        anchor_ids: torch.Tensor,
        context: Context,
        permitted: list[Lookahead] | None = None,
        lookup: tuple[list[list[int]], list[list[float]]] | None = None,
        tree_budget: int | None = None,
        draw_noise: torch.Tensor | None = None,
    ) -> DraftTree:
        """Read the new context and draft the trees of one round.

        Args:
            anchor_ids (`torch.LongTensor` of shape `(batch,)`):
                Newest committed tokens, whose states the target has not computed yet.
            context ([`Context`]):
                States of the positions committed since the last call.
            permitted (`list[Lookahead]`, *optional*):
                For each row, which tokens the call's processors leave possible after a path.
            lookup (`tuple[list[list[int]], list[list[float]]]`, *optional*):
                For each row a chain of tokens to graft into its tree, and the probability of each token.
            tree_budget (`int`, *optional*):
                Nodes per tree, by default those of the knobs.
            draw_noise (`torch.FloatTensor` of shape `(batch, config.num_drafted, vocab)`, *optional*):
                What the target's draws of the coming tokens will add to its logits, see `draft`.

        Returns:
            [`DraftTree`]
        """
        budget = tree_budget or self.knobs.tree_budget
        proposal = self._propose(anchor_ids, context, budget, draw_noise)
        if permitted is None and lookup is None:
            return build_tree(proposal, anchor_ids, budget)
        tables = build_tables(proposal.rows(), anchor_ids, budget, permitted)
        if lookup is not None:
            chains, trusts = lookup
            if permitted is not None:
                chains = [row.longest(chain) for row, chain in zip(permitted, chains, strict=True)]
            tables = [graft(*row, budget) for row in zip(tables, chains, trusts, strict=True)]
        return tree_from_tables(tables)

    def _propose(
        self, anchor_ids: torch.Tensor, context: Context, budget: int, draw_noise: torch.Tensor | None
    ) -> Proposal:
        """Run the drafter, whose cache keeps the context and drops the block."""
        window = self.knobs.draft_window
        context = context if window is None else context.last(window)
        slots, length = self.drafter.config.block_size, context.hidden_states.shape[1]
        last = context.newest_positions  # (batch, 1)
        block = last + torch.arange(1, slots + 1, device=last.device)  # (batch, slots)
        seen = self._kernel_arguments(context)
        with without_plans(self.device) if seen is None else kernel_attention(self.drafter.config):
            proposal = self.drafter.draft(
                anchor_ids,
                context.hidden_states.to(self.device, self.dtype),
                self._embed,
                self.draft_head,
                position_ids=torch.cat([context.position_ids, block], dim=1).to(
                    self.device
                ),  # (batch, length + slots)
                cache=self.prefix.cache,
                knobs=self.knobs,
                draw_noise=None if draw_noise is None else draw_noise.to(self.draft_head.device),
                # On a CPU the builder runs beside the drafter, and a tree reaches about a row per two nodes. The
                # anchor's row comes on top: products of 17 rows cost a quarter more than of 16.
                on_demand=budget - 1 if on_cpu(self.device) and not self.in_step else None,
                **({"attention_mask": self._mask(context)} if seen is None else seen),
            )
        tail_valid = context.valid
        if tail_valid is not None:
            tail_valid = nn.functional.pad(tail_valid, (0, slots), value=True).to(self.device)  # as the positions
        self.prefix.commit([list(range(count)) for count in context.counts], length + slots, tail_valid)
        if window is not None:
            self.prefix.trim(window)
        return proposal

    def _kernel_arguments(self, context: Context) -> dict | None:
        """Return what a pass through the kernel is told; None where there is padding or filler before the block."""
        batch, length = context.position_ids.shape
        if context.valid is not None or not self.sees_all:
            return None
        words = self.block_words.expand(batch, -1, -1)
        return self.by_kernel.arguments(self.prefix, self.prefix.length + length, words)

    def _mask(self, context: Context) -> dict[str, torch.Tensor] | None:
        config, slots = self.drafter.config, self.drafter.config.block_size
        rules = block_rules(config)
        if context.valid is None and self.prefix.valid is None and all(rule.hides_nothing for rule in rules.values()):
            return None
        batch, length = context.position_ids.shape
        device = context.position_ids.device
        valid = torch.ones(batch, length, dtype=torch.bool, device=device) if context.valid is None else context.valid
        tail = nn.functional.pad(valid, (0, slots), value=True)  # (batch, length + slots)
        counts = upload(context.counts, device)[:, None]
        queries = counts + torch.arange(slots, device=device)  # (batch, slots), from the first token of the context
        new = torch.cat([torch.arange(length, device=device).expand(batch, -1), queries], dim=1)
        masks = {}
        for kind, rule in rules.items():
            stored = self.prefix.stored(config.layer_types.index(kind))
            earlier = torch.arange(-stored, 0, device=device).expand(batch, -1)
            present = torch.cat([self.prefix.present(stored, device).expand(batch, -1), tail], dim=1)
            seen = seen_by_block(present, queries, torch.cat([earlier, new], dim=1), rule)
            masks[kind] = additive_mask(seen.to(self.device), self.dtype)
        return masks

    def observe(self, accepted: int) -> None:
        """Note what a round brought; a drafter that never helps is reported once.

        Args:
            accepted (`int`):
                Drafted tokens that the target agreed with.
        """
        self.rounds += 1
        self.emitted += accepted + 1
        if self.rounds == 50 and self.emitted < 1.2 * self.rounds:
            logger.warning_once(
                f"The drafter hardly helps: {self.emitted / self.rounds:.2f} tokens per target pass over 50 rounds. "
                "Check that it was trained for this target, and with this chat template and thinking mode."
            )

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        embeds = self.target_embed(token_ids.to(self.embedding_device))
        return embeds.to(self.device, self.dtype)


__all__ = ["TreeFlashCandidateGenerator"]
