"""The decoding loop (draft, verify, walk, commit) and its one hook into `generate()`."""

import dataclasses
import functools
import importlib
import time

import torch
from transformers import GenerationMixin

from .budget import auto_budget
from .cache import PrefixCache, check_restorable, recording_past
from .candidate_generator import TreeFlashCandidateGenerator
from .context import Context, count_positions, recall_context, remember_context, tapped_states
from .logits_process import TreeLogitsProcessor
from .lookahead import Lookahead, askable
from .lookup import PromptLookup
from .outputs import Recorder
from .rows import Rows
from .sequences import Sequences
from .tree import DraftTree, root_only
from .validation import check_call, check_prompt
from .verify import Verdict, Verifier, walk

# What a verify pass sets itself, or only the prompt needs.
PROMPT_KWARGS = {"attention_mask", "position_ids", "past_key_values", "inputs_embeds", "logits_to_keep"}


class TreeDecoding:
    """One `generate` call: the texts, both models' caches, and the verbs of a round.

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
        target,
        drafter,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        streamer,
        model_kwargs,
    ):
        self.target, self.drafter, self.streamer = target, drafter, streamer
        self.input_ids, self.generation_config, self.model_kwargs = input_ids, generation_config, model_kwargs
        self.rows = list(range(input_ids.shape[0]))  # those still being written
        self.sequences = Sequences(input_ids, stopping_criteria)
        self.processor = TreeLogitsProcessor(logits_processor, batch=len(self.rows))
        self.verifier = Verifier(target)
        self.prunes = bool(askable(logits_processor))
        self.recorder = Recorder(generation_config, len(self.rows))
        self.acceptance_lengths: list[list[int]] = [[] for _ in self.rows]
        self.generator = TreeFlashCandidateGenerator(
            drafter,
            target.get_input_embeddings(),
            target.get_output_embeddings(),
            temperature=(generation_config.temperature or 1.0) if generation_config.do_sample else 1.0,
        )
        self.auto = auto_budget(drafter, len(self.rows)) if self.generator.knobs.is_auto else None
        quotes = generation_config.prompt_lookup_num_tokens is not None
        self.lookup = PromptLookup(generation_config, len(self.rows)) if quotes else None

    def run(self):
        """Decode until every row is finished; return what `generate` returns."""
        with tapped_states(self.target, self.drafter.config.target_layer_ids) as self.taps:
            self.prefill()
            self.rounds()
        return self.result()

    def rounds(self) -> None:
        """Draft, verify, walk and commit until every row is finished."""
        with recording_past(self.prefix.cache):
            try:
                while self.rows:
                    started = time.perf_counter()
                    tree = self.draft()
                    outputs = self.verify(tree)
                    verdicts = self.walk(tree, outputs)
                    self.commit(tree, verdicts)
                    if self.auto is not None:
                        self.auto.observe(tree, verdicts, time.perf_counter() - started)
            except BaseException:
                self.prefix.rollback()
                self.prefix.restore_rows()
                raise

    def prefill(self) -> None:
        """Run the target over the prompt as plain decoding does, and choose the first token."""
        kwargs, batch = self.model_kwargs, len(self.rows)
        earlier = recall_context(kwargs["past_key_values"], self.drafter)
        outputs = self.target._prefill(self.input_ids, self.generation_config, kwargs)
        states = torch.cat(self.taps, dim=1)
        self.taps.clear()
        mask, position_ids = kwargs.get("attention_mask"), kwargs["position_ids"]
        valid = None if mask is None else mask.bool()
        cache = outputs.past_key_values
        outlives = self.generation_config.return_dict_in_generate or getattr(cache, "_is_user_defined", False)
        rewinds = batch > 1 and not self.sequences.pads
        self.prefix = PrefixCache(cache, valid, Rows(batch) if outlives else None, rewinds)
        self.prompt_columns, self.first_positions = self.prefix.length, position_ids[..., -1] + 1
        # Models with several position axes still have the drafter count tokens.
        text_ids = position_ids if position_ids.ndim == 2 else count_positions(mask, self.prefix.length, position_ids)
        self.positions = position_ids[..., -1].expand(*position_ids.shape[:-2], batch) + 1
        self.text_positions = text_ids[:, -1].expand(batch) + 1
        length = states.shape[1]
        context = Context(
            states,
            text_ids[:, -length:].expand(batch, -1),
            [length] * batch,
            None if valid is None else valid[:, -length:],
        )
        if earlier is not None:
            self.generator.prefix, pending = earlier
            context = Context.joined([pending, context])
        self.unread = [context]  # target states the drafter has yet to read
        self.recorder.prefill(outputs)
        # The prompt's last token is the root of a tree without branches.
        self._keep_unfinished(self._walk([{}] * batch, outputs.logits[:, -1:]))

    def draft(self) -> DraftTree:
        """Draft the trees of one round on the target's device."""
        if self.auto is not None and not self.auto.drafts():
            return root_only(self.anchor_ids)  # its context is read with the next draft
        tree = self.generator.draft_tree(
            self.anchor_ids,
            Context.joined(self.unread),
            self.lookaheads() if self.prunes else None,
            None if self.lookup is None else self.lookup.find(self.rows, self.sequences),
            None if self.auto is None else self.auto.limit,
        )
        self.unread = []
        if self.auto is not None:
            tree = tree.first(self.auto.size(tree))
        return tree.to(self.anchor_ids.device)

    def lookaheads(self) -> list[Lookahead]:
        """Return for each row of the batch what can say which tokens may follow its text."""
        vocab_size = self.drafter.config.vocab_size
        return [Lookahead(self.processor.by_row[row], self.sequences.prefix(row), vocab_size) for row in self.rows]

    def verify(self, tree: DraftTree):
        """Run the target once over the trees; return its output, one row of logits per node."""
        kwargs = {key: value for key, value in self.model_kwargs.items() if key not in PROMPT_KWARGS}
        room = [self.sequences.room(row) for row in self.rows]
        if min(room) < tree.token_ids.shape[1]:
            # No position that the text cannot reach: some targets know only so many.
            limit = torch.tensor(room, device=tree.depths.device)[:, None] - 1
            tree = dataclasses.replace(tree, depths=tree.depths.minimum(limit))
        self.taps.clear()  # of what processors ran the target for
        outputs = self.verifier(tree, self.prefix, self.positions, kwargs)
        self.states = self.taps.pop()
        return outputs

    def walk(self, tree: DraftTree, outputs) -> list[Verdict]:
        """Follow the target's own choices through each tree."""
        verdicts = self._walk(tree.children, outputs.logits)
        for index, (row, verdict) in enumerate(zip(self.rows, verdicts, strict=True)):
            self.acceptance_lengths[row].append(len(verdict.path))
            self.recorder.path(row, index, verdict.path, outputs, self.prefix)
            if tree.token_ids.shape[1] > 1:  # a round without a draft says nothing of the drafter
                self.generator.update_candidate_strategy(self.input_ids, outputs.logits, len(verdict.path) - 1)
            if self.lookup is not None:
                self.lookup.observe(row, verdict.token_ids)
        return verdicts

    def commit(self, tree: DraftTree, verdicts: list[Verdict]) -> None:
        """Keep the accepted paths' keys and values; their states are the drafter's next context."""
        paths = [verdict.path for verdict in verdicts]
        self.prefix.commit(paths, tail=tree.token_ids.shape[1])
        self.unread.append(Context.of_paths(self.states, self.text_positions, paths))
        accepted = torch.tensor([len(path) for path in paths], device=self.positions.device)
        self.positions = self.positions + accepted
        self.text_positions = self.text_positions + accepted.to(self.text_positions.device)
        self._keep_unfinished(verdicts)

    def result(self):
        """Return the ids, or the dictionary the call asked for."""
        cache = self.prefix.cache
        ids = self.sequences.padded(self.generation_config._pad_token_tensor)
        steps = ids.shape[1] - self.sequences.prompt_length
        self.prefix.restore_rows(self.prompt_columns + steps - 1, self._run_last)
        if len(self.acceptance_lengths) == 1:
            remember_context(cache, self.drafter, self.generator.prefix, Context.joined(self.unread))
        if self.streamer is not None:
            self.streamer.end()
        if not self.generation_config.return_dict_in_generate:
            return ids
        return self.recorder.result(ids, steps, cache, self.acceptance_lengths)

    def _walk(self, children: list[dict], logits: torch.Tensor) -> list[Verdict]:
        do_sample, choices = self.generation_config.do_sample, None
        if not do_sample and not self.recorder.needs_scores and self.processor.prefix_independent:
            choices = self.processor.whole_tree(logits).argmax(dim=-1).tolist()
        verdicts = []
        for index, row in enumerate(self.rows):

            def choose(node: int, index=index, row=row) -> int:
                if choices is not None:
                    return choices[index][node]
                raw = logits[index, node, None].to(self.input_ids.device, torch.float32, copy=True)
                scores = self.processor.node(row, self.sequences.prefix(row), raw)
                self.recorder.token(row, scores, raw)
                if not do_sample:
                    return int(scores.argmax(dim=-1))
                return int(torch.multinomial(scores.softmax(dim=-1), num_samples=1))

            def emit(token: int, row=row) -> bool:
                return self.sequences.append(row, token, self.recorder.scores_of(row))

            verdicts.append(walk(children[index], choose, emit))
            self._stream(verdicts[-1].token_ids)
        return verdicts

    def _run_last(self, prefix: PrefixCache, rows: list[int]) -> None:
        """Run the target over the last token of rows that ended before others, as plain decoding does."""
        tokens = torch.stack([self.sequences.prefix(row)[0, -1] for row in rows])
        new = torch.tensor([self.sequences.lengths[row] - self.sequences.prompt_length for row in rows])
        first = self.first_positions.expand(*self.first_positions.shape[:-1], len(self.sequences.lengths))
        kwargs = {key: value for key, value in self.model_kwargs.items() if key not in PROMPT_KWARGS}
        with recording_past(prefix.cache):
            self.verifier(root_only(tokens), prefix, first[..., rows] + new.to(first.device) - 1, kwargs)

    def _stream(self, token_ids: list[int]) -> None:
        if self.streamer is not None:
            for token in token_ids:
                self.streamer.put(torch.tensor([token]))

    def _keep_unfinished(self, verdicts: list[Verdict]) -> None:
        """Set the next anchors, and take rows that are finished out of the batch: they cost nothing from here on."""
        kept = [index for index, verdict in enumerate(verdicts) if not verdict.finished]
        anchors = [verdicts[index].token_ids[-1] for index in kept]
        self.anchor_ids = torch.tensor(anchors, dtype=torch.long, device=self.input_ids.device)
        self.rows = [self.rows[index] for index in kept]
        if 0 < len(kept) < len(verdicts):
            self.prefix.select(kept)
            self.generator.prefix.select(kept)
            self.unread = [context.select(kept) for context in self.unread]
            self.positions, self.text_positions = self.positions[..., kept], self.text_positions[kept]


def tree_decoding(
    target,
    input_ids,
    logits_processor,
    stopping_criteria,
    generation_config,
    synced_gpus=False,
    streamer=None,
    inputs_tensor=None,
    assistant_model=None,
    assistant_tokenizer=None,
    tokenizer=None,
    **model_kwargs,
):
    """Decode with a TreeFlash drafter; the decoding method `generate` runs in place of its assisted decoding.

    Arguments and return value are those of `GenerationMixin._assisted_decoding`; a dictionary output also has
    `acceptance_lengths` and `block_efficiency`, see [`TreeFlashGenerateOutput`].
    """
    check_restorable(model_kwargs.get("past_key_values"))
    check_prompt(input_ids, generation_config, model_kwargs)
    decoding = TreeDecoding
    if getattr(generation_config, "_treeflash_static", False):
        if getattr(model_kwargs["past_key_values"], "_is_user_defined", False):
            raise ValueError("`cache_implementation='static'` makes its own cache; leave out `past_key_values`.")
        decoding = static_decoding()
    return decoding(
        target,
        assistant_model,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        streamer,
        model_kwargs,
    ).run()


def is_treeflash(drafter, generation_config) -> bool:
    """Whether a call is ours: by the drafter's config, as its class may be wrapped or loaded from a repository."""
    model_type = getattr(getattr(drafter, "config", None), "model_type", None)
    # `speculation_type="dflash"` asks for transformers' own chain.
    return model_type == "treeflash" and getattr(generation_config, "speculation_type", None) is None


def static_decoding() -> type[TreeDecoding]:
    """Return the decoding of `cache_implementation="static"`, which needs the kernels and so the whole package.

    Raises:
        ValueError: Where only the files of a repository are at hand.
    """
    try:
        return importlib.import_module("hf_treeflash.static").StaticDecoding
    except ImportError as error:
        raise ValueError("`cache_implementation='static'` beside a drafter needs the hf_treeflash package.") from error


def choose_caches(generation_config) -> None:
    """Take a call's wish for static caches over: `generate` prepares the prompt's cache, the static ones are ours."""
    if generation_config.cache_implementation == "static":
        static_decoding()
        generation_config.cache_implementation = None
        generation_config._treeflash_static = True


def install_hook() -> None:
    """Let `generate(assistant_model=drafter)` reach the tree for TreeFlash drafters; all others keep their way."""
    decode, validate = GenerationMixin._assisted_decoding, GenerationMixin._validate_generation_mode
    if hasattr(decode, "_before_treeflash"):
        return

    @functools.wraps(decode)
    def _assisted_decoding(self, *args, **kwargs):
        ours = is_treeflash(kwargs.get("assistant_model"), kwargs.get("generation_config"))
        return (tree_decoding if ours else decode)(self, *args, **kwargs)

    @functools.wraps(validate)
    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        drafter = generation_mode_kwargs.get("assistant_model")
        if is_treeflash(drafter, generation_config):
            check_call(self, drafter, generation_mode, generation_config, generation_mode_kwargs)
            choose_caches(generation_config)
        return validate(self, generation_mode, generation_config, generation_mode_kwargs)

    for method, original in ((_assisted_decoding, decode), (_validate_generation_mode, validate)):
        setattr(method, "_before_treeflash", original)
        setattr(GenerationMixin, original.__name__, method)


def remove_hook() -> None:
    """Undo [`install_hook`]."""
    for name in ("_assisted_decoding", "_validate_generation_mode"):
        method = getattr(GenerationMixin, name)
        setattr(GenerationMixin, name, getattr(method, "_before_treeflash", method))


__all__ = ["install_hook", "remove_hook", "tree_decoding"]
