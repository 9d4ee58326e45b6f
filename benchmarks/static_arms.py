"""Rounds over static caches that `round.py` times, and the plain step to hold them against in the same mode."""

import torch
from round_arms import Arm, Setting, Stage, pending, random_cache
from torch._inductor import cudagraph_trees
from transformers import GenerationConfig, LogitsProcessorList, StaticCache

from hf_treeflash.candidate_generator import TreeFlashCandidateGenerator
from hf_treeflash.compat import CACHE
from hf_treeflash.logits_process import TreeLogitsProcessor
from hf_treeflash.static.launch import Launcher
from hf_treeflash.static.round import StaticRound
from hf_treeflash.static.sessions import round_up


class Static(Arm):
    """The round of `cache_implementation="static"`, its models as they are."""

    compiled = graphed = False

    def __init__(self, setting: Setting):
        generator = TreeFlashCandidateGenerator(
            setting.drafter, setting.target.get_input_embeddings(), setting.target.get_output_embeddings()
        )
        processor = TreeLogitsProcessor(LogitsProcessorList(), batch=1)
        cache = random_cache(setting.target, setting.context)
        block, budget = setting.drafter.config.block_size, generator.knobs.tree_budget
        capacity = round_up(setting.context + block + max(budget, 2 * block))
        self.static = StaticRound(setting.target, generator, processor, False, cache, 1, capacity, ahead=0)
        self.launcher = Launcher(self.static, GenerationConfig(disable_compile=not self.compiled))
        if not self.graphed:
            self.launcher.graphs = None
        self._begin(setting, cache, capacity)
        self.before = [tensor.clone() for tensor in self.static.state]
        self.span = self.launcher.span_of(setting.context)
        # What the walk accepts decides nothing about the cost of static shapes; so many states are read.
        self.accepted = setting.accepted
        stages = () if self.graphed else ("draft", "verify", "commit")  # the last of them with the walk
        self.inner = [(self.static, name, name) for name in stages]

    def _begin(self, setting: Setting, cache, capacity: int) -> None:
        """Put the round where texts of this length would have it."""
        static, (anchor, states, _) = self.static, pending(setting)
        static.target_cache.take_over(cache, setting.context)
        for layer in static.drafter_cache.layers:
            for states_of in (layer.keys, layer.values):
                states_of.normal_()
        static.lengths.fill_(setting.context)
        static.limits.fill_(capacity)
        static.anchors.copy_(anchor)
        static.active.fill_(True)
        static.pending[:, : setting.accepted] = states
        static.pending_counts.fill_(setting.accepted)

    def round(self, stage: Stage) -> None:
        self.launcher.launch(self.span)
        self.static.emitted.tolist()

    def rewind(self) -> None:
        for tensor, before in zip(self.static.state, self.before, strict=True):
            tensor.copy_(before)

    def fallen_back(self) -> str | None:
        launcher = self.launcher
        if launcher.failure is not None:
            return launcher.failure
        if self.static.device.type == "cuda" and not self.static.by_kernel:
            return "tree attention did not run as a kernel"
        if self.compiled and not (launcher.compiled and launcher.steps_compiled):
            return "the models run uncompiled"
        if self.graphed and self.span not in (launcher.graphs or {}):
            return "no graph was recorded"
        return None


class Compiled(Static):
    """The same with both models compiled."""

    compiled = True


class Graphed(Static):
    """The same as one CUDA graph."""

    compiled = graphed = True


class GraphedVanilla(Arm):
    """A step of plain decoding over a static cache, compiled and graphed as transformers does it."""

    accepted = 1
    inner: list = []

    def __init__(self, setting: Setting):
        self.context = setting.context
        self.cache = StaticCache(config=setting.target.config, max_cache_len=setting.context + 64)
        for layer, random in zip(self.cache.layers, random_cache(setting.target, setting.context).layers, strict=True):
            layer.update(random.keys, random.values)
        self.token = torch.tensor([[7]], device=setting.target.device)
        self.position = torch.tensor([[setting.context]], device=setting.target.device)
        self.step = torch.compile(setting.target.__call__, mode="reduce-overhead", fullgraph=False)

    def round(self, stage: Stage) -> None:
        outputs = self.step(self.token, position_ids=self.position, **{CACHE: self.cache}, logits_to_keep=1)
        int(outputs.logits[0, -1].argmax())

    def fallen_back(self) -> str | None:
        if not self.token.is_cuda:
            return "there are no graphs without a CUDA device"
        skips = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
        manager = cudagraph_trees.get_manager(self.token.get_device(), create_if_none_exists=False)
        recorded = manager is not None and any(manager.roots.values())
        return None if recorded and not skips else f"inductor recorded {int(recorded)} graphs and skipped {skips}"

    def rewind(self) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.context)


__all__ = ["Compiled", "Graphed", "GraphedVanilla", "Static"]
