"""Every family of transformers' causal mapping beside a drafter: `python -m tests.families.causal_mapping`.

Each family's tiny target runs in a process of its own, as some of them crash or never end. The table it writes,
`causal_mapping.md`, has a line per family: exact, refused and why, or that plain `generate` itself fails.
"""

import inspect
import os
import signal
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_treeflash.taps import decoder_layers
from tests.families.hybrids import HYBRIDS, REFUSED
from tests.helpers.ties import TIE, gap_at_first_difference
from tests.helpers.tiny import SHAPE, VOCAB, tiny_drafter, with_knobs

TABLE = Path(__file__).with_name("causal_mapping.md")
SECONDS, LENGTH, NEW = 120, 10, 24
GREEDY = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 2}

# What makes a config small, by the names its families use; each takes those it knows.
SMALL = SHAPE | {
    "d_model": 32,
    "n_embd": 32,
    "word_embed_proj_dim": 32,
    "embedding_size": 32,
    "ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "ffn_hidden_size": 48,
    "n_inner": 48,
    "num_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "decoder_layers": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "decoder_attention_heads": 4,
    "init_std": 0.3,
    "is_decoder": True,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "rotary_dim": 4,
    "depth": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_groups": 1,
    "image_size": 32,
    "patch_size": 8,
}
MLA = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16}
MLA |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "qk_head_dim": 12, "v_head_dim": 8, "head_dim": 4}
SHARED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
SHARED |= {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8}
# What single families need beside that.
OWN: dict[str, dict] = {
    **dict.fromkeys(
        (
            "axk1",
            "axk2",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "minicpm3",
            "sarvam_mla",
            "youtu",
        ),
        MLA,
    ),
    "longcat_flash": MLA
    | {
        "num_layers": 2,
        "num_hidden_layers": 4,
        "ffn_hidden_size": 48,
        "zero_expert_num": 2,
        "moe_topk": 2,
        "expert_ffn_hidden_size": 24,
    },
    "dory": {
        "num_hidden_layers": 8,
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp"] * 2,
        "n_input_layers": 2,
        "n_recurrent_layers": 4,
        "n_output_layers": 2,
    },
    "gemma3n_text": SHARED
    | {"intermediate_size": 48, "laurel_rank": 8, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": SHARED,
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1, "state_size": 4},
    "zaya": {"num_experts_per_tok": 1},
    "xlm": {"emb_dim": 32, "n_words": VOCAB},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "mpt": {"use_cache": True},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    "plbart": {"encoder_attention_heads": 4},
    "whisper": {"encoder_attention_heads": 4},
    "blenderbot": {"encoder_layers": 4},
    "dots1": {"n_shared_experts": 1},
    "reformer": {"axial_pos_embds": False},
}


# What recurrent and indexed families need, told elsewhere.
OF_HYBRIDS = {f.config: f.extra for f in [*HYBRIDS, *(family for family, _ in REFUSED)] if f.vision is None}


def small_config(config_class, own: dict | None = None):
    """Return a small config of a class, and of the classes inside it."""
    fields = set(inspect.signature(config_class.__init__).parameters)
    fields |= set(getattr(config_class, "__dataclass_fields__", {}))
    aliases = getattr(config_class, "attribute_map", {})
    values = {name: value for name, value in SMALL.items() if name in fields and name not in aliases}
    for name in getattr(config_class, "sub_configs", {}):
        inner = getattr(config_class(), name, None)
        if inner is not None:
            values[name] = small_config(type(inner)).to_dict()
    return config_class(**values | (own or {}))


def target_of(model_type: str):
    """Return a family's tiny target, random and in evaluation mode."""
    torch.manual_seed(0)
    config_class = CONFIG_MAPPING[model_type]
    config = small_config(config_class, OWN.get(model_type, OF_HYBRIDS.get(config_class.__name__)))
    with torch.device("meta"):
        size = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    if size > 3e7:
        raise MemoryError(f"{size / 1e6:.0f} million weights at the smallest")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def told(error: Exception) -> str:
    """Return the beginning of an error on one line."""
    text = " ".join(str(error).split()).replace("|", "/")
    return f"{type(error).__name__}: {text[:90]}{'...' if len(text) > 90 else ''}"


def seen_of(model_type: str) -> str:
    """Return what a family does beside a drafter, as the table says it."""
    try:
        target = target_of(model_type)
    except Exception as error:
        return f"not built: {told(error)}"
    near_tie = ""
    ids = torch.randint(4, VOCAB - 4, (2, LENGTH), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, :3], ids[1, :3] = 0, 2
    for inputs in ({"input_ids": ids[:1]}, {"input_ids": ids, "attention_mask": mask}):
        try:
            plain = target.generate(**inputs, **GREEDY)
        except Exception as error:
            return f"plain `generate` fails: {told(error)}"
        last = len(decoder_layers(target) or range(4)) - 1
        taps = [0, last] if len(inputs) == 1 else [0, last // 2]
        drafter = with_knobs(tiny_drafter(target_layer_ids=taps, num_target_layers=None), tree_budget=12)
        try:
            tree = target.generate(**inputs, assistant_model=drafter, **GREEDY)
        except ValueError as error:
            return f"refused: {' '.join(str(error).split()).replace('|', '/')}"
        except Exception as error:
            return f"CRASHES: {told(error)}"
        if not torch.equal(plain, tree):
            told_scores = target.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_scores=True)
            if gap_at_first_difference(told_scores, tree) > TIE:
                return f"DIFFERS in a batch of {len(plain)}"
            near_tie = ", up to a near-tie"
    return f"exact{near_tie}"


def in_a_process(model_type: str) -> str:
    """Return what a family does, tried in a child process that is given up after a while."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        transformers.logging.set_verbosity_error()
        os.write(writer, seen_of(model_type).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    return text or f"not built: the process ended with signal {os.WTERMSIG(status)}"


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    lines = []
    for model_type in names or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        lines.append(f"| {model_type} | {in_a_process(model_type)} |")
        print(lines[-1], flush=True)
    if not names:
        TABLE.write_text("\n".join([HEADER.format(version=transformers.__version__), *lines]) + "\n")


def lines_of(table: str) -> dict[str, str]:
    """Return what a table says was seen, by family."""
    rows = [line.split(" | ", 1) for line in table.splitlines() if line.startswith("| ")][2:]
    return {family.removeprefix("| "): seen.removesuffix(" |") for family, seen in rows}


HEADER = """# Every family of transformers' causal mapping

What a tiny random target of each did beside a drafter that reads its last layer, a single prompt and a padded batch
of two, greedily, with transformers {version}: the text was plain decoding's (exact), the call was refused and why,
plain `generate` itself fails, or no tiny target could be built and why. `python -m tests.families.causal_mapping`
writes it.

| family | seen |
| --- | --- |"""


if __name__ == "__main__":
    main(sys.argv[1:])
