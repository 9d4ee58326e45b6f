"""Arguments of drafter training."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

STAGES = ("backbone", "head", "joint")
# Stage 1's shortlists come from the marginal distributions: left without a loss they drift, and every tree with them.
LEAST_MARGINAL_WEIGHT = 0.2


@dataclass
class TreeFlashTrainingArguments(TrainingArguments):
    """[`TrainingArguments`] and what drafter training adds to them.

    Args:
        stage (`str`, *optional*, defaults to `"head"`):
            `"backbone"` trains a DFlash drafter, without the head; `"head"` the AR head on a frozen backbone;
            `"joint"` both. Adapters decide themselves what is trained; the stage then only chooses the loss.
        loss (`str`, *optional*):
            `"kl"`, forward KL to the target's distribution, or `"cross_entropy"` with the tokens of the data. By
            default cross-entropy for the backbone and KL otherwise.
        slot_decay (`float`, *optional*, defaults to 7.0):
            Slot k weighs `exp(-(k - 1) / slot_decay)`: 7 suits blocks of 16, 5 of 10, 4 of 8.
        marginal_loss_weight (`float`, *optional*, defaults to 0.5):
            Weight of the marginal distributions' loss in stage `"joint"`, at least 0.2.
        backbone_learning_rate_scale (`float`, *optional*, defaults to 0.1):
            Learning rate of the backbone relative to the head's in stage `"joint"`.
        num_anchors (`int`, *optional*, defaults to 128):
            Blocks per sequence and step, at random anchors.
        eval_anchor_stride (`int`, *optional*, defaults to 16):
            Distance of the fixed anchors in evaluation, in tokens.
        max_length (`int`, *optional*, defaults to 3072):
            Longer samples are cut, in tokens.
        loss_chunk_rows (`int`, *optional*, defaults to 256):
            Slots whose logits are held at once.
        draft_vocabulary (`int`, *optional*):
            The drafter drafts this many tokens alone, the most frequent ones of the responses, and is saved so;
            see [`~TreeFlashDraftModel.set_draft_vocabulary`].
        loss_vocabulary (`int`, *optional*):
            The loss is over this many tokens, the most frequent ones of the training responses, and some of the
            others, drawn at each step; by default over all. Rows with another label are left out.
        loss_drawn_tokens (`int`, *optional*, defaults to 512):
            How many of the others.
        target_states (`str`, *optional*):
            Folder for the target's states of all samples, computed once before training and read from there; by
            default they are computed at each step.
        target_states_dtype (`str`, *optional*, defaults to `"bfloat16"`):
            Of the states in that folder.
        eval_max_new_tokens (`int`, *optional*, defaults to 128):
            Tokens generated per held-out prompt to measure block efficiency, greedily.
        shard_target (`bool`, *optional*, defaults to `False`):
            Shard the target's layers over the processes (FSDP2) where one device cannot hold it.
    """

    stage: str = field(default="head", metadata={"help": "backbone, head or joint"})
    loss: str | None = field(default=None, metadata={"help": "kl or cross_entropy"})
    slot_decay: float = field(default=7.0, metadata={"help": "decay of the slots' weights, in slots"})
    marginal_loss_weight: float = field(default=0.5, metadata={"help": "weight of the marginal loss in stage joint"})
    backbone_learning_rate_scale: float = field(default=0.1, metadata={"help": "backbone's rate over the head's"})
    num_anchors: int = field(default=128, metadata={"help": "blocks per sequence and step"})
    eval_anchor_stride: int = field(default=16, metadata={"help": "distance of evaluation anchors, in tokens"})
    max_length: int = field(default=3072, metadata={"help": "longest sample, in tokens"})
    loss_chunk_rows: int = field(default=256, metadata={"help": "slots whose logits are held at once"})
    draft_vocabulary: int | None = field(default=None, metadata={"help": "frequent tokens that are drafted"})
    loss_vocabulary: int | None = field(default=None, metadata={"help": "frequent tokens that the loss is over"})
    loss_drawn_tokens: int = field(default=512, metadata={"help": "other tokens drawn per step beside them"})
    target_states: str | None = field(default=None, metadata={"help": "folder to keep the target's states in"})
    target_states_dtype: str = field(default="bfloat16", metadata={"help": "of the states in that folder"})
    eval_max_new_tokens: int = field(default=128, metadata={"help": "tokens per prompt for block efficiency"})
    shard_target: bool = field(default=False, metadata={"help": "shard the target's layers over the processes"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "keep it off: the collator reads them"})

    def __post_init__(self):
        super().__post_init__()
        if self.stage not in STAGES:
            raise ValueError(f"`stage` must be one of {', '.join(STAGES)}, got {self.stage!r}.")
        if self.loss is None:
            self.loss = "cross_entropy" if self.stage == "backbone" else "kl"
        if self.loss not in ("kl", "cross_entropy"):
            raise ValueError(f"`loss` must be 'kl' or 'cross_entropy', got {self.loss!r}.")
        if self.target_states and self.shard_target:
            raise ValueError("`target_states` needs the whole target on a device; leave out `shard_target`.")
        if self.stage == "joint" and self.marginal_loss_weight < LEAST_MARGINAL_WEIGHT:
            raise ValueError(
                f"`marginal_loss_weight` must be at least {LEAST_MARGINAL_WEIGHT} in stage 'joint', got "
                f"{self.marginal_loss_weight}: candidates are shortlisted by the marginal distributions."
            )
