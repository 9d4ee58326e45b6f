"""The decoding loop: draft, verify, walk and commit until every text has ended.

Longer than 300 lines, so that the loop and each of its verbs can be read in one place.
"""

import dataclasses
import functools
import time
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn import functional

from .budget import auto_budget
from .cache import PrefixCache, recording_past
from .candidate_generator import TreeFlashCandidateGenerator
from .choice import upload
from .compat import CACHE
from .context import Context, remember_context, take_context
from .draft_head import OutputScale
from .exactness import Exactness
from .lockstep import LockstepWalker, advances_together
from .logits_process import TreeLogitsProcessor
from .lookahead import Lookahead, askable
from .lookup import PromptLookup
from .noise import Noise
from .outputs import Recorder
from .plain import plain_step
from .products import quick_products
from .protocols import Drafter, Target
from .ranks import Ranks
from .round_state import RoundState
from .rows import Rows
from .sequences import Sequences
from .taps import Taps, is_compiled, tapped_states
from .tree import DraftTree, chains, root_only
from .verify import Verdict, Verifier
from .walker import Walker

# What a verify pass sets itself, or only the prompt needs.
PROMPT_KWARGS = {"attention_mask", "position_ids", CACHE, "inputs_embeds", "logits_to_keep"}


READ_AT_ONCE = 64  # tokens per row: as many as a usual tree has nodes


class NoCache(ValueError):
    """A target keeps nothing of what it reads."""


class TreeDecoding:
    """One `generate` call: its texts, both models, and the verbs of a round.

    Args:
        target ([`PreTrainedModel`]):
            The model whose text is kept.
        drafter ([`PreTrainedModel`]):
            The drafter.
        input_ids, logits_processor, stopping_criteria, generation_config, streamer, model_kwargs:
            As `generate` prepares them for a decoding method.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        *,
        input_ids: torch.Tensor,
        logits_processor,
        stopping_criteria,
        generation_config,
        streamer,
        model_kwargs: dict,
    ):
        batch = input_ids.shape[0]
        self.target, self.drafter, self.streamer = target, drafter, streamer
        self.input_ids, self.generation_config, self.model_kwargs = input_ids, generation_config, model_kwargs
        self.sequences = Sequences(input_ids, stopping_criteria)
        self.processor = TreeLogitsProcessor(logits_processor, batch=batch)
        self.verifier, self.ranks = Verifier(target), Ranks.of(target)
        self.prunes = bool(askable(logits_processor))
        self.recorder = Recorder(generation_config, batch)
        self.exactness = Exactness(self.verifier, model_kwargs, self.forward_kwargs)
        self.acceptance_lengths: list[list[int]] = [[] for _ in range(batch)]
        self.generator = TreeFlashCandidateGenerator(
            drafter,
            target.get_input_embeddings(),
            target.get_output_embeddings(),
            generation_config,
            output_scale=OutputScale.of(self.verifier.config, drafter.config),
            in_step=self.ranks is not None,
        )
        self.auto = auto_budget(drafter, batch) if self.generator.knobs.is_auto else None
        quotes = generation_config.prompt_lookup_num_tokens is not None
        self.lookup = PromptLookup(generation_config, batch) if quotes else None
        self.temperature = (generation_config.temperature or 1.0) if generation_config.do_sample else 0.0
        self.noise = None
        if self.temperature > 0:
            self.noise = Noise(batch, 2 * self.tokens_ahead, input_ids.device, self.sequences.may_overrun)
            self.generator.draft_head.expect(logits_processor, self.temperature)
        walks = self.processor, self.sequences, self.recorder, streamer, self.noise, input_ids.device
        given = getattr(model_kwargs[CACHE], "_is_user_defined", False)
        self.outlives = generation_config.return_dict_in_generate or given  # the call, does its cache
        self.together = advances_together(batch, logits_processor, stopping_criteria, streamer, self.forward_kwargs)
        if self.outlives and self.sequences.may_overrun and self.verifier.recurrent is not None:
            self.together = True  # rows that are ahead would have to be cut back, and a recurrent state cannot be
        self.walker = LockstepWalker(generation_config._pad_token_tensor, *walks) if self.together else Walker(*walks)

    def run(self):
        """Decode until every row is finished; return what `generate` returns."""
        with tapped_states(self.target, self.drafter.config.target_layer_ids) as taps:
            state = self.prefill(taps)
            self.rounds(state)
        return self.result(state)

    def rounds(self, state: RoundState) -> None:
        """Draft, verify, walk and commit until every row is finished.

        Args:
            state ([`RoundState`]):
                After the prompt; it is left as after the last round.
        """
        try:
            while state.rows:
                with recording_past(state.prefix.cache), self.quick_layers():
                    while state.rows and not self.exactness.is_border(state, self.sequences):
                        self.round(state)
                if state.rows:
                    self.plain_round(state)
        except BaseException:
            state.prefix.rollback()
            state.prefix.restore_rows()
            raise

    def quick_layers(self) -> AbstractContextManager:
        """While rounds run, layers of both models multiply their few rows in the fastest way."""
        if self.ranks is not None or is_compiled(self.target):  # each rank would choose for itself
            return nullcontext()
        return quick_products(self.target, self.drafter, self.generator.draft_head.lm_head)

    def round(self, state: RoundState) -> None:
        """Draft, verify, walk and commit once."""
        started = time.perf_counter()
        tree = self.draft(state)
        outputs, hidden_states = self.verify(state, tree)
        verdicts = self.walk(state, tree, outputs)
        self.commit(state, verdicts, hidden_states)
        if self.auto is not None:
            seconds = time.perf_counter() - started
            self.auto.observe(tree, verdicts, seconds if self.ranks is None else self.ranks.agree(seconds))

    def plain_round(self, state: RoundState) -> None:
        """Run a single text's newest token as plain decoding does, where the target may read the text anew."""
        ids = self.sequences.prefix(0)
        state.taps.clear()
        kwargs = self.model_kwargs | state.taps.model_kwargs
        outputs = plain_step(self.target, state.prefix.cache, ids, kwargs, ids.shape[1] - self.input_ids.shape[1])
        if outputs[CACHE] is not state.prefix.cache:
            state.prefix.restore_rows()
            state.prefix = state.prefix.over(outputs[CACHE])
        hidden_states = state.taps.take(outputs)[:, -1:]  # (1, 1, taps * hidden_size)
        outputs.logits = outputs.logits[:, -1:]  # (1, 1, vocab)
        tree = root_only(state.anchor_ids)
        self.commit(state, self.walk(state, tree, outputs), hidden_states)

    def prefill(self, taps: Taps) -> RoundState:
        """Run the target over the prompt as plain decoding does, and choose the first token.

        Args:
            taps ([`Taps`]):
                Where the pass leaves the states that the drafter reads.
        """
        kwargs = self.model_kwargs
        earlier = take_context(kwargs[CACHE], self.drafter, self.input_ids)
        outputs = self.target._prefill(self.input_ids, self.generation_config, kwargs | taps.model_kwargs)
        self.recorder.prefill(outputs)
        cache, mask, batch = outputs.get(CACHE), kwargs.get("attention_mask"), len(self.input_ids)
        if cache is None or not any(getattr(layer, "is_initialized", False) for layer in cache.layers):
            raise NoCache(f"{type(self.target).__name__} keeps no cache of what it reads")
        prefix = PrefixCache(
            cache,
            None if mask is None else mask.bool(),
            Rows(batch) if self.outlives else None,
            rewinds=self.sequences.may_overrun,
        )
        states = taps.take(outputs)
        positions = kwargs.get("position_ids")
        if positions is None:  # a target that hides what its forward takes counts for itself
            positions = torch.arange(prefix.length - states.shape[1], prefix.length, device=states.device)[None]
        state = RoundState.after_prompt(self.input_ids, mask, positions, prefix, states, taps)
        self.vocab_size = outputs.logits.shape[-1]
        if earlier is not None:
            self.generator.prefix, pending = earlier
            if pending is not None:
                state.pending = [Context.joined([pending, *state.pending])]
        self.exactness.start(state, self.input_ids, outputs.logits[:, -1])
        # The prompt's last token is the root of a tree without branches.
        self._end_round(state, self.walker(state.rows, [{} for _ in state.rows], outputs.logits[:, -1:]))
        return state

    def draft(self, state: RoundState) -> DraftTree:
        """Draft the trees of one round on the target's device.

        Args:
            state ([`RoundState`]):
                Of the round; a draft reads what is pending.
        """
        room = self.exactness.room(state, self.sequences)
        if room == 1 or (self.auto is not None and not self.auto.drafts()):
            return root_only(state.anchor_ids)  # its context is read with the next draft
        noise = None if self.noise is None else self.noise.ahead(state.rows, self.tokens_ahead)
        tree = self.generator.draft_tree(
            state.anchor_ids,
            Context.joined(state.pending),
            self.lookaheads(state.rows) if self.prunes else None,
            None if self.lookup is None else self.lookup.find(state.rows, self.sequences, noise),
            None if self.auto is None else self.auto.limit,
            None if noise is None else self.draw_noise(noise),
        )
        state.pending = []
        if self.auto is not None:
            tree = tree.first(self.auto.size(tree))
        if self.ranks is not None:
            tree = self.ranks.agree(tree.to(torch.device("cpu")))
        return self.walker.prepared(tree.first(room).to(state.anchor_ids.device))

    @property
    def tokens_ahead(self) -> int:
        """Tokens whose draws a round wants to know: as many as a path below the root can have."""
        return max(self.drafter.config.num_drafted, 0 if self.lookup is None else self.lookup.tokens)

    def draw_noise(self, noise: torch.Tensor) -> torch.Tensor:
        """Return what the draws of a block's tokens add to logits, given their noise `(rows, tokens, vocab)`."""
        return noise[:, : self.drafter.config.num_drafted].log() * -self.temperature

    def lookaheads(self, rows: list[int]) -> list[Lookahead]:
        """Return for some rows of the call what can say which tokens may follow their texts."""
        texts = self.sequences
        return [
            Lookahead(
                self.processor.by_row[row], row, texts.prefix(row), self.vocab_size, texts.room(row), texts.eos_ids
            )
            for row in rows
        ]

    def verify(self, state: RoundState, tree: DraftTree):
        """Run the target once over the trees.

        Args:
            state ([`RoundState`]):
                Of the round.
            tree ([`DraftTree`]):
                The trees, of `(rows, nodes)`.

        Returns:
            `tuple`: the target's output, one row of logits per node, and its states at the nodes as the drafter reads
            them, of shape `(rows, nodes, taps * hidden_size)`.
        """
        room = [self.sequences.room(row) for row in state.rows]
        if min(room) < tree.token_ids.shape[1]:
            # No position that the text cannot reach: some targets know only so many.
            limit = upload(room, tree.depths.device)[:, None] - 1  # (rows, 1)
            tree = dataclasses.replace(tree, depths=tree.depths.minimum(limit))
        state.taps.clear()  # of what processors ran the target for
        kwargs = self.forward_kwargs | state.taps.model_kwargs
        outputs = self.verifier(tree, state.prefix, state.positions, kwargs)
        return outputs, state.taps.take(outputs)

    @property
    def forward_kwargs(self) -> dict:
        """What the call passes to each of the target's forwards."""
        return {key: value for key, value in self.model_kwargs.items() if key not in PROMPT_KWARGS}

    def walk(self, state: RoundState, tree: DraftTree, outputs) -> list[Verdict]:
        """Follow the target's own choices through each tree.

        Args:
            state ([`RoundState`]):
                Of the round.
            tree ([`DraftTree`]):
                The trees, of `(rows, nodes)`.
            outputs ([`ModelOutput`]):
                What the target says of them, `logits` of shape `(rows, nodes, vocab)`.
        """
        ended = self.sequences.ended_rows() if self.together else set()
        verdicts = self.walker(state.rows, tree.children, outputs.logits)
        for index, (row, verdict) in enumerate(zip(state.rows, verdicts, strict=True)):
            self.recorder.path(row, index, verdict.path, outputs, state.prefix)
            if row in ended:  # padding says nothing of the drafter
                continue
            self.acceptance_lengths[row].append(len(verdict.path))
            if tree.token_ids.shape[1] > 1:  # a round without a draft says nothing of the drafter
                self.generator.observe(len(verdict.path) - 1)
            if self.lookup is not None:
                self.lookup.observe(row, verdict.token_ids)
        return verdicts

    def commit(self, state: RoundState, verdicts: list[Verdict], hidden_states: torch.Tensor) -> None:
        """Keep the accepted paths' keys and values; their states are the drafter's next context.

        Args:
            state ([`RoundState`]):
                Of the round, which it ends.
            verdicts (`list[Verdict]`):
                What each row accepted.
            hidden_states (`torch.Tensor` of shape `(rows, nodes, taps * hidden_size)`):
                The target's states at the nodes.
        """
        paths = [verdict.path for verdict in verdicts]
        state.prefix.commit(paths, tail=hidden_states.shape[1])
        state.pending.append(Context.of_paths(hidden_states, state.text_positions, paths))
        self._end_round(state, verdicts)

    def result(self, state: RoundState):
        """Return the ids `(batch, longest)`, or the dictionary the call asked for.

        Args:
            state ([`RoundState`]):
                After the last round.
        """
        cache = state.prefix.cache
        ids = self.sequences.padded(self.generation_config._pad_token_tensor)
        steps = ids.shape[1] - self.sequences.prompt_length
        if self.noise is not None:
            self.noise.leave(steps)
        read_on = functools.partial(self._read_on, state.first_positions, ids)
        single = len(self.acceptance_lengths) == 1  # its columns are as it left them
        state.prefix.restore_rows(None if single else state.prompt_columns + steps - 1, read_on)
        if single:
            text, pending = self.sequences.prefix(0), Context.joined(state.pending)
            remember_context(cache, self.drafter, text, self.generator.prefix, pending)
        if self.streamer is not None:
            self.streamer.end()
        if not self.generation_config.return_dict_in_generate:
            return ids
        return self.recorder.result(ids, steps, cache, self.acceptance_lengths)

    def _end_round(self, state: RoundState, verdicts: list[Verdict]) -> None:
        """Set the next anchors, and take rows that are finished out of the batch: they cost nothing from here on."""
        state.advance(verdicts)
        if self.noise is not None:
            self.noise.finish([row for row, verdict in zip(state.rows, verdicts, strict=True) if verdict.finished])
        kept = [index for index, verdict in enumerate(verdicts) if not verdict.finished]
        if not kept:
            state.rows = []
        elif len(kept) < len(verdicts):
            state.select(kept)
            self.generator.prefix.select(kept)

    def _read_on(
        self, first_positions: torch.Tensor, ids: torch.Tensor, prefix: PrefixCache, rows: list[int], left: list[int]
    ) -> None:
        """Run the target over some of what rows that ended before others have not read: a token, then padding."""
        last = ids.shape[1] - 1  # the newest token of the longest row stays unread, as in plain decoding
        counts = [min(count, READ_AT_ONCE) for count in left]
        ids, begins = functional.pad(ids, (0, max(counts))), [last - count for count in left]
        tokens = torch.stack([ids[row, n : n + max(counts)] for row, n in zip(rows, begins, strict=True)])
        new = upload([begin - self.sequences.prompt_length for begin in begins], first_positions.device)
        with recording_past(prefix.cache):
            self.verifier(chains(tokens), prefix, first_positions[..., rows] + new, self.forward_kwargs)
        prefix.commit([list(range(count)) for count in counts], tail=max(counts))


__all__ = ["PROMPT_KWARGS", "NoCache", "TreeDecoding"]
