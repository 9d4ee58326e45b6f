"""Configuration of TreeFlash drafters."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


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

    Args:
        vocab_size (`int`, *optional*, defaults to 151936):
            Vocabulary of the target; the drafter itself holds neither embeddings nor an output layer.
        hidden_size (`int`, *optional*, defaults to 2560):
            Width of the drafter, equal to the target's.
        intermediate_size (`int`, *optional*, defaults to 9728):
            Width of the SwiGLU layers, in the decoder layers and in the AR head.
        num_hidden_layers (`int`, *optional*, defaults to 5):
            Number of drafter layers.
        num_attention_heads (`int`, *optional*, defaults to 32):
            Number of query heads.
        num_key_value_heads (`int`, *optional*, defaults to 8):
            Number of key and value heads.
        head_dim (`int`, *optional*, defaults to 128):
            Width of one head.
        rope_parameters (`dict`, *optional*):
            Rotary embedding parameters as in any transformers config (`rope_type`, `rope_theta`, ...).
        sliding_window (`int`, *optional*):
            Window of the layers marked `"sliding_attention"` in `layer_types`, in tokens.
        layer_types (`list[str]`, *optional*):
            `"full_attention"` or `"sliding_attention"` per layer; all full by default.
        num_target_layers (`int`, *optional*):
            Number of decoder layers of the target, where the checkpoint says it.
        target_layer_ids (`list[int]`, *optional*):
            Target layers whose outputs the drafter reads: entry `l` is the output of decoder layer `l`, that is
            `hidden_states[l + 1]` of the target's full tuple. Derived from the layer counts when absent, by the
            DFlash rule (for a target of 36 layers when that is not said either).
        block_size (`int`, *optional*, defaults to 16):
            Slots per drafting pass, the anchor's included.
        mask_token_id (`int`, *optional*, defaults to 151669):
            Token whose embedding fills the slots after the anchor.
        bos_token_id, eos_token_id, pad_token_id (`int`, *optional*):
            Special tokens of the target, which pipelines compare before they pair two models.
        ar_head (`str`, *optional*):
            `"swiglu"` for the TreeFlash head that conditions each token on the one before it, `None` for a plain
            DFlash drafter.
    """

    model_type = "treeflash"

    vocab_size: int = 151936
    hidden_size: int = 2560
    intermediate_size: int = 9728
    num_hidden_layers: int = 5
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 40960
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    num_target_layers: int | None = None
    target_layer_ids: list[int] | None = None
    block_size: int = 16
    mask_token_id: int = 151669
    ar_head: str | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    # The drafter holds no embeddings, so there is nothing to tie.
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if self.layer_types is None:
            self.layer_types = ["full_attention"] * self.num_hidden_layers
        if self.target_layer_ids is None:
            self.target_layer_ids = default_target_layer_ids(self.num_target_layers or 36, self.num_hidden_layers)
        super().__post_init__(**kwargs)
        self._check_drafter()

    def _check_drafter(self):
        if self.ar_head not in (None, "swiglu"):
            raise ValueError(f"`ar_head` must be 'swiglu' or None, got {self.ar_head!r}.")
        if self.block_size < 2:
            raise ValueError(f"`block_size` counts the anchor and must be at least 2, got {self.block_size}.")
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(
                f"`mask_token_id` must be a token id below `vocab_size` {self.vocab_size}, got {self.mask_token_id}."
            )
        taps = self.target_layer_ids
        if not taps or min(taps) < 0 or (self.num_target_layers is not None and max(taps) >= self.num_target_layers):
            raise ValueError(
                f"`target_layer_ids` must name layers of a target with {self.num_target_layers or 'any number of'} "
                f"layers, got {taps}."
            )
        unknown = set(self.layer_types or ()) - {"full_attention", "sliding_attention"}
        if unknown or len(self.layer_types or ()) != self.num_hidden_layers:
            raise ValueError(
                f"`layer_types` must hold one of 'full_attention' or 'sliding_attention' for each of the "
                f"{self.num_hidden_layers} layers, got {self.layer_types}."
            )
        if "sliding_attention" in (self.layer_types or ()) and self.sliding_window is None:
            raise ValueError("`sliding_window` must be set when `layer_types` has 'sliding_attention'.")


__all__ = ["TreeFlashConfig"]
