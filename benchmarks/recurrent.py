"""What a pass over a tree costs one recurrent layer, against an attention layer: operations, bytes, time.

    python benchmarks/recurrent.py --json recurrent.json

Only what walks along the text is counted, not projections, gates and norms, which cost what they cost without trees.
Shapes are the defaults of transformers' configs. Bytes are what operations write, kept or not. Times are
processor time of one thread, so that other programs on the machine disturb them little.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from hf_treeflash.bench.measuring import columns, machine
from hf_treeflash.recurrent.convolution import convolution
from hf_treeflash.recurrent.gated_delta import gated_delta
from hf_treeflash.recurrent.kimi_delta import kimi_delta
from hf_treeflash.recurrent.levels import levels_of, reached_columns
from hf_treeflash.recurrent.mamba1 import mamba1
from hf_treeflash.recurrent.mamba2 import mamba2

ACCEPTED = 4  # nodes of a path that is committed


class Layer(NamedTuple):
    """A layer's share of a pass, made ready for trees of one size.

    Attributes:
        run (`Callable`):
            Runs the pass; returns what its commit needs.
        commit (`Callable`, *optional*):
            Given that, keeps a path.
        state (`int`):
            Bytes of the state of one text, columns of keys and values aside.
    """

    run: Callable[[], Any]
    commit: Callable[[Any], None] | None
    state: int


class Counter(TorchDispatchMode):
    """Counts the operations of everything that runs, and the bytes that it writes."""

    def __init__(self):
        super().__init__()
        self.operations = self.bytes = self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        written = [part for part in (result if isinstance(result, tuple | list) else [result])
                   if isinstance(part, torch.Tensor) and not function.is_view]  # fmt: skip
        self.bytes += sum(part.nbytes for part in written)
        self.largest = max([self.largest, *(part.nbytes for part in written)])
        self.operations += operations_of(function, args, kwargs, result, sum(part.numel() for part in written))
        return result


def operations_of(function, args, kwargs, result, written: int) -> int:
    """Count additions and multiplications; a function of one element counts as one."""
    packet = function.overloadpacket
    if packet == torch.ops.aten.linalg_solve_triangular:
        matrix, right = args[:2]
        return right.numel() * matrix.shape[-1]  # half of a product: a triangle
    if packet == torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        query, key = args[:2]
        return 4 * query.numel() * key.shape[2]
    if packet in flop_registry:
        return flop_registry[packet](*args, **kwargs, out_val=result)
    return written


def tree(nodes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return parents `(1, nodes)`, ancestor mask and the path to commit, of a tree that branches by two."""
    parents = torch.tensor([[-1, *((node - 1) // 2 for node in range(1, nodes))]])
    mask = torch.eye(nodes, dtype=torch.bool)
    for node in range(1, nodes):
        mask[node] |= mask[parents[0, node]]
    return parents, mask[None], torch.tensor([[2**depth - 1 for depth in range(ACCEPTED)]])


def walker(function: Callable, inputs: list[torch.Tensor], state: torch.Tensor, shape, path: torch.Tensor) -> Layer:
    """Return a recurrent layer whose walker takes its inputs, the state, and the tree's shape."""
    return Layer(
        lambda: function(*inputs, state, shape)[1],
        lambda terms: terms.add_path(state, path),
        state.nbytes,
    )


def layers(nodes: int, context: int) -> dict[str, Layer]:
    """Return one layer of each kind; decays, gates and time steps are random, and no work depends on them."""
    parents, mask, path = tree(nodes)

    def delta(key_heads: int, heads: int, channels: bool) -> list[torch.Tensor]:
        decay = -torch.rand(1, nodes, heads, *([128] if channels else []))
        keys = [torch.randn(1, nodes, key_heads, 128) for _ in range(2)]
        return [*keys, torch.randn(1, nodes, heads, 128), decay, torch.rand(1, nodes, heads)]

    weights = [torch.randn(1, nodes, 8, 128) for _ in range(2)]
    mamba2_inputs = [torch.randn(1, nodes, 128, 64), torch.rand(1, nodes, 128), -torch.rand(128), *weights]
    scan = [torch.randn(1, 8192, nodes), torch.rand(1, 8192, nodes), -torch.rand(8192, 16)]
    scan += [torch.randn(1, 16, nodes) for _ in range(2)]
    stored, reached = torch.randn(1, 8192, 4 + nodes), reached_columns(parents, 4)
    query = torch.randn(1, 16, nodes, 256)
    keys, values = (torch.randn(1, 4, context + nodes, 256) for _ in range(2))
    visible = torch.cat([torch.ones(1, nodes, context, dtype=torch.bool), mask], dim=2)[:, None]
    bias = torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))
    return {
        f"attention, 16 / 4 heads of 256, {context} columns (Qwen3.5)": Layer(
            lambda: F.scaled_dot_product_attention(query, keys, values, bias, enable_gqa=True), None, 0
        ),
        "gated delta, 16 / 32 heads of 128 x 128 (Qwen3.5)": walker(
            gated_delta, delta(16, 32, False), torch.randn(1, 32, 128, 128), mask, path
        ),
        "Kimi delta, 32 heads of 128 x 128 (Kimi-Linear)": walker(
            kimi_delta, delta(32, 32, True), torch.randn(1, 32, 128, 128), mask, path
        ),
        "Mamba-2, 128 heads of 64 x 128 (Nemotron-H)": walker(
            mamba2, [*mamba2_inputs, torch.randn(128)], torch.randn(1, 128, 64, 128), mask, path
        ),
        "Mamba-1, 8192 channels of 16 (Jamba)": walker(
            mamba1, [*scan, torch.randn(8192)], torch.randn(1, 8192, 16), levels_of(parents), path
        ),
        "convolution of 4, 8192 channels": Layer(
            lambda: convolution(stored, torch.randn(8192, 4), None, reached), None, 4 * 8192 * 4
        ),
    }


def milliseconds(call: Callable[[], Any], repeats: int) -> float:
    """Return the median processor time of a call."""
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        call()
        times.append(1e3 * (time.process_time() - start))
    return statistics.median(times[1:])


def measure(layer: Layer, repeats: int) -> dict[str, float]:
    """Count and time a layer's pass and commit."""
    with Counter() as counter:
        terms = layer.run()
        if layer.commit is not None:
            layer.commit(terms)
    return {
        "operations": counter.operations,
        "bytes_written": counter.bytes,
        "largest_tensor": counter.largest,
        "state_bytes": layer.state,
        "pass_ms": milliseconds(layer.run, repeats),
        "commit_ms": 0.0 if layer.commit is None else milliseconds(lambda: layer.commit(terms), repeats),
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--context", type=int, default=2048, help="columns that attention looks back on")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [
        {"layer": name, "nodes": nodes, **measure(layer, args.repeats)}
        for nodes in args.nodes
        for name, layer in layers(nodes, args.context).items()
    ]
    heading = ["one layer, one text", "nodes", "MFLOP", "MB written", "largest MB", "a state per node, MB", "pass ms"]
    cells = [[*heading, "commit ms"]]
    for row in rows:
        counts = [row["operations"], row["bytes_written"], row["largest_tensor"], row["nodes"] * row["state_bytes"]]
        shown = [*(f"{count / 1e6:.1f}" for count in counts), f"{row['pass_ms']:.2f}", f"{row['commit_ms']:.2f}"]
        cells.append([row["layer"], str(row["nodes"]), *shown])
    print(columns(cells))
    if args.json:
        record = {"environment": machine("cpu"), "context": args.context, "rows": rows}
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
