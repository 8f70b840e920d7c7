"""Nystromformer: softmax attention by way of m landmarks (Xiong et al., AAAI 2021).

    out = F1 F2^+ F3 v + conv(v),    F1 = s(q k~^T), F2 = s(q~ k~^T), F3 = s(q~ k^T)

with s the softmax of x / sqrt(D), landmarks q~ and k~ the means of m segments of the sequence, and
a depthwise convolution over positions, one kernel a head. A few steps of an iteration of third
order give F2^+: O(N m (D + E) + m^3) time, O(N m) memory. Token p of a sequence of its own length L
belongs to segment floor(p m / L): segments are of equal size where m divides L, no two tokens share
one where L <= m, and padding is of no consequence. Means are those of real tokens, and a segment
without any is no landmark. In public code masked tokens dilute the means and are seen in F1 and F2,
and the iteration begins with a norm taken over the whole batch, by which a sample depends on its
batch mates; here each matrix has its own. There is no causal form, as landmarks hold later tokens,
and no cross form: a mask tells which keys may go into landmarks, but nothing tells which queries.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import register_attention
from models.attention.base import (
    Attention,
    Capabilities,
    Context,
    Cost,
    at_least_float32,
    masked_softmax,
    own_lengths,
)
from models.attention.engines.kernel import guard


class Segments(NamedTuple):
    """How landmarks are made.

    Attributes:
        means: The map (B or 1, m, N) from tokens to the means of segments.
        live: Bool (B or 1, m), True for segments that have a real token.
    """

    means: Tensor
    live: Tensor


@register_attention("nystrom")
class Nystrom(Attention):
    """The Nystrom approximation of softmax attention, and a convolution of the values."""

    @dataclass(frozen=True)
    class Config:
        """Options of Nystromformer.

        Attributes:
            landmarks: Number m of landmarks.
            conv_kernel: Positions c that the convolution spans, an odd number; 0 for none.
            iterations: Steps towards the pseudo-inverse of F2: 6 as published, more for accuracy;
                30 converge in float64. In float32, 12 magnify rounding where landmarks are much
                alike.
        """

        landmarks: int = 64
        conv_kernel: int = 35
        iterations: int = 6

        def __post_init__(self) -> None:
            if min(self.landmarks, self.iterations) < 1:
                raise ValueError("landmarks and iterations must be at least 1.")
            if self.conv_kernel < 0 or (self.conv_kernel and self.conv_kernel % 2 == 0):
                raise ValueError("conv_kernel must be odd, or 0 for no convolution.")

    capabilities = Capabilities(
        paper="Xiong et al., AAAI 2021",
        family="low rank",
        rotary=True,
        identities=frozenset({"key shift", "rotation"}),
    )

    def __init__(self, config: Config, **sizes: Any) -> None:
        super().__init__(config, **sizes)
        self.convolution: nn.Parameter | None = None
        if config.conv_kernel:
            uniform = 2 * torch.rand(self.num_heads, config.conv_kernel) - 1
            # As torch makes a convolution.
            self.convolution = nn.Parameter(uniform * config.conv_kernel**-0.5)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Computes F1 (F2^+ (F3 v)) and the convolution, in time linear in N."""
        mask, attention = context.key_mask, F.scaled_dot_product_attention
        with torch.autocast(q.device.type, enabled=False):
            dtype = v.dtype
            q, k, v = at_least_float32(q), at_least_float32(k), at_least_float32(v)
            means, live = self.segments(k, mask)
            queries, keys = _landmarks(means, q), _landmarks(means, k)
            f2 = _softmax(queries, keys, live) * live[:, None, :, None]
            # F3 has rows of no landmark too: the columns of F2^+ that meet them are 0.
            f3_v = attention(queries, k, v, attn_mask=None if mask is None else mask[:, None, None])
            inner = _pseudo_inverse(f2, self.config.iterations) @ f3_v
            out = attention(q, keys, inner, attn_mask=None if mask is None else live[:, None, None])
            if self.convolution is not None:
                out = out + _convolved(v, self.convolution, mask)
            return out.to(dtype)

    def matrix(self, q: Tensor, k: Tensor, context: Context) -> Tensor:
        """Returns F1 F2^+ F3, and the convolution as a band."""
        with torch.autocast(q.device.type, enabled=False):
            q, k = at_least_float32(q), at_least_float32(k)
            means, live = self.segments(k, context.key_mask)
            queries, keys = means[:, None] @ q, means[:, None] @ k
            real = context.key_mask
            if real is None:
                real = torch.ones(len(k), k.shape[2], dtype=torch.bool, device=k.device)
            f1, f3 = _softmax(q, keys, live), _softmax(queries, k, real)
            f2 = _softmax(queries, keys, live) * live[:, None, :, None]
            weights = f1 @ _pseudo_inverse(f2, self.config.iterations) @ f3
            if self.convolution is not None:
                weights = weights + _band(self.convolution.to(k.dtype), real)
            return weights

    def segments(self, k: Tensor, key_mask: Tensor | None) -> Segments:
        """Divides each sequence into segments by its own length.

        Args:
            k: Keys (B, H, N, D).
            key_mask: Bool (B, N), True for real tokens.
        """
        n = k.shape[2]
        # Not more than positions. The padded length is not felt: where a sequence has fewer tokens
        # than m, each is a landmark of its own whatever m is.
        m = min(self.config.landmarks, n)
        scaled = m * torch.arange(n, device=k.device)[None]
        if key_mask is None:
            segment = scaled // n
        else:
            lengths = own_lengths(key_mask, k).clamp_min(1)
            segment = (scaled // lengths[:, None]).masked_fill(~key_mask, -1)
        members = segment[:, None] == torch.arange(m, device=k.device)[:, None]
        sizes = members.sum(-1, keepdim=True)
        return Segments(members.to(k.dtype) / sizes.clamp_min(1), sizes[..., 0] > 0)

    def cost(self, n: int, s: int) -> Cost:
        """Six N x m products of depth D, two of m x m x D, four m^3 a step, c for each value."""
        m, d, c = min(self.config.landmarks, n), self.head_dim, self.config.conv_kernel
        steps = self.config.iterations
        flops = 12 * n * m * d + 4 * m * m * d + 8 * steps * m**3 + 2 * n * c * d
        kept = n * (d + 2) + m * (4 * d + 1) + (2 + 5 * steps) * m * m
        return Cost(
            flops=self.num_heads * flops,
            activation_bytes=4 * (self.num_heads * kept + n * m),
            parameters=sum(p.numel() for p in self.parameters()),
            state_floats=0,
        )


def _landmarks(means: Tensor, x: Tensor) -> Tensor:
    """Returns the means (B, H, m, D) of the segments of x (B, H, N, D), 0 where there is none."""
    # One product for all heads, which lie beside each other in memory.
    return (means @ x.transpose(1, 2).flatten(2)).unflatten(2, (x.shape[1], -1)).transpose(1, 2)


def _softmax(q: Tensor, k: Tensor, keep: Tensor) -> Tensor:
    """Returns softmax(q k^T / sqrt(D)) over the keys that ``keep`` (B, S) has, 0 for the others."""
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return masked_softmax(scores, keep[:, None, None])


def _pseudo_inverse(kernel: Tensor, iterations: int) -> Tensor:
    """Approximates the pseudo-inverse of matrices (..., m, m), whose rows are distributions or 0.

    Z <- Z (13 - X (15 - X (7 - X))) / 4 with X = A Z, from A^T / (|A|_1 |A|_inf); |A|_inf, the
    largest sum of a row, is 1. Rows and columns of 0 stay 0, and change no other.
    """
    identity = torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
    norm = guard(kernel.sum(-2).amax(-1), signed=False)
    inverse = kernel.transpose(-2, -1) / norm[..., None, None]
    for _ in range(iterations):
        x = kernel @ inverse
        inverse = inverse @ (13 * identity - x @ (15 * identity - x @ (7 * identity - x))) / 4
    return inverse


def _convolved(v: Tensor, kernels: Tensor, key_mask: Tensor | None) -> Tensor:
    """Returns sum_t kernels[h, t] v[i + t - c // 2] (B, H, N, E), with v 0 where it is masked.

    Args:
        v: Values (B, H, N, E).
        kernels: (H, c).
        key_mask: Bool (B, N), True for real tokens.
    """
    heads, e = v.shape[1], v.shape[3]
    # Each channel by itself and channels last in memory, as projections of a layer lie: on CPU a
    # tenth of the time of one kernel a head over (B, H, N, E).
    rows = v.transpose(1, 2).flatten(2)
    if key_mask is not None:
        rows = rows * key_mask[..., None]
    kernels = kernels.to(v.dtype).repeat_interleave(e, 0)[:, None, :, None]
    image = rows.transpose(1, 2)[..., None]
    out = F.conv2d(image, kernels, padding=(kernels.shape[2] // 2, 0), groups=heads * e)
    return out[..., 0].unflatten(1, (heads, e)).transpose(2, 3)


def _band(kernels: Tensor, real: Tensor) -> Tensor:
    """Returns the convolution by kernels (H, c) of tokens that are real (B, N) as (B, H, N, N)."""
    c, n = kernels.shape[1], real.shape[1]
    at = torch.arange(n, device=real.device)
    tap = at - at[:, None] + c // 2
    within = (tap >= 0) & (tap < c) & real[:, None, None]
    return torch.where(within, kernels[:, tap.clamp(0, c - 1)], 0.0)
