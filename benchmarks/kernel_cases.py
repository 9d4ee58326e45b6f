"""What `kernel_times.py` times: each kernel, its oracle, and the best that libraries offer for the same result."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from hf_treeflash import kernels, tree
from hf_treeflash.draft_head import DraftHead
from hf_treeflash.kernels import Tree
from hf_treeflash.kernels.tree_attention import merges_inside
from hf_treeflash.transitions import Transitions
from hf_treeflash.verify import walk

SPLITS = (1, 2, 4, 8, 16)


class Sizes(NamedTuple):
    """Shapes of a target and of a draft; the first token of a block is the anchor's."""

    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    hidden: int
    vocab: int
    depth: int
    candidates: int
    branching: int
    accepted: int
    contexts: list[int]
    budgets: list[int]
    dtype: torch.dtype

    @property
    def rows(self) -> int:
        """Rows of the second pass over the output layer: the anchor's, and one per candidate of the other slots."""
        return 1 + (self.depth - 1) * self.candidates


# Those of Qwen3-4B, and of Qwen3-8B too but for the hidden size.
FULL = Sizes(32, 8, 128, 36, 2560, 151936, 15, 16, 16, 8, [512, 2048, 8192, 32768], [16, 64, 128, 256], torch.bfloat16)
SMOKE = Sizes(4, 2, 16, 2, 32, 640, 4, 4, 4, 3, [24], [12], torch.float32)


class Way(NamedTuple):
    """One way to compute something; `run` returns what is compared with the oracle, or None."""

    run: Callable[[], Any]
    on_device: bool = True  # nothing in it waits for the host


class Case(NamedTuple):
    """Ways to compute the same, the oracle first."""

    name: str
    shape: dict[str, Any]
    ways: dict[str, Way]


def all_cases(
    sizes: Sizes, device: torch.device, names: list[str] | None = None, with_flex: bool = True
) -> Iterator[Case]:
    """Make the cases one after the other, so that no two occupy the device's memory together."""
    attention = functools.partial(tree_attention, with_flex=with_flex)
    makers: list[tuple[str, Callable[..., Case], list[tuple]]] = [
        ("K1 tree attention", attention, [(context, nodes) for context in sizes.contexts for nodes in sizes.budgets]),
        ("K2 head selection", selection, [()]),
        ("K3 tree build", building, [(nodes,) for nodes in sizes.budgets]),
        ("K4 accept", accepting, [(nodes,) for nodes in sizes.budgets]),
        ("K5 compaction", compacting, [(context, sizes.budgets[-1]) for context in sizes.contexts]),
        ("output layer, candidates' rows", head_pass, [()]),
    ]
    for name, make, points in makers:
        if names is None or any(name.startswith(start) for start in names):
            for point in points:
                case = make(sizes, device, *point)
                # Without a GPU the kernels' functions run their oracles: nothing to compare.
                ways = {way: run for way, run in case.ways.items() if device.type == "cuda" or "kernel" not in way}
                yield Case(name, case.shape, ways)


def random_transitions(sizes: Sizes, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens, log-probabilities and next rows of one draft, of the shape `draft()` returns."""
    shape = (1, sizes.depth, sizes.candidates, sizes.branching)
    logits = torch.randn(*shape[:3], 4 * sizes.branching, device=device) * 3
    log_probs, token_ids = logits.log_softmax(dim=-1).topk(sizes.branching, dim=-1)
    next_row = torch.randint(-1, sizes.candidates, shape, device=device)
    next_row[:, -1] = -1
    return token_ids, log_probs, next_row


def random_tree(sizes: Sizes, nodes: int, device: torch.device) -> Tree:
    return kernels.build_tree_reference(*random_transitions(sizes, device), nodes)


def tree_attention(sizes: Sizes, device: torch.device, context: int, nodes: int, with_flex: bool) -> Case:
    words = random_tree(sizes, nodes, device).ancestor_words
    group, slots = sizes.heads // sizes.kv_heads, context + nodes
    query = torch.randn(1, sizes.heads, nodes, sizes.head_dim, dtype=sizes.dtype, device=device)
    key, value = torch.randn(2, 1, sizes.kv_heads, slots, sizes.head_dim, dtype=sizes.dtype, device=device)
    prefix, start = torch.tensor([context], device=device), torch.tensor([0], device=device)
    inputs = (query, key, value, words, prefix, start, sizes.head_dim**-0.5)
    mask = kernels.dense_tree_mask(words, prefix, start, slots)
    ancestors = mask[0, 0, :, context:]

    def repeated() -> torch.Tensor:
        keys, values = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask).transpose(1, 2).contiguous()

    def grouped() -> torch.Tensor:
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        return output.transpose(1, 2).contiguous()

    ways = {"oracle": Way(lambda: kernels.tree_attention_reference(*inputs, 1))}
    default, arrivals = kernels.default_num_splits(query, key), kernels.new_arrivals(device)
    for splits in sorted({*SPLITS, default}):
        chosen = ", the default" if splits == default else ""
        run = functools.partial(kernels.tree_attention, *inputs, splits)
        ways[f"kernel, {splits} splits{chosen}"] = Way(run)
        if merges_inside(query, key, splits, arrivals):
            ways[f"kernel, {splits} splits{chosen}, merged in the same launch"] = Way(
                functools.partial(run, arrivals=arrivals)
            )
    ways["repeat_kv + SDPA"] = Way(repeated)  # what transformers does when there is a mask
    ways["SDPA, grouped"] = Way(grouped)
    if with_flex:
        ways |= flex_ways(query, key, value, ancestors, context)
    return Case("", {"context": context, "nodes": nodes}, ways)


def flex_ways(query, key, value, ancestors: torch.Tensor, context: int) -> dict[str, Way]:
    """FlexAttention over a block mask, compiled on a GPU; `ancestors` says which nodes a node sees."""
    device, nodes = query.device, query.shape[2]

    def sees(batch, head, node, slot):
        column = slot - context
        return (column < 0) | ancestors[node, column.clamp(0, nodes - 1)]

    block_mask = create_block_mask(sees, 1, None, nodes, key.shape[2], device=device.type)
    flex = torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention

    def flexible(**options) -> torch.Tensor:
        output = flex(query, key, value, block_mask=block_mask, enable_gqa=True, kernel_options=options or None)
        return output.transpose(1, 2).contiguous()

    if device.type != "cuda":
        return {"FlexAttention, not compiled": Way(flexible)}
    split = functools.partial(flexible, SPLIT_KV=4, BLOCK_M=64)
    return {"FlexAttention": Way(flexible), "FlexAttention, 4 splits of 64 rows": Way(split)}


def selection(sizes: Sizes, device: torch.device) -> Case:
    logits = (torch.randn(sizes.rows, sizes.vocab, device=device) * 4).to(sizes.dtype)
    k, temperature = sizes.branching, 1.0

    def softmax_first() -> torch.Tensor:
        return (logits.float() / temperature).log_softmax(dim=-1).topk(k, dim=-1).values

    def topk_first() -> torch.Tensor:
        return logits.topk(k, dim=-1).values.float() - logits.float().logsumexp(dim=-1, keepdim=True)

    ways = {
        "oracle": Way(lambda: kernels.head_select_reference(logits, k, temperature)[1]),
        "kernel": Way(lambda: kernels.head_select(logits, k, temperature)[1]),
        "float32 log_softmax + topk": Way(softmax_first),
        "topk + logsumexp": Way(topk_first),
    }
    return Case("", {"rows": sizes.rows, "vocabulary": sizes.vocab, "k": k}, ways)


def building(sizes: Sizes, device: torch.device, nodes: int) -> Case:
    transitions, anchor = random_transitions(sizes, device), torch.tensor([7], device=device)

    def heap() -> torch.Tensor:
        rows = Transitions(*transitions).rows()
        return tree.tree_from_tables(tree.build_tables(rows, anchor, nodes)).to(device).path_log_probs

    ways = {
        "oracle": Way(lambda: kernels.build_tree_reference(*transitions, nodes).path_log_probs),
        "kernel": Way(lambda: kernels.build_tree(*transitions, nodes).path_log_probs),
        "heap on the host, with copies": Way(heap, on_device=False),
    }
    return Case("", {"nodes": nodes}, ways)


def accepting(sizes: Sizes, device: torch.device, nodes: int) -> Case:
    drafted = random_tree(sizes, nodes, device)
    targets = torch.full_like(drafted.token_ids, -1)
    node = int(drafted.depths[0].argmax())  # the target follows the deepest path to its end
    while node > 0:
        parent = int(drafted.parents[0, node])
        targets[0, parent], node = drafted.token_ids[0, node], parent
    parts = (drafted.token_ids, drafted.parents, drafted.ancestor_words, drafted.num_nodes, targets)

    def on_the_host() -> torch.Tensor:
        parents, tokens, choices = drafted.parents[0].tolist(), drafted.token_ids[0].tolist(), targets[0].tolist()
        children = {(p, t): i for i, (p, t) in enumerate(zip(parents, tokens, strict=True)) if p >= 0}
        path = walk(children, choices.__getitem__, lambda token: False).path
        return torch.tensor([len(path)], device=device)

    ways = {
        "oracle": Way(lambda: kernels.accept_reference(*parts)[1]),
        "kernel": Way(lambda: kernels.accept(*parts)[1]),
        "walk on the host": Way(on_the_host, on_device=False),
    }
    return Case("", {"nodes": nodes, "path": int(drafted.depths.max()) + 1}, ways)


def compacting(sizes: Sizes, device: torch.device, context: int, nodes: int) -> Case:
    shape = (1, sizes.kv_heads, context + nodes, sizes.head_dim)
    first = torch.randn(2 * sizes.layers, *shape, dtype=sizes.dtype, device=device)
    path = torch.full((1, nodes), -1, device=device)
    path[0, : sizes.accepted] = torch.arange(sizes.accepted, device=device) * (nodes - 1) // (sizes.accepted - 1)
    length, prefix = torch.tensor([sizes.accepted], device=device), torch.tensor([context], device=device)
    source, tail = path[0, : sizes.accepted] + context, slice(context, context + sizes.accepted)

    def on_its_own_cache(compact: Callable) -> Way:
        cache = list(first.clone())  # every way moves rows in place
        table = kernels.pointer_table(cache)
        return Way(lambda: compact(cache, table) or [states[:, :, tail] for states in cache])

    def layer_by_layer(cache: list[torch.Tensor], table: torch.Tensor) -> None:
        for states in cache:
            states[:, :, tail].copy_(states.index_select(2, source))

    ways = {
        "oracle": on_its_own_cache(lambda cache, table: kernels.compact_reference(cache, path, length, prefix)),
        "kernel": on_its_own_cache(lambda cache, table: kernels.compact(cache, path, length, prefix, table)),
        "index_select + copy_ per layer": on_its_own_cache(layer_by_layer),
    }
    return Case("", {"context": context, "path": sizes.accepted, "tensors": 2 * sizes.layers}, ways)


def head_pass(sizes: Sizes, device: torch.device) -> Case:
    """The second pass over the output layer, whole and approximate; approximations are not compared."""
    lm_head = torch.nn.Linear(sizes.hidden, sizes.vocab, bias=False, device=device, dtype=sizes.dtype)
    states = torch.randn(1, sizes.rows, sizes.hidden, device=device).to(sizes.dtype)
    exact, float8 = DraftHead(lm_head), DraftHead(lm_head, "float8")
    ways = {"layer": Way(lambda: exact(states)), "float8": Way(lambda: float8(states))}
    return Case("", {"rows": sizes.rows, "hidden": sizes.hidden, "vocabulary": sizes.vocab}, ways)
