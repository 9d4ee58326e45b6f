"""The evaluation harness beside a drafter: responses and results are plain decoding's, byte for byte.

A drafter is named among the generation settings, as `lm_eval --gen_kwargs assistant_model=NAME` has them.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_treeflash.bench.demo import EMBEDDED

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed: `make harness` does")
PROMPTS = json.loads((EMBEDDED / "prompts.json").read_text())[:10]
TASK = Path(__file__).with_name("continue_code.yaml")
DRAFTER = str(EMBEDDED / "drafter")


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    """A function that runs the task with some generation settings, four prompts at a time; offline."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("task")
    lines = [json.dumps(prompt) for prompt in PROMPTS]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    (folder / TASK.name).write_text(TASK.read_text().replace("DATA", str(folder / "prompts.jsonl")))
    target = AutoModelForCausalLM.from_pretrained(EMBEDDED / "target", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "target")
    tasks = TaskManager(include_path=str(folder), include_defaults=False)

    def evaluate(**settings):
        model = HFLM(pretrained=target, tokenizer=tokenizer, batch_size=4, device="cpu")
        return lm_eval.simple_evaluate(
            model, tasks=["continue_code"], task_manager=tasks, gen_kwargs=settings or None, bootstrap_iters=0
        )

    return target, evaluate


def passes_of(target, evaluate, **settings) -> tuple[bytes, int]:
    """Return what the harness saw, as bytes, and how many passes the target made."""
    passes: list = []
    hook = target.register_forward_pre_hook(lambda *args: passes.append(args[0]))
    output = evaluate(**settings)
    hook.remove()
    seen = [sample["resps"] for sample in output["samples"]["continue_code"]], output["results"]
    return json.dumps(seen).encode(), len(passes)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"until": ["self", ":", "\n    "]},
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"max_gen_toks": 5, "repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_responses_and_results_are_plain_decodings(harness, settings):
    seen = []
    for drafting in ({}, {"assistant_model": DRAFTER}):
        torch.manual_seed(3)
        seen.append(passes_of(*harness, **settings, **drafting))
    (plain, plain_passes), (tree, tree_passes) = seen
    assert tree == plain
    assert len(json.loads(plain)[0]) == len(PROMPTS)
    assert tree_passes < plain_passes
