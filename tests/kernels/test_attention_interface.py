"""Tree attention inside transformers models: equal to SDPA with a dense 4-D mask, traced whole, never a guess."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)

from hf_treeflash.kernels import compact, dense_tree_mask, pack_ancestor_words
from hf_treeflash.kernels.attention_interface import register_tree_attention, tree_attention_forward

from .trees import ancestor_mask, random_parents

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
NODES, WINDOW = 20, 6


def make_model(kind: str, implementation: str):
    torch.manual_seed(0)
    if kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**TINY))
    elif kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**TINY))
    elif kind == "mistral":  # every layer has a window
        model = MistralForCausalLM(MistralConfig(**TINY, sliding_window=WINDOW))
    elif kind == "qwen3 mixed":
        windows = {"use_sliding_window": True, "sliding_window": WINDOW}
        types = ["full_attention", "sliding_attention"]
        model = Qwen3ForCausalLM(Qwen3Config(**TINY, **windows, layer_types=types))
    elif kind == "gemma2":  # windows in every other layer, soft-caps in all
        model = Gemma2ForCausalLM(Gemma2Config(**TINY, sliding_window=WINDOW, attn_logit_softcapping=0.5))
    else:  # windows in every other layer, sinks in all
        config = GptOssConfig(**TINY, sliding_window=WINDOW, num_local_experts=2, num_experts_per_tok=1)
        model = GptOssForCausalLM(config)
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.sinks)
    with torch.no_grad():  # default weights are so small that attention would hardly matter
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    model.set_attn_implementation(implementation)
    return model.eval()


def random_tree(batch: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, ancestor mask and depths."""
    generator = torch.Generator().manual_seed(seed)
    ancestors = ancestor_mask(random_parents(batch, NODES, generator))
    return torch.randint(1, 64, (batch, NODES), generator=generator), ancestors, ancestors.sum(-1) - 1


def left_padded_prompt(length: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    prompt = torch.randint(1, 64, (2, length), generator=torch.Generator().manual_seed(3))
    attention_mask = torch.ones_like(prompt)
    attention_mask[1, :4] = 0
    return prompt, attention_mask


def prefill(model, cache, prompt: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    return model(
        input_ids=prompt, attention_mask=attention_mask, position_ids=positions, past_key_values=cache, use_cache=True
    ).logits


def verify(model, cache, tokens, ancestors, depths, prefix, start) -> torch.Tensor:
    return model(
        input_ids=tokens,
        attention_mask=pack_ancestor_words(ancestors)[:, None],
        position_ids=(prefix - start)[:, None] + depths,
        past_key_values=cache,
        use_cache=True,
        tree_prefix=prefix,
        tree_start=start,
    ).logits


def verify_by_sdpa(model, cache, tokens, ancestors, depths, prefix, start) -> torch.Tensor:
    """The same forward with a dense additive mask, all rows at one prefix length."""
    length = int(prefix[0])
    sees = torch.ones(len(tokens), 1, NODES, length + NODES, dtype=torch.bool)
    sees[..., length:] = ancestors[:, None]
    sees &= torch.arange(length + NODES) >= start[:, None, None, None]
    mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
    positions = (prefix - start)[:, None] + depths
    return model(input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache).logits


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


class RowCache(DynamicCache):
    """A static cache whose rows have lengths of their own: updates are written at each row's length."""

    def __init__(self, cache: DynamicCache, slots: int):
        super().__init__()
        pad = (0, 0, 0, slots - cache.get_seq_length())
        self.tensors = [
            torch.nn.functional.pad(tensor, pad, value=float("nan"))
            for layer in cache.layers
            for tensor in (layer.keys, layer.values)
        ]
        self.lengths = torch.full((len(self.tensors[0]),), cache.get_seq_length())

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        batch = torch.arange(len(self.lengths)).unsqueeze(1)
        slots = self.lengths.unsqueeze(1) + torch.arange(key_states.shape[2])
        both = self.tensors[2 * layer_idx : 2 * layer_idx + 2]
        for tensor, states in zip(both, (key_states, value_states), strict=True):
            tensor.transpose(1, 2)[batch, slots] = states.transpose(1, 2)
        return both


@torch.no_grad()
@pytest.mark.parametrize("kernel", [False, True], ids=["oracle", "kernel"])
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_rounds_with_diverging_rows(request, kind, kernel):
    """Three rounds over one cache; every row must equal a run of its own, unpadded, through SDPA."""
    if kernel:
        if torch.cuda.is_available():
            pytest.skip("the models of this test live on the CPU")
        request.getfixturevalue("triton_kernels")
    model, plain = make_model(kind, register_tree_attention()), make_model(kind, "sdpa")
    prompt, attention_mask = left_padded_prompt()
    dynamic = DynamicCache()
    prefill(model, dynamic, prompt, attention_mask)
    cache = RowCache(dynamic, slots=80)
    start = 9 - attention_mask.sum(-1)
    texts = [prompt[0].tolist(), prompt[1, 4:].tolist()]
    for turn in range(3):
        tokens, ancestors, depths = random_tree(2, seed=turn)
        logits = verify(model, cache, tokens, ancestors, depths, cache.lengths, start)
        paths = []
        for row, text in enumerate(texts):
            own, single = DynamicCache(), slice(row, row + 1)
            prefill(plain, own, torch.tensor([text]), torch.ones(1, len(text), dtype=torch.int64))
            length, zero = torch.tensor([len(text)]), torch.tensor([0])
            expected = verify_by_sdpa(plain, own, tokens[single], ancestors[single], depths[single], length, zero)
            close(logits[row], expected[0])
            last = int(depths[row].argmax()) if (turn + row) % 2 else 1
            paths.append(ancestors[row, last].nonzero().flatten().tolist())
            text += tokens[row, paths[-1]].tolist()
        lengths = torch.tensor([len(path) for path in paths])
        padded = torch.tensor([path + [-1] * (int(lengths.max()) - len(path)) for path in paths])
        compact(cache.tensors, padded, lengths, cache.lengths)
        cache.lengths = cache.lengths + lengths
    assert len(texts[0]) != len(texts[1]) + 4


@torch.no_grad()
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_dynamic_cache_equals_sdpa(kind):
    model, plain = make_model(kind, register_tree_attention()), make_model(kind, "sdpa")
    prompt, attention_mask = left_padded_prompt()
    caches = DynamicCache(), DynamicCache()
    logits = [prefill(m, cache, prompt, attention_mask) for m, cache in zip((model, plain), caches, strict=True)]
    close(logits[0][:, -1], logits[1][:, -1])
    start, prefix = 9 - attention_mask.sum(-1), torch.full((2,), 9)
    tree = random_tree(2, seed=1)
    close(verify(model, caches[0], *tree, prefix, start), verify_by_sdpa(plain, caches[1], *tree, prefix, start))


@torch.no_grad()
@pytest.mark.parametrize("prompt_length", [2, 9])
@pytest.mark.parametrize("kind", ["mistral", "qwen3 mixed", "gemma2", "gpt_oss"])
def test_other_layers_equal_paths_run_alone(kind, prompt_length):
    """Windows, soft-caps and sinks: node logits are those of the text root-to-node path, run by the eager model."""
    model, plain = make_model(kind, register_tree_attention()), make_model(kind, "eager")
    prompt = left_padded_prompt(prompt_length)[0][:1]
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=64)):
        logits = prefill(model, cache, prompt, torch.ones_like(prompt))
        close(logits, plain(input_ids=prompt).logits)
        tokens, ancestors, depths = random_tree(1, seed=2)
        prefix, start = torch.tensor([prompt_length]), torch.tensor([0])
        logits = verify(model, cache, tokens, ancestors, depths, prefix, start)
        for node in (0, 1, 7, 19, int(depths.argmax())):
            text = torch.cat([prompt, tokens[:, ancestors[0, node]]], dim=1)
            close(logits[0, node], plain(input_ids=text).logits[0, -1])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_compiles_into_one_graph(kind):
    model = make_model(kind, register_tree_attention())
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    for length in (9, 12):
        prompt, attention_mask = left_padded_prompt(length)
        tree = random_tree(2, seed=length)
        prefix, start = torch.full((2,), length), length - attention_mask.sum(-1)
        results = []
        for forward in (model, compiled):
            cache = StaticCache(config=model.config, max_cache_len=64)
            prefill(model, cache, prompt, attention_mask)
            results.append(verify(forward, cache, *tree, prefix, start))
        close(*results)
    assert counter.frame_count == 1


def call(**changes):
    module = torch.nn.Module().eval()
    module.config = LlamaConfig(**TINY, **changes.pop("config", {}))
    module.layer_idx = 0
    tensor = torch.randn(1, 2, NODES, 16)
    arguments = {
        "attention_mask": pack_ancestor_words(random_tree(1, seed=0)[1])[:, None],
        "tree_prefix": torch.tensor([0]),
    }
    return tree_attention_forward(module, tensor, tensor, tensor, **(arguments | changes))[0]


def test_what_is_not_a_tree_call_raises():
    assert call().shape == (1, NODES, 2, 16)
    with pytest.raises(ValueError, match="no tree_prefix"):
        call(tree_prefix=None)
    with pytest.raises(ValueError, match="int64 attention_mask"):
        call(attention_mask=None)
    with pytest.raises(ValueError, match="dropout"):
        call(dropout=0.1)


def test_unknown_kinds_of_attention_raise():
    with pytest.raises(NotImplementedError, match="position_bias"):
        call(position_bias=torch.zeros(1, 2, NODES, NODES))
    with pytest.raises(NotImplementedError, match="chunked_attention"):
        call(config={"layer_types": ["chunked_attention", "full_attention"]})


def test_values_of_another_size_take_sdpa():
    module = torch.nn.Module()
    _, ancestors, _ = random_tree(1, seed=0)
    query, value = torch.randn(1, 2, NODES, 16), torch.randn(1, 2, NODES, 8)
    words = pack_ancestor_words(ancestors)[:, None]
    output, _ = tree_attention_forward(module, query, query, value, words, tree_prefix=torch.tensor([0]))
    expected = torch.nn.functional.scaled_dot_product_attention(query, query, value, ancestors[:, None])
    close(output, expected.transpose(1, 2))


def test_dense_mask_of_a_window():
    """A chain behind a prefix is plain sliding attention, whether the oldest slots were dropped or not."""
    words = pack_ancestor_words(torch.ones(1, 5, 5, dtype=torch.bool).tril())
    prefix, start = torch.tensor([8]), torch.tensor([0])
    distance = torch.arange(8, 13)[:, None] - torch.arange(13)
    expected = (distance >= 0) & (distance < 4)
    assert torch.equal(dense_tree_mask(words, prefix, start, 13, sliding_window=4)[0, 0], expected)
    assert torch.equal(dense_tree_mask(words, prefix, start, 8, sliding_window=4)[0, 0], expected[:, 5:])
