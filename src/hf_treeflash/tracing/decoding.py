"""The decoding loop with somebody looking on: each verb is timed, and each walk is written down."""

import copy
import os

import torch
from transformers.utils import logging

from ..bench.measuring import Stopwatch, machine
from ..decoding import TreeDecoding
from ..round_state import RoundState
from ..taps import Taps
from ..tree import DraftTree
from ..verify import Verdict
from .rounds import TracedRound, TracedText

logger = logging.get_logger(__name__)


class TracedDecoding(TreeDecoding):
    """One `generate` call whose rounds are kept.

    Args:
        texts (`list[TracedText]`):
            Where to; the call's rows are added to it.
        others:
            As in [`TreeDecoding`].
    """

    def __init__(self, texts: list[TracedText], *others, **call):
        super().__init__(*others, **call)
        if getattr(self.generation_config, "_treeflash_static", False):
            logger.warning_once("A traced call runs with dynamic caches instead of static ones; the text is the same.")
        self.auto = copy.deepcopy(self.auto)  # what it learns from rounds that are looked at is not kept
        self.stopwatch = Stopwatch(self.input_ids.device)
        mask = self.model_kwargs.get("attention_mask")
        prompts = [self.input_ids[row] for row in range(len(self.input_ids))]
        if mask is not None and mask.shape == self.input_ids.shape:
            prompts = [ids[own.bool()] for ids, own in zip(prompts, mask, strict=True)]
        settings = self._settings()
        self.texts = [TracedText(ids.tolist(), settings) for ids in prompts]
        texts.extend(self.texts)

    def _settings(self) -> dict:
        knobs, call = self.generator.knobs, self.generation_config
        return {
            "target": name_of(self.target),
            "drafter": name_of(self.drafter),
            "tree_budget": "auto" if knobs.is_auto else knobs.tree_budget,
            "temperature": self.temperature,
            "prompt_lookup_num_tokens": call.prompt_lookup_num_tokens,
            "dtype": str(self.target.dtype).removeprefix("torch."),
            **machine(self.input_ids.device),
        }

    def prefill(self, taps: Taps) -> RoundState:
        """Run the prompt; the first token is the target's own."""
        self.stopwatch.new_round()
        with self.stopwatch.stage("prompt"):
            state = super().prefill(taps)
        for row, text in enumerate(self.texts):
            (first,) = self.sequences.prefix(row)[0, self.sequences.prompt_length :].tolist()
            text.rounds.append(TracedRound.of_prompt(text.prompt_ids, first))
        self._close(self.texts)
        return state

    def round(self, state: RoundState) -> None:
        """Draft, verify, walk and commit once."""
        texts = [self.texts[row] for row in state.rows]
        self.stopwatch.new_round()
        with self.stopwatch.stage("rest"):
            super().round(state)
        self._close(texts)

    def plain_round(self, state: RoundState) -> None:
        """Run a single text's newest token as plain decoding does."""
        texts = [self.texts[row] for row in state.rows]
        self.stopwatch.new_round()
        with self.stopwatch.stage("verify"):
            super().plain_round(state)
        self._close(texts)

    def draft(self, state: RoundState) -> DraftTree:
        """Draft the trees of one round."""
        with self.stopwatch.stage("draft"):
            return super().draft(state)

    def verify(self, state: RoundState, tree: DraftTree):
        """Run the target once over the trees."""
        with self.stopwatch.stage("verify"):
            return super().verify(state, tree)

    def walk(self, state: RoundState, tree: DraftTree, outputs) -> list[Verdict]:
        """Follow the target's own choices, and write down what they met."""
        ended = self.sequences.ended_rows() if self.together else set()
        with self.stopwatch.stage("walk"):
            verdicts = super().walk(state, tree, outputs)
        with self.stopwatch.stage("tracing"):
            for index, (row, verdict) in enumerate(zip(state.rows, verdicts, strict=True)):
                if row not in ended:
                    chain = [] if self.lookup is None else self.lookup.chains[row]
                    seen = TracedRound.of_walk(tree, index, verdict, outputs.logits[index], chain)
                    self.texts[row].rounds.append(seen)
        return verdicts

    def commit(self, state: RoundState, verdicts: list[Verdict], hidden_states: torch.Tensor) -> None:
        """Keep the accepted paths."""
        with self.stopwatch.stage("commit"):
            super().commit(state, verdicts, hidden_states)

    def _close(self, texts: list[TracedText]) -> None:
        """Give the latest round of these texts its times; rows of a batch share them."""
        times = {name: value for name, value in self.stopwatch.current.items() if name != "tracing"}
        for text in texts:
            if not text.rounds[-1].milliseconds:
                text.rounds[-1].milliseconds = times


def name_of(model) -> str:
    """Return a model's Hub id, or the last part of its folder's path."""
    name = model.config.name_or_path
    return os.path.basename(os.path.normpath(name)) if os.path.isdir(name) else name
