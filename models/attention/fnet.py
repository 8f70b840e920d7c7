"""FNet mixing: Fourier transforms of tokens and channels (Lee-Thorp et al., NAACL 2022).

    y = Re(F_N x F_C),    F_n[k, l] = exp(-2 pi i k l / n)

in O(N C log(N C)) time without any parameter, in place of attention and its projections. As x is
real, half of the spectrum tells all of it: Re Y[-k, -l] = Re Y[k, l]. Only that half is computed,
with half the work of the public code, which takes the real part of a complex transform. The map is
its own transpose, so gradients are one more transform and nothing is kept for them. Masked tokens
are zeros, which the public code does not ensure; N is the padded length, as published, so that
padding is felt by every output though what stands under the mask is not.
"""

import math
from typing import Any

import torch
from torch import Tensor

from models.attention import register_mixer
from models.attention.base import Capabilities, Context, Cost, Mixer, at_least_float32


@register_mixer("fnet")
class FNet(Mixer):
    """The real part of the two-dimensional discrete Fourier transform."""

    capabilities = Capabilities(
        paper="Lee-Thorp et al., NAACL 2022",
        family="mixer",
        time="N log N",
        key_mask="approximate",
    )

    def mix(self, x: Tensor, context: Context) -> Tensor:
        """Computes the fast transform, in float32 at least."""
        return _RealFourier.apply(_real_tokens(x, context)).to(x.dtype)

    def mix_quadratic(self, x: Tensor, context: Context) -> Tensor:
        """Computes C_N x C_C - S_N x S_C with matrices of all cosines C and sines S."""
        tokens = _real_tokens(x, context)
        with torch.autocast(x.device.type, enabled=False):
            (cos_n, sin_n), (cos_c, sin_c) = (_dft(size, tokens) for size in tokens.shape[1:])
            return (cos_n @ tokens @ cos_c - sin_n @ tokens @ sin_c).to(x.dtype)

    def cost(self, n: int, s: int) -> Cost:
        """5/2 M log2 M for a real transform of M = N C numbers; keeps half the spectrum."""
        size = n * self.model_dim
        return Cost(
            flops=round(2.5 * size * math.log2(size)),
            activation_bytes=8 * n * (self.model_dim // 2 + 1),
            parameters=0,
            state_floats=0,
        )


class _RealFourier(torch.autograd.Function):
    """Maps (B, N, C) to the real part of its transform over N and C; symmetric and linear."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        channels = x.shape[-1]
        half = torch.fft.rfft2(x).real  # channels 0 to C // 2
        # Channel C - l of token -k is channel l of token k.
        mirrored = half[..., 1 : channels - channels // 2].roll(-1, 1).flip(1, 2)
        return torch.cat([half, mirrored], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _RealFourier.apply(grad)


def _real_tokens(x: Tensor, context: Context) -> Tensor:
    """Returns the tokens in float32 at least, zeros in place of masked ones."""
    x = at_least_float32(x)
    return x if context.key_mask is None else x.masked_fill(~context.key_mask[..., None], 0.0)


def _dft(size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cos(2 pi k l / n) and sin(2 pi k l / n), both (n, n), for n = ``size``."""
    at = torch.arange(size, device=like.device)
    # Whole turns are taken off in integers, where they are exact.
    angles = (at[:, None] * at % size).double() * (2 * math.pi / size)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)
