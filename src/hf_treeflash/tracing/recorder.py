"""`hf_treeflash.trace()`: while it is open, every round of every call with a drafter is written down."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..generation import DECODING
from .decoding import TracedDecoding
from .rounds import TracedText


class Trace:
    """What calls did while it was open.

    Attributes:
        texts (`list[TracedText]`):
            One per row of each call, in the order in which calls began.
    """

    def __init__(self):
        self.texts: list[TracedText] = []

    def to_dict(self, tokenizer) -> dict[str, Any]:
        """Return all of it as plain data, ready for JSON and for [`render_page`].

        Args:
            tokenizer ([`PreTrainedTokenizerBase`]):
                The target's.

        Returns:
            `dict`: `texts`, and in `tokens` what each token id of a tree reads as.
        """
        ids = sorted({token for text in self.texts for round in text.rounds for token in round.shown_ids})
        return {
            "version": 1,
            "texts": [text.to_dict(tokenizer) for text in self.texts],
            "tokens": {str(token): tokenizer.decode([token]) for token in ids},
        }


@contextmanager
def trace() -> Iterator[Trace]:
    """Write down the rounds of the calls of `generate` in a `with` block, in the thread that opened it.

    Texts stay what they are. Rounds take longer: the device is waited for between stages, and the target's
    probabilities are read at every node. Calls with static caches run with dynamic ones, whose rounds can be looked
    at.

    Returns:
        [`Trace`]: Filled as the calls run.

    Example:

        >>> with hf_treeflash.trace() as trace:
        ...     target.generate(**inputs, assistant_model=drafter)
        >>> hf_treeflash.tracing.write_trace(trace, "out", tokenizer)
    """
    recorded = Trace()
    token = DECODING.set(functools.partial(TracedDecoding, recorded.texts))
    try:
        yield recorded
    finally:
        DECODING.reset(token)
