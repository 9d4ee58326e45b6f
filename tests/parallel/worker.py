"""Run by test_parallel.py: texts of a target whose layers are split over two processes, or of a whole one."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import hf_treeflash  # noqa: F401
from tests.helpers.tiny import keeping, prompt, tiny_drafter, with_knobs

BASE = {"max_new_tokens": 24, "eos_token_id": None, "pad_token_id": 2}
# By name: settings of the call, and knobs of the drafter.
CALLS: dict[str, tuple[dict, dict]] = {
    "greedy": ({"do_sample": False}, {}),
    "batch": ({"do_sample": False, "input_ids": prompt(batch=3)}, {}),
    "batch with ends": ({"do_sample": False, "input_ids": prompt(batch=3), "eos_token_id": [5, 7]}, {}),
    "sampling": ({"do_sample": True}, {}),
    "automatic budget": ({"do_sample": False, "max_new_tokens": 90}, {"tree_budget": "auto"}),
    "static": ({"do_sample": False, "cache_implementation": "static"}, {}),
    "scores": ({"do_sample": False, "output_scores": True, "return_dict_in_generate": True}, {}),
    "draft vocabulary": ({"do_sample": False}, {}),
    "eight bits": ({"do_sample": False}, {"draft_lm_head": "float8"}),
}


def texts(target, drafter_seed: int, drafted: bool) -> dict:
    """Return each call's text, or the error it ended in."""
    results: dict = {}
    for name, (settings, knobs) in CALLS.items():
        settings = {"input_ids": prompt(), **BASE, **settings}
        if not drafted:
            settings.pop("cache_implementation", None)
        drafter = with_knobs(tiny_drafter(seed=drafter_seed), **{"tree_budget": 12, **knobs})
        if name == "draft vocabulary":
            keeping(drafter, *range(4, 16))
        torch.manual_seed(3)
        try:
            output = target.generate(**settings, **({"assistant_model": drafter} if drafted else {}))
            results[name] = output["sequences"] if "scores" in name else output
        except ValueError as error:
            results[name] = str(error)
    return results


def main(folder: str, output: str) -> None:
    logging.set_verbosity_error()
    split = torch.distributed.is_torchelastic_launched()
    if split:
        torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank() if split else 0
    plan = {"tp_plan": "auto"} if split else {}
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **plan).eval()
    results = {"plain": texts(target, 1, drafted=False), "drafted": texts(target, 1, drafted=True)}
    # Each process has a drafter of its own: the first one's trees are everybody's.
    results["drafters apart"] = texts(target, 1 + rank, drafted=True)
    torch.save(results, Path(output, f"{rank}.pt"))
    if split:
        torch.distributed.destroy_process_group()  # its threads must not outlive the interpreter


if __name__ == "__main__":
    main(*sys.argv[1:])
