"""Tiny random targets with recurrent layers, whose decays range from none to strong."""

import torch

from tests.families.models import IMAGE_END, IMAGE_START, SMALL_VISION, Family

LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DEEPSEEK_MOE = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
}
MAMBA2 = {"mamba_d_state": 16, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_chunk_size": 8}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
RECURRENT_FIRST = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]


class Hybrid(Family):
    """A family with recurrent layers."""

    def build(self, seed: int = 0, **overrides):
        """Return an untrained target whose recurrent layers forget at speeds of their own."""
        target = super().build(seed, **overrides)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in target.named_parameters():
            if name.rpartition(".")[2] in ("A_log", "dt_bias"):
                spread = torch.rand(parameter.shape, generator=generator)
                parameter.data = (5 * spread - 3 if name.endswith("A_log") else 4 * spread - 3).to(parameter.dtype)
        return target


HYBRIDS = [
    Hybrid(
        "Qwen3-Next",
        "Qwen3NextConfig",
        {**LINEAR, **MOE, "shared_expert_intermediate_size": 24, "layer_types": RECURRENT_FIRST},
        "gated delta and full, experts",
    ),
    Hybrid("Qwen3.5", "Qwen3_5TextConfig", {**LINEAR, "layer_types": RECURRENT_FIRST}, "gated delta and full"),
    Hybrid(
        "Qwen3.5-MoE",
        "Qwen3_5MoeTextConfig",
        {**LINEAR, **MOE, "shared_expert_intermediate_size": 24, "layer_types": RECURRENT_FIRST},
        "gated delta and full, experts",
    ),
    Hybrid(
        "OLMo-hybrid",
        "OlmoHybridConfig",
        {**LINEAR, "layer_types": RECURRENT_FIRST, "linear_allow_neg_eigval": True},
        "gated delta with updates up to 2, and full",
    ),
    Hybrid(
        "Kimi-Linear",
        "KimiLinearConfig",
        {
            **DEEPSEEK_MOE,
            **MLA,
            "linear_num_heads": 4,
            "linear_head_dim": 8,
            "layer_types": RECURRENT_FIRST,
            "first_k_dense_replace": 1,
        },
        "Kimi delta and full (latent)",
    ),
    Hybrid(
        "Bailing-hybrid",
        "BailingHybridConfig",
        {
            **DEEPSEEK_MOE,
            **MLA,
            "linear_num_heads": 4,
            "linear_head_dim": 8,
            "layer_types": RECURRENT_FIRST,
            "first_k_dense_replace": 1,
        },
        "Kimi delta and full (latent)",
    ),
    Hybrid("Bamba", "BambaConfig", {**MAMBA2, "attn_layer_indices": [2]}, "Mamba-2 and full"),
    Hybrid(
        "Granite-4-hybrid",
        "GraniteMoeHybridConfig",
        {
            **MAMBA2,
            "layer_types": RECURRENT_FIRST,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 24,
        },
        "Mamba-2 and full, experts",
    ),
    Hybrid(
        "Nemotron-H",
        "NemotronHConfig",
        {
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 2,
            "chunk_size": 8,
            "n_routed_experts": 4,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 24,
        },
        "Mamba-2, full, and layers of experts or MLPs alone",
    ),
    Hybrid("Falcon-H1", "FalconH1Config", {**MAMBA2, "mamba_d_ssm": 64}, "Mamba-2 and full in every layer"),
    Hybrid(
        "Zamba2",
        "Zamba2Config",
        {
            "mamba_d_state": 16,
            "n_mamba_heads": 4,
            "mamba_ngroups": 2,
            "chunk_size": 8,
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
            # At the others' 0.3 transformers' own two forms, of many tokens and of one, differ by up to 0.04.
            "initializer_range": 0.2,
        },
        "Mamba-2, and full beside it in some layers",
    ),
    Hybrid(
        "Jamba",
        "JambaConfig",
        {"num_experts": 2, "mamba_d_state": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
        "Mamba-1 and full, experts",
    ),
    Hybrid(
        "LFM2", "Lfm2Config", {"layer_types": ["conv", "conv", "full_attention", "conv"]}, "short convolution and full"
    ),
    Hybrid(
        "LFM2-MoE",
        "Lfm2MoeConfig",
        {**MOE, "layer_types": ["conv", "conv", "full_attention", "conv"], "num_dense_layers": 1},
        "short convolution and full, experts",
    ),
    Hybrid(
        "LFM3",
        "Lfm3Config",
        {"layer_types": ["conv", "sliding_attention", "full_attention", "conv"], "sliding_window": 12},
        "short convolution, full and sliding",
    ),
    Hybrid(
        "Lara-mini",
        "LaraMiniConfig",
        {
            **LINEAR,
            **MOE,
            "layer_types": ["linear_attention", "sliding_attention", "full_attention", "linear_attention"],
            "sliding_window": 12,
        },
        "gated delta, full and sliding, experts",
    ),
    Hybrid(
        "Qwen3.5 with images",
        "Qwen3_5Config",
        {
            **LINEAR,
            "layer_types": RECURRENT_FIRST,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
                "partial_rotary_factor": 1.0,
            },
        },
        "gated delta and full, image in the prompt, three position axes",
        model="Qwen3_5ForConditionalGeneration",
        vision={
            "outer": {"vision_start_token_id": IMAGE_START, "vision_end_token_id": IMAGE_END},
            "inner": {
                **SMALL_VISION,
                "depth": 2,
                "num_heads": 2,
                "spatial_merge_size": 2,
                "temporal_patch_size": 1,
                "out_hidden_size": 32,
                "num_position_embeddings": 16,
            },
            "pixels": 48,
            "typed": True,
        },
    ),
]

# Transformers' Mamba-1 cannot go on from a cache with several tokens.
FIRST_TURN_ONLY = {"Jamba"}

UNKNOWN_STATE = "keeps a state in a way that is not known here"
INDEXED = "attend to what a learned index chooses among all columns"
INDEX = {**MLA, "q_lora_rank": 16, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 8}
# Families that are refused, with the reason as the message has it.
REFUSED: list[tuple[Family, str]] = [
    (
        Family(
            "MiniMax",
            "MiniMaxConfig",
            {"num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"] * 2},
            "lightning attention and full",
        ),
        UNKNOWN_STATE,
    ),
    (
        Family(
            "RecurrentGemma",
            "RecurrentGemmaConfig",
            {"lru_width": 32, "attention_window_size": 12},
            "gated linear recurrence and sliding",
        ),
        UNKNOWN_STATE,
    ),
    (Family("RWKV", "RwkvConfig", {"attention_hidden_size": 32}, "time mixing"), UNKNOWN_STATE),
    (Family("xLSTM", "xLSTMConfig", {"num_heads": 4, "num_blocks": 4}, "matrix LSTM"), UNKNOWN_STATE),
    (Family("Mamba", "MambaConfig", {"state_size": 4}, "Mamba-1 alone"), "do not count the tokens they have read"),
    (
        Family(
            "Zamba",
            "ZambaConfig",
            {"mamba_d_state": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
            "Mamba-1 with heads, and full beside it",
        ),
        "splits its channels into heads with a state each",
    ),
    (
        Family(
            "Gemma 3n",
            "Gemma3nTextConfig",
            {
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "num_kv_shared_layers": 2,
                "vocab_size_per_layer_input": 24,
                "hidden_size_per_layer_input": 8,
                "laurel_rank": 8,
                "altup_num_inputs": 2,
                "activation_sparsity_pattern": [0.0] * 4,
            },
            "full and sliding, several states per token",
        ),
        "gives several states per token",
    ),
    (Family("Inkling", "InklingTextConfig", {}, "convolutions in attention"), "keep several convolutions each"),
    (
        Family(
            "Qwen4-exp",
            "Qwen4ExpTextConfig",
            {
                **LINEAR,
                **MOE,
                "indexer_n_heads": 2,
                "indexer_kv_heads": 1,
                "indexer_head_dim": 8,
                "indexer_budget": 8,
                "indexer_compress_ratio": 2,
                "ngram_vocab_size_base": 64,
                "make_ngram_vocab_size_divisible_by": 8,
                "split_ngram_parts": 1,
            },
            "gated delta and indexed",
        ),
        INDEXED,
    ),
    (Family("DeepSeek-V3.2", "DeepseekV32Config", {**DEEPSEEK_MOE, **INDEX}, "indexed"), INDEXED),
]
