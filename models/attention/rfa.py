"""Random Feature Attention: softmax by random features (Peng et al., ICLR 2021).

    phi(x) = D^-1/2 [sin(w_1.x) .. sin(w_D.x), cos(w_1.x) .. cos(w_D.x)]    (gaussian)
    phi(x) = D^-1/2 relu(w_1.x) .. relu(w_D.x)                              (arccos, order 1)

with w = sigma o w~ / tau, w~ ~ N(0, I) and sigma a learned vector of each head. For sigma = 1,
phi(x).phi(y) of the first has mean exp(-|x - y|^2 / (2 tau^2)) and variance
(1 - exp(-|x - y|^2 / tau^2))^2 / (2 D). Queries and keys are l2-normalised, where that kernel is
exp(x.y / tau^2) but for a constant that cancels; without normalisation the keys' factor
exp(|k|^2 / (2 tau^2)) is put back exactly. ``gate=true`` is RFA-Gate, causal alone, with a gate
g_t = sigmoid(w_g.x_t + b_g) of the layer's input x_t:

    S_t = g_t S_{t-1} + (1 - g_t) phi(k_t) v_t^T, z_t likewise, o_t = phi(q_t) S_t / phi(q_t).z_t

For heads of d dimensions it costs O(N D (d + E)), with a recurrent state of F (E + 1) numbers a
head, F = 2 D or D features. In training each head takes one of a pool of matrices at every step;
in evaluation it keeps one. Gaussian similarities and their sums may be negative: the denominator
keeps its sign and stays 1e-6 away from 0, while the public code bounds it by 1, which shrinks the
first outputs of a causal sequence, or drops its sign.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import register_attention
from models.attention.base import (
    Capabilities,
    Context,
    Cost,
    admissible_keys,
    at_least_float32,
    masked_softmax,
)
from models.attention.engines.kernel import guard, projected
from models.attention.engines.kernel_attention import Features, KernelAttention


@register_attention("rfa")
class RandomFeatureAttention(KernelAttention):
    """Softmax attention estimated by random features."""

    @dataclass(frozen=True)
    class Config:
        """Options of Random Feature Attention.

        Attributes:
            kernel: gaussian (estimates softmax) or arccos (the arc-cosine kernel of order 1).
            projections: Random vectors D of a head; gaussian has 2 D features, arccos has D.
            normalise: Whether queries and keys are l2-normalised. If not, gaussian weighs keys by
                exp(|k|^2 / (2 tau^2)) and estimates softmax still.
            tau: Standard deviation of the Gaussian kernel; softmax of q.k / tau^2.
            pool: Matrices that training draws from, one for each head and step.
            gate: RFA-Gate: a learned, input-dependent decay of the past; causal attention only.
        """

        kernel: Literal["gaussian", "arccos"] = "gaussian"
        projections: int = 64
        normalise: bool = True
        tau: float = 1.0
        pool: int = 200
        gate: bool = False

        def __post_init__(self) -> None:
            if min(self.projections, self.pool) < 1:
                raise ValueError("projections and pool must be at least 1.")
            if not 0 < self.tau < math.inf:
                raise ValueError("tau must be positive and finite.")

    capabilities = Capabilities(
        paper="Peng et al., ICLR 2021",
        family="kernel",
        patterns=frozenset({"self", "causal", "cross"}),
        stochastic=True,
        recurrent=True,
        rotary=True,
        identities=frozenset({"permutation", "position shift", "query scale", "key scale"}),
    )

    @classmethod
    def capabilities_with(cls, config: Config) -> Capabilities:
        """Narrows them for the gate and for features in which scales do not cancel."""
        able = cls.capabilities
        if not config.normalise and config.kernel == "gaussian":
            able = replace(able, identities=able.identities - {"query scale", "key scale"})
        if config.gate:
            able = replace(
                able,
                patterns=frozenset({"causal"}),
                needs_hidden=True,
                identities=able.identities - {"permutation"},
            )
        return able

    def __init__(self, config: Config, **sizes: Any) -> None:
        super().__init__(config, **sizes)
        if config.pool < self.num_heads:
            raise ValueError(
                f"attention.pool is {config.pool}: {self.num_heads} heads need as many matrices."
            )
        self.scale = nn.Parameter(torch.ones(self.num_heads, self.head_dim))
        self.register_buffer("pool", torch.randn(config.pool, config.projections, self.head_dim))
        self.register_buffer("drawn", torch.arange(self.num_heads))
        if config.gate:
            self.gate = nn.Linear(self.model_dim, self.num_heads)

    @property
    def weighted_keys(self) -> bool:
        """True where keys carry a factor of their own, of the gate or of their norm."""
        unnormalised = self.config.kernel == "gaussian" and not self.config.normalise
        return self.config.gate or unnormalised

    @property
    def num_features(self) -> int:
        """A sine and a cosine for each random vector, or one ReLU."""
        return self.config.projections * (2 if self.config.kernel == "gaussian" else 1)

    @property
    def signed(self) -> bool:
        """True for the Gaussian kernel, whose estimates may be negative."""
        return self.config.kernel == "gaussian"

    def resample(self, generator: torch.Generator) -> None:
        """Draws a matrix of the pool for each head, for training; no two heads get the same."""
        order = torch.randperm(self.config.pool, generator=generator)
        self.drawn.copy_(order[: self.num_heads])

    def features(self, q: Tensor, k: Tensor, context: Context) -> Features:
        """Returns the random features, with the weights of keys and the decay of the gate."""
        # Evaluation keeps the pool's first matrices, whatever training draws.
        matrices = self.pool[self.drawn] if self.training else self.pool[: self.num_heads]
        matrices = matrices.transpose(-2, -1).to(q.dtype)
        q, k = self._scaled(q, k)
        features = _relu_features if self.config.kernel == "arccos" else _SinCos.apply
        log_weight = log_decay = None
        if self.config.kernel == "gaussian" and not self.config.normalise:
            log_weight = k.square().sum(-1) / 2
        if self.config.gate:
            assert context.hidden is not None
            hidden, weight, bias = context.hidden, self.gate.weight, self.gate.bias
            logits = F.linear(hidden.to(q.dtype), weight.to(q.dtype), bias.to(q.dtype)).mT
            log_decay, log_kept = F.logsigmoid(logits), F.logsigmoid(-logits)
            log_weight = log_kept if log_weight is None else log_weight + log_kept
        q, k = (features(projected(x, matrices)) for x in (q, k))
        return Features(q, k, log_weight, log_decay)

    def exact(self, q: Tensor, k: Tensor, context: Context) -> Tensor | None:
        """Returns attention by the kernel itself; None of RFA-Gate, which is causal alone."""
        if self.config.gate:
            return None
        q, k = self._scaled(at_least_float32(q), at_least_float32(k))
        keep = admissible_keys(q, k, context)
        products = q @ k.transpose(-2, -1)
        if self.config.kernel == "gaussian":
            if self.config.normalise:  # else the factor of the keys' norms is put back
                products = products - k.square().sum(-1)[..., None, :] / 2
            return masked_softmax(products, keep)
        norms = q.norm(dim=-1)[..., None] * k.norm(dim=-1)[..., None, :]
        angles = (products / norms.clamp_min(1e-12)).clamp(-1, 1).acos()
        similarity = norms * (angles.sin() + (math.pi - angles) * angles.cos()) * keep
        return similarity / guard(similarity.sum(-1, keepdim=True), signed=False)

    def _scaled(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what the standard normal vectors are multiplied with."""
        if self.config.normalise:
            q, k = _unit(q), _unit(k)
        scale = (self.scale / self.config.tau)[:, None, :]
        return q * scale, k * scale

    def cost(self, n: int, s: int) -> Cost:
        """Adds the projections to the engine's products."""
        base = super().cost(n, s)
        flops = self.num_heads * 2 * (n + s) * self.head_dim * self.config.projections
        if self.config.gate:
            flops += 2 * n * self.model_dim * self.num_heads
        return replace(base, flops=base.flops + flops)


def _unit(x: Tensor) -> Tensor:
    """Returns x / |x|; a zero vector stays zero, with a finite gradient."""
    return x * x.square().sum(-1, keepdim=True).clamp_min(1e-12).rsqrt()


def _relu_features(projected: Tensor) -> Tensor:
    """Returns D^-1/2 relu(u) (..., D) of projections u (..., D)."""
    return F.relu(projected) * projected.shape[-1] ** -0.5


class _SinCos(torch.autograd.Function):
    """D^-1/2 [sin u, cos u] (..., 2 D) of projections u (..., D).

    Its output is all that the gradient needs, as sine and cosine are each other's derivatives.
    """

    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:
        size = projected.shape[-1]
        out = projected.new_empty(*projected.shape[:-1], 2 * size)
        torch.sin(projected, out=out[..., :size])
        torch.cos(projected, out=out[..., size:])
        out *= size**-0.5
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        sin, cos = out.chunk(2, -1)
        grad_sin, grad_cos = grad.chunk(2, -1)
        return (grad_sin * cos).addcmul_(grad_cos, sin, value=-1)
