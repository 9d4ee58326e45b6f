"""Mamba-1 over trees: Jamba."""

from typing import NamedTuple

import torch

from .levels import Level

# Every node has a state of its own for as long as its level is computed; so much of it at a time.
ELEMENTS = 1 << 21


class ScanTerms(NamedTuple):
    """What the nodes of a pass fed into the scan; the state follows a path by repeating its steps.

    Attributes:
        time_step, inputs (`torch.FloatTensor` of shape `(batch, channels, nodes)`):
            Time steps, and time steps times inputs.
        rate (`torch.Tensor` of shape `(channels, state_size)`):
            Negative rates of decay ("A").
        input_weights (`torch.FloatTensor` of shape `(batch, nodes, state_size)`):
            "B".
    """

    time_step: torch.Tensor
    inputs: torch.Tensor
    rate: torch.Tensor
    input_weights: torch.Tensor

    def add_path(self, state: torch.Tensor, path: torch.Tensor) -> None:
        """Move the state along accepted paths, see [`Terms`]."""
        moved, rows = state.float(), torch.arange(len(path), device=path.device)
        for nodes in path.unbind(1):
            taken = (nodes >= 0)[:, None]
            # A step of no time leaves the state as it is.
            time_step = self.time_step[rows, :, nodes].where(taken, 0.0)  # (batch, channels)
            inputs = self.inputs[rows, :, nodes].where(taken, 0.0)
            moved = _step(moved, time_step, inputs, self.rate, self.input_weights[rows, nodes])
        state.copy_(moved)


def mamba1(
    hidden_states: torch.Tensor,
    time_step: torch.Tensor,
    rate: torch.Tensor,
    input_weights: torch.Tensor,
    output_weights: torch.Tensor,
    skip: torch.Tensor,
    state: torch.Tensor,
    levels: list[Level],
) -> tuple[torch.Tensor, ScanTerms]:
    """Run the layer over the nodes of trees, all from one state, which stays as it is.

    There is a decay for every channel and place of the state, so no product of matrices stands for a path: the nodes
    of a level go together, and its states live until those of the next are there.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch, channels, nodes)`):
            Inputs.
        time_step (`torch.FloatTensor` of shape `(batch, channels, nodes)`):
            Positive time steps.
        rate (`torch.FloatTensor` of shape `(channels, state_size)`):
            Negative rates of decay ("A").
        input_weights, output_weights (`torch.Tensor` of shape `(batch, state_size, nodes)`):
            "B" and "C".
        skip (`torch.Tensor` of shape `(channels,)`):
            Weight of the input in the output ("D").
        state (`torch.Tensor` of shape `(batch, channels, state_size)`):
            The state the roots continue.
        levels (`list[Level]`):
            The nodes of each depth.

    Returns:
        `tuple[torch.Tensor, ScanTerms]`: The output, `(batch, channels, nodes)`, and the nodes' terms.
    """
    batch, channels, nodes = hidden_states.shape
    hidden, b, c = hidden_states.float(), input_weights.float().mT, output_weights.float().mT
    terms = ScanTerms(time_step, time_step * hidden, rate, b)
    # One more node takes what rows with narrower levels compute for nothing.
    output = hidden.new_zeros(batch, channels, nodes + 1)
    widest = max(level.nodes.shape[1] for level in levels)
    step = max(1, ELEMENTS // (batch * widest * rate.shape[1]))
    for first in range(0, channels, step):
        here = slice(first, first + step)
        states = state[:, here].float()[:, None]  # (batch, 1, channels, state_size)
        for level in levels:
            states = _level_states(states, level, terms, here)
            read = states @ _at(c, level.nodes)[..., None]  # (batch, width, channels, 1)
            place = level.slots[:, None].expand(-1, read.shape[2], -1)
            output[:, here].scatter_(2, place, read[..., 0].mT)
    output = output[:, :, :nodes] + hidden * skip.float()[:, None]
    return output.to(hidden_states.dtype), terms


def _level_states(states: torch.Tensor, level: Level, terms: ScanTerms, here: slice) -> torch.Tensor:
    """Return the states of a level's nodes from those of the level above, `(batch, width, channels, state_size)`."""
    above = _at(states.flatten(2), level.parents).unflatten(2, states.shape[2:])
    time_step = _at(terms.time_step[:, here].mT, level.nodes)  # (batch, width, channels)
    inputs = _at(terms.inputs[:, here].mT, level.nodes)
    return _step(above, time_step, inputs, terms.rate[here], _at(terms.input_weights, level.nodes))


def _step(states, time_step, inputs, rate, input_weights) -> torch.Tensor:
    """Let time steps pass over states `(..., channels, state_size)`."""
    decay = (time_step[..., None] * rate).exp_()
    return decay.mul_(states).add_(inputs[..., None] * input_weights[..., None, :])


def _at(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return chosen places of each row of `(batch, places, size)`."""
    return values.gather(1, places[..., None].expand(-1, -1, values.shape[2]))


__all__ = ["ScanTerms", "mamba1"]
