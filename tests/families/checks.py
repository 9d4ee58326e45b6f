"""What holds for every target: the text, the seed and the cache of plain `generate`."""

import torch

from hf_treeflash.compat import CACHE
from tests.helpers.quoting import knows
from tests.helpers.tiny import tiny_drafter, with_knobs

CLOSE = {"atol": 2e-4, "rtol": 1e-3}


def drafter_for(target, head: bool = True, **knobs):
    """Return a tiny drafter for any tiny target."""
    return with_knobs(tiny_drafter(head, num_target_layers=None), **{"tree_budget": 24, **knobs})


def own_columns(output, prompt_mask: torch.Tensor, eos_token_ids=()) -> list[tuple[int, int]]:
    """Return, for each row, the sequence columns whose states a plain forward computes for that row's own tokens."""
    length, spans = prompt_mask.shape[1], []
    for row, ids in enumerate(output.sequences[:, length:].tolist()):
        ends = [index + 1 for index, token in enumerate(ids) if token in eos_token_ids]
        # The newest token of the longest row is the only one without a state.
        spans.append((int((prompt_mask[row] == 0).sum()), length + min([*ends, len(ids) - 1])))
    return spans


def assert_same_cache(ours, plain, prompt_mask: torch.Tensor) -> None:
    """Compare two caches, but for the columns of padding before the prompts."""
    assert ours.get_seq_length() == plain.get_seq_length()
    assert len(ours.layers) == len(plain.layers)
    for mine, theirs in zip(ours.layers, plain.layers, strict=True):
        assert type(mine) is type(theirs)
        assert not getattr(mine, "record_past", False)
        assert_same_states(mine, theirs)
        if getattr(mine, "keys", None) is None:
            continue
        assert mine.get_seq_length() == theirs.get_seq_length()
        offset = mine.get_seq_length() - mine.keys.shape[2]
        for name in ("keys", "values"):
            a, b = getattr(mine, name), getattr(theirs, name)
            assert a.shape == b.shape
            for row, padding in enumerate((prompt_mask == 0).sum(1).tolist()):
                start = max(0, padding - offset)
                torch.testing.assert_close(a[row, :, start:], b[row, :, start:], **CLOSE)


def assert_same_states(mine, theirs) -> None:
    """Compare what two layers of caches keep beside columns."""
    for name in ("conv_states", "recurrent_states"):
        a, b = (getattr(layer, name, {0: None})[0] for layer in (mine, theirs))
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == b.shape and a.dtype == b.dtype
            torch.testing.assert_close(a, b, **CLOSE)


def check_greedy(target, drafter, inputs: dict, **settings):
    """Compare greedy texts and the caches they leave behind; return the drafted call's output."""
    settings = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": None, **settings}
    settings["return_dict_in_generate"] = True
    plain = target.generate(**inputs, **settings)
    knows(drafter, plain.sequences, inputs["attention_mask"])
    tree = target.generate(**inputs, assistant_model=drafter, **settings)
    assert torch.equal(tree.sequences, plain.sequences)
    assert_same_cache(tree.past_key_values, plain.past_key_values, inputs["attention_mask"])
    return tree


def check_sampling(target, drafter, inputs: dict, seeds=range(3), **settings) -> None:
    """Compare texts sampled with the same seed, and how far the random numbers were used up."""
    settings = {"do_sample": True, "max_new_tokens": 20, "eos_token_id": None, "temperature": 0.9, **settings}
    for seed in seeds:
        torch.manual_seed(seed)
        plain, state = target.generate(**inputs, **settings), torch.get_rng_state()
        knows(drafter, plain, inputs["attention_mask"])
        torch.manual_seed(seed)
        tree = target.generate(**inputs, assistant_model=drafter, **settings)
        assert torch.equal(tree, plain)
        assert torch.equal(torch.get_rng_state(), state)


def check_second_turn(target, drafter, inputs: dict, **settings) -> None:
    """Compare a second turn on each call's own cache, and a plain one on the cache of the drafted call."""
    settings = {"do_sample": False, "max_new_tokens": 9, "eos_token_id": None, **settings}
    settings["return_dict_in_generate"] = True
    mask, ids = inputs["attention_mask"], inputs["input_ids"]
    user = torch.randint(4, 20, (len(ids), 5), generator=torch.Generator().manual_seed(9))

    def turns(first, second) -> list[torch.Tensor]:
        """Write a turn, let the user say something, write another, with a drafter or without."""
        before = target.generate(**inputs, **settings, **first)
        text = torch.cat([before.sequences, user], dim=1)
        longer = torch.cat([mask, mask.new_ones(len(ids), text.shape[1] - ids.shape[1])], dim=1)
        after = target.generate(text, attention_mask=longer, **{CACHE: before[CACHE]}, **settings, **second)
        return [before.sequences, after.sequences]

    plain = turns({}, {})
    knows(drafter, plain[1], mask)
    ours = {"assistant_model": drafter}
    for first, second in ((ours, ours), (ours, {}), ({}, ours)):
        for mine, theirs in zip(turns(first, second), plain, strict=True):
            assert torch.equal(mine, theirs)


def ending_at(target, inputs: dict, steps: list[int]) -> list[int]:
    """Return end-of-text ids under which rows end early: the tokens of row `i` after `steps[i]` plain steps."""
    length = inputs["input_ids"].shape[1]
    text = target.generate(**inputs, do_sample=False, max_new_tokens=max(steps) + 1, eos_token_id=None)[:, length:]
    return [int(text[row, step]) for row, step in enumerate(steps)]
