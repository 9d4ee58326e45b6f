"""An evaluation as a card takes it: without paths, complete, and of this very pair."""

import json
import os
from pathlib import Path
from typing import Any

from .scan import without_paths

NUMBER, NOTHING = (int, float), type(None)
# What a card prints, and of which type it is.
RESULT = {"task": str, "settings": dict, "environment": dict, "arms": list}
SETTINGS = {"prompts": int, "max_new_tokens": int, "repeats": int, "seed": int}
ARM = {
    "name": str,
    "knobs": dict,
    "tau": (*NUMBER, NOTHING),
    "tokens_per_second": (dict, NOTHING),
    "speedup": (dict, NOTHING),
    "identical": bool,
    "acceptance_rates": list,
    "distinct_4grams": (*NUMBER, NOTHING),
}
SPREAD = {"median": NUMBER, "min": NUMBER, "max": NUMBER}


def read_evaluation(source: dict[str, Any] | str | os.PathLike) -> dict[str, Any]:
    """Read what `hf-treeflash bench --json` wrote, and shorten the paths in it.

    Raises:
        ValueError: Naming what is missing or of another type.
    """
    text = json.dumps(source) if isinstance(source, dict) else Path(source).read_text("utf-8")
    try:
        evaluation = without_paths(json.loads(text))
    except ValueError as error:
        raise ValueError(f"The evaluation {source} is no JSON ({error}).") from error
    _check(evaluation, {"target": dict, "drafter": dict, "results": list}, "The evaluation")
    _check(evaluation["target"], {"id": str}, "`target` of the evaluation")
    for number, result in enumerate(evaluation["results"]):
        place = f"`results[{number}]` of the evaluation"
        _check(result, RESULT, place)
        _check(result["settings"], SETTINGS, f"`settings` in {place}")
        if not result["arms"]:
            raise ValueError(f"{place} compares nothing: its `arms` are empty.")
        for arm in result["arms"]:
            _check(arm, ARM, f"An arm in {place}")
            if not all(isinstance(rate, NUMBER) for rate in arm["acceptance_rates"]):
                raise ValueError(f"An arm in {place} has `acceptance_rates` that are no numbers.")
            for name in ("tokens_per_second", "speedup"):
                if arm[name] is not None:
                    _check(arm[name], SPREAD, f"`{name}` in {place}")
    return evaluation


def _check(entry: Any, fields: dict[str, Any], place: str) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{place} is no object; it must be what `hf-treeflash bench --json` wrote.")
    for name, kind in fields.items():
        if not isinstance(entry.get(name, ...), kind):
            raise ValueError(f"{place} has no fit `{name}`; it must be what `hf-treeflash bench --json` wrote.")


def check_pair(evaluation: dict[str, Any], target_id: str, target_revision: str | None, sizes: set[int]) -> None:
    """Refuse an evaluation of another target or drafter than the card is about.

    Args:
        evaluation (`dict`):
            From [`read_evaluation`].
        target_id (`str`), target_revision (`str`, *optional*):
            As the card names them.
        sizes (`set[int]`):
            Numbers of parameters the drafter may be recorded with.

    Raises:
        ValueError: With both names.
    """
    target, drafter = evaluation["target"], evaluation["drafter"]
    names = {target_id, target_id.rpartition("/")[2], *(target_id.replace("/", sign) for sign in ("-", "_", "--"))}
    # A target that was read from a folder is known by the folder's name, in the Hub's cache by the commit.
    if target["id"].lower() not in {name.lower() for name in names} | {target_revision}:
        raise ValueError(
            f"The evaluation ran with the target {target['id']!r}, the card would say {target_id!r}. Give the "
            "evaluation of this target, or the target's id as it was evaluated."
        )
    revision = target.get("revision")
    if None not in (revision, target_revision) and revision != target_revision:
        raise ValueError(
            f"The evaluation ran with revision {revision} of the target, the card would say {target_revision}."
        )
    parameters = drafter.get("parameters")
    if parameters is not None and parameters not in sizes:
        raise ValueError(
            f"The evaluation is of a drafter of {parameters} parameters, this one has {min(sizes)}: evaluate this one."
        )


__all__ = ["check_pair", "read_evaluation"]
