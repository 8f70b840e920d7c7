"""Longformer: a band of keys, and global tokens with own projections (Beltagy et al. 2020).

Token i sees the keys |i - j| <= window / 2 and the first g = `global_tokens` tokens; those see all
keys, by queries, keys and values of their own projections of the layer's input (section 3.1), which
are 3 C H D more parameters. Cost O(N (window + g) D). Causal attention keeps j <= i. The first
token is the CLS token of a protocol that has one. Global keys and values are never made: q_g W_k
meets the input, and what is summed up of the input meets W_v, the same products in another order.
The arena's JAX code has no global token and computes all N x N scores; the window is its whole
width there and here, and one side of it in the authors' code.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

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
    attend_blocks,
    band_window,
    gather_windows,
    masked_attention,
    with_shared,
)


@register_attention("longformer")
class Longformer(Attention):
    """Sliding-window attention with global tokens."""

    @dataclass(frozen=True)
    class Config:
        """Options of Longformer.

        Attributes:
            window: Width of the band: a token sees half of it to each side, and itself.
            global_tokens: How many of the first tokens see and are seen by all.
        """

        window: int = 512
        global_tokens: int = 1

        def __post_init__(self) -> None:
            if self.window < 0 or self.window % 2:
                raise ValueError("window must be even and not negative.")
            if self.global_tokens < 0:
                raise ValueError("global_tokens must not be negative.")

    capabilities = Capabilities(
        paper="Beltagy et al. 2020",
        family="pattern",
        patterns=frozenset({"self", "causal"}),
        dropout="weights",
        needs_hidden=True,
        own_values=True,
        identities=frozenset({"key shift", "rotation"}),
    )

    @classmethod
    def capabilities_with(cls, config: Config) -> Capabilities:
        """Without global tokens it is a band, which needs nothing of its own."""
        if config.global_tokens:
            return cls.capabilities
        return replace(
            cls.capabilities,
            needs_hidden=False,
            own_values=False,
            rotary=True,
            identities=cls.capabilities.identities | {"position shift"},
        )

    def __init__(self, config: Config, **sizes: Any) -> None:
        super().__init__(config, **sizes)
        if config.global_tokens:
            inner = 3 * self.num_heads * self.head_dim
            self.project_global = nn.Linear(self.model_dim, inner, bias=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Computes the band with the global keys, and the rows of the global queries."""
        n, dropout = k.shape[2], self.dropout if self.training else 0.0
        count = min(self.config.global_tokens, n)
        window = band_window(self.config.window // 2, context.causal).within(n)
        keys = gather_windows(k, v, context.key_mask, self._rule(context.causal), window)
        if count:
            rows = keys.k.shape[1] * window.block
            seen = torch.ones(rows, count, dtype=torch.bool, device=k.device)
            seen = seen.tril() if context.causal else seen
            seen = seen.view(1, -1, 1, window.block, count)
            if context.key_mask is not None:
                seen = seen & context.key_mask[:, None, None, None, :count]
            keys = with_shared(keys, k[:, :, :count], v[:, :, :count], seen)
        out = attend_blocks(q, keys, window.block, dropout)
        if not count:
            return out
        return torch.cat(
            [self._global_rows(count, context, dropout).to(v.dtype), out[:, :, count:]], 2
        )

    def _global_rows(self, count: int, context: Context, dropout: float) -> Tensor:
        """Returns the outputs of the global queries (B, H, g, D)."""
        assert context.hidden is not None
        with torch.autocast(context.hidden.device.type, enabled=False):
            hidden = at_least_float32(context.hidden)[:, None]
            wq, wk, wv = self._projections(hidden.dtype)
            q = hidden[:, :, :count] @ wq.mT @ wk
            # The scale is that of the D channels of a head.
            q = q * (self.model_dim / self.head_dim) ** 0.5
            seen = None
            if context.key_mask is not None or context.causal:
                seen = admissible_keys(q, hidden, context)
            hidden = hidden.expand(-1, self.num_heads, -1, -1)
            return masked_attention(q, hidden, hidden, seen, dropout) @ wv.mT

    def _projections(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Returns the weights of global queries, keys and values, (H, D, C) each."""
        weight = self.project_global.weight.to(dtype)
        return weight.view(3, self.num_heads, self.head_dim, self.model_dim).unbind(0)

    def _rule(self, causal: bool) -> Rule:
        """Returns which pairs of positions the band admits; global keys are not of the band."""
        count, reach = self.config.global_tokens, self.config.window // 2

        def rule(i: Tensor, j: Tensor) -> Tensor:
            near = ((i - j).abs() <= reach) & (j >= count)
            return near & (j <= i) if causal else near

        return rule

    def matrix(self, q: Tensor, k: Tensor, context: Context) -> Tensor:
        """Returns softmax(q k^T / sqrt(D)) over band and global keys; all keys for global rows."""
        at = torch.arange(k.shape[2], device=k.device)
        scale, count = q.shape[-1] ** -0.5, self.config.global_tokens
        keep = admissible_keys(q, k, context)
        near = ((at[:, None] - at).abs() <= self.config.window // 2) | (at < count)
        weights = masked_softmax(q @ k.mT * scale, keep & near)
        if not count:
            return weights
        assert context.hidden is not None
        wq, wk, _ = self._projections(context.hidden.dtype)
        own_q, own_k = (context.hidden[:, None] @ w.mT for w in (wq, wk))
        rows = masked_softmax(own_q @ own_k.mT * scale, keep)
        return torch.where(at[:, None] < count, rows, weights)

    def combine(self, weights: Tensor, v: Tensor, context: Context) -> Tensor:
        """Weighs values, and for global queries the values of their own projection."""
        count = self.config.global_tokens
        if not count:
            return weights @ v
        assert context.hidden is not None
        own = context.hidden[:, None] @ self._projections(context.hidden.dtype)[2].mT
        return torch.cat([weights[:, :, :count] @ own, weights[:, :, count:] @ v], 2)

    def cost(self, n: int, s: int) -> Cost:
        """Products with the gathered keys, and for global queries with the layer's input."""
        heads, d, c = self.num_heads, self.head_dim, self.model_dim
        count = min(self.config.global_tokens, n)
        window = band_window(self.config.window // 2, causal=False).within(n)
        blocks = -(-n // window.block)
        local = 4 * d * (window.pairs(n) + blocks * window.block * count)
        # Queries, what they give to W_k, two products with the input, and W_v.
        rows = count * c * (4 * n + 6 * d)
        gathered = blocks * (window.length + count) * 2 * d
        return Cost(
            flops=heads * (local + rows),
            activation_bytes=heads * 4 * (n + gathered),
            parameters=sum(p.numel() for p in self.parameters()),
            state_floats=0,
        )
