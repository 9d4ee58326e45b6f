"""Completions that TRL logs while it trains a target, plain or adapted by PEFT, beside a drafter: plain decoding's."""

import functools

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Trainer, TrainingArguments

from hf_treeflash import TreeFlashDraftModel
from hf_treeflash.bench.demo import EMBEDDED

pytest.importorskip("trl", reason="trl is not installed: `make harness` does")
PROMPTS = ["def parse(path):\n", "import os\n\nclass Reader", "    return self", "for name in", "with open("]


def completions(folder, adapted: bool, drafter) -> list:
    """Return what the callback logs over some steps of training, a drafter bound to the target's `generate`."""
    from datasets import Dataset
    from trl import LogCompletionsCallback

    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_pretrained(EMBEDDED / "target", dtype=torch.float32)
    if adapted:
        peft = pytest.importorskip("peft", reason="peft is not installed: `make harness` does")
        target = peft.get_peft_model(target, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    if drafter is not None:
        target.generate = functools.partial(target.generate, assistant_model=drafter)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "target")
    ids = tokenizer("\n".join(PROMPTS))["input_ids"]
    trainer = Trainer(
        target,
        TrainingArguments(
            folder,
            max_steps=4,
            per_device_train_batch_size=1,
            per_device_eval_batch_size=4,
            learning_rate=1e-3,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"input_ids": ids, "labels": ids}] * 4),
        eval_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=tokenizer,
    )
    callback = LogCompletionsCallback(trainer, GenerationConfig(max_new_tokens=16, do_sample=False), freq=2)
    trainer.add_callback(callback)
    trainer.train()
    return callback.table


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "PEFT"])
def test_logged_completions_are_plain_decodings(tmp_path, adapted):
    drafter = TreeFlashDraftModel.from_pretrained(EMBEDDED / "drafter", dtype=torch.float32)
    drafts, draft = [], drafter.draft
    drafter.draft = lambda *args, **kwargs: drafts.append(args) or draft(*args, **kwargs)
    plain = completions(tmp_path / "plain", adapted, None)
    assert [step for step, *_ in plain] == ["2"] * 5 + ["4"] * 5
    assert plain[:5] != plain[5:]  # the target has changed
    assert completions(tmp_path / "tree", adapted, drafter) == plain
    assert 0 < len(drafts) < 4 * 15  # two steps of training, two batches each, fewer passes than tokens
