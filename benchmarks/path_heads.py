"""Reference code of two heads whose rows depend on the whole path, a row per node of a tree; slow, to measure only.

Both give what to add to a slot's own logits, from a state that each token of the path moves on. No finite table holds
their rows, so they are not part of the package: `heads.py` measures what they would bring.
"""

import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from hf_treeflash.transitions import NextTokens


class DominoHead(nn.Module):
    """Domino: a GRU over the tokens' embeddings; its state and the slot's go through a small network.

    Args:
        hidden_size (`int`), vocab_size (`int`):
            Of the drafter.
        state_size (`int`), rank (`int`):
            Of the GRU's state, and of the network's middle.
        embed (`Callable`):
            The target's embedding.
    """

    def __init__(self, hidden_size: int, vocab_size: int, state_size: int, rank: int, embed: Callable):
        super().__init__()
        self.state_size, self.embed = state_size, [embed]  # in a list: not a part of this module
        self.cell = nn.GRUCell(hidden_size, state_size, bias=False)
        self.mix = nn.Linear(hidden_size + state_size, rank, bias=False)
        self.output = nn.Linear(rank, vocab_size, bias=False)
        nn.init.zeros_(self.output.weight)

    def step(self, state: torch.Tensor, previous_ids: torch.Tensor, normed: torch.Tensor):
        """Read a token; return the next state and what to add to the logits of the slot behind it."""
        state = self.cell(self.embed[0](previous_ids), state)
        return state, self.output(F.silu(self.mix(torch.cat([normed, state], dim=-1))))


class RecurrentMarkovHead(nn.Module):
    """DSpark's `rnn`: gate, candidate and output from the state, the previous token's vector and the slot's state."""

    def __init__(self, hidden_size: int, vocab_size: int, rank: int):
        super().__init__()
        self.state_size = rank
        self.previous = nn.Embedding(vocab_size, rank)
        nn.init.normal_(self.previous.weight, std=0.02)
        self.joint = nn.Linear(2 * rank + hidden_size, 3 * rank)
        self.output = nn.Linear(rank, vocab_size, bias=False)
        nn.init.zeros_(self.output.weight)

    def step(self, state: torch.Tensor, previous_ids: torch.Tensor, normed: torch.Tensor):
        """Read a token; see [`DominoHead`]."""
        joint = self.joint(torch.cat([state, self.previous(previous_ids), normed], dim=-1))
        gate, candidate, output = joint.chunk(3, dim=-1)
        gate = gate.sigmoid()
        return gate * state + (1 - gate) * candidate.tanh(), self.output(output.tanh())


def added_along(head: nn.Module, previous_ids: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
    """Return what a head adds along known texts, `(blocks, depth, vocab)`, from `(blocks, depth)` previous tokens."""
    state = normed.new_zeros(len(normed), head.state_size)
    added = []
    for depth in range(normed.shape[1]):
        state, own = head.step(state, previous_ids[:, depth], normed[:, depth])
        added.append(own)
    return torch.stack(added, dim=1)


class PathRows:
    """The rows of a head that reads whole paths, each computed exactly when a tree reaches its node.

    Args:
        step (`Callable`):
            Given the state before a token, the token, the text and the depth index of the slot behind it, returns the
            state behind the token and the slot's logits `(columns,)`.
        start (`torch.Tensor`):
            The state before an anchor.
        anchor_ids (`torch.LongTensor` of shape `(batch,)`):
            Newest committed tokens.
        depth (`int`), branching (`int`), temperature (`float`):
            Of the draft.
        target_ids (`Callable`, *optional*):
            Gives the tokens behind columns.
        shortlists (`list[list[set[int]]]`, *optional*):
            By text and depth index, the tokens that have a row, as in a draft of tables; by default all have.
    """

    def __init__(
        self, step: Callable, start, anchor_ids, depth: int, branching: int, temperature: float,
        target_ids: Callable = lambda columns: columns, shortlists: list[list[set[int]]] | None = None,
    ):  # fmt: skip
        self.step, self.depth, self.branching, self.temperature = step, depth, branching, temperature
        self.target_ids, self.shortlists = target_ids, shortlists
        # By text and number of a row: the state before its token, and the token.
        self.nodes = [[(start, anchor)] for anchor in anchor_ids.tolist()]
        self.known: dict[tuple[int, int, int], NextTokens] = {}

    def rows(self) -> "PathRows":
        """Return itself."""
        return self

    def device_tables(self) -> None:
        """Return None: there are no tables."""

    def compute_guessed(self) -> list[int]:
        """Return no text: nothing is ever guessed."""
        return []

    @torch.no_grad()
    def read(self, text: int, depth: int, row: int) -> NextTokens:
        """Return a node's row, with a new row for each of its children."""
        key = text, depth, row
        if key not in self.known:
            state, token = self.nodes[text][row]
            state, logits = self.step(state, token, text, depth)
            best = (logits / self.temperature).log_softmax(-1).topk(min(self.branching, len(logits)))
            tokens, first = self.target_ids(best.indices).tolist(), len(self.nodes[text])
            rows = dict.fromkeys(tokens, -1)
            if depth < self.depth - 1:
                rows = {token: first + i for i, token in enumerate(tokens) if self._has_row(text, depth, token)}
            self.nodes[text] += [(state, token) for token in tokens]
            self.known[key] = NextTokens(tokens, best.values.tolist(), rows)
        return self.known[key]

    def _has_row(self, text: int, depth: int, token: int) -> bool:
        return self.shortlists is None or token in self.shortlists[text][depth]


@torch.no_grad()
def draft_along_paths(drafter, steps_of, anchor_ids, context, embed, lm_head, *, knobs, position_ids, cache, **kwargs):
    """Draft as [`TreeFlashDraftModel.draft`] does, with rows that `steps_of(hidden, normed, marginals, ...)` gives."""
    kwargs = {name: value for name, value in kwargs.items() if name not in ("draw_noise", "on_demand")}
    attention_mask = kwargs.pop("attention_mask", None)
    masks = anchor_ids.new_full((len(anchor_ids), drafter.config.block_size - 1), drafter.config.mask_token_id)
    noise = embed(torch.cat([anchor_ids[:, None], masks], dim=1))
    hidden = drafter.backbone(noise, context, position_ids, attention_mask, cache, **kwargs)
    hidden = hidden[:, drafter.config.first_slot :]
    normed = drafter.norm(hidden)
    marginals = lm_head(normed)
    step, start, has_shortlists = steps_of(hidden, normed, marginals, embed, lm_head)
    shortlists = None
    if has_shortlists:
        best = drafter.target_ids(marginals.topk(min(knobs.num_candidates, marginals.shape[-1])).indices)
        shortlists = [[set(slot) for slot in text] for text in best.tolist()]
    branching, temperature = knobs.branching, knobs.draft_temperature
    return PathRows(step, start, anchor_ids, hidden.shape[1], branching, temperature, drafter.target_ids, shortlists)


def drafting_along_paths(drafter, steps_of: Callable):
    """Let a drafter without a head draft along paths.

    Args:
        drafter ([`TreeFlashDraftModel`]):
            A view of its own.
        steps_of (`Callable`):
            Takes a block's `hidden`, `normed`, `marginals`, `embed` and `lm_head`; returns the `step` and the `start`
            of [`PathRows`], and whether only shortlisted tokens have rows.
    """
    drafter.draft = functools.partial(draft_along_paths, drafter, steps_of)
    return drafter


def steps_of_state(head: nn.Module) -> Callable:
    """Return how a head with a state of its own steps, see [`drafting_along_paths`]."""

    def steps_of(hidden, normed, marginals, embed, lm_head):
        def step(state, token, text, depth):
            state, added = head.step(state, torch.tensor([token]), normed[text, depth][None])
            return state, marginals[text, depth] + added[0]

        return step, normed.new_zeros(1, head.state_size), False

    return steps_of
