"""Whether arms wrote the baseline's texts, and where not, how near a tie that was."""

from typing import Any

import torch


def differences(target, prompts, expected: list[list[int]], found: list[list[int]]) -> list[dict[str, Any]]:
    """Return where texts first differ from what was expected, and how near a tie that was.

    Args:
        target ([`PreTrainedModel`]):
            The target.
        prompts (`Sequence[torch.LongTensor]` of shape `(1, length)`):
            What the texts follow.
        expected (`list[list[int]]`), found (`list[list[int]]`):
            New tokens of each.

    Returns:
        `list[dict]`: `text` and `token`, counted from 0, and `gap`: by how much the target's logit of the expected
        token is above that of the found one; None where one of the texts ends there.
    """
    listed = []
    for number, (prompt, one, other) in enumerate(zip(prompts, expected, found, strict=True)):
        if one == other:
            continue
        at = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        gap = None
        if at < min(len(one), len(other)):
            ids = torch.cat([prompt.to(target.device), prompt.new_tensor([one[:at]]).to(target.device)], dim=1)
            with torch.no_grad():
                logits = target(input_ids=ids, use_cache=False).logits[0, -1]
            gap = float(logits[one[at]] - logits[other[at]])
        listed.append({"text": number, "token": at, "gap": gap})
    return listed


def is_exact(result: dict[str, Any]) -> bool:
    """Tell whether every arm of a comparison that promises the baseline's texts gave them."""
    return all(arm["identical"] for arm in result["arms"] if arm["promises_text"])
