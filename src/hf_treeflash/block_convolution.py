"""DFlash-2's convolution along a block: each slot mixed with those before it, by kernels that its state chooses."""

import torch
from torch import nn

from .configuration_treeflash import TreeFlashConfig


class BlockConvolution(nn.Module):
    """Two convolutions around a sublayer, of its input and of its output; nothing is mixed across blocks.

    Slot i becomes the sum over t of kernel[t] times slot i - t. A kernel is a learned one per channel plus one per
    group of channels that the sublayer's input gives, the same input for both convolutions.

    Args:
        config ([`TreeFlashConfig`]):
            `conv_kernel_size` taps, `conv_group_size` channels per group.
    """

    def __init__(self, config: TreeFlashConfig):
        super().__init__()
        self.taps, self.block_size = config.conv_kernel_size, config.block_size
        self.groups = config.hidden_size // config.conv_group_size
        self.base_kernel = nn.Parameter(torch.zeros(2, self.taps, config.hidden_size))
        self.kernel_projection = nn.Linear(config.hidden_size, 2 * self.taps * self.groups, bias=False)
        setattr(self.kernel_projection, "_zero_init", True)

    def around(self, sublayer, states: torch.Tensor) -> torch.Tensor:
        """Run a sublayer between the two convolutions.

        Args:
            sublayer (`Callable`):
                Takes and returns states.
            states (`torch.Tensor` of shape `(batch, slots, hidden_size)`):
                Its normed input; any number of whole blocks.
        """
        batch, slots, _ = states.shape
        length = min(self.block_size, slots)
        # (batch * blocks, length, 2, taps, groups)
        kernels = self.kernel_projection(states).view(-1, length, 2, self.taps, self.groups)
        before = self._mixed(states.view(-1, length, states.shape[-1]), kernels, side=0)
        after = sublayer(before.view(batch, slots, -1))
        return self._mixed(after.view(-1, length, after.shape[-1]), kernels, side=1).view(batch, slots, -1)

    def _mixed(self, states: torch.Tensor, kernels: torch.Tensor, side: int) -> torch.Tensor:
        group = states.shape[-1] // self.groups
        mixed = torch.zeros_like(states)
        for tap in range(min(self.taps, states.shape[1])):
            kernel = kernels[:, :, side, tap].repeat_interleave(group, dim=-1) + self.base_kernel[side, tap]
            earlier = nn.functional.pad(states, (0, 0, tap, 0))[:, : states.shape[1]]  # slot i holds slot i - tap
            mixed = mixed + kernel * earlier
        return mixed


__all__ = ["BlockConvolution"]
