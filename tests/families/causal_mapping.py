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

import hf_treeflash  # noqa: F401
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
    "image_size": 32,
    "patch_size": 8,
}
MLA = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16}
MLA |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "qk_head_dim": 12, "v_head_dim": 8, "head_dim": 4}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4, "mamba_expand": 2}
# What single families need beside that.
OWN: dict[str, dict] = {
    **dict.fromkeys(
        (
            "axk1",
            "axk2",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "glm_moe_dsa",
            "minicpm3",
            "sarvam_mla",
            "youtu",
        ),
        MLA,
    ),
    "longcat_flash": MLA | {"num_layers": 2, "num_hidden_layers": 4, "ffn_hidden_size": 48, "zero_expert_num": 2},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2},
    "gemma4_text": {"vocab_size_per_layer_input": 24, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    "bamba": MAMBA2 | {"attn_layer_indices": [1]},
    "granitemoehybrid": MAMBA2 | {"layer_types": ["mamba", "attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1, "state_size": 4},
    "jamba": {"num_experts": 2, "mamba_d_state": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "plbart": {"encoder_attention_heads": 4},
    "whisper": {"encoder_attention_heads": 4},
    "blenderbot": {"encoder_layers": 4},
    "dots1": {"n_shared_experts": 1},
    "reformer": {"axial_pos_embds": False},
}


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
    config = small_config(CONFIG_MAPPING[model_type], OWN.get(model_type))
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
        return f"no tiny target: {told(error)}"
    ids = torch.randint(4, VOCAB - 4, (2, LENGTH), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, :3], ids[1, :3] = 0, 2
    for inputs in ({"input_ids": ids[:1]}, {"input_ids": ids, "attention_mask": mask}):
        try:
            plain = target.generate(**inputs, **GREEDY)
        except Exception as error:
            return f"plain `generate` fails: {told(error)}"
        taps = [0, 3] if len(inputs) == 1 else [0, 2]
        drafter = with_knobs(tiny_drafter(target_layer_ids=taps, num_target_layers=None), tree_budget=12)
        try:
            tree = target.generate(**inputs, assistant_model=drafter, **GREEDY)
        except ValueError as error:
            return f"refused: {' '.join(str(error).split()).replace('|', '/')}"
        except Exception as error:
            return f"CRASHES: {told(error)}"
        if not torch.equal(plain, tree):
            return f"DIFFERS in a batch of {len(plain)}"
    return "exact"


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
    return text or f"no tiny target: the process ended with signal {os.WTERMSIG(status)}"


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    lines = []
    for model_type in names or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        lines.append(f"| {model_type} | {in_a_process(model_type)} |")
        print(lines[-1], flush=True)
    if not names:
        TABLE.write_text("\n".join([HEADER.format(version=transformers.__version__), *lines]) + "\n")


HEADER = """# Every family of transformers' causal mapping

What a tiny random target of each did beside a drafter that reads its last layer, a single prompt and a padded batch
of two, greedily, with transformers {version}. Written by `python -m tests.families.causal_mapping`.

| family | seen |
| --- | --- |"""


if __name__ == "__main__":
    main(sys.argv[1:])
