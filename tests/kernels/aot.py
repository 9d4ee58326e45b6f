"""
Compiles every kernel for a GPU that need not be there and prints one JSON line per configuration.

Run in a process of its own, without TRITON_INTERPRET: `python aot.py 90 80`.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# The kernels by themselves: the package around them imports transformers, which takes longer than compiling.
sys.path.insert(0, str(Path(__file__).parents[2] / "src" / "hf_treeflash"))


def attention(
    dtype: str, dim: int, group: int, splits: int, nodes: int, capability: int, append=False, merge=False
) -> dict:
    module = importlib.import_module("kernels.tree_attention")
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    config = module.tree_attention_config(torch_dtype, dim, nodes * group, divmod(capability, 10))
    types = {name: f"*{dtype}" for name in ("Q", "K", "V", "NEW_K", "NEW_V", "OUT")}
    types |= {name: "*i64" for name in ("WORDS", "PREFIX", "START")}
    types |= {"PARTIAL": "*fp32" if splits > 1 else f"*{dtype}", "LSE": "*fp32" if splits > 1 else f"*{dtype}"}
    types |= {"ARRIVALS": "*i32" if merge else f"*{dtype}", "scale_log2e": "fp32"}
    constants = {"GROUP": group, "DIM": dim, "SPLITS": splits, "MERGE": merge, "APPEND": append, "UPCAST": False}
    constants |= {"nodes": 1} if nodes == 1 else {}  # as the launcher does with integers that are 1
    return {"kernel": module._tree_attention_kernel, "types": types, "constants": constants | config}


def merge(splits: int, group: int, dim: int) -> dict:
    module = importlib.import_module("kernels.merge_splits")
    types = {"PARTIAL": "*fp32", "LSE": "*fp32", "OUT": "*bf16"}
    splits_block, block_m = module.merge_tile(splits, dim)
    constants = {"GROUP": group, "DIM": dim, "SPLITS_BLOCK": splits_block, "BLOCK_M": block_m}
    return {"kernel": module._merge_kernel, "types": types, "constants": constants}


def select(name: str, k: int, vocab: int, noisy: bool = False) -> dict:
    module = importlib.import_module("kernels.head_select")
    tiles, chunks = -(-vocab // module.TILE), -(-vocab // module.CHUNK)
    types = {"LOGITS": "*bf16", "NOISE": "*fp32" if noisy else "*bf16", "SLOTS": "*i64"}
    types |= {"TILE_MAX": "*fp32", "CHUNK_MAX": "*fp32", "CHUNK_SUM": "*fp32"}
    types |= {"TOKEN_IDS": "*i64", "LOG_PROBS": "*fp32", "inverse_temperature": "fp32"}
    if name == "_tile_maxima_kernel":
        types = {key: value for key, value in types.items() if key not in ("TOKEN_IDS", "LOG_PROBS")}
        constants = {"NOISY": noisy, "TILE": 128, "CHUNK": 4096} | ({} if noisy else {"rows": 1, "slots": 1})
        return {"kernel": module._tile_maxima_kernel, "types": types, "constants": constants}
    constants = {"NOISY": noisy} | ({} if noisy else {"rows": 1, "slots": 1})
    constants |= {"NUM_TILES": min(k, tiles), "TOP_K": k, "LANES": module.next_power_of_2(k), "TILE": module.TILE}
    constants |= {"TILES_BLOCK": module.next_power_of_2(tiles), "CHUNKS_BLOCK": module.next_power_of_2(chunks)}
    constants["num_warps"] = module.select_warps(k)
    return {"kernel": module._select_kernel, "types": types, "constants": constants}


def simple(module_name: str, kernel: str, types: dict, **constants) -> dict:
    module = importlib.import_module(f"kernels.{module_name}")
    return {"kernel": getattr(module, kernel), "types": types, "constants": constants}


def build(nodes: int) -> dict:
    types = {name: "*i64" for name in ("TOKENS", "NEXT", "OUT_TOKENS", "OUT_PARENTS", "OUT_DEPTHS", "OUT_WORDS")}
    types |= {"OUT_COUNT": "*i64", "LOG_PROBS": "*fp32", "OUT_SCORES": "*fp32"}
    return simple("build_tree", "_build_tree_kernel", types, NODES=nodes, WORDS=-(-nodes // 64), num_warps=1)


def accept(nodes: int) -> dict:
    names = ("TOKENS", "PARENTS", "WORDS", "NUM_NODES", "TARGETS", "PATH", "LENGTH", "NEXT_TOKEN")
    types, words = dict.fromkeys(names, "*i64"), -(-nodes // 64)
    constants = {"words": 1} if words == 1 else {}
    return simple("accept", "_accept_kernel", types, NODES=nodes, WORDS_BLOCK=words, **constants)


def compact(width: int) -> dict:
    types = dict.fromkeys(("POINTERS", "PATH", "LENGTH", "PREFIX"), "*i64") | {"LIKE": "*bf16"}
    dim_block = min(128, 4096 // width)
    return simple("compact", "_compact_kernel", types, PATH_BLOCK=width, DIM_BLOCK=dim_block)


def gated_delta(name: str, nodes: int, dtype: str = "bf16") -> dict:
    module = importlib.import_module("kernels.gated_delta")
    types = dict.fromkeys(("Q", "K", "V", "BETA", "OUT"), f"*{dtype}") | {"MASK": "*i1", "scale": "fp32"}
    types |= dict.fromkeys(("G", "STATE", "QUERIES", "KEYS", "UPDATES", "DECAYS"), "*fp32")
    config = module.gated_delta_config(nodes, 128)
    if name == "_prepare_kernel":
        config = {"BLOCK": config["BLOCK"], "KEY_BLOCK": 128, "num_warps": 4}
    constants = {"nodes": 1} if nodes == 1 else {}
    return {"kernel": getattr(module, name), "types": types, "constants": constants | {"GROUP": 2} | config}


def add_path(length: int, channels: int) -> dict:
    types = dict.fromkeys(("STATE", "KEYS", "UPDATES", "DECAYS"), "*fp32") | {"PATH": "*i64"}
    constants = {"GROUP": 2, "CHANNELS": channels, "LENGTH": length, "BLOCK_K": 32, "BLOCK_V": 64}
    return simple("add_path", "_add_path_kernel", types, **constants, s_value=1)


def configurations(capability: int) -> dict[str, dict]:
    """The shapes of Qwen3-4B and 8B (head_dim 128, groups of 4, 151936 tokens) and others the launch options know."""
    return {
        "attention bf16 d128 g4 split 1": attention("bf16", 128, 4, 1, 64, capability),
        "attention bf16 d128 g4 split 8": attention("bf16", 128, 4, 8, 64, capability),
        "attention bf16 d128 g4 split 1, one node": attention("bf16", 128, 4, 1, 1, capability),
        "attention bf16 d128 g4 split 8, one node": attention("bf16", 128, 4, 8, 1, capability),
        "attention bf16 d128 g4 split 1, new": attention("bf16", 128, 4, 1, 64, capability, append=True),
        "attention bf16 d128 g4 split 8, new": attention("bf16", 128, 4, 8, 64, capability, append=True),
        "attention bf16 d128 g4 split 8, merged": attention("bf16", 128, 4, 8, 64, capability, merge=True),
        "attention bf16 d128 g4 split 8, new, merged": attention("bf16", 128, 4, 8, 64, capability, True, True),
        "attention bf16 d128 g4 split 32, one node, merged": attention("bf16", 128, 4, 32, 1, capability, merge=True),
        "attention bf16 d64 g2 split 16, merged": attention("bf16", 64, 2, 16, 64, capability, merge=True),
        "attention bf16 d256 g2 split 4, merged": attention("bf16", 256, 2, 4, 64, capability, merge=True),
        "attention fp32 d128 g4 split 32, merged": attention("fp32", 128, 4, 32, 64, capability, merge=True),
        "attention fp32 d256 g2 split 16, merged": attention("fp32", 256, 2, 16, 64, capability, merge=True),
        "attention bf16 d64 g2 split 4": attention("bf16", 64, 2, 4, 64, capability),
        "attention bf16 d256 g2 split 4": attention("bf16", 256, 2, 4, 64, capability),
        "attention fp32 d128 g4 split 4": attention("fp32", 128, 4, 4, 64, capability),
        "merge d128 split 8": merge(8, 4, 128),
        "merge d256 split 32": merge(32, 4, 256),
        "tile maxima": select("_tile_maxima_kernel", 16, 151936),
        "select k16": select("_select_kernel", 16, 151936),
        "select k64": select("_select_kernel", 64, 151936),
        "tile maxima with noise": select("_tile_maxima_kernel", 16, 151936, noisy=True),
        "select k16 with noise": select("_select_kernel", 16, 151936, noisy=True),
        "build 64": build(64),
        "build 256": build(256),
        "accept 64": accept(64),
        "accept 256": accept(256),
        "compact 16": compact(16),
        "compact 64": compact(64),
        "gated delta preparation": gated_delta("_prepare_kernel", 64),
        "gated delta, one node": gated_delta("_gated_delta_kernel", 1),
        "gated delta 64": gated_delta("_gated_delta_kernel", 64),
        "gated delta 64, fp32": gated_delta("_gated_delta_kernel", 64, "fp32"),
        "add path": add_path(16, 1),
        "add path per channel": add_path(16, 128),
    }


def compile_one(kernel, types: dict, constants: dict, capability: int) -> dict:
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    options = {"num_warps": 4} | options
    jitted = kernel.jitted
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in jitted.arg_names}
    # Pointers and strides divisible by 16, as the launcher finds them; without it loads are not vectorised.
    aligned = [
        (place,) for place, name in enumerate(jitted.arg_names)
        if signature[name].startswith("*") or re.fullmatch(r"[qkvwn]_\w+|\w+_stride", name)
    ]  # fmt: skip
    source = ASTSource(jitted, signature, constants, {place: [["tt.divisibility", 16]] for place in aligned})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    return {
        **options,
        **resources(compiled.asm["cubin"]),
        "shared": compiled.metadata.shared,
        "wgmma": "wgmma" in ptx,
        "mma": "mma.sync" in ptx,
    }


def resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread and bytes of stack (spilled registers live there) of the machine code."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True)
    counts = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", run.stdout))
    return {"registers": int(counts["REG"]), "stack": int(counts["STACK"]) + int(counts["LOCAL"])}


def main() -> None:
    for capability in map(int, sys.argv[1:]):
        for name, configuration in configurations(capability).items():
            report = compile_one(**configuration, capability=capability)
            print(json.dumps({"capability": capability, "name": name, **report}), flush=True)


if __name__ == "__main__":
    main()
