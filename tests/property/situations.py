"""Situations a call is made in, drawn from a seed: the pair, the prompts, the settings and what the caller brings."""

import copy
import functools
import random
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from packaging.version import parse
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, GPTNeoXConfig, WatermarkingConfig

from hf_treeflash.compat import CACHE
from tests.families.hybrids import HYBRIDS
from tests.families.models import FAMILIES
from tests.helpers.pair_on_disk import letter_tokenizer
from tests.helpers.quoting import quoting_drafter
from tests.helpers.tiny import SHAPE, VOCAB, tiny_drafter, with_knobs
from tests.property.callers import draw_objects

PAD, SWITCH = 2, 20
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
ATTENTION = {
    name: {}
    for name in ("Llama", "Llama, tied embeddings", "Mistral", "Qwen2", "Qwen3-MoE", "Gemma 2", "Phi-3", "OLMo-2")
}
ATTENTION |= {
    "Qwen3, sliding layers": {"layer_types": ["sliding_attention", "full_attention"]},
    "Gemma 3": {"layer_types": ["sliding_attention", "full_attention"]},
    "GPT-OSS": {"layer_types": ["sliding_attention", "full_attention"]},
    "Llama 4": {},
    "OPT": {"word_embed_proj_dim": 16, "dropout": 0.0},
}
OTHERS = {
    "GPT-2": lambda: GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128, **SPECIAL, **CALM),
    "GPT-NeoX": lambda: GPTNeoXConfig(**SHAPE | {"num_hidden_layers": 2}),
}
CALM = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SPECIAL = {"initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": PAD}
RECURRENT = "Qwen3.5", "Bamba", "Falcon-H1", "LFM2", "LFM3", "Granite-4-hybrid", "OLMo-hybrid"
BY_NAME = {family.name: family for family in [*FAMILIES, *HYBRIDS]}

LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0], "original_max_position_embeddings": SWITCH}
ROPES: dict[str, dict] = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {"rope_type": "longrope", "factor": 4.0, **LONG},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
}
TAKES_ROPES = {name: list(ROPES) for name in ("Llama", "Mistral", "Qwen2", "OLMo-2")}
TAKES_ROPES["Phi-3"] = ["default", "longrope"]


@functools.cache
def target_of(name: str, rope: str, seed: int, attention: str):
    """Return a tiny target; those whose rotary embedding keeps a state are copied by whoever uses them."""
    torch.manual_seed(seed)
    if name in OTHERS:
        target = AutoModelForCausalLM.from_config(OTHERS[name]()).eval()
    elif name in RECURRENT:
        target = BY_NAME[name].build(seed)
    else:
        fields = TINY | ATTENTION[name]
        if "sliding_window" in BY_NAME[name].extra:
            fields = fields | {"sliding_window": (4, 7)[seed]}
        if ROPES[rope]:
            fields = fields | {"rope_parameters": {"rope_theta": 10000.0, **ROPES[rope]}}
        if rope == "dynamic":
            fields = fields | {"max_position_embeddings": SWITCH}
        if rope == "longrope" and name == "Phi-3":
            fields = fields | {"original_max_position_embeddings": SWITCH}
        target = BY_NAME[name].build(seed, **copy.deepcopy(fields))
    if attention == "eager":
        target.set_attn_implementation("eager")
    return target


@dataclass
class Situation:
    """One call, or two turns, in one situation; `repr` says which.

    Attributes:
        settings (`dict`): What both calls are given.
        drafting (`dict`): What only the call with a drafter is given.
        knobs (`dict`), knobs_in_call (`bool`): Of the drafter, or in the call's `generation_config`.
        objects (`list`): Kinds of what the caller brings, made anew for each of the two ways.
        quotes (`bool`): Whether the drafter knows the text, so that drafts are accepted.
        wrap (`str`): How the drafter is handed over.
        embeds, gaps, given (`bool`): Prompts as embeddings, with gaps, or with a cache of the caller's.
        mixed (`int`, *optional*): The turn that is written without the drafter.
    """

    seed: int
    name: str
    rope: str
    attention: str
    lengths: list[int]
    settings: dict
    drafting: dict
    knobs: dict
    knobs_in_call: bool
    objects: list
    quotes: bool
    wrap: str
    turns: int
    training: bool
    embeds: bool
    gaps: bool
    given: bool
    mixed: int | None
    head: bool

    @property
    def recurrent(self) -> bool:
        return self.name in RECURRENT

    @property
    def rows(self) -> int:
        return len(self.lengths) * self.settings.get("num_return_sequences", 1)

    def target(self):
        """Return the target, a copy where a call changes it."""
        target = target_of(self.name, self.rope, self.seed % 2, self.attention)
        if self.rope in ("longrope", "dynamic") or self.training:
            target = copy.deepcopy(target).train(self.training)
        return target

    def drafter(self) -> Any:
        layers = 4 if self.recurrent else 2
        hidden = 32 if self.recurrent or self.name in OTHERS else 16
        shape = {"hidden_size": hidden, "num_target_layers": None, "target_layer_ids": [0, layers - 1]}
        knobs = {} if self.knobs_in_call else self.knobs
        if self.quotes:
            return quoting_drafter(shape, **knobs)
        return with_knobs(tiny_drafter(self.head, self.seed % 3, **shape), **knobs)

    def inputs(self, target) -> dict[str, torch.Tensor]:
        """Return left-padded prompts of different lengths, at times as embeddings."""
        longest = max(self.lengths)
        ids = torch.randint(0, VOCAB, (len(self.lengths), longest), generator=torch.Generator().manual_seed(self.seed))
        mask = torch.ones_like(ids)
        for row, length in enumerate(self.lengths):
            mask[row, : longest - length] = 0
        ids = ids.masked_fill(mask == 0, PAD)
        if self.gaps:  # padding that is not on the left
            mask[0, longest // 2] = 0
        inputs: dict[str, Any] = {"attention_mask": mask}
        inputs |= {"inputs_embeds": target.get_input_embeddings()(ids).detach()} if self.embeds else {"input_ids": ids}
        if self.given:
            inputs[CACHE] = DynamicCache(config=target.config)
        return inputs


# What `generate` makes processors of by itself.
STOCK: list[dict] = [
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2},
    {"suppress_tokens": [5, 6]},
    {"begin_suppress_tokens": [4, 5, 6, 7]},
    {"bad_words_ids": [[5], [7, 8]]},
    {"sequence_bias": [[[9], 1.5], [[4, 6], 3.0]]},
    {"encoder_repetition_penalty": 1.2},
    {"encoder_no_repeat_ngram_size": 3},
    {"forced_eos_token_id": 3},
    {"forced_bos_token_id": 4},
    {"renormalize_logits": True},
    {"guidance_scale": 1.5},
    {"watermarking_config": WatermarkingConfig(bias=2.0, context_width=1)},
]


def draw_settings(draws: random.Random) -> dict:
    """Return stops, sampling and outputs of a call."""
    tokens = [None, None, draws.randrange(VOCAB), draws.sample(range(VOCAB), 3)]
    settings: dict[str, Any] = {"eos_token_id": draws.choice(tokens), "pad_token_id": PAD}
    settings["max_new_tokens"] = draws.randint(1, 24)
    if draws.random() < 0.2:
        settings["min_new_tokens"] = draws.randint(1, 12)
    if draws.random() < 0.15:
        settings |= {"stop_strings": draws.sample(["a", "bc", "q", "de", "t"], 2), "tokenizer": letter_tokenizer()}
    settings["do_sample"] = draws.random() < 0.4
    if settings["do_sample"]:
        samplers = [{}, {"temperature": 0.6}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.05}, {"typical_p": 0.8}]
        settings |= {"top_k": 0} | draws.choice(samplers)
        if draws.random() < 0.25:
            settings["num_return_sequences"] = draws.randint(2, 3)
    if draws.random() < 0.5:
        settings |= draws.choice(STOCK)
    if draws.random() < 0.5:
        settings["return_dict_in_generate"] = True
        outputs = [
            [],
            ["output_scores"],
            ["output_logits", "output_scores"],
            ["output_hidden_states", "output_logits"],
        ]
        settings |= dict.fromkeys(draws.choice(outputs), True)
    if draws.random() < 0.2:
        settings["cache_implementation"] = draws.choice(["static", "static", "dynamic"])
    if draws.random() < 0.1:
        settings["use_cache"] = draws.random() < 0.9
    if draws.random() < 0.05:
        settings["prefill_chunk_size"] = draws.randint(1, 5)
    return settings


def draw(seed: int) -> Situation:
    """Return the situation of a seed."""
    draws = random.Random(seed)
    name = draws.choice(RECURRENT if draws.random() < 0.12 else [*ATTENTION, *OTHERS, *TAKES_ROPES])
    batch = draws.choice([1, 1, 2, 3, 4])
    lengths = [draws.randint(1, 14) for _ in range(batch)]
    longest = max(lengths)
    settings = draw_settings(draws)
    training = draws.random() < 0.06
    turns = 2 if draws.random() < 0.25 and settings.get("cache_implementation") != "static" else 1
    older = parse(transformers.__version__) < parse("5.24")
    if turns == 2:
        settings |= {"return_dict_in_generate": True}
        settings.pop("num_return_sequences", None)
        if older:  # they read the whole text onto the given cache again
            settings.pop("prefill_chunk_size", None)
    knobs: dict[str, Any] = {"tree_budget": draws.choice([2, 5, 9, 16, 24, 70, "auto"])}
    if draws.random() < 0.3:
        window = {"draft_window": draws.choice([None, 3, 12]), "draft_temperature": draws.choice([0.5, 1.0, 2.0])}
        knobs |= {"num_candidates": draws.randint(1, 12), "branching": draws.randint(1, 12), **window}
        knobs["draft_lm_head"] = draws.choice([None, "float8"])
    # Static rounds want the drafter's tables, which one that quotes has not.
    quotes = draws.random() < 0.6 and settings.get("cache_implementation") != "static"
    rope = draws.choice(TAKES_ROPES.get(name, ["default"]))
    if older and name == "Phi-3" and rope == "longrope":  # reads later turns behind its switch in a way of its own
        turns = 1
    return Situation(
        seed=seed,
        name=name,
        rope=rope,
        attention=draws.choice(["sdpa", "sdpa", "eager"]),
        lengths=lengths,
        settings=settings,
        drafting={"prompt_lookup_num_tokens": 5} if draws.random() < 0.15 else {},
        knobs=knobs,
        knobs_in_call=draws.random() < 0.2,
        objects=draw_objects(draws),
        quotes=quotes,
        wrap=draws.choice(["itself", "itself", "itself", "DataParallel", "DDP", "itself" if quotes else "its name"]),
        turns=turns,
        training=training,
        embeds=draws.random() < 0.06 and turns == 1,
        gaps=draws.random() < 0.05 and longest > 3,
        given=draws.random() < 0.1 and "cache_implementation" not in settings,
        mixed=draws.choice([None, None, 0, 1]) if turns == 2 else None,
        head=draws.random() < 0.7,
    )


__all__ = ["PAD", "Situation", "draw"]
