"""The decoding loop of `cache_implementation="static"`: launch rounds, read their few numbers, end the texts."""

from collections import deque
from collections.abc import Callable
from contextlib import nullcontext

import torch
from transformers.utils import logging

from ..decoding import TreeDecoding
from ..round_state import RoundState
from ..taps import tapped_states
from .coverage import why_dynamic
from .launch import Launcher
from .sessions import session

logger = logging.get_logger(__name__)


class StaticDecoding(TreeDecoding):
    """One `generate` call whose rounds run on the device over static caches, without a host synchronisation.

    Arguments are those of [`TreeDecoding`]. Prefill is plain decoding's. What [`why_dynamic`] names is decoded with
    dynamic caches instead, after a warning. A dictionary output has no cache: the caches stay for the next call of the
    pair, see [`session`].
    """

    def run(self):
        """Decode until every row is finished; return what `generate` returns."""
        with tapped_states(self.target, self.drafter.config.target_layer_ids) as taps:
            state = self.prefill(taps)
            reason = why_dynamic(self, state)
            if reason is not None:
                logger.warning_once(
                    f"cache_implementation='static' beside a TreeFlash drafter does not cover {reason}. Decoding with "
                    "a dynamic cache instead; the text is the same."
                )
                self.rounds(state)
        if reason is not None:
            return self.result(state)
        if state.rows:
            self.static_rounds(state)
        return self.static_result()

    def static_rounds(self, state: RoundState) -> None:
        """Decode what prefill has begun."""
        batch, cache, valid = len(state.rows), state.prefix.cache, state.prefix.valid
        padding = torch.zeros(batch, dtype=torch.long) if valid is None else (~valid).sum(dim=1)
        room = torch.tensor([self.sequences.room(row) for row in state.rows])
        config, budget = self.drafter.config, self.generator.knobs.tree_budget
        longest = config.num_drafted + 1
        on_cuda = cache.layers[0].keys.is_cuda
        needed = state.prefix.length + int(room.max()) + longest + max(budget, config.block_size + longest)
        needed = max(needed, getattr(self.generation_config, "max_cache_len", None) or 0)
        (context,) = state.pending
        state.pending = []
        on_device = torch.cuda.device(cache.layers[0].keys.device) if on_cuda else nullcontext()
        with on_device, session(self, cache, needed, rounds_ahead(cache.layers[0].keys)) as launcher:
            launcher.round.start(cache, context, padding, state.anchor_ids, room)
            if self.noise is not None and launcher.round.noise is not None:
                self.noise.move(launcher.round.noise, state.rows)
            self._launch_and_read(launcher, state.rows, state.prefix.length)

    def _launch_and_read(self, launcher: Launcher, rows: list[int], prompt: int) -> None:
        round, unfinished = launcher.round, set(rows)
        lengths = [prompt] * len(rows)  # as far as they are known of
        under_way: deque[Callable[[], list]] = deque()
        while unfinished:
            longest = max(lengths)
            if self.noise is not None:
                self.noise.make(sorted(unfinished), self.noise.capacity)
            launcher.launch(launcher.span_of(longest + round.longest * len(under_way)))
            under_way.append(copy_to_host(round.emitted))
            if len(under_way) > round.ahead:
                for index, (*tokens, count) in enumerate(under_way.popleft()()):
                    lengths[index] += count
                    if rows[index] in unfinished and not count:
                        raise RuntimeError(
                            f"A round under cache_implementation='static' gave row {rows[index]} no token: what was "
                            "compiled or recorded is broken. Call with `disable_compile=True`, and please report this "
                            "with the output of `hf-treeflash env`."
                        )
                    if rows[index] in unfinished and self._take(rows[index], tokens[:count]):
                        unfinished.remove(rows[index])
                        round.active[index] = False

    def _take(self, row: int, tokens: list[int]) -> bool:
        """Append a round's tokens to a row, up to its end; return whether that was reached."""
        taken, finished = 0, False
        while taken < len(tokens) and not finished:
            if self.noise is not None:
                self.noise.use([row])
            finished = self.walker.emit(row, tokens[taken])
            taken += 1
        if finished and self.noise is not None:
            self.noise.finish([row])
        self.acceptance_lengths[row].append(taken)
        self.generator.observe(taken - 1)
        return finished

    def static_result(self):
        """Return the ids, or the dictionary the call asked for, without a cache."""
        ids = self.sequences.padded(self.generation_config._pad_token_tensor)
        if self.noise is not None:
            self.noise.leave(ids.shape[1] - self.sequences.prompt_length)
        if self.streamer is not None:
            self.streamer.end()
        if not self.generation_config.return_dict_in_generate:
            return ids
        return self.recorder.result(ids, ids.shape[1] - self.sequences.prompt_length, None, self.acceptance_lengths)


def rounds_ahead(tensor: torch.Tensor) -> int:
    """Return how many rounds to launch before reading one: while the host reads, a CUDA device runs the next."""
    return int(tensor.is_cuda)


def copy_to_host(tensor: torch.Tensor) -> Callable[[], list]:
    """Start copying a tensor to the host; return what waits for the copy and gives it as a list."""
    if not tensor.is_cuda:
        return tensor.clone().tolist
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def wait() -> list:
        event.synchronize()
        return host.tolist()

    return wait


__all__ = ["StaticDecoding"]
