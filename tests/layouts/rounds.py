"""What a drafter said in each round of a real `generate`, and where: to be compared with the reference."""

import json

import torch
from safetensors.torch import save_file

from hf_treeflash import TreeFlashDraftModel
from tests.families.models import FAMILIES
from tests.helpers.tiny import VOCAB, prompt, tiny_target, with_knobs

BY_NAME = {family.name: family for family in FAMILIES}


def make_target(name: str):
    """Return the tiny target of a published checkpoint."""
    families = {"gemma2": "Gemma 2", "muse": "Muse Glimmer"}
    return BY_NAME[families[name]].build() if name in families else tiny_target(name)


def write(published, folder):
    """Write a published checkpoint as its repository has it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(published.config))
    tensors = {name: value.contiguous() for name, value in published.tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name in published.files:
        (folder / name).touch()
    return folder


def load(published, folder, **kwargs):
    """Read a published checkpoint as users do."""
    return TreeFlashDraftModel.from_pretrained(write(published, folder), dtype=torch.float32, **kwargs).eval()


def drafted_rounds(target, drafter, lengths: tuple[int, ...] = (9,), **settings):
    """Generate, and return the texts and what each round's draft said of each of them.

    Args:
        lengths (`tuple[int, ...]`):
            Of the prompts; shorter ones are padded on the left.

    Returns:
        `tuple`: The texts, each `(length,)`, and a list of (place of the anchor, anchor, log-probabilities of all
        tokens): `(depth, vocab)`, or with a head `(depth, vocab, vocab)` by previous token.
    """
    rounds: list[tuple[int, int, torch.Tensor]] = []
    draft, block = type(drafter).draft, drafter.config.block_size

    def spy(anchor_ids, *args, on_demand=None, **kwargs):
        transitions = draft(drafter, anchor_ids, *args, **kwargs)
        places = kwargs["position_ids"][:, -block].tolist()
        for row, (place, anchor) in enumerate(zip(places, anchor_ids.tolist(), strict=True)):
            rounds.append((place, anchor, all_log_probs(transitions, row, anchor, drafter)))
        return transitions

    ids = prompt(max(lengths), batch=len(lengths))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : max(lengths) - length] = 0
    drafter.draft = spy
    with_knobs(drafter, tree_budget=12, num_candidates=VOCAB, branching=VOCAB, draft_temperature=1.0)
    inputs = {"input_ids": ids.masked_fill(mask == 0, 2), "attention_mask": mask}
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, **settings}
    try:
        texts = target.generate(**inputs, assistant_model=drafter, **options)
    finally:
        del drafter.draft
    options.pop("cache_implementation", None)
    plain = target.generate(**inputs, **options)
    assert torch.equal(texts, plain)
    return [text[max(lengths) - length :] for text, length in zip(texts, lengths, strict=True)], rounds


def all_log_probs(transitions, row: int, anchor: int, drafter) -> torch.Tensor:
    """Arrange one row of transitions over the whole vocabulary by tokens."""
    tokens, log_probs, next_row = (table[row] for table in transitions)
    depth, rows, _ = tokens.shape
    by_row = torch.full((depth, rows, VOCAB), float("-inf")).scatter_(2, tokens, log_probs)
    if drafter.config.ar_head is None:
        return by_row[:, 0]
    result = torch.full((depth, VOCAB, VOCAB), float("-inf"))
    result[0, anchor] = by_row[0, 0]
    for level in range(1, depth):
        links = zip(tokens[level - 1].flatten().tolist(), next_row[level - 1].flatten().tolist(), strict=True)
        for token, below in links:
            if below >= 0:
                result[level, token] = by_row[level, below]
    return result


def largest_difference(rounds, texts, reference) -> float:
    """Return by how much the rounds differ from the reference, where anything was said at all."""
    worst, compared = 0.0, 0
    for place, anchor, said in rounds:
        # Rows leave a batch at their own time: the round is of one of the texts with this anchor there. A static round
        # also drafts for rows that have ended.
        wanted = [reference.log_probs(text, place) for text in texts if place < len(text) and text[place] == anchor]
        if wanted:
            worst, compared = max(worst, min(difference(said, one) for one in wanted)), compared + 1
    assert compared >= 3 * len(texts)
    return worst


def difference(said: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return how far two tables of log-probabilities are apart, infinitely if they are not of the same tokens."""
    if said.ndim == 3:
        rows = (said > float("-inf")).any(-1)  # what follows a token that nothing led to was never asked
        said, wanted = said[rows], wanted[rows]
    if not torch.equal(said > float("-inf"), wanted > float("-inf")):
        return float("inf")
    known = said > float("-inf")
    return float((said - wanted)[known].abs().max())
