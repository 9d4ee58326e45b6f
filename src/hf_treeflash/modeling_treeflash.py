"""The TreeFlash drafter: a DFlash backbone, a head that conditions each token on the one before it, and one draft."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, GenerationConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast

from .ar_head import ARHead, Slots
from .backbone import RMSNorm, TreeFlashDecoderLayer, layer_masks
from .block_convolution import BlockConvolution
from .compat import CACHE
from .configuration_treeflash import TreeFlashConfig
from .draft_vocabulary import kept_tokens, offsets
from .knobs import DEFAULT_KNOBS, KNOB_DEFAULTS, DraftingKnobs
from .layouts import PASSED_OVER
from .markov_head import MarkovHead, SelectorHead
from .rotary import rotary_embedding, rotations
from .transitions import HeadRows, Transitions, top_log_probs


@dataclass
class TreeFlashOutput(BaseModelOutputWithPast):
    """Output of [`TreeFlashDraftModel`].

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch, block_size, hidden_size)`):
            Normed states; the target's output layer turns them into the marginal distributions.
        corrected_hidden_state (`torch.FloatTensor` of shape `(batch, block_size, size)`, *optional*):
            What the head's `logits` reads, given the previous tokens that were passed in: normed states, corrected
            for them or with their codes behind.
    """

    corrected_hidden_state: torch.Tensor | None = None


class TreeFlashPreTrainedModel(PreTrainedModel):
    config: TreeFlashConfig
    config_class = TreeFlashConfig
    base_model_prefix = "model"
    main_input_name = "noise_embeds"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TreeFlashDecoderLayer"]
    # What files may carry that no drafter reads.
    _keys_to_ignore_on_load_unexpected = [rf"(^|\.){re.escape(name)}$" for name in PASSED_OVER]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def _init_weights(self, module):
        super()._init_weights(module)
        if getattr(module, "_zero_init", False):
            init.zeros_(module.weight)
        if isinstance(module, BlockConvolution):  # at first it changes nothing
            kernel = torch.zeros_like(module.base_kernel)
            kernel[:, 0] = 1.0
            init.copy_(module.base_kernel, kernel)


HEADS: dict[str, type[nn.Module]] = {"swiglu": ARHead, "markov": MarkovHead, "selector": SelectorHead}


class TreeFlashDraftModel(TreeFlashPreTrainedModel):
    """A drafter for `target.generate(assistant_model=drafter)`.

    It shares the target's embeddings and output layer, so it holds neither. `forward` follows the contract of
    transformers' own DFlash drafters; [`~TreeFlashDraftModel.draft`] adds the transitions a draft tree is built from.

    Args:
        config ([`TreeFlashConfig`]):
            Shape of the drafter.

    Source: TreeFlash (arXiv 2606.03819) on a DFlash backbone (arXiv 2602.06036).
    """

    def __init__(self, config: TreeFlashConfig):
        super().__init__(config)
        self.fc = nn.Linear(len(config.target_layer_ids or []) * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList(TreeFlashDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = rotary_embedding(config)
        self.ar_head: Any = None if config.ar_head is None else HEADS[config.ar_head](config)
        if config.draft_vocab_size is not None:
            if not config.tie_draft_head:
                self.draft_lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long))
        self.gradient_checkpointing = False
        self.generation_config = GenerationConfig(**KNOB_DEFAULTS)
        self.post_init()

    def forward(
        self,
        noise_embeds: torch.Tensor,
        context_hidden_states: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        cache: Cache | None = None,
        previous_embeds: torch.Tensor | None = None,
        previous_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> TreeFlashOutput:
        """Run one drafting pass.

        Args:
            noise_embeds (`torch.Tensor` of shape `(batch, slots, hidden_size)`):
                Target embeddings of the anchor and of the mask token; any number of blocks when training.
            context_hidden_states (`torch.Tensor` of shape `(batch, context, taps * hidden_size)`):
                Target states at `config.target_layer_ids`, concatenated, for the newly committed positions.
            position_ids (`torch.LongTensor` of shape `(batch, context + slots)`, *optional*):
                Absolute positions, context first.
            attention_mask (`torch.Tensor` or `dict[str, torch.Tensor]`, *optional*):
                2D padding mask over cached context, new context and slots, or 4D masks (boolean or additive) of
                shape `(batch, 1, slots, keys)`, one for all layers or one per layer type. None: everything is seen.
            cache ([`Cache`], *optional*):
                Keys and values of earlier context. The caller drops the block's again. Before transformers 5.24 its
                own chain calls it `past_key_values`.
            previous_embeds (`torch.Tensor` of shape `(batch, slots, hidden_size)`, *optional*):
                Target embeddings of the token before each slot; asks for `corrected_hidden_state` (training).
            previous_ids (`torch.LongTensor` of shape `(batch, slots)`, *optional*):
                The tokens themselves instead, for heads that hold vectors of their own for them.

        Returns:
            [`TreeFlashOutput`]
        """
        cache = past_key_values if cache is None else cache
        hidden_states = self.backbone(
            noise_embeds, context_hidden_states, position_ids, attention_mask, cache, **kwargs
        )
        normed = self.norm(hidden_states)
        corrected = None
        if previous_embeds is not None or previous_ids is not None:
            if self.ar_head is None:
                raise ValueError("This drafter has no AR head; set `config.ar_head='swiglu'` to give it one.")
            if previous_embeds is None:
                previous_embeds = self.ar_head.previous(previous_ids)
            corrected = self.ar_head.states(self.norm, hidden_states, normed, previous_embeds)
        return TreeFlashOutput(last_hidden_state=normed, corrected_hidden_state=corrected, **{CACHE: cache})

    def backbone(
        self, noise_embeds, context_hidden_states, position_ids, attention_mask, cache, **kwargs
    ) -> torch.Tensor:
        """Return the block's states before the final norm; arguments as in `forward`."""
        context = self.hidden_norm(self.fc(context_hidden_states))
        if position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            length = context.shape[1] + noise_embeds.shape[1]
            position_ids = torch.arange(past, past + length, device=noise_embeds.device)[None]
        masks = layer_masks(self.config, attention_mask, noise_embeds, cache)
        rotation = rotations(self.rotary_emb, self.config.layer_types or (), noise_embeds, position_ids)
        hidden_states = noise_embeds
        for kind, layer in zip(self.config.layer_types or [], self.layers, strict=True):
            hidden_states = layer(
                hidden_states,
                context,
                position_embeddings=rotation[kind],
                attention_mask=masks[kind],
                cache=cache,
                **kwargs,
            )
        return hidden_states

    def target_ids(self, columns: torch.Tensor) -> torch.Tensor:
        """Return the target's tokens behind columns of the output layer; the same unless the vocabulary is reduced."""
        return columns if self.config.draft_vocab_size is None else columns + self.d2t.to(columns.device)[columns]

    def set_draft_vocabulary(self, token_ids: torch.Tensor | None) -> None:
        """Draft only some of the target's tokens, which costs a fraction of two passes over its output layer.

        The text stays the target's; tokens that are left out are never drafted. The choice is saved with the drafter.

        Args:
            token_ids (`torch.LongTensor` of shape `(draft_vocab_size,)`, *optional*):
                The tokens, such as [`~training.frequent_tokens`] of the target's responses. None: all tokens again.

        Raises:
            ValueError: If the drafter has an output layer of its own, or the tokens are no vocabulary.
        """
        if hasattr(self, "draft_lm_head"):
            raise ValueError(
                f"This drafter was trained with an output layer of its own for {self.config.draft_vocab_size} tokens; "
                "it cannot draft others."
            )
        d2t = None if token_ids is None else offsets(token_ids, self.config.vocab_size).to(self.device)
        if hasattr(self.ar_head, "following"):
            raise ValueError(
                f"The head of this drafter (`ar_head={self.config.ar_head!r}`) has a vector of its own for each token "
                "that it was trained to draft; it cannot draft others."
            )
        self.register_buffer("d2t", d2t)
        self.config.draft_vocab_size = None if d2t is None else len(d2t)
        self.config.tie_draft_head = d2t is not None

    @torch.no_grad()
    def draft(
        self,
        anchor_ids: torch.Tensor,
        context_hidden_states: torch.Tensor,
        embed: Callable[[torch.Tensor], torch.Tensor],
        lm_head: Callable[[torch.Tensor], torch.Tensor],
        *,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        cache: Cache | None = None,
        knobs: DraftingKnobs = DEFAULT_KNOBS,
        draw_noise: torch.Tensor | None = None,
        on_demand: int | None = None,
        **kwargs,
    ) -> Transitions | HeadRows:
        """Draft one block: the most likely next tokens after every candidate, at every depth, in one pass.

        Args:
            anchor_ids (`torch.LongTensor` of shape `(batch,)`):
                Newest committed tokens.
            context_hidden_states (`torch.Tensor` of shape `(batch, context, taps * hidden_size)`):
                See `forward`, like `position_ids`, `attention_mask` and `cache`.
            embed, lm_head (`Callable`):
                The target's input embedding, and the output layer of the tokens that may be drafted ([`DraftHead`]).
            knobs ([`DraftingKnobs`], *optional*):
                How many candidates and next tokens to consider, and how.
            draw_noise (`torch.FloatTensor` of shape `(batch, config.num_drafted, vocab)`, *optional*):
                What the target's draw of each token will add to its logits: Gumbel noise times the temperature of the
                call. Candidates and next tokens are ranked by `(logits + draw_noise) / draft_temperature`.
            on_demand (`int`, *optional*):
                Compute only about this many rows of the head now and the others when they are asked for; pays where
                the tree is built on the host beside the drafter.
            kwargs:
                What the drafter's attention takes besides.

        Returns:
            [`Transitions`] with `config.num_drafted` depths, or [`HeadRows`] on demand (with a head only).

        Source: stages 1 and 2 of arXiv 2606.03819.
        """
        temperature, branching = knobs.draft_temperature, knobs.branching
        if draw_noise is not None and self.config.draft_vocab_size is not None:
            draw_noise = draw_noise[..., kept_tokens(self.d2t).to(draw_noise.device)]
        masks = anchor_ids.new_full((anchor_ids.shape[0], self.config.block_size - 1), self.config.mask_token_id)
        noise_embeds = embed(torch.cat([anchor_ids[:, None], masks], dim=1))  # (batch, slots, hidden_size)
        hidden = self.backbone(noise_embeds, context_hidden_states, position_ids, attention_mask, cache, **kwargs)
        hidden = hidden[:, self.config.first_slot :]  # (batch, depth, hidden_size)
        normed = self.norm(hidden)
        if self.ar_head is None:
            marginal = Transitions.marginal(lm_head(normed), branching, temperature, draw_noise)
            return marginal._replace(token_ids=self.target_ids(marginal.token_ids))

        # The last slot precedes nothing, so it needs no shortlist; some heads ask it, too.
        head, links = self.ar_head, hidden.shape[1] - 1
        marginals = lm_head(normed if head.reads_marginals else normed[:, :links])  # (batch, slots, vocab)
        if draw_noise is not None:
            marginals = marginals + draw_noise[:, : marginals.shape[1]]
        shortlist, shortlist_log_probs = top_log_probs(marginals[:, :links], knobs.num_candidates, temperature)
        shortlist, embed = self.target_ids(shortlist), head.embedding(embed)  # (batch, links, candidates)
        states, score_columns = head.scorer(Slots(hidden, normed, marginals, draw_noise), self.norm, lm_head, knobs)

        def score(*arguments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            columns, log_probs = score_columns(*arguments)
            return self.target_ids(columns), log_probs

        if on_demand is not None:
            rows = HeadRows(score, embed, states, anchor_ids, shortlist, shortlist_log_probs)
            rows.compute_likely(on_demand)
            return rows
        # One row for the anchor, then one per candidate of each further slot: `rows` in all.
        previous_ids = torch.cat([anchor_ids[:, None].to(shortlist.device), shortlist.flatten(1)], dim=1)
        candidates = shortlist.shape[-1]
        own = torch.arange(candidates - 1, candidates * (links + 1), device=hidden.device) // candidates  # (rows,)
        token_ids, log_probs = score(*states, embed(previous_ids), own)  # (batch, rows, branching)
        return Transitions.conditional(token_ids, log_probs, shortlist)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *model_args, **kwargs):
        """Load a drafter from a folder or Hub repository in any published layout.

        Ours, the official TreeFlash layout, DFlash, DSpark, DFlash-2, transformers' own DFlash layout and vLLM
        speculators' are recognised by their config; weights must be safetensors and no code of the repository is run.
        Arguments are those of [`PreTrainedModel.from_pretrained`]; `ar_head="swiglu"` (or `"markov"` or `"selector"`)
        gives a head-less checkpoint a fresh head.
        """
        from .checkpoints import resolve_checkpoint

        generation_config = kwargs.pop("generation_config", None)
        kwargs, stored_generation_config = resolve_checkpoint(cls, pretrained_model_name_or_path, kwargs)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        drafter = loaded[0] if isinstance(loaded, tuple) else loaded
        drafter.generation_config = generation_config or stored_generation_config
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """Save weights and config as any transformers model does, and the drafting knobs beside them."""
        # Always our layout, also for a drafter that was read from another.
        super().save_pretrained(save_directory, **{"save_original_format": False, **kwargs})
        self.generation_config.save_pretrained(save_directory)


__all__ = ["TreeFlashDraftModel", "TreeFlashPreTrainedModel"]
