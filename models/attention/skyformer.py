"""Skyformer: kernelized attention by the Nyström method (Chen et al., NeurIPS 2021).

    out = K(q, Z) (K(Z, Z) + ridge I)^-1 K(Z, k) v,    K(x, y) = exp(-|x - y|^2 / (2 sqrt(D)))

with landmarks Z: F / 2 queries and F / 2 keys, drawn with replacement from each sample's real
tokens, at the same places in every head. With Z all queries and keys and no ridge it is kernelized
attention exactly. Nothing normalises rows, so outputs grow with the length. It costs O(N F D + F^3)
time and O(N) memory, and is bidirectional alone: any token may be a landmark, which all outputs
feel. The public code approximates the inverse in 6 iterations from a start that all samples share,
has the kernel's width for D = 32 whatever D is, takes the first tokens for the real ones, and draws
in evaluation too; here the system is solved, and training draws at each step while evaluation keeps
its own draw.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.attention import register_attention
from models.attention.base import Attention, Capabilities, Context, Cost, at_least_float32
from models.attention.engines.gaussian import (
    gaussian_floats,
    gaussian_flops,
    gaussian_matrix,
    gaussian_sums,
)

DRAW_BITS = 31
"""Draws are integers u 2^31, as no change of a model's precision rounds those."""


@register_attention("skyformer")
class Skyformer(Attention):
    """Attention by a Gaussian kernel that sampled landmarks approximate."""

    @dataclass(frozen=True)
    class Config:
        """Options of Skyformer.

        Attributes:
            landmarks: Number F of landmarks of a head, half of them queries and half keys.
            ridge: What is added to the diagonal of the landmarks' kernel matrix.
        """

        landmarks: int = 128
        ridge: float = 0.1

        def __post_init__(self) -> None:
            if self.landmarks < 2 or self.landmarks % 2:
                raise ValueError("landmarks must be even and at least 2: half are queries.")
            if not 0 < self.ridge < math.inf:
                raise ValueError("ridge must be positive and finite.")

    capabilities = Capabilities(
        paper="Chen et al., NeurIPS 2021",
        family="low rank",
        stochastic=True,
        rotary=True,
        identities=frozenset({"rotation"}),
    )

    def __init__(self, config: Config, **sizes: Any) -> None:
        super().__init__(config, **sizes)
        draw = torch.randint(2**DRAW_BITS, (config.landmarks,))
        self.register_buffer("kept", draw)
        self.register_buffer("drawn", draw.clone())

    def resample(self, generator: torch.Generator) -> None:
        """Draws the places of the landmarks for training."""
        self.drawn.copy_(torch.randint(2**DRAW_BITS, self.drawn.shape, generator=generator))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Computes the products from right to left, in float32 at least."""
        with torch.autocast(q.device.type, enabled=False):
            q, k = at_least_float32(q), at_least_float32(k)
            landmarks = self._landmarks(q, k, context.key_mask)
            sums = gaussian_sums(landmarks, k, at_least_float32(v), context.key_mask)
            sums = torch.linalg.solve(self._with_ridge(_kernel_of_itself(landmarks)), sums)
            return gaussian_sums(q, landmarks, sums).to(v.dtype)

    def matrix(self, q: Tensor, k: Tensor, context: Context) -> Tensor:
        """Returns K(q, Z) (K(Z, Z) + ridge I)^-1 K(Z, k), with columns of 0 for masked keys."""
        with torch.autocast(q.device.type, enabled=False):
            q, k = at_least_float32(q), at_least_float32(k)
            z = self._landmarks(q, k, context.key_mask)
            right = gaussian_matrix(z, k)
            if context.key_mask is not None:
                right = right * context.key_mask[:, None, None, :]
            inner = self._with_ridge(gaussian_matrix(z, z))
            return gaussian_matrix(q, z) @ torch.linalg.solve(inner, right)

    def cost(self, n: int, s: int) -> Cost:
        """Sums over keys and over landmarks; a Gram matrix, its factorisation, two solves."""
        f, d = self.config.landmarks, self.head_dim
        inner = 2 * f * f * d + 2 * f**3 // 3 + 2 * f * f * d
        sums = gaussian_flops(f, s, d, d) + gaussian_flops(n, f, d, d)
        floats = gaussian_floats(f, s, d, self.num_heads) + gaussian_floats(n, f, d, self.num_heads)
        return Cost(
            flops=self.num_heads * (sums + inner),
            activation_bytes=4 * (floats + self.num_heads * (3 * f * f + 3 * f * d)),
            parameters=0,
            state_floats=0,
        )

    def _landmarks(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        """Returns the landmarks (B, H, F, D); zeros for samples without a real token."""
        of_q, of_k = self._places(key_mask, len(k), k.shape[2]).chunk(2, -1)
        z = torch.cat([_rows(q, of_q), _rows(k, of_k)], 2)
        if key_mask is not None:
            z = z.masked_fill(~key_mask.any(-1)[:, None, None, None], 0.0)
        return z

    def _places(self, key_mask: Tensor | None, batch: int, n: int) -> Tensor:
        """Returns where each sample's landmarks are (B, F): its real token floor(u count)."""
        draws = self.drawn if self.training else self.kept
        if key_mask is None:
            return (draws * n >> DRAW_BITS).expand(batch, -1)
        seen = key_mask.cumsum(-1)
        ranks = draws * seen[:, -1:] >> DRAW_BITS
        # Without a real token the search ends past the last one.
        return torch.searchsorted(seen, ranks + 1).clamp_max(n - 1)

    def _with_ridge(self, matrix: Tensor) -> Tensor:
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        return matrix + self.config.ridge * eye


def _rows(x: Tensor, at: Tensor) -> Tensor:
    """Returns the rows ``at`` (B, F) of each head of ``x`` (B, H, N, D)."""
    return x.gather(2, at[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _kernel_of_itself(z: Tensor) -> Tensor:
    """Returns K(z, z) for z (B, H, F, D), by a product, as pairwise distances take longer."""
    products = z @ z.mT
    # Norms out of the same product, so that z and another draw of it have a distance of 0.
    half = products.diagonal(dim1=-2, dim2=-1) / 2
    exponents = (products - half[..., :, None] - half[..., None, :]).clamp_max(0)
    return (exponents / math.sqrt(z.shape[-1])).exp()
