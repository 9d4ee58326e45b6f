"""The references of the small golden pair, in plain torch alone: no transformers, and nothing of this package.

Slow and simple on purpose: every forward starts from the first token, there are no caches and no masks but the causal
one, and a tree is grown one node at a time.
"""

import heapq
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn import functional as F

FOLDER = Path(__file__).parent
VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER = 64, 48, 4, 2, 16, 96
LAYERS, TAPS, DRAFT_LAYERS, BLOCK, MASK = 6, (1, 3), 2, 8, 1
NODES, CANDIDATES, BRANCHING, NEW_TOKENS, PROMPTS = 16, 8, 8, 48, 6
EPS, BASE = 1e-6, 10000.0

Weights = dict[str, torch.Tensor]


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Turn each pair (i, i + half) of a head `(batch, heads, length, size)` by its position."""
    half = x.shape[-1] // 2
    angles = positions[:, None].float() * BASE ** (-torch.arange(half).float() / half)
    cos, sin = angles.cos(), angles.sin()
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def heads(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (x @ weight.T).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)


def attend(w: Weights, at: str, queries, source, query_positions, source_positions, mask) -> torch.Tensor:
    query = rotate(norm(heads(queries, w[f"{at}.q_proj.weight"]), w[f"{at}.q_norm.weight"]), query_positions)
    key = rotate(norm(heads(source, w[f"{at}.k_proj.weight"]), w[f"{at}.k_norm.weight"]), source_positions)
    value = heads(source, w[f"{at}.v_proj.weight"])
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) / HEAD_DIM**0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2) @ w[f"{at}.o_proj.weight"].T


def mlp(w: Weights, at: str, x: torch.Tensor) -> torch.Tensor:
    return (F.silu(x @ w[f"{at}.gate_proj.weight"].T) * (x @ w[f"{at}.up_proj.weight"].T)) @ w[
        f"{at}.down_proj.weight"
    ].T


def run_target(w: Weights, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits, and the outputs of the tapped layers side by side."""
    x, taps = w["model.embed_tokens.weight"][ids], []
    positions = torch.arange(ids.shape[1])
    causal = positions[:, None] >= positions
    for number in range(LAYERS):
        at = f"model.layers.{number}"
        normed = norm(x, w[f"{at}.input_layernorm.weight"])
        x = x + attend(w, f"{at}.self_attn", normed, normed, positions, positions, causal)
        x = x + mlp(w, f"{at}.mlp", norm(x, w[f"{at}.post_attention_layernorm.weight"]))
        if number in TAPS:
            taps.append(x)
    return norm(x, w["model.norm.weight"]) @ w["model.embed_tokens.weight"].T, torch.cat(taps, dim=-1)


def run_drafter(w: Weights, embedding: torch.Tensor, states: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Return a block's states before the final norm, given the target's states of all tokens before the anchor."""
    context = norm(states @ w["model.fc.weight"].T, w["model.hidden_norm.weight"])
    x = embedding[torch.cat([anchors[:, None], torch.full((len(anchors), BLOCK - 1), MASK)], dim=1)]
    positions = torch.arange(context.shape[1] + BLOCK)
    for number in range(DRAFT_LAYERS):
        at = f"model.layers.{number}"
        normed = norm(x, w[f"{at}.input_layernorm.weight"])
        source = torch.cat([context, normed], dim=1)
        x = x + attend(w, f"{at}.self_attn", normed, source, positions[-BLOCK:], positions, None)
        x = x + mlp(w, f"{at}.mlp", norm(x, w[f"{at}.post_attention_layernorm.weight"]))
    return x


def correct(w: Weights, h: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    """Return a slot's state corrected for the token before it, given as an embedding; before the final norm."""
    both = torch.cat([norm(previous, w["ar_approximation.norm.weight"]), norm(h, w["model.norm.weight"])], dim=-1)
    u, g = (both @ w["ar_approximation.ug.weight"].T + w["ar_approximation.ug.bias"]).chunk(2, dim=-1)
    return h + (F.silu(g) * u) @ w["ar_approximation.d.weight"].T


def grow_tree(root: int, row_after) -> dict:
    """Grow the most probable tree one node at a time.

    Args:
        root (`int`):
            The anchor.
        row_after (`Callable[[int, int], list | None]`):
            Given the depth of a node and its token, the (token, log-probability) pairs that may follow, best first.
    """
    tokens, parents, depths, scores = [root], [-1], [0], [0.0]
    waiting: list = []

    def offer(node: int, ranks: tuple) -> None:
        for rank, (token, log_prob) in enumerate(row_after(depths[node], tokens[node]) or []):
            path = (*ranks, rank)
            heapq.heappush(waiting, (-(scores[node] + log_prob), len(path), path, node, token))

    offer(0, ())
    while waiting and len(tokens) < NODES:
        score, depth, ranks, parent, token = heapq.heappop(waiting)
        tokens.append(token)
        parents.append(parent)
        depths.append(depth)
        scores.append(-score)
        offer(len(tokens) - 1, ranks)
    return {"tokens": tokens, "depths": depths, "parents": parents, "cum_logprob": scores}


def draft(target: Weights, drafter: Weights, ids: list[int], with_head: bool) -> dict:
    """Return the tree that follows a text, whose last token is the anchor."""
    embedding = target["model.embed_tokens.weight"]
    _, states = run_target(target, torch.tensor([ids[:-1]]))
    (h,) = run_drafter(drafter, embedding, states, torch.tensor(ids[-1:]))

    def best(state: torch.Tensor) -> list[tuple[int, float]]:
        log_probs = (norm(state, drafter["model.norm.weight"]) @ embedding.T).log_softmax(-1)
        top = log_probs.topk(BRANCHING)
        return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))

    def row_after(depth: int, token: int):
        slot = depth + 1
        if slot == BLOCK:
            return None
        if not with_head:
            return best(h[slot])
        shortlist = [candidate for candidate, _ in best(h[depth])[:CANDIDATES]]
        if depth > 0 and token not in shortlist:
            return None
        return best(correct(drafter, h[slot], embedding[token]))

    return grow_tree(ids[-1], row_after)


def greedy(target: Weights, ids: list[int], count: int) -> tuple[list[int], float]:
    """Return a text's greedy continuation, and the smallest gap between a chosen logit and the next best."""
    ids, gap = list(ids), float("inf")
    for _ in range(count):
        top = run_target(target, torch.tensor([ids]))[0][0, -1].topk(2)
        gap = min(gap, float(top.values[0] - top.values[1]))
        ids.append(int(top.indices[0]))
    return ids[-count:], gap


def decode(target: Weights, drafter: Weights, prompt: list[int], text: list[int], with_head: bool) -> tuple:
    """Return the tokens committed per round and the first tree; the text is known, so no tree has to be verified."""
    done, acceptance, first = 1, [], None
    while done < NEW_TOKENS:
        tree = draft(target, drafter, prompt + text[:done], with_head)
        first = first or tree
        node, accepted = 0, 1
        while True:
            children = {tree["tokens"][i]: i for i, parent in enumerate(tree["parents"]) if parent == node}
            if text[done + accepted - 1] not in children:
                break
            node = children[text[done + accepted - 1]]
            accepted += 1
        acceptance.append(accepted)
        done += accepted
    return acceptance, first


@torch.no_grad()
def references(target: Weights, drafter: Weights, prompts: list[list[int]]) -> dict:
    meta = {"max_new_tokens": NEW_TOKENS, "block_size": BLOCK, "tree_size": NODES, "top_m": CANDIDATES}
    meta |= {"top_k": BRANCHING, "drafter_temperature": 1.0, "mask_token_id": MASK}
    record = {"meta": meta, "prompts": []}
    for prompt in prompts:
        text, gap = greedy(target, prompt, NEW_TOKENS + BLOCK)
        entry = {"prompt_ids": prompt, "output_ids": text[:NEW_TOKENS], "min_top2_gap": gap}
        for with_head, acceptance, tree in (
            (True, "treeflash_acceptance", "first_tree"),
            (False, "marginal_tree_acceptance", "marginal_first_tree"),
        ):
            entry[acceptance], entry[tree] = decode(target, drafter, prompt, text, with_head)
        record["prompts"].append(entry)
    return record


def load_pair() -> tuple[Weights, Weights]:
    """Return the stored weights of target and drafter, in float32."""
    files = [load_file(FOLDER / name / "model.safetensors") for name in ("target", "drafter-official")]
    target, drafter = ({key: value.float() for key, value in file.items()} for file in files)
    return target, drafter


def stored_references() -> dict:
    """Return what `golden.json` holds."""
    return json.loads((FOLDER / "golden.json").read_text())
