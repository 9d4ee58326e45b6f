"""Makes the small golden pair: a target that learns a random language, and a drafter that learns the target.

    python tests/golden_small/make.py    # about three minutes of a CPU

It writes the pair in the published layouts, and beside it the references (see reference.py).
"""

import json

import torch
from reference import (
    BASE,
    BLOCK,
    DRAFT_LAYERS,
    EPS,
    FOLDER,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INNER,
    KV_HEADS,
    LAYERS,
    MASK,
    PROMPTS,
    TAPS,
    VOCAB,
    Weights,
    correct,
    norm,
    references,
    run_drafter,
    run_target,
)
from safetensors.torch import save_file
from torch.nn import functional as F


def new_language() -> torch.Tensor:
    """Return next-token probabilities by (token before the last, modulo 3; last token); 0 and 1 are never spoken."""
    table = torch.zeros(3, VOCAB, VOCAB)
    for group in range(3):
        for token in range(VOCAB):
            table[group, token, 2 + torch.randperm(VOCAB - 2)[:3]] = torch.tensor([0.6, 0.3, 0.1])
    return table


def speak(table: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    ids = torch.randint(2, VOCAB, (batch, 2))
    while ids.shape[1] < length:
        row = table[ids[:, -2] % 3, ids[:, -1]]
        ids = torch.cat([ids, torch.multinomial(row, 1)], dim=1)
    return ids


def layer_weights(prefix: str, count: int) -> Weights:
    shapes = {
        "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    ones = {"self_attn.q_norm": HEAD_DIM, "self_attn.k_norm": HEAD_DIM}
    ones |= {"input_layernorm": HIDDEN, "post_attention_layernorm": HIDDEN}
    weights = {}
    for number in range(count):
        at = f"{prefix}.{number}"
        weights |= {f"{at}.{name}.weight": torch.randn(shape) * shape[1] ** -0.5 for name, shape in shapes.items()}
        weights |= {f"{at}.{name}.weight": torch.ones(size) for name, size in ones.items()}
    return weights


def train(weights: Weights, loss_of, steps: int, rate: float) -> None:
    for value in weights.values():
        value.requires_grad_()
    optimizer = torch.optim.AdamW(weights.values(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for step in range(steps):
        loss = loss_of()
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            print(f"step {step + 1}: {loss.item():.3f}", flush=True)
    for name, value in weights.items():
        weights[name] = value.detach().bfloat16().float()


def train_pair() -> tuple[Weights, Weights, list[list[int]]]:
    table = new_language()
    target = {"model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN) * 0.3, "model.norm.weight": torch.ones(HIDDEN)}
    target |= layer_weights("model.layers", LAYERS)

    def target_loss() -> torch.Tensor:
        ids = speak(table, 32, 48)
        return F.cross_entropy(run_target(target, ids[:, :-1])[0].flatten(0, 1), ids[:, 1:].flatten())

    train(target, target_loss, 800, 3e-3)
    drafter = {
        "model.fc.weight": torch.randn(HIDDEN, len(TAPS) * HIDDEN) * (2 * HIDDEN) ** -0.5,
        "model.hidden_norm.weight": torch.ones(HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN),
        "ar_approximation.norm.weight": torch.ones(HIDDEN),
        "ar_approximation.ug.weight": torch.randn(2 * INNER, 2 * HIDDEN) * (2 * HIDDEN) ** -0.5,
        "ar_approximation.ug.bias": torch.zeros(2 * INNER),
        "ar_approximation.d.weight": torch.zeros(HIDDEN, INNER),
        **layer_weights("model.layers", DRAFT_LAYERS),
    }
    embedding = target["model.embed_tokens.weight"]

    def drafter_loss() -> torch.Tensor:
        anchor = int(torch.randint(4, 40, ()))
        ids = speak(table, 64, anchor + BLOCK)
        with torch.no_grad():
            logits, states = run_target(target, ids)
        h = run_drafter(drafter, embedding, states[:, :anchor], ids[:, anchor])[:, 1:]
        corrected = correct(drafter, h, embedding[ids[:, anchor:-1]])
        wanted = logits[:, anchor:-1].softmax(-1)
        losses = [
            F.cross_entropy((norm(x, drafter["model.norm.weight"]) @ embedding.T).flatten(0, 1), wanted.flatten(0, 1))
            for x in (h, corrected)
        ]
        return sum(losses)

    train(drafter, drafter_loss, 1500, 3e-3)
    return target, drafter, speak(table, PROMPTS, 32).tolist()


def write_pair(target: Weights, drafter: Weights) -> None:
    shape = {
        "model_type": "qwen3",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": EPS,
        "rope_parameters": {"rope_theta": BASE, "rope_type": "default"},
        "max_position_embeddings": 512,
        "vocab_size": VOCAB,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "dtype": "bfloat16",
    }
    draft_shape = {**shape, "num_hidden_layers": DRAFT_LAYERS, "num_target_layers": LAYERS, "block_size": BLOCK}
    # The official layout leaves the taps to the default rule; the other names them, and has neither prefix nor head.
    official = {**draft_shape, "architectures": ["TreeFlashDraftModel"], "dflash_config": {"mask_token_id": MASK}}
    official["treeflash_config"] = {"ar_approximation": "swiglu"}
    dflash = {**draft_shape, "architectures": ["DFlashDraftModel"]}
    dflash["dflash_config"] = {"mask_token_id": MASK, "target_layer_ids": list(TAPS)}
    backbone = {key.removeprefix("model."): value for key, value in drafter.items() if key.startswith("model.")}
    for name, config, weights in (
        ("target", {**shape, "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": LAYERS}, target),
        ("drafter-official", official, drafter),
        ("drafter-dflash", dflash, backbone),
    ):
        (FOLDER / name).mkdir(exist_ok=True)
        (FOLDER / name / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        stored = {key: value.bfloat16().contiguous() for key, value in weights.items()}
        save_file(stored, FOLDER / name / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    target, drafter, prompts = train_pair()
    write_pair(target, drafter)
    text = json.dumps(references(target, drafter, prompts))
    (FOLDER / "golden.json").write_text(text.replace('{"prompt_ids"', '\n{"prompt_ids"') + "\n")


if __name__ == "__main__":
    main()
