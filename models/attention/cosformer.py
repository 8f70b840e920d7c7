"""cosFormer: linear attention re-weighted by a cosine of the distance (Qin et al., ICLR 2022).

    s(i, j) = (relu(q_i) . relu(k_j)) cos(pi/2 (i - j)/M), row-normalised

(eq. 8 to 10), split exactly by cos(a - b) = cos a cos b + sin a sin b into F = 2 D features.
Cost O(N D E), causal too, with a recurrent state of 2 D (E + 1) numbers a head. The horizon M is
each sequence's own length, its last real index + 1, so that padding and batch mates change
nothing; the larger of the number of queries and the keys' own length where these numbers differ,
as in cross attention; and ``max_len`` where attention is causal, so that no future token is felt.
The authors' code takes the padded length and applies no padding mask at all; ``horizon=padded``
takes that length too, with the mask. The other similarities are the ablations of their Table 1;
softmax similarity has no linear form and is quadratic.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.attention import register_attention
from models.attention.base import (
    Capabilities,
    Context,
    Cost,
    admissible_keys,
    at_least_float32,
    own_lengths,
)
from models.attention.engines import feature_maps
from models.attention.engines.feature_maps import FEATURE_MAPS
from models.attention.engines.kernel import guard
from models.attention.engines.kernel_attention import Features, KernelAttention


@register_attention("cosformer")
class Cosformer(KernelAttention):
    """ReLU linear attention with cosine re-weighting."""

    @dataclass(frozen=True)
    class Config:
        """Options of cosFormer.

        Attributes:
            feature: The similarity that the cosine re-weights: phi(q).phi(k), or that of softmax,
                exp(q.k / sqrt(D)), which is quadratic.
            horizon: M of bidirectional and cross attention: each sequence's own length, or, as
                published, the padded length of what is computed at once, with which padding and
                the number of micro-batches change results.
        """

        feature: Literal[feature_maps.Name, "softmax"] = "relu"
        horizon: Literal["own", "padded"] = "own"

    capabilities = Capabilities(
        paper="Qin et al., ICLR 2022",
        family="kernel",
        patterns=frozenset({"self", "causal", "cross"}),
        needs_max_len=True,
        recurrent=True,
        identities=frozenset({"position shift", "query scale", "key scale"}),
    )

    @classmethod
    def capabilities_with(cls, config: Config) -> Capabilities:
        """Narrows them for similarities that are not linear, scales that stay, a padded horizon."""
        able = cls.capabilities
        if config.feature == "softmax":
            able = replace(able, time="N^2", memory="N^2", recurrent=False)
        if config.feature == "softmax" or not FEATURE_MAPS[config.feature].homogeneous:
            able = replace(able, identities=frozenset({"position shift"}))
        if config.horizon == "padded":
            able = replace(able, key_mask="approximate")
        return able

    @property
    def num_features(self) -> int:
        """A cosine and a sine part for each dimension of the head."""
        return 2 * self.head_dim

    @property
    def signed(self) -> bool:
        """True for the maps with negative values."""
        return self.config.feature != "softmax" and FEATURE_MAPS[self.config.feature].signed

    def features(self, q: Tensor, k: Tensor, context: Context) -> Features:
        """Returns [phi(x) cos a, phi(x) sin a] with a = pi i / (2 M) for q and k."""
        phi = FEATURE_MAPS[self.config.feature].function
        horizon = self._horizon(q, k, context)
        return Features(*(_reweighted(phi(x), _angles(x, horizon, context.start)) for x in (q, k)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Computes the attention; in linear time unless the similarity is that of softmax."""
        if self.config.feature != "softmax":
            return super().attend(q, k, v, context)
        with torch.autocast(q.device.type, enabled=False):
            weights = self._softmax_weights(q, k, context)
            return (weights @ at_least_float32(v)).to(v.dtype)

    def matrix(self, q: Tensor, k: Tensor, context: Context) -> Tensor:
        """Returns the row-normalised similarities (B, H, N, S)."""
        if self.config.feature != "softmax":
            return super().matrix(q, k, context)
        with torch.autocast(q.device.type, enabled=False):
            return self._softmax_weights(q, k, context)

    def reweighting(self, q: Tensor, k: Tensor, context: Context) -> Tensor:
        """Returns cos(pi (i - j) / (2 M)), (B, 1, N, S)."""
        q, k = at_least_float32(q), at_least_float32(k)
        horizon = self._horizon(q, k, context)
        distances = _angles(q, horizon, 0)[..., None] - _angles(k, horizon, 0)[..., None, :]
        return distances.cos()[:, None]

    def cost(self, n: int, s: int) -> Cost:
        """As the engine's; with softmax similarity two N x S products, and the N x S weights."""
        if self.config.feature != "softmax":
            return super().cost(n, s)
        return Cost(
            flops=self.num_heads * 4 * n * s * self.head_dim,
            activation_bytes=self.num_heads * 4 * n * s,
            parameters=0,
            state_floats=0,
        )

    def _horizon(self, q: Tensor, k: Tensor, context: Context) -> Tensor:
        """Returns M for each sample (B,)."""
        if context.causal:
            return torch.full((k.shape[0],), self.max_len, device=k.device)
        padded = self.config.horizon == "padded"
        horizon = own_lengths(None if padded else context.key_mask, k).clamp_min(1)
        if q.shape[-2] != k.shape[-2]:
            horizon = horizon.clamp_min(q.shape[-2])
        return horizon

    def _softmax_weights(self, q: Tensor, k: Tensor, context: Context) -> Tensor:
        q, k = at_least_float32(q), at_least_float32(k)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~admissible_keys(q, k, context), -torch.inf)
        # The largest admissible score, which cancels; 0 where there is none.
        top = scores.detach().amax(-1, keepdim=True).nan_to_num(neginf=0.0)
        similarity = (scores - top).exp() * self.reweighting(q, k, context)
        return similarity / guard(similarity.sum(-1, keepdim=True), signed=False)


def _angles(x: Tensor, horizon: Tensor, start: int) -> Tensor:
    """Returns pi i / (2 M) for the positions i of ``x`` from ``start``, (B, N)."""
    positions = start + torch.arange(x.shape[-2], device=x.device)
    # Rows past the horizon are padding; they share the last angle, so that no weight is negative.
    positions = torch.minimum(positions, horizon[:, None] - 1).to(x.dtype)
    return (math.pi / 2) * positions / horizon[:, None]


def _reweighted(x: Tensor, angles: Tensor) -> Tensor:
    """Returns the cosine and sine features (B, H, N, 2 D) of ``x`` for angles (B, N)."""
    angles = angles[:, None, :, None]
    if torch.compiler.is_compiling():  # which ends graphs where slices are written into
        return torch.cat([x * angles.cos(), x * angles.sin()], dim=-1)
    return _Reweighted.apply(x, angles.cos(), angles.sin())


class _Reweighted(torch.autograd.Function):
    """[x c, x s] for factors (B, 1, N, 1), written and read in place of being put together."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, c: Tensor, s: Tensor) -> Tensor:
        ctx.save_for_backward(x, c, s)
        d = x.shape[-1]
        features = x.new_empty(*x.shape[:-1], 2 * d)
        torch.mul(x, c, out=features[..., :d])
        torch.mul(x, s, out=features[..., d:])
        return features

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, c, s = ctx.saved_tensors
        d = x.shape[-1]
        out = torch.mul(gradient[..., :d], c, out=torch.empty_like(x))
        return out.addcmul_(gradient[..., d:], s), None, None
