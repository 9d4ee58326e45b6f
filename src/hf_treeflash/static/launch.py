"""How a round is launched: as it is, with compiled models, or replayed as one CUDA graph."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from transformers import CompileConfig, GenerationConfig
from transformers.utils import logging

from .round import StaticRound

logger = logging.get_logger(__name__)

# Modes of inductor that would record CUDA graphs of their own inside ours.
WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
# One compilation per span and session; the default of 8 would leave later ones uncompiled. Spans matter where passes
# take masks.
RECOMPILE_LIMIT = 64
SMALLEST_SPAN = 256


def compile_options(config: CompileConfig) -> dict:
    """Translate a call's `compile_config` for `torch.compile`."""
    options = {"backend": config.backend, "fullgraph": config.fullgraph, "dynamic": bool(config.dynamic)}
    if config.options:
        options["options"] = config.options
    elif config.backend == "inductor":
        options["mode"] = WITHOUT_GRAPHS.get(config.mode, config.mode)
    return options


@contextmanager
def own_workspaces() -> Iterator[None]:
    """Let a recording allocate the workspaces of its matrix products itself.

    cuBLAS keeps one per stream, outside of any recording, and inductor frees them all before it records graphs of its
    own: replays of ours would then write to memory that is no longer theirs.
    """
    if not torch.backends.cuda.is_built():  # a stand-in for recordings, in tests
        yield
        return
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


class Launcher:
    """Launches rounds, and keeps what was compiled and recorded for them.

    On CUDA both models are compiled and the round is recorded as a graph, once, or once per span where a pass takes
    masks; on other devices models are compiled where the call has a `compile_config`. `disable_compile` turns both
    off. What cannot be compiled or recorded runs as it is, and without the kernel where that fails, too, each after a
    warning.

    Args:
        round ([`StaticRound`]):
            The round.
        generation_config ([`GenerationConfig`]):
            Of the call: `compile_config` and `disable_compile`.

    Attributes:
        failure (`str`, *optional*):
            What kept rounds from being compiled or recorded, if something did.
    """

    def __init__(self, round: StaticRound, generation_config: GenerationConfig):
        self.round = round
        on_cuda, config = round.device.type == "cuda", generation_config.compile_config
        self.compiled = (on_cuda or config is not None) and not generation_config.disable_compile
        self.graphs: dict[int, torch.cuda.CUDAGraph] | None = {} if on_cuda and self.compiled else None
        self.pool = None if self.graphs is None else torch.cuda.graph_pool_handle()
        self.seen: set[int] = set()  # spans that were launched
        self.steps_compiled = False
        self.failure: str | None = None
        self.options = compile_options(config or CompileConfig())
        self.make_room: Callable[[], None] = lambda: None

    def hold(self, target, generator, make_room: Callable[[], None]) -> None:
        """Take a call's models, see [`StaticRound`], and what frees memory when it is short."""
        self.round.hold(target, generator)
        self.make_room = make_room

    def let_go(self) -> None:
        """Hold nothing of a call between calls."""
        self.round.let_go()
        self.make_room = lambda: None

    def span_of(self, length: int) -> int:
        """Return how many slots a round looks at, given the longest row: few numbers, as each is compiled."""
        if self.round.spanless:
            return self.round.capacity
        needed = length + self.round.tail
        return min(max(SMALLEST_SPAN, 1 << (needed - 1).bit_length()), self.round.capacity)

    def launch(self, span: int) -> None:
        """Run one round; one that fails on its way to the device has changed nothing yet, and is run again.

        Raises:
            torch.OutOfMemoryError: If the memory does not suffice without the caches of other calls either.
        """
        try:
            self._attempt(span)
            return
        except Exception as error:
            short = isinstance(error, torch.OutOfMemoryError)
            if span in self.seen or not (short or self.compiled or self.round.by_kernel):
                raise
            if not short:
                self._do_without(error)
        # Behind the handler, where what the failed attempt allocated is free again.
        if short:
            self.make_room()
            self._attempt(span)
        else:
            self.launch(span)

    def _attempt(self, span: int) -> None:
        if self.compiled and not self.steps_compiled:
            # The first round runs as it is: transformers installs hooks in it, which compilation cannot trace.
            self.round.run(span)
            self.round.steps = self.round.steps.compiled(self.options)
            self.steps_compiled = True
            return
        if self.graphs is None:
            self._run(span)
        else:
            if span not in self.graphs:
                self.graphs[span] = self._record(span)
            self.graphs[span].replay()
        self.seen.add(span)

    def _run(self, span: int) -> None:
        compiles = self.compiled and span not in self.seen
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT) if compiles else nullcontext():
            self.round.run(span)

    def _record(self, span: int) -> torch.cuda.CUDAGraph:
        saved = [tensor.clone() for tensor in self.round.state]

        def restore() -> None:
            for tensor, before in zip(self.round.state, saved, strict=True):
                tensor.copy_(before)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compilation and the libraries' choices, outside the recording
            for _ in range(2):
                self._run(span)
                restore()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # The outer context returns to this stream where a recording breaks off; the stream of torch's own choice stays
        # on the device of the first recording; and other threads may use the device meanwhile.
        with (
            own_workspaces(),
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"),
        ):
            self._run(span)
        return graph

    def _do_without(self, error: Exception) -> None:
        """Give up what a round failed with: compiled models and graphs first, then the kernel."""
        given_up = "uncompiled" if self.compiled else "without tree attention"
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        logger.warning_once(
            f"{type(self.round.target).__name__} runs {given_up} under cache_implementation='static'; the text is the "
            f"same. {reason}"
        )
        if self.compiled:
            self.compiled, self.graphs = False, None
            self.round.steps_uncompiled()
        else:
            self.round.without_kernel()
        self.failure = reason


__all__ = ["Launcher"]
