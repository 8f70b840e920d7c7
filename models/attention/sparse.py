"""Sparse Transformer: a block or band, and every l-th token beyond it (Child et al. 2019).

    fixed:   j // l = i // l, or j mod l >= l - c      (own block; the last c tokens of each block)
    strided: |i - j| < l,     or (i - j) mod l = 0

The paper defines both for causal attention (j <= i, section 4.3), where its heads are merged as
here; in both directions these are the same sets without j <= i. With l about the root of N, the
default, cost is O(N^1.5 D). The arena's JAX code takes fixed with l = 50 and c = 10 and stays
causal in its bidirectional classifier; it and others compute all N x N scores.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import register_attention
from models.attention.base import (
    Attention,
    Capabilities,
    Context,
    Cost,
    admissible_keys,
    at_least_float32,
    masked_softmax,
)
from models.attention.engines.pattern import (
    Rule,
    Window,
    attend_blocks,
    gather_windows,
    with_shared,
)
from models.dropout import Dropout


@register_attention("sparse")
class Sparse(Attention):
    """Softmax attention over a block or band and every l-th token."""

    @dataclass(frozen=True)
    class Config:
        """Options of the Sparse Transformer.

        Attributes:
            pattern: fixed or strided.
            stride: l, the length of a block and the distance of far tokens; null takes the root of
                max_len.
            summary: c, the tokens at the end of each block that all see, with pattern=fixed; at
                most l.
        """

        pattern: Literal["fixed", "strided"] = "fixed"
        stride: int | None = None
        summary: int = 10

        def __post_init__(self) -> None:
            if min(self.summary, self.stride or 1) < 1 or self.stride == 0:
                raise ValueError("stride and summary must be at least 1.")

    capabilities = Capabilities(
        paper="Child et al. 2019",
        family="pattern",
        patterns=frozenset({"self", "causal"}),
        time="N^1.5",
        memory="N^1.5",
        dropout="weights",
        rotary=True,
        identities=frozenset({"key shift", "rotation"}),
    )

    @classmethod
    def capabilities_with(cls, config: Config) -> Capabilities:
        """Growth is quadratic where the stride does not grow; strides know distances only."""
        able = cls.capabilities
        if config.stride is not None:
            able = replace(able, time="N^2", memory="N^2")
        if config.pattern == "strided":
            able = replace(able, identities=able.identities | {"position shift"})
        return able

    def __init__(self, config: Config, **sizes: Any) -> None:
        super().__init__(config, **sizes)
        self.stride = config.stride or max(1, round(math.sqrt(self.max_len)))
        self.summary = min(config.summary, self.stride)
        self.weight_dropout = Dropout(self.dropout)

    def _rule(self, causal: bool) -> Rule:
        """Returns which pairs of positions the pattern admits."""
        stride = self.stride

        def fixed(i: Tensor, j: Tensor) -> Tensor:
            return (i // stride == j // stride) | (j % stride >= stride - self.summary)

        def strided(i: Tensor, j: Tensor) -> Tensor:
            return ((i - j).abs() < stride) | ((i - j) % stride == 0)

        either = fixed if self.config.pattern == "fixed" else strided
        return (lambda i, j: either(i, j) & (j <= i)) if causal else either

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Computes near and far keys of each block of queries under one softmax."""
        if self.config.pattern == "fixed":
            return self._fixed(q, k, v, context)
        with torch.autocast(q.device.type, enabled=False):
            wide = (at_least_float32(x) for x in (q, k, v))
            return self._strided(*wide, context).to(v.dtype)

    def _fixed(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        n, rule = k.shape[2], self._rule(context.causal)
        window = Window(self.stride, 0, 0).within(n)
        keys = gather_windows(k, v, context.key_mask, rule, window)
        at = torch.arange(n, device=k.device)
        far = at[at % self.stride >= self.stride - self.summary]
        if n > window.block and len(far):
            i = torch.arange(keys.k.shape[1] * window.block, device=k.device).view(-1, window.block)
            # Those of the own block are there already.
            seen = rule(i[..., None], far) & (i[..., None] // self.stride != far // self.stride)
            seen = seen[None, :, None]
            if context.key_mask is not None:
                seen = seen & context.key_mask[:, None, None, None, far]
            keys = with_shared(keys, k[:, :, far], v[:, :, far], seen)
        return attend_blocks(q, keys, window.block, self.dropout if self.training else 0.0)

    def _strided(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        n, stride = k.shape[2], self.stride
        reach = stride - 1
        window = Window(stride, reach, 0 if context.causal else reach)

        def band(i: Tensor, j: Tensor) -> Tensor:
            close = (i - j).abs() < stride
            return close & (j <= i) if context.causal else close

        near = gather_windows(k, v, context.key_mask, band, window)
        blocks = near.k.shape[1]
        padding = blocks * stride - n

        def columns(x: Tensor) -> Tensor:
            """Puts the tokens of one place in their blocks side by side, (B, H, l, blocks, D)."""
            return F.pad(x, (0, 0, 0, padding)).unflatten(2, (blocks, stride)).transpose(2, 3)

        q, k, v = columns(q * q.shape[-1] ** -0.5), columns(k), columns(v)
        near_k, near_v = near.k.transpose(1, 2), near.v.transpose(1, 2)
        scores = [q.transpose(2, 3) @ near_k.mT, (q @ k.mT).transpose(2, 3)]
        # Of a query's column, its own block is near already.
        far = torch.ones(blocks, blocks, dtype=torch.bool, device=k.device)
        far = far.tril(-1) if context.causal else far.fill_diagonal_(False)
        real = context.key_mask
        if real is None:
            real = torch.ones(1, n, dtype=torch.bool, device=k.device)
        far = far[:, None] & F.pad(real, (0, padding)).view(-1, 1, 1, blocks, stride).mT
        masks = [far.new_ones(1) if near.mask is None else near.mask.transpose(1, 2), far]
        masks = [m.expand(len(far), 1, *x.shape[2:]) for m, x in zip(masks, scores, strict=True)]
        weights = masked_softmax(torch.cat(scores, -1), torch.cat(masks, -1))
        weights = self.weight_dropout(weights)
        near_w, far_w = weights.split([window.length, blocks], -1)
        out = near_w @ near_v + (far_w.transpose(2, 3) @ v).transpose(2, 3)
        return out.flatten(2, 3)[:, :, :n]

    def matrix(self, q: Tensor, k: Tensor, context: Context) -> Tensor:
        """Returns softmax(q k^T / sqrt(D)) over the admissible keys of the pattern."""
        at = torch.arange(k.shape[2], device=k.device)
        keep = admissible_keys(q, k, context) & self._rule(context.causal)(at[:, None], at)
        return masked_softmax(q @ k.mT * q.shape[-1] ** -0.5, keep)

    def cost(self, n: int, s: int) -> Cost:
        """Two products of depth D with near and far keys; those of `fixed` are kept."""
        stride, d = self.stride, self.head_dim
        blocks = -(-n // stride)
        if self.config.pattern == "fixed":
            window = Window(stride, 0, 0).within(n)
            far = n // stride * self.summary + max(0, n % stride - stride + self.summary)
            pairs = window.pairs(n) + (blocks * stride * far if n > window.block else 0)
            kept = blocks * 2 * d * (stride + far)
        else:
            pairs = blocks * stride * (3 * stride - 2 + blocks)
            kept = 2 * pairs
        return Cost(
            flops=self.num_heads * 4 * pairs * d,
            activation_bytes=self.num_heads * 4 * kept,
            parameters=0,
            state_floats=0,
        )
