"""The trainer of drafters: a frozen target beside the drafter, three stages, real block efficiency."""

import functools
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import Trainer

from .adapters import check_adapters
from .arguments import TreeFlashTrainingArguments
from .blocks import Blocks, make_blocks, output_layer_of
from .collator import AnchorCollator
from .draft_vocabulary import frequent_tokens, response_tokens
from .loss_vocabulary import LossVocabulary
from .losses import RowScores, score_rows, slot_weights, weighted_mean
from .metrics import MetricSums, add_block_metrics, measure_block_efficiency
from .stored_states import StoredStates


class TreeFlashTrainer(Trainer):
    """Trains a drafter for a frozen target.

    Args:
        model ([`TreeFlashDraftModel`] or `PeftModel`):
            The drafter. Weights that train are kept in float32.
        args ([`TreeFlashTrainingArguments`]):
            Stage, loss, anchors, and everything [`Trainer`] takes.
        target ([`PreTrainedModel`]):
            The model to draft for; frozen, never saved.
        train_dataset, eval_dataset (`Dataset` or `list`, *optional*):
            Samples `{"input_ids": list[int], "prompt_length": int}`; responses should be the target's own.
        eval_prompts (`Sequence[Sequence[int]]`, *optional*):
            Token ids of held-out prompts. Every evaluation generates from them and logs the block efficiency as
            `eval_block_efficiency`, which `metric_for_best_model` may name.
        kwargs:
            Of [`Trainer`].

    Source: stages and losses of arXiv 2606.03819; block training of DFlash (arXiv 2602.06036).
    """

    args: TreeFlashTrainingArguments
    data_collator: Any
    optimizer: Any

    def __init__(self, model, args, *, target, eval_prompts: Sequence[Sequence[int]] = (), callbacks=(), **kwargs):
        check_adapters(model)
        choose_trainable(model, args.stage)
        if not args.bf16 and any(p.dtype != torch.float32 for p in model.parameters()):
            raise ValueError(
                "The drafter is not in float32: train it with `bf16=True`, which keeps what trains in float32."
            )
        pad_token_id = target.config.get_text_config(decoder=True).pad_token_id or 0
        collator = AnchorCollator(pad_token_id, args.num_anchors, args.max_length, seed=args.seed)
        super().__init__(model, args, data_collator=collator, callbacks=[AnchorEpoch(collator), *callbacks], **kwargs)
        # The loss is the mean of a micro-batch; a forward that takes `**kwargs` would pass for scaled already.
        self.model_accepts_loss_kwargs = False
        self.target = target.requires_grad_(False).eval()
        if args.shard_target:
            shard_layers(self.target, self.accelerator.device)
        else:
            self.target.to(self.accelerator.device)
        self.eval_prompts = eval_prompts
        self.loss_vocabulary = self._loss_vocabulary()
        self._set_draft_vocabulary(model)
        collator.states = self._stored_states()
        self.eval_collator = AnchorCollator(
            pad_token_id, max_length=args.max_length, stride=args.eval_anchor_stride, states=collator.states
        )
        self.sums = {True: MetricSums(), False: MetricSums()}  # by whether the model trains

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Run target and drafter over a batch and return the loss, in nats per unit of slot weight."""
        loss = self.block_loss(model, inputs)
        return (loss, {"loss": loss}) if return_outputs else loss

    def block_loss(self, model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the loss of a batch, and add to the metrics."""
        drafter, training = self.accelerator.unwrap_model(model), model.training
        with_head = self.args.stage != "backbone"
        blocks = make_blocks(drafter, self.target, inputs, with_head)
        outputs = model(**blocks.inputs)
        sums, drafts = self.sums[training], {}
        for prefix, states in (("base_", outputs.last_hidden_state), ("", outputs.corrected_hidden_state)):
            is_frozen = prefix == "base_" and self.args.stage == "head"
            if states is not None and not (is_frozen and training):
                drafts[prefix] = blocks.rows(states)
        scores, known = self._score(drafter, blocks, drafts)
        weights, losses = slot_weights(blocks.depths, self.args.slot_decay) * known, {}
        for prefix, (loss, correct, recalled) in scores.items():
            losses[prefix] = weighted_mean(loss, weights)
            add_block_metrics(sums, prefix, correct & known, blocks.supervised, per_slot=not training)
            if prefix == "base_":
                sums.add("candidate_recall", (recalled & known).sum(), torch.tensor(len(weights)))
        return self._combine(losses)

    def _score(
        self, drafter, blocks: Blocks, drafts: dict[str, torch.Tensor]
    ) -> tuple[dict[str, RowScores], torch.Tensor]:
        """Score drafts; also return which rows have a label that the loss is over."""
        labels, vocabulary = blocks.labels, None
        if self.loss_vocabulary is not None:
            labels, vocabulary = self.loss_vocabulary.places[labels], self.loss_vocabulary.draw()
        output_layer = output_layer_of(self.target, drafter, vocabulary)
        groups, own = [drafts], None
        if "" in drafts and drafter.ar_head.reads_marginals:  # its logits are not the output layer's alone
            token_ids = None if vocabulary is None else vocabulary.token_ids
            own = functools.partial(drafter.ar_head.logits, lm_head=output_layer, token_ids=token_ids)
            groups = [{prefix: rows} for prefix, rows in drafts.items()]
        scores: dict[str, RowScores] = {}
        for group in groups:
            by_head = own if "" in group else None
            scored = score_rows(
                by_head or output_layer,
                torch.stack(list(group.values())),
                labels.clamp(min=0),
                blocks.teacher_states if self.args.loss == "kl" else None,
                teacher_head=output_layer_of(self.target, vocabulary=vocabulary),
                num_candidates=drafter.generation_config.num_candidates,
                chunk_rows=self.args.loss_chunk_rows,
                is_frozen=by_head is None,
            )
            scores |= {prefix: RowScores(*parts) for prefix, *parts in zip(group, *scored, strict=True)}
        return scores, labels >= 0

    def _combine(self, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        if self.args.stage == "joint":
            return losses[""] + self.args.marginal_loss_weight * losses["base_"]
        return losses["base_" if self.args.stage == "backbone" else ""]

    def _set_draft_vocabulary(self, drafter) -> None:
        if self.args.draft_vocabulary is None:
            return
        if hasattr(drafter, "peft_config"):
            raise ValueError(
                "`draft_vocabulary` is saved with a drafter, not with adapters: set that of the drafter they adapt "
                "by `hf-treeflash vocabulary`."
            )
        texts = response_tokens(self.train_dataset)
        drafter.set_draft_vocabulary(frequent_tokens(texts, self.args.draft_vocabulary))

    def _loss_vocabulary(self) -> LossVocabulary | None:
        if self.args.loss_vocabulary is None:
            return None
        head = self.target.get_output_embeddings()
        if type(head) is not nn.Linear or not head.weight.is_floating_point():
            raise ValueError(
                "`loss_vocabulary` reads single rows of the target's output layer, which must be a plain `nn.Linear`; "
                f"this target has a {type(head).__name__}. Leave it out."
            )
        if self.accelerator.unwrap_model(self.model).config.ar_head == "selector":
            raise ValueError("`loss_vocabulary` hides the candidates that a selector chooses from. Leave it out.")
        frequent = frequent_tokens(response_tokens(self.train_dataset), self.args.loss_vocabulary)
        return LossVocabulary(frequent.to(head.weight.device), head.weight.shape[0], self.args.loss_drawn_tokens)

    def _stored_states(self) -> StoredStates | None:
        if self.args.target_states is None:
            return None
        layer_ids = self.accelerator.unwrap_model(self.model).config.target_layer_ids
        samples = [*(self.train_dataset or ()), *(self.eval_dataset or ())]
        with self.accelerator.main_process_first():
            dtype = getattr(torch, self.args.target_states_dtype)
            states = StoredStates(self.args.target_states, self.target, layer_ids, dtype)
            states.add(sample["input_ids"][: self.args.max_length] for sample in samples)
        return states

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Return the loss of an evaluation batch; metrics are summed on the way."""
        with torch.no_grad():
            loss = self.block_loss(model, self._prepare_inputs(inputs))
        return loss, None, None

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        """Evaluate on fixed anchors, then generate from the held-out prompts."""
        self.sums[False] = MetricSums()
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics = self.sums[False].pop(self.accelerator)
        if self.eval_prompts:
            metrics["block_efficiency"] = self.block_efficiency()
        prefixed = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return output._replace(metrics={**(output.metrics or {}), **prefixed})

    def block_efficiency(self) -> float:
        """Return emitted tokens per verify pass over the held-out prompts, shared between the processes."""
        prompts = self.eval_prompts
        if not self.args.shard_target:  # a sharded target takes part in every pass on every process
            prompts = prompts[self.accelerator.process_index :: self.accelerator.num_processes]
        drafter = self.accelerator.unwrap_model(self.model).eval()
        with torch.no_grad(), self.accelerator.autocast():
            counts = measure_block_efficiency(
                self.target, drafter, prompts, max_new_tokens=self.args.eval_max_new_tokens
            )
        totals = MetricSums()
        totals.add("block_efficiency", *counts)
        return totals.pop(self.accelerator).get("block_efficiency", math.nan)

    def log(self, logs, start_time=None):
        """Log, with the training metrics since the last time."""
        if "loss" in logs:
            logs = logs | self.sums[True].pop(self.accelerator)
        super().log(logs, start_time)

    def get_eval_dataloader(self, eval_dataset=None):
        """Return the evaluation data with anchors at a fixed stride."""
        training, self.data_collator = self.data_collator, self.eval_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training

    def create_optimizer(self, model=None):
        """Create the optimizer; in stage "joint" the backbone learns more slowly than the head."""
        drafter = self.accelerator.unwrap_model(self.model)
        if self.args.stage == "joint" and self.optimizer is None and not hasattr(drafter, "peft_config"):
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, drafter)
            self.optimizer = optimizer_class(self._joint_groups(drafter), **options)
        return super().create_optimizer(model)

    def _joint_groups(self, drafter) -> list[dict]:
        decayed = set(self.get_decay_parameter_names(drafter))
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in drafter.named_parameters():
            groups.setdefault((name.startswith("ar_head."), name in decayed), []).append(parameter)
        scales = {True: 1.0, False: self.args.backbone_learning_rate_scale}
        return [
            {
                "params": parameters,
                "lr": self.args.learning_rate * scales[is_head],
                "weight_decay": self.args.weight_decay if is_decayed else 0.0,
            }
            for (is_head, is_decayed), parameters in groups.items()
        ]

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            write_command(Path(output_dir or self.args.output_dir or "."), self.args.seed)


class AnchorEpoch(transformers.TrainerCallback):
    """Tells the collator the epoch, so that each one draws other anchors."""

    def __init__(self, collator: AnchorCollator):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.epoch = int(state.epoch or 0)


def choose_trainable(model, stage: str) -> None:
    """Mark what a stage trains, and keep it in float32; adapters have marked theirs already."""
    if not hasattr(model, "peft_config"):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(stage == "joint" or name.startswith("ar_head.") == (stage == "head"))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if model.config.draft_vocab_size is not None and not model.config.tie_draft_head:
        raise ValueError(
            f"A drafter with an output layer of its own (`draft_vocab_size` {model.config.draft_vocab_size}) cannot "
            "be trained here: labels are tokens of the whole vocabulary."
        )
    if stage != "backbone" and model.ar_head is None:
        raise ValueError(
            f"Stage {stage!r} needs a head: load the drafter with `ar_head='swiglu'` (or 'markov' or 'selector') to "
            "give it a fresh one."
        )
    for parameter in trainable:
        parameter.data = parameter.data.float()


def shard_layers(target, device) -> None:
    """Shard each decoder layer over all processes (FSDP2); embeddings, norm and output layer stay whole on each."""
    mesh = torch.distributed.device_mesh.init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for layer in target.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    target.to(device)


def write_command(folder: Path, seed: int) -> None:
    """Note beside a checkpoint what made it."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    versions["accelerate"] = accelerate.__version__
    lines = [shlex.join(["python", *sys.argv]), f"seed {seed}", *(f"{k} {v}" for k, v in versions.items())]
    (folder / "command.txt").write_text("\n".join(lines) + "\n")
