"""Causal convolutions over trees: of every recurrent layer, and all there is to LFM2's."""

import torch


def convolution(
    columns: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, reached: torch.Tensor
) -> torch.Tensor:
    """Convolve every node with what stands before it on its path.

    Args:
        columns (`torch.Tensor` of shape `(batch, channels, stored + nodes)`):
            Stored columns, then those of the nodes.
        weight (`torch.Tensor` of shape `(channels, kernel)`):
            Weights, the newest column's last.
        bias (`torch.Tensor` of shape `(channels,)`, *optional*):
            Bias.
        reached (`torch.LongTensor` of shape `(batch, nodes, kernel)`):
            The columns of each node's window, see [`reached_columns`].

    Returns:
        `torch.FloatTensor` of shape `(batch, channels, nodes)`.
    """
    _, nodes, kernel = reached.shape
    index = (reached + (columns.shape[2] - nodes)).flatten(1)[:, None].expand(-1, columns.shape[1], -1)
    windows = columns.gather(2, index).unflatten(2, (nodes, kernel))  # (batch, channels, nodes, kernel)
    output = (windows.float() @ weight.float()[..., None])[..., 0]
    return output if bias is None else output + bias.float()[:, None]


__all__ = ["convolution"]
