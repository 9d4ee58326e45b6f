"""An eight-bit copy of an output layer, which ranks nodes at half the reading."""

from typing import Any

import torch
from torch import nn

from .memory import recall, remember, stamp


class Float8Rows:
    """Rows of a weight in `float8_e4m3fn`, each with its own scale.

    Args:
        rows (`torch.Tensor` of shape `(tokens, hidden_size)`, float8):
            The scaled rows.
        scales (`torch.FloatTensor` of shape `(tokens,)`):
            What to multiply them with.
    """

    def __init__(self, rows: torch.Tensor, scales: torch.Tensor):
        self.rows, self.scales = rows, scales

    def product(self, states: torch.Tensor) -> torch.Tensor:
        """Return `states @ rows.T` in bfloat16, the states rounded to float8 row by row as well.

        Devices without float8 matrix units compute the same product in float32: right, but slow.

        Args:
            states (`torch.Tensor` of shape `(..., hidden_size)`):
                What to multiply.

        Returns:
            `torch.Tensor` of shape `(..., tokens)`.
        """
        left, left_scales = to_float8(states.reshape(-1, states.shape[-1]))  # (rows, hidden_size) and (rows,)
        if self._on_matrix_units():
            logits = torch._scaled_mm(
                left,
                self.rows.t(),
                scale_a=left_scales[:, None],
                scale_b=self.scales[None],
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )
        else:
            logits = (left.float() @ self.rows.float().t() * left_scales[:, None] * self.scales).bfloat16()
        return logits.view(*states.shape[:-1], -1)

    def _on_matrix_units(self) -> bool:
        if not self.rows.is_cuda or any(size % 16 for size in self.rows.shape):
            return False
        return torch.cuda.get_device_capability(self.rows.device) >= (8, 9)


def to_float8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows `(rows, hidden_size)` scaled to the range of `float8_e4m3fn`, and their scales (float32)."""
    rows = rows.float()
    limit = torch.finfo(torch.float8_e4m3fn).max
    scales = rows.abs().amax(dim=-1).clamp(min=torch.finfo(torch.float32).tiny * limit) / limit
    return (rows / scales[:, None]).to(torch.float8_e4m3fn), scales


@torch.no_grad()
def float8_copy(lm_head: nn.Module) -> Float8Rows:
    """Return the layer's float8 copy; a weight that was moved or written to since gets a new one."""
    weight: Any = lm_head.weight
    state = stamp(weight)
    made_from, copy = recall("float8", lm_head) or (None, None)
    if copy is None or made_from != state:
        # A few rows at a time: a whole layer in float32 takes gigabytes.
        rows, scales = zip(*map(to_float8, weight.split(8192)), strict=True)
        joined = torch.cat([part.view(torch.uint8) for part in rows]).view(
            rows[0].dtype
        )  # as bytes: not every device joins float8
        copy = Float8Rows(joined, torch.cat(scales))
        remember("float8", (state, copy), lm_head)
    return copy


__all__ = ["Float8Rows", "float8_copy", "to_float8"]
