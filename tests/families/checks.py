"""What holds for every target: the text, the seed and the cache of plain `generate`."""

import torch

from tests.tiny import tiny_drafter, with_knobs

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


def assert_same_cache(ours, plain, spans: list[tuple[int, int]]) -> None:
    """Compare two caches on the columns that hold rows' own tokens, and in length and shape everywhere."""
    assert ours.get_seq_length() == plain.get_seq_length()
    assert len(ours.layers) == len(plain.layers)
    for mine, theirs in zip(ours.layers, plain.layers, strict=True):
        assert type(mine) is type(theirs) and mine.get_seq_length() == theirs.get_seq_length()
        assert not getattr(mine, "record_past", False)
        offset = mine.get_seq_length() - mine.keys.shape[2]
        for name in ("keys", "values"):
            a, b = getattr(mine, name), getattr(theirs, name)
            assert a.shape == b.shape
            for row, span in enumerate(spans):
                start, stop = (max(0, column - offset) for column in span)
                torch.testing.assert_close(a[row, :, start:stop], b[row, :, start:stop], **CLOSE)


def check_greedy(target, drafter, inputs: dict, **settings) -> None:
    """Compare greedy texts and the caches they leave behind."""
    settings = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": None, **settings}
    settings["return_dict_in_generate"] = True
    plain = target.generate(**inputs, **settings)
    tree = target.generate(**inputs, assistant_model=drafter, **settings)
    assert torch.equal(tree.sequences, plain.sequences)
    eos = settings["eos_token_id"]
    spans = own_columns(plain, inputs["attention_mask"], eos if isinstance(eos, list) else [eos])
    assert_same_cache(tree.past_key_values, plain.past_key_values, spans)


def check_sampling(target, drafter, inputs: dict, seeds=range(3), **settings) -> None:
    """Compare texts sampled with the same seed, and how far the random numbers were used up."""
    settings = {"do_sample": True, "max_new_tokens": 20, "eos_token_id": None, "temperature": 0.9, **settings}
    for seed in seeds:
        torch.manual_seed(seed)
        plain, state = target.generate(**inputs, **settings), torch.get_rng_state()
        torch.manual_seed(seed)
        tree = target.generate(**inputs, assistant_model=drafter, **settings)
        assert torch.equal(tree, plain)
        assert torch.equal(torch.get_rng_state(), state)


def ending_at(target, inputs: dict, steps: list[int]) -> list[int]:
    """Return end-of-text ids under which rows end early: the tokens of row `i` after `steps[i]` plain steps."""
    length = inputs["input_ids"].shape[1]
    text = target.generate(**inputs, do_sample=False, max_new_tokens=max(steps) + 1, eos_token_id=None)[:, length:]
    return [int(text[row, step]) for row, step in enumerate(steps)]
