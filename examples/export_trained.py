"""Turn a checkpoint of a training into the folder that is shipped: half precision, knobs, code, card, training record.

So the drafter of SmolLM2-135M-Instruct is made from the training that README.md names:

    python examples/export_trained.py build/smollm2 drafters/smollm2-135m-instruct-treeflash \\
        --target HuggingFaceTB/SmolLM2-135M-Instruct --license apache-2.0 --tree_budget 16 --evaluation evaluation.json

The evaluation is what `hf-treeflash bench --json` wrote about this very checkpoint in bfloat16.
"""

import argparse
import json
from pathlib import Path

import torch

from hf_treeflash import TreeFlashDraftModel
from hf_treeflash.hub import export_drafter

CURVE = 100  # points of the curves in the record, at most


def training_record(checkpoint: Path) -> dict:
    """Return what a checkpoint's trainer state says of its training: how long, and how the metrics went."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    logs = [entry for entry in state["log_history"] if "loss" in entry]
    every = -(-len(logs) // CURVE) or 1
    return {
        "steps": state["global_step"],
        "batch_size": state["train_batch_size"],
        "command": (checkpoint / "command.txt").read_text().splitlines(),
        "log": logs[::-1][::every][::-1],  # the last one always
    }


def budget(text: str) -> int | str:
    """Read a tree budget."""
    return text if text == "auto" else int(text)


def main(argv: list[str] | None = None) -> list[str]:
    """Write the folder, and return its files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="folder that the Trainer wrote")
    parser.add_argument("folder", type=Path, help="where to write: new, empty, or an earlier export")
    parser.add_argument("--target", required=True, help="Hub id of the target")
    parser.add_argument("--license", help="of the weights")
    parser.add_argument("--dataset", action="append", help="Hub id of training data; may be repeated")
    parser.add_argument("--evaluation", type=Path, help="what `hf-treeflash bench --json` wrote")
    parser.add_argument("--tree_budget", type=budget, help="the knob to ship: nodes, or auto")
    parser.add_argument("--num_candidates", type=int, help="the knob to ship")
    args = parser.parse_args(argv)
    drafter = TreeFlashDraftModel.from_pretrained(args.checkpoint, dtype=torch.bfloat16)
    for knob in ("tree_budget", "num_candidates"):
        if getattr(args, knob) is not None:
            setattr(drafter.generation_config, knob, getattr(args, knob))
    files = export_drafter(
        drafter,
        args.folder,
        target_id=args.target,
        license=args.license,
        datasets=args.dataset,
        evaluation=args.evaluation,
        command=args.checkpoint / "command.txt",
        record=training_record(args.checkpoint),
    )
    print("\n".join(files))
    return files


if __name__ == "__main__":
    main()
