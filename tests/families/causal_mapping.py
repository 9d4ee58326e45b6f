"""Every family of transformers' causal mapping beside a drafter: `python -m tests.families.causal_mapping`.

Each family's tiny target runs in a process of its own, as some of them crash or never end; the result is a table,
`causal_mapping.md`, of what was seen: exact, refused and why, or that plain `generate` itself fails.
"""

from pathlib import Path

from tests.tiny import VOCAB

TABLE = Path(__file__).with_name("causal_mapping.md")
SECONDS = 120  # for one family
LENGTH, NEW = 10, 24

# What makes a config small, by the names that the families use; each takes those it knows.
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "word_embed_proj_dim": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "num_hidden_layers": 4,
    "num_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "init_std": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "is_decoder": True,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "attention_dropout": 0.0,
}
