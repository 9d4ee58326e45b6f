"""Tiny random targets of many families, and prompts for them."""

from dataclasses import dataclass

import torch
import transformers

from tests.helpers.tiny import SHAPE

IMAGE, IMAGE_START, IMAGE_END = 20, 22, 23
BATCH_LENGTH = 16  # longer than the windows below


@dataclass(frozen=True)
class Family:
    """A model class of transformers with what its tiny config needs.

    Attributes:
        name (`str`): As the table shows it.
        config (`str`): Configuration class.
        extra (`dict`): Configuration fields beside those of every tiny target.
        note (`str`): What is particular about its layers.
        model (`str`): Model class, where `AutoModelForCausalLM` does not know the configuration.
        vision (`dict`): Configuration fields of the image encoder, for prompts with an image.
    """

    name: str
    config: str
    extra: dict
    note: str
    model: str | None = None
    vision: dict | None = None

    @property
    def exists(self) -> bool:
        """Whether this release of transformers has it."""
        return hasattr(transformers, self.config)

    def build(self, seed: int = 0, **overrides):
        """Return an untrained fp32 target in evaluation mode."""
        shape = {**SHAPE, **self.extra, **overrides}
        config_class = getattr(transformers, self.config)
        if self.vision is None:
            config = config_class(**shape)
        else:
            outer = {"image_token_id": IMAGE, "video_token_id": 21, **self.vision["outer"]}
            config = config_class(text_config=shape, vision_config=self.vision["inner"], **outer)
        torch.manual_seed(seed)
        if self.model is None:
            return transformers.AutoModelForCausalLM.from_config(config).eval()
        return getattr(transformers, self.model)(config).eval()

    def inputs(self, batch: int = 1, seed: int = 0) -> dict[str, torch.Tensor]:
        """Return a prompt, left-padded for some rows of a batch, with an image where the family reads them."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(4, IMAGE, (batch, BATCH_LENGTH), generator=generator)
        mask = torch.ones_like(ids)
        extra = {}
        if self.vision is not None:
            ids[:, 5], ids[:, 6:10], ids[:, 10] = IMAGE_START, IMAGE, IMAGE_END
            pixels = torch.randn(16 * batch, self.vision["pixels"], generator=generator)
            extra = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]] * batch)}
            if self.vision["typed"]:
                extra["mm_token_type_ids"] = (ids == IMAGE).long()
        for row in range(1, batch):
            mask[row, : 5 - 2 * row] = 0
        return {"input_ids": ids.masked_fill(mask == 0, 2), "attention_mask": mask, **extra}


SMALL_VISION = {"hidden_size": 16, "intermediate_size": 16, "patch_size": 4}
MIXED = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

FAMILIES = [
    Family("Llama", "LlamaConfig", {}, "full attention"),
    Family("Llama, tied embeddings", "LlamaConfig", {"tie_word_embeddings": True}, "full attention"),
    Family("Mistral", "MistralConfig", {"sliding_window": 12}, "sliding window"),
    Family("Mistral, window below the block", "MistralConfig", {"sliding_window": 3}, "sliding window"),
    Family("Qwen2", "Qwen2Config", {}, "full attention, biases"),
    Family("Qwen3", "Qwen3Config", {}, "full attention"),
    Family(
        "Qwen3, sliding layers",
        "Qwen3Config",
        {"use_sliding_window": True, "sliding_window": 12, "layer_types": MIXED},
        "full and sliding",
    ),
    Family("Qwen3-MoE", "Qwen3MoeConfig", MOE, "full attention, experts"),
    Family(
        "Gemma 2",
        "Gemma2Config",
        {"sliding_window": 12, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0},
        "full and sliding, soft-caps, scaled embeddings",
    ),
    Family(
        "Gemma 3",
        "Gemma3TextConfig",
        {"sliding_window": 12, "query_pre_attn_scalar": 8, "layer_types": MIXED},
        "full and sliding, two rotary bases, scaled embeddings",
    ),
    Family(
        "Gemma 4",
        "Gemma4TextConfig",
        {
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": 24,
            "hidden_size_per_layer_input": 8,
        },
        "full and sliding, the last layers share keys and values",
    ),
    Family("Phi-3", "Phi3Config", {"sliding_window": 12}, "sliding window, fused projections"),
    Family(
        "OPT",
        "OPTConfig",
        # Learned positions, just enough for the longest text.
        {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3, "max_position_embeddings": BATCH_LENGTH + 24},
        "full attention, learned positions",
    ),
    Family("OLMo-2", "Olmo2Config", {}, "full attention, post-norms"),
    Family(
        "GPT-OSS",
        "GptOssConfig",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 12,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "full and sliding, attention sinks, experts",
    ),
    Family(
        "Qwen3-VL",
        "Qwen3VLConfig",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            }
        },
        "full attention, image in the prompt, three position axes",
        model="Qwen3VLForConditionalGeneration",
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
                "deepstack_visual_indexes": [0],
            },
            "pixels": 48,
            "typed": True,
        },
    ),
    Family(
        "Muse Glimmer",
        "MuseGlimmerConfig",
        {"sliding_window": 12},
        "full without positions and sliding, image in the prompt, normed embeddings (the drafter sees the bare ones)",
        model="MuseGlimmerForConditionalGeneration",
        vision={
            "outer": {"out_hidden_size": 64, "projector_hidden_size": 16},
            "inner": {
                **SMALL_VISION,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "pos_emb_height": 4,
                "pos_emb_width": 4,
            },
            "pixels": 96,
            "typed": False,
        },
    ),
    Family(
        "Llama 4",
        "Llama4TextConfig",
        {
            "attention_chunk_size": 8,
            "num_local_experts": 2,
            "intermediate_size_mlp": 48,
            "attn_temperature_tuning": False,
        },
        "chunked, and full without positions; batches without temperature tuning only",
    ),
]
