"""A drafter's forward written out in plain torch, straight from how its makers run it: one text, no cache, no batch.

It shares no code with the package. `log_probs` gives what the drafter says of every token in every slot.
"""

import math

import torch
from torch.nn import functional as F


def stored_value(stored: dict, *names, default=None):
    """Return a field from wherever published files keep it."""
    for place in (stored.get("dflash_config") or {}, stored, stored.get("transformer_layer_config") or {}):
        for name in names:
            if place.get(name) is not None:
                return place[name]
    return default


def norm(states, weight, eps):
    return states / (states.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


class Reference:
    """One checkpoint beside its target.

    Args:
        stored (`dict`):
            Its `config.json`.
        tensors (`dict[str, torch.Tensor]`):
            Its tensors, under the names of the file.
        target ([`PreTrainedModel`]):
            The target.
    """

    def __init__(self, stored: dict, tensors: dict, target):
        self.stored, self.target = stored, target
        self.layout = (
            "speculators" if "speculators_model_type" in stored else
            "native" if "encoder.fc.weight" in tensors else
            "published"
        )  # fmt: skip
        renames = {"model.": "", "encoder.fc": "fc", "encoder.output_norm_enc": "hidden_norm"}
        renames |= {"logit_head.": "", "markov_head.": "", "ar_approximation.": "ar."}
        self.tensors = {}
        for name, value in tensors.items():
            for old, new in renames.items():
                if name.startswith(old):
                    name = new + name[len(old) :]
            self.tensors[name] = value.float() if value.is_floating_point() else value
        self.hidden = self.get("hidden_size")
        self.heads = self.get("num_attention_heads")
        self.kv_heads = self.get("num_key_value_heads", default=self.heads)
        self.head_dim = self.get("head_dim", default=self.hidden // self.heads)
        self.layers = self.get("num_hidden_layers")
        self.eps = self.get("rms_norm_eps", default=1e-6)
        self.block = self.get("block_size")

    def get(self, *names, default=None):
        return stored_value(self.stored, *names, default=default)

    # --- what the file asks for -----------------------------------------------------------------------------------

    def taps(self) -> list[int]:
        states = self.get("aux_hidden_state_layer_ids", "eagle_aux_hidden_state_layer_ids")
        if self.get("target_layer_ids") is not None:
            return self.get("target_layer_ids")
        if states is not None:
            return [state - 1 for state in states]
        count = self.get("num_target_layers")
        if self.layers == 1:
            return [count // 2]
        return [round(1 + i * (count - 4) / (self.layers - 1)) for i in range(self.layers)]

    def first_slot(self) -> int:
        dspark = (
            "Qwen3DSparkModel" in self.get("architectures", default=[])
            or self.get("speculators_model_type") == "dspark"
            or self.get("projector_type") == "dspark"
        )
        return 0 if self.get("sample_from_anchor", "shift_label", default=dspark) else 1

    def is_sliding(self, layer: int) -> bool:
        kinds = self.get("layer_types")
        if kinds is not None:
            return kinds[layer] == "sliding_attention"
        if self.get("use_sliding_window"):
            return layer >= self.get("max_window_layers", default=28)
        return False

    def is_causal(self, layer: int) -> bool:
        said = self.get("is_causal", "causal", "causal_head")
        if said is not None:
            return said
        if self.layout == "native":
            return False
        if self.layout == "speculators":
            return self.is_sliding(layer) and not self.get("sliding_window_non_causal", default=False)
        return self.is_sliding(layer)

    def sees(self, layer: int, slot: int, key: int, anchor: int) -> bool:
        """Whether slot `slot` of the block at `anchor` sees position `key` (of the context if below the anchor)."""
        query = anchor + slot
        any_sliding = any(map(self.is_sliding, range(self.layers)))
        by_swa = bool(self.get("use_swa")) and not any_sliding
        window = self.get("swa_window_size") or self.get("sliding_window")
        if not (self.is_sliding(layer) or by_swa):
            window = None
        if key < anchor:
            if window is None:
                return True
            if self.layout == "native":
                return query - key <= window
            if self.layout == "speculators":
                return anchor - key <= window
            return query - key < window
        if self.is_causal(layer) and key > query:
            return False
        if window is None or by_swa or self.layout == "speculators":
            return True
        return abs(query - key) <= window if self.layout == "native" else abs(query - key) < window

    # --- rotary embedding -----------------------------------------------------------------------------------------

    def frequencies(self, layer: int):
        """Return inverse frequencies and the factor on cosines and sines."""
        rope = self.get("rope_parameters", "rope_scaling", default={})
        kind = "sliding_attention" if self.is_sliding(layer) else "full_attention"
        rope = rope.get(kind, rope)
        theta = rope.get("rope_theta", self.get("rope_theta", default=10000.0))
        part = rope.get("partial_rotary_factor", self.get("partial_rotary_factor", default=1.0))
        width = int(self.head_dim * part)
        base = torch.tensor([theta ** -(i / width) for i in range(0, width, 2)])
        name = rope.get("rope_type", rope.get("type", "default"))
        longest = rope.get("original_max_position_embeddings") or self.get("max_position_embeddings")
        factor = rope.get("factor", 1.0)
        if name == "default":
            return base, 1.0
        if name == "linear":
            return base / factor, 1.0
        if name == "llama3":
            low, high = longest / rope["low_freq_factor"], longest / rope["high_freq_factor"]
            scaled = []
            for frequency in base.tolist():
                wave = 2 * math.pi / frequency
                if wave > low:
                    frequency /= factor
                elif wave >= high:
                    share = (longest / wave - rope["low_freq_factor"]) / (
                        rope["high_freq_factor"] - rope["low_freq_factor"]
                    )
                    frequency = (1 - share) * frequency / factor + share * frequency
                scaled.append(frequency)
            return torch.tensor(scaled), 1.0
        assert name == "yarn"

        def dimension(turns: float) -> float:
            return width * math.log(longest / (turns * 2 * math.pi)) / (2 * math.log(theta))

        first = max(math.floor(dimension(rope.get("beta_fast", 32))), 0)
        last = min(math.ceil(dimension(rope.get("beta_slow", 1))), width - 1)
        ramp = ((torch.arange(width // 2) - first) / (last - first if last != first else 0.001)).clamp(0, 1)
        return base / factor * ramp + base * (1 - ramp), 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0

    def rotated(self, states, positions, layer: int):
        """Rotate `(length, heads, head_dim)`."""
        inverse, factor = self.frequencies(layer)
        angles = positions[:, None].float() * inverse
        cos, sin = (angles.cos() * factor)[:, None], (angles.sin() * factor)[:, None]
        width = 2 * len(inverse)
        turned, kept = states[..., :width], states[..., width:]
        if self.get("is_neox_style", "rope_is_neox_style", default=True):
            a, b = turned.chunk(2, dim=-1)
            turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        else:
            a, b = turned[..., ::2], turned[..., 1::2]
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
        return torch.cat([turned, kept], dim=-1)

    # --- forward --------------------------------------------------------------------------------------------------

    def linear(self, name: str, states):
        return F.linear(states, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def embed(self, ids):
        embedding = self.target.get_input_embeddings()
        scale = self.get("input_embedding_scale")
        if scale is not None or hasattr(embedding, "embed_norm"):
            return embedding.weight[ids] * (1.0 if scale is None else scale)
        return embedding(ids)

    def attention(self, layer: int, block, context, anchor: int):
        name, source = f"layers.{layer}.self_attn", torch.cat([context, block])
        positions = torch.arange(anchor + self.block)
        query = self.linear(f"{name}.q_proj", block).view(self.block, self.heads, self.head_dim)
        key = self.linear(f"{name}.k_proj", source).view(-1, self.kv_heads, self.head_dim)
        value = self.linear(f"{name}.v_proj", source).view(-1, self.kv_heads, self.head_dim)
        query = self.rotated(norm(query, self.tensors[f"{name}.q_norm.weight"], self.eps), positions[anchor:], layer)
        key = self.rotated(norm(key, self.tensors[f"{name}.k_norm.weight"], self.eps), positions, layer)
        outputs = torch.zeros(self.block, self.heads, self.head_dim)
        for slot in range(self.block):
            seen = [k for k in range(anchor + self.block) if self.sees(layer, slot, k, anchor)]
            for head in range(self.heads):
                group = head // (self.heads // self.kv_heads)
                weights = (key[seen, group] @ query[slot, head] / self.head_dim**0.5).softmax(0)
                outputs[slot, head] = weights @ value[seen, group]
        return self.linear(f"{name}.o_proj", outputs.flatten(1))

    def block_states(self, text, anchor: int):
        """Return the block's states before the final norm."""
        with torch.no_grad():
            states = self.target(text[None, :anchor], output_hidden_states=True).hidden_states
        context = torch.cat([states[tap + 1][0] for tap in self.taps()], dim=-1)
        context = norm(self.linear("fc", context), self.tensors["hidden_norm.weight"], self.eps)
        mask = self.get("mask_token_id")
        block = self.embed(torch.tensor([int(text[anchor]), *[mask] * (self.block - 1)]))
        for layer in range(self.layers):
            name = f"layers.{layer}"
            normed = norm(block, self.tensors[f"{name}.input_layernorm.weight"], self.eps)
            before, after = self.convolutions(f"{name}.attention_conv", normed)
            block = block + after(self.attention(layer, before(normed), context, anchor))
            normed = norm(block, self.tensors[f"{name}.post_attention_layernorm.weight"], self.eps)
            before, after = self.convolutions(f"{name}.mlp_conv", normed)
            mixed = before(normed)
            gate = F.silu(self.linear(f"{name}.mlp.gate_proj", mixed))
            block = block + after(
                self.linear(f"{name}.mlp.down_proj", gate * self.linear(f"{name}.mlp.up_proj", mixed))
            )
        return block

    def convolutions(self, name: str, states):
        """Return what mixes the slots before a sublayer and behind it; both kernels come from what goes in."""
        taps = self.get("conv_kernel_size", default=0)
        if not taps:
            return (lambda mixed: mixed), (lambda mixed: mixed)
        base, size = self.tensors[f"{name}.base_kernel"], self.get("conv_group_size")
        delta = (states @ self.tensors[f"{name}.kernel_projection.weight"].T).view(self.block, 2, taps, -1)

        def along_block(side: int):
            def mix(mixed):
                result = torch.zeros_like(mixed)
                for slot in range(self.block):
                    for tap in range(min(taps, slot + 1)):
                        of_groups = delta[slot, side, tap][torch.arange(self.hidden) // size]
                        result[slot] += (base[side, tap] + of_groups) * mixed[slot - tap]
                return result

            return mix

        return along_block(0), along_block(1)

    def rows_by_head(self, normed):
        """Return the logits of a head that adds to a slot's own, `(depth, vocab, vocab)` by previous token."""
        base, tensors = self.logits(normed), self.tensors
        selects = self.get("selector_rank")
        names = ("predecessor_codebook", "successor_codebook") if selects else ("markov_w1.weight", "markov_w2.weight")
        previous, following = (tensors[f"candidate_selector.{name}" if selects else name] for name in names)
        if "d2t" in tensors:
            whole = torch.zeros(len(previous), following.shape[1])
            whole[torch.arange(len(following)) + tensors["d2t"]] = following
            following = whole
        rows = []
        for token in range(len(previous)):
            code = previous[token].expand(len(normed), -1)
            if selects:
                code = code * (normed @ tensors["candidate_selector.hidden_projection.weight"].T)
            elif self.get("markov_head_type") == "gated":
                code = code * torch.sigmoid(self.linear("gate_proj", torch.cat([normed, code], dim=-1)))
            rows.append(base + code @ following.T)
        logits = torch.stack(rows, dim=1)
        if selects:
            least = base.topk(self.get("selector_top_k"), dim=-1).values[:, -1]
            logits[(base < least[:, None])[:, None].expand_as(logits)] = float("-inf")
        return logits

    def logits(self, states):
        """Return scaled logits over the target's vocabulary, -inf where the drafter has no token."""
        config = self.target.config.get_text_config(decoder=True)
        multiplier = self.get("output_multiplier", "logit_scale", default=getattr(config, "output_multiplier", 1.0))
        cap = self.get("final_logit_softcapping", default=getattr(config, "final_logit_softcapping", None))
        if "d2t" in self.tensors:
            products = states @ self.tensors["lm_head.weight"].T
        else:
            products = self.target.get_output_embeddings()(states)
        products = products * multiplier
        if cap is not None:
            products = cap * torch.tanh(products / cap)
        if "d2t" not in self.tensors:
            return products
        tokens = torch.arange(len(self.tensors["d2t"])) + self.tensors["d2t"]
        whole = torch.full((*products.shape[:-1], config.vocab_size), float("-inf"))
        whole[..., tokens] = products
        return whole

    @torch.no_grad()
    def log_probs(self, text: torch.Tensor, anchor: int) -> torch.Tensor:
        """Return what the drafter says after `text[: anchor + 1]`.

        Args:
            text (`torch.LongTensor` of shape `(length,)`):
                Committed tokens.
            anchor (`int`):
                Place of the newest of them.

        Returns:
            `torch.FloatTensor` of shape `(depth, vocab)`, or `(depth, vocab, vocab)` with a head, by previous token.
        """
        states = self.block_states(text, anchor)[self.first_slot() :]
        weight = self.tensors["norm.weight"]
        if self.get("markov_rank") or self.get("selector_rank"):
            return self.rows_by_head(norm(states, weight, self.eps)).log_softmax(-1)
        if "ar.ug.weight" not in self.tensors:
            return self.logits(norm(states, weight, self.eps)).log_softmax(-1)
        by_token = []
        for token in range(self.target.config.get_text_config(decoder=True).vocab_size):
            previous = norm(self.embed(torch.tensor(token)), self.tensors["ar.norm.weight"], 1e-6)
            joined = torch.cat([previous.expand_as(states), norm(states, weight, self.eps)], dim=-1)
            linear, gate = self.linear("ar.ug", joined).chunk(2, dim=-1)
            corrected = states + self.linear("ar.d", F.silu(gate) * linear)
            by_token.append(self.logits(norm(corrected, weight, self.eps)).log_softmax(-1))
        return torch.stack(by_token, dim=1)
