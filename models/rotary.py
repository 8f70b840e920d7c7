"""Rotary positions: queries and keys turned by angles that grow with their positions.

Channels i and i + D/2 are a plane that position p turns by p 10,000^(-2i / D), so that q.k depends
on contents and on the distance of the two positions alone (RoFormer, Su et al. 2021, eq. 34). With
D odd, the last channel stays as it is.
"""

import torch
from torch import Tensor, nn

BASE = 10_000.0


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Turns the vectors ``x`` (..., N, D) by their ``positions`` (N,); in float32 at least."""
    half = x.shape[-1] // 2
    # In float64: a float32 angle of position 4,096 is off by 1e-4.
    rates = BASE ** (-torch.arange(half, device=x.device, dtype=torch.float64) / max(half, 1))
    angles = positions.double()[:, None] * rates
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = angles.cos().to(wide), angles.sin().to(wide)
    # Contiguous, or each part would be read with strides several times.
    first, second, rest = x.to(wide).contiguous().tensor_split((half, 2 * half), -1)
    turned = (first * cos - second * sin, second * cos + first * sin, rest)
    return torch.cat(turned, -1).to(x.dtype)


class Rotary(nn.Module):
    """Turns the vectors of a whole sequence by their positions 0, 1, 2, ...

    Args:
        head_dim: Dimension D of the vectors; at least 2.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        if head_dim < 2:
            raise ValueError(
                "Rotary positions turn pairs of channels: head_dim must be at least 2."
            )

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, H, N, D) to the same shape."""
        with torch.autocast(x.device.type, enabled=False):
            return rotate(x, torch.arange(x.shape[-2], device=x.device))
