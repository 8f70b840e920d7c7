"""Performer: softmax by positive random features, FAVOR+ (Choromanski et al., ICLR 2021).

    phi(x)_f = exp(w_f.x~ - |x~|^2 / 2),  x~ = d^-1/4 x,  w_f ~ N(0, I),  f = 1 .. F

so that phi(q).phi(k) / F has mean exp(q.k / sqrt(d)), with a relative variance of
(exp(|q~ + k~|^2) - 1) / F for independent w_f. By default they are orthogonal in blocks of d, which
makes it smaller. ``kernel=relu`` is the generalised attention that the arena's JAX code runs on
most tasks: phi(x) = relu(x) + 1e-3, without w and scale. It costs O(N F (d + E)), with a recurrent
state of F (E + 1) numbers a head. Every training step draws new w_f; evaluation keeps its own.
Public code subtracts the largest exponent of all keys, through which the future is felt; adds an
epsilon to every feature, so that no F is enough for small similarities; masks values alone; and
takes the vectors of a QR decomposition with signs that are not random, which biases the mean. Here
what is subtracted cancels, causal or not, nothing is added, keys are masked and signs are drawn.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import register_attention
from models.attention.base import (
    Capabilities,
    Context,
    Cost,
    admissible_keys,
    at_least_float32,
    masked_softmax,
)
from models.attention.engines.kernel import projected
from models.attention.engines.kernel_attention import LOWEST, Features, KernelAttention

RELU_EPS = 1e-3
"""Added to the features of the relu kernel, so that no query is without similar keys."""

QUERY_UNIT = 20.0
"""Log of a query's largest feature: sums are far from overflow, and from what guards divisions."""

CPU_BLOCK, BLOCK = 2**19, 2**26
"""Weights of a block: a few of them fit in a CPU's cache; elsewhere few blocks are best."""


@register_attention("performer")
class Performer(KernelAttention):
    """Softmax attention estimated by positive random features."""

    @dataclass(frozen=True)
    class Config:
        """Options of Performer.

        Attributes:
            kernel: softmax (FAVOR+, which estimates it) or relu (relu(x) + 1e-3, nothing random).
            features: Random features F of a head, for softmax.
            orthogonal: Whether random vectors are orthogonal in blocks of d, with the lengths of
                normal vectors, or else independent.
        """

        kernel: Literal["softmax", "relu"] = "softmax"
        features: int = 256
        orthogonal: bool = True

        def __post_init__(self) -> None:
            if self.features < 1:
                raise ValueError("features must be at least 1.")

    capabilities = Capabilities(
        paper="Choromanski et al., ICLR 2021",
        family="kernel",
        patterns=frozenset({"self", "causal", "cross"}),
        stochastic=True,
        recurrent=True,
        rotary=True,
        identities=frozenset({"permutation", "position shift"}),
    )

    @classmethod
    def capabilities_with(cls, config: Config) -> Capabilities:
        """Returns that the relu kernel draws nothing and feels more than q.k."""
        if config.kernel == "softmax":
            return cls.capabilities
        return replace(cls.capabilities, stochastic=False, rotary=False)

    def __init__(self, config: Config, **sizes: Any) -> None:
        super().__init__(config, **sizes)
        if config.kernel == "softmax":
            self.register_buffer("fixed", self._draw(None))
            self.register_buffer("drawn", self.fixed.clone())

    @property
    def weighted_keys(self) -> bool:
        """Whether keys carry the factor that makes their largest feature 1."""
        return self.config.kernel == "softmax"

    @property
    def num_features(self) -> int:
        """One feature for each random vector, or for each dimension of the head."""
        return self.config.features if self.config.kernel == "softmax" else self.head_dim

    def resample(self, generator: torch.Generator) -> None:
        """Draws random vectors for training."""
        if self.config.kernel == "softmax":
            self.drawn.copy_(self._draw(generator))

    def _draw(self, generator: torch.Generator | None) -> Tensor:
        """Returns random vectors (H, F, D), in blocks of D for each head."""
        size = self.head_dim
        blocks = -(-self.config.features // size)
        vectors = torch.randn(self.num_heads, blocks, size, size, generator=generator)
        if self.config.orthogonal:
            # Vectors are columns here. Their directions alone decide Q, so that their lengths are
            # independent of it. Signs are those of R's diagonal, or Q would depend on how it is
            # computed and its first entries would all be negative.
            directions, triangle = torch.linalg.qr(vectors)
            signs = triangle.diagonal(dim1=-2, dim2=-1).sign()
            lengths = vectors.norm(dim=-2) * signs
            vectors = (directions * lengths[..., None, :]).mT
        return vectors.flatten(1, 2)[:, : self.config.features].contiguous()

    def _vectors(self, dtype: torch.dtype) -> Tensor:
        """Returns d^-1/4 w_f (H, F, D)."""
        vectors = self.drawn if self.training else self.fixed
        return vectors.to(dtype) * self.head_dim**-0.25

    def features(self, q: Tensor, k: Tensor, context: Context) -> Features:
        """Returns features whose largest is the same for every query and every key."""
        if self.config.kernel == "relu":
            return Features(F.relu(q) + RELU_EPS, F.relu(k) + RELU_EPS)
        vectors = self._vectors(q.dtype).mT
        fq, fk = projected(q, vectors), projected(k, vectors)
        # What is taken off cancels: in the normalisation, or with the key's weight. It is detached.
        top_q, top_k = (x.detach().amax(-1, keepdim=True) for x in (fq, fk))
        log_weight = _log_norm(k) + top_k.squeeze(-1)
        return Features(fq.sub_(top_q - QUERY_UNIT).exp_(), fk.sub_(top_k).exp_(), log_weight)

    def exact(self, q: Tensor, k: Tensor, context: Context) -> Tensor | None:
        """Returns softmax attention; None of the relu kernel, which estimates nothing."""
        if self.config.kernel == "relu":
            return None
        scores = at_least_float32(q) @ at_least_float32(k).mT * self.head_dim**-0.5
        return masked_softmax(scores, admissible_keys(q, k, context))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Computes the attention in time and memory linear in N."""
        if self.config.kernel == "relu" or context.causal:
            return super().attend(q, k, v, context)
        mask = context.key_mask
        with torch.autocast(q.device.type, enabled=False):
            q, k, values = (at_least_float32(x) for x in (q, k, v))
            out = _Bidirectional.apply(q, k, values, mask, self._vectors(q.dtype))
            if mask is not None:
                out = out * mask.any(-1)[:, None, None, None]
            return out.to(v.dtype)

    def cost(self, n: int, s: int) -> Cost:
        """Of softmax, bidirectional: products of F x D and of F x E for each token.

        Kept are means, sums and norms, beside the block of one sequence at a time.
        """
        if self.config.kernel == "relu":
            return super().cost(n, s)
        f, d = self.num_features, self.head_dim
        block = 2 * min(CPU_BLOCK, f * max(n, s))
        return Cost(
            flops=self.num_heads * 4 * (n + s) * f * d,
            activation_bytes=4 * (self.num_heads * (f * (d + 1) + s) + block),
            parameters=0,
            state_floats=self._state_floats(),
        )


def _log_norm(k: Tensor) -> Tensor:
    """Returns -|k~|^2 / 2 (B, H, S)."""
    return k.square().sum(-1) * (-0.5 * k.shape[-1] ** -0.5)


class _Bidirectional(torch.autograd.Function):
    """FAVOR+ without causality, as two softmaxes in blocks that stay in cache.

    With a_fj = w_f.k~_j - |k~_j|^2 / 2, sums over keys are means of values and a weight for each
    feature, and the attention is a softmax over features:

        u_f = sum_j softmax_j(a_f)_j v_j,  t_f = log sum_j exp(a_fj)
        out_i = sum_f softmax_f(w_f.q~_i + t_f) u_f

    so that nothing overflows or vanishes, whatever the norms. No feature is kept: the backward pass
    computes each block of weights again.

    Args of ``apply``:
        q: Queries (B, H, N, D).
        k: Keys (B, H, S, D).
        v: Values (B, H, S, E).
        key_mask: Bool (B, S) or None. The output of a sequence without real keys has no meaning.
        vectors: d^-1/4 w (H, F, D).
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, vectors: Tensor
    ) -> Tensor:
        bias = _log_norm(k)
        if key_mask is not None:
            bias.masked_fill_(~key_mask[:, None], LOWEST)
        means = v.new_empty(*q.shape[:2], vectors.shape[1], v.shape[-1])
        tops = v.new_empty(means.shape[:3])
        out = v.new_empty(*q.shape[:3], v.shape[-1])
        blocks = _Blocks(q, k, vectors)
        for at, w in blocks:
            for f in blocks.features:
                scores, weights = blocks.softmax(w[:, f], k[at], bias[at])
                means[at][:, f] = weights @ v[at]
                # The largest score less the log of its weight is the log of the sum.
                tops[at][:, f] = scores.amax(-1) - weights.amax(-1).log_()
            for i in blocks.rows:
                _, weights = blocks.softmax(q[at][:, i], w, tops[at])
                out[at][:, i] = weights @ means[at]
        ctx.save_for_backward(q, k, v, vectors, bias, means, tops, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, vectors, bias, means, tops, out = ctx.saved_tensors
        grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q, k, v))
        blocks = _Blocks(q, k, vectors)
        for at, w in blocks:
            # Sums of outer products are kept transposed: those products are faster.
            grad_means = _zeros_transposed(means[at])
            grad_tops = torch.zeros_like(tops[at])
            for i in blocks.rows:
                _, weights = blocks.softmax(q[at][:, i], w, tops[at])
                g = grad[at][:, i]
                grad_means.baddbmm_(g.mT, weights)
                shift = (g * out[at][:, i]).sum(-1)
                grad_scores = blocks.softmax_gradient(weights, g, means[at], shift)
                grad_tops += grad_scores.sum(1)
                grad_q[at][:, i] = grad_scores @ w
            shift = (grad_means.mT * means[at]).sum(-1) - grad_tops
            grad_keys, grad_values = (_zeros_transposed(x[at]) for x in (k, v))
            grad_bias = torch.zeros_like(bias[at])
            for f in blocks.features:
                _, weights = blocks.softmax(w[:, f], k[at], bias[at])
                g = grad_means[..., f]
                grad_values.baddbmm_(g, weights)
                grad_scores = blocks.softmax_gradient(weights, g.mT, v[at], shift[:, f])
                grad_bias += grad_scores.sum(1)
                grad_keys.baddbmm_(w[:, f].mT, grad_scores)
            norm = k[at] * (grad_bias * k.shape[-1] ** -0.5)[..., None]
            torch.sub(grad_keys.mT, norm, out=grad_k[at])
            grad_v[at] = grad_values.mT
        return grad_q, grad_k, grad_v, None, None


class _Blocks:
    """Walks over blocks, and computes their weights in memory that they share.

    Iterating gives indices of a few sequences (G of them) and one head, and its vectors (G, F, D).

    Attributes:
        features: Slices of features: the blocks of weights of keys.
        rows: Slices of queries: the blocks of weights of features.
    """

    def __init__(self, q: Tensor, k: Tensor, vectors: Tensor) -> None:
        self.vectors = vectors
        self.batch, _, n, _ = q.shape
        f, s = vectors.shape[1], k.shape[2]
        size = CPU_BLOCK if q.device.type == "cpu" else BLOCK
        self.group = min(self.batch, max(1, size // (f * max(n, s))))
        features = min(f, max(1, size // (self.group * s)))
        rows = min(n, max(1, size // (self.group * f)))
        self.features, self.rows = _slices(f, features), _slices(n, rows)
        size = self.group * max(features * s, rows * f)
        self.memory = tuple(q.new_empty(size) for _ in range(2))

    def __iter__(self) -> Iterator[tuple[tuple[slice, int], Tensor]]:
        for head, group in product(range(len(self.vectors)), _slices(self.batch, self.group)):
            size = min(group.stop, self.batch) - group.start
            yield (group, head), self.vectors[head].expand(size, -1, -1)

    def _room(self, which: int, *shape: int) -> Tensor:
        return self.memory[which][: math.prod(shape)].view(shape)

    def softmax(self, x: Tensor, y: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Returns scores x y^T + bias (G, X, Y), and their softmax over Y, until the next call."""
        shape = (*x.shape[:2], y.shape[1])
        scores = torch.baddbmm(bias[:, None], x, y.mT, out=self._room(0, *shape))
        return scores, torch.softmax(scores, -1, out=self._room(1, *shape))

    def softmax_gradient(self, weights: Tensor, grad: Tensor, v: Tensor, shift: Tensor) -> Tensor:
        """Returns the gradient of scores, in their place, from that of ``weights @ v``."""
        out = torch.bmm(grad, v.mT, out=self._room(0, *weights.shape))
        return out.sub_(shift[..., None]).mul_(weights)


def _slices(total: int, size: int) -> list[slice]:
    return [slice(i, i + size) for i in range(0, total, size)]


def _zeros_transposed(x: Tensor) -> Tensor:
    """Returns contiguous zeros of the shape of ``x.mT``."""
    return x.new_zeros(x.mT.shape)
