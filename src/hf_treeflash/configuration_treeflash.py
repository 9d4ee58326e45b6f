"""Configuration of TreeFlash drafters."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .ranges import INTEGERS, LAYER_TYPES, check_dtype, check_numbers, check_range, has_own_rope


def default_target_layer_ids(num_target_layers: int, num_draft_layers: int) -> list[int]:
    """Return the target layers a DFlash drafter reads when its config does not name them.

    Args:
        num_target_layers (`int`):
            Number of decoder layers of the target.
        num_draft_layers (`int`):
            Number of decoder layers of the drafter; also the number of layers read.

    Returns:
        `list[int]`: Zero-based layer indices, spread evenly from the second layer to the third from the end.
    """
    if num_draft_layers == 1:
        return [num_target_layers // 2]
    span = num_target_layers - 4
    return [round(1 + i * span / (num_draft_layers - 1)) for i in range(num_draft_layers)]


@strict
class TreeFlashConfig(PreTrainedConfig):
    r"""
    Configuration of a [`TreeFlashDraftModel`].

    Numbers outside the ranges of `ranges.py` are refused by name.

    Args:
        vocab_size (`int`, *optional*, defaults to 151936):
            Vocabulary of the target; the drafter itself holds neither embeddings nor an output layer. None where the
            checkpoint does not say it: the target's own.
        hidden_size (`int`, *optional*, defaults to 2560):
            Width of the drafter, equal to the target's.
        intermediate_size (`int`, *optional*, defaults to 9728):
            Width of the SwiGLU layers, in the decoder layers and in the AR head.
        num_hidden_layers (`int`, *optional*, defaults to 5):
            Number of drafter layers, at most 256.
        num_attention_heads (`int`, *optional*, defaults to 32):
            Number of query heads.
        num_key_value_heads (`int`, *optional*, defaults to 8):
            Number of key and value heads.
        head_dim (`int`, *optional*, defaults to 128):
            Width of one head.
        rope_parameters (`dict`, *optional*):
            Rotary embedding parameters as in any transformers config (`rope_type`, `rope_theta`,
            `partial_rotary_factor`, ...), for all layers or by layer type.
        rope_interleaved (`bool`, *optional*, defaults to `False`):
            Rotate neighbouring entries of a head (2i with 2i + 1) instead of its halves (i with i + half).
        sliding_window (`int`, *optional*):
            Window of the layers marked `"sliding_attention"` in `layer_types`, in tokens.
        layer_types (`list[str]`, *optional*):
            `"full_attention"` or `"sliding_attention"` per layer; all full by default.
        causal_layers (`str`, *optional*, defaults to `"none"`):
            Layers in which a slot sees no later slot of its block: `"none"`, `"sliding"` or `"all"`.
        window_rule (`str`, *optional*, defaults to `"inclusive"`):
            What a window of w tokens lets slot q see at position k: `"inclusive"` |q - k| <= w, as transformers' own
            DFlash drafters; `"strict"` |q - k| < w; `"context"` the context where q - k < w, and the whole block;
            `"anchor"` the context at most w before the anchor, and the whole block.
        num_target_layers (`int`, *optional*):
            Number of decoder layers of the target, where the checkpoint says it.
        target_layer_ids (`list[int]`, *optional*):
            Target layers whose outputs the drafter reads: entry `l` is the output of decoder layer `l`, that is
            `hidden_states[l + 1]` of the target's full tuple; -1 is the embedding. Derived from the layer counts when
            absent, by the DFlash rule (for a target of 36 layers when that is not said either).
        block_size (`int`, *optional*, defaults to 16):
            Slots per drafting pass, the anchor's included, from 2 to 256.
        first_slot (`int`, *optional*, defaults to 1):
            Slot that predicts the token after the anchor. 1: slot k predicts anchor + k, and the anchor's own slot
            nothing; 0: slot k predicts anchor + k + 1.
        mask_token_id (`int`, *optional*, defaults to 151669):
            Token whose embedding fills the slots after the anchor.
        input_embedding_scale (`float`, *optional*):
            The slots' input is the target's bare embedding rows times this; by default what its embedding returns.
        output_multiplier (`float`, *optional*), final_logit_softcapping (`float`, *optional*):
            Logits are `cap * tanh(multiplier * W z / cap)`; each is the target's own by default.
        draft_vocab_size (`int`, *optional*):
            Tokens of a reduced vocabulary, the only ones that are drafted; the drafter keeps which they are (`d2t`).
        tie_draft_head (`bool`, *optional*, defaults to `False`):
            Whether their output layer is made of the target's rows; if not, the drafter holds one of its own.
        bos_token_id, eos_token_id, pad_token_id (`int`, *optional*):
            Special tokens of the target, which pipelines compare before they pair two models.
        ar_head (`str`, *optional*):
            What conditions each token on the one before it: `"swiglu"` the TreeFlash head, `"markov"` DSpark's,
            `"selector"` DFlash-2's; `None` for a plain DFlash drafter.
        head_rank (`int`, *optional*, defaults to 256):
            Width of the vectors a Markov head or selector holds for each token.
        head_gated (`bool`, *optional*, defaults to `False`):
            Whether a Markov head weighs these vectors by the slot's state.
        selector_top_k (`int`, *optional*, defaults to 16):
            Tokens of each slot that a selector considers.
        conv_kernel_size (`int`, *optional*, defaults to 0):
            Taps of DFlash-2's convolutions along the block, around each sublayer; 0 for none.
        conv_group_size (`int`, *optional*, defaults to 16):
            Channels that share what these convolutions take from the state.
    """

    model_type = "treeflash"

    vocab_size: int | None = 151936
    hidden_size: int = 2560
    intermediate_size: int = 9728
    num_hidden_layers: int = 5
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 40960
    initializer_range: float | int = 0.02
    rms_norm_eps: float | int = 1e-6
    rope_parameters: dict | None = None
    rope_interleaved: bool = False
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    causal_layers: str = "none"
    window_rule: str = "inclusive"
    num_target_layers: int | None = None
    target_layer_ids: list[int] | None = None
    block_size: int = 16
    first_slot: int = 1
    mask_token_id: int = 151669
    input_embedding_scale: float | int | None = None
    output_multiplier: float | int | None = None
    final_logit_softcapping: float | int | None = None
    draft_vocab_size: int | None = None
    tie_draft_head: bool = False
    ar_head: str | None = None
    head_rank: int = 256
    head_gated: bool = False
    selector_top_k: int = 16
    conv_kernel_size: int = 0
    conv_group_size: int = 16
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    # The drafter holds no embeddings, so there is nothing to tie.
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        check_range("num_hidden_layers", self.num_hidden_layers, *INTEGERS["num_hidden_layers"], whole=True)
        check_dtype(self.dtype)
        if self.layer_types is None:
            self.layer_types = ["full_attention"] * self.num_hidden_layers
        if self.target_layer_ids is None:
            self.target_layer_ids = default_target_layer_ids(self.num_target_layers or 36, self.num_hidden_layers)
        super().__post_init__(**kwargs)
        self._check_drafter()

    def convert_rope_params_to_dict(self, **kwargs):
        """Complete the rotary parameters; those by kind of layer stay as they are."""
        if not has_own_rope(self.rope_parameters or {}):
            return super().convert_rope_params_to_dict(**kwargs)
        return kwargs

    @property
    def num_drafted(self) -> int:
        """Tokens that one block drafts, the depth of its tree."""
        return self.block_size - self.first_slot

    def _check_drafter(self):
        check_numbers(self)
        if self.vocab_size is not None and self.mask_token_id >= self.vocab_size:
            raise ValueError(
                f"`mask_token_id`: expected a token id below `vocab_size` {self.vocab_size}, found "
                f"{self.mask_token_id}."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_key_value_heads`: expected a divisor of `num_attention_heads` {self.num_attention_heads}, "
                f"found {self.num_key_value_heads}."
            )
        if self.ar_head in ("markov", "selector") and self.vocab_size is None:
            raise ValueError(f"`vocab_size`: expected a number of tokens for the head {self.ar_head!r}, found none.")
        if self.ar_head == "selector" and self.draft_vocab_size is not None:
            raise ValueError(f"`draft_vocab_size`: expected None beside a selector, found {self.draft_vocab_size}.")
        if self.conv_kernel_size and self.hidden_size % self.conv_group_size:
            raise ValueError(
                f"`conv_group_size`: expected a divisor of `hidden_size` {self.hidden_size}, found "
                f"{self.conv_group_size}."
            )
        taps = self.target_layer_ids
        if not taps or (self.num_target_layers is not None and max(taps) >= self.num_target_layers):
            raise ValueError(
                f"`target_layer_ids`: expected layers of a target with {self.num_target_layers or 'any number of'} "
                f"layers, found {taps}."
            )
        if set(self.layer_types or ()) - set(LAYER_TYPES) or len(self.layer_types or ()) != self.num_hidden_layers:
            raise ValueError(
                f"`layer_types`: expected 'full_attention' or 'sliding_attention' for each of the "
                f"{self.num_hidden_layers} layers, found {self.layer_types}."
            )
        if "sliding_attention" in (self.layer_types or ()) and self.sliding_window is None:
            raise ValueError("`sliding_window`: expected a number of tokens for the sliding layers, found none.")


__all__ = ["TreeFlashConfig"]
