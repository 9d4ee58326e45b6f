"""What a drafter reads, and what it may propose."""

import torch

from hf_treeflash.transitions import Transitions


def random_transitions(seed, depth=4, rows=3, branching=3, batch=1, quantised=False, holes=0.0):
    """Return tables of likely tokens as a drafter with a head proposes them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, depth, rows, branching)
    log_probs = torch.log_softmax(torch.randn(*shape, generator=generator) * 2, dim=-1)
    if quantised:  # dyadic values add up exactly, so ties are real ties
        log_probs = (log_probs * 2).round() / 2
    log_probs = log_probs.sort(dim=-1, descending=True).values
    if holes:
        log_probs[torch.rand(*shape, generator=generator) < holes] = float("-inf")
        log_probs = log_probs.sort(dim=-1, descending=True).values
    token_ids = torch.stack([torch.randperm(50, generator=generator)[:branching] for _ in range(batch * depth * rows)])
    next_row = torch.randint(-1, rows, shape, generator=generator)
    next_row[:, -1] = -1
    return Transitions(token_ids.view(shape), log_probs, next_row)


def drafting_inputs(drafter, target, length=6, batch=1):
    """Return the arguments of `draft`: anchors, target states, and the target's embedding and output layer."""
    context = torch.randn(batch, length, 2 * 32, generator=torch.Generator().manual_seed(3))
    anchors = torch.arange(4, 4 + batch)
    return (anchors, context, target.get_input_embeddings(), target.get_output_embeddings())
