"""Softmax attention: softmax(q k^T / sqrt(D)) v (Vaswani et al., NeurIPS 2017).

Fused `scaled_dot_product_attention` wherever it exists: O(N^2 D) time, O(N) memory. On CPU the
fused kernel has no attention dropout, and the fallback of torch materialises all N^2 weights
several times; there, `engines/dropout.py` computes the same in pieces that stay in cache. The
recurrent form keeps all keys and values. A query without any admissible key gives 0, where additive
masks of -1e9 give the mean of all values.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.attention import register_attention
from models.attention.base import (
    Attention,
    Capabilities,
    Context,
    Cost,
    admissible_keys,
    masked_softmax,
)
from models.attention.engines.dropout import softmax_dropout_attention

MASKED_ROWS = 128
"""Queries at a time where a mask and causality combine, so that no N x N mask is made."""


class Cache(NamedTuple):
    """The recurrent state: keys and values of the past, in memory for ``max_len`` of each.

    Attributes:
        keys: (B, H, max_len, D), of which the first ``length`` are filled.
        values: (B, H, max_len, E); E is 0 before the first token, which tells it.
        length: Number of tokens seen.
    """

    keys: Tensor
    values: Tensor
    length: int


@register_attention("softmax")
class Softmax(Attention):
    """Scaled dot-product attention."""

    capabilities = Capabilities(
        paper="Vaswani et al., NeurIPS 2017",
        family="full",
        patterns=frozenset({"self", "causal", "cross"}),
        time="N^2",
        dropout="weights",
        recurrent=True,
        rotary=True,
        identities=frozenset({"permutation", "position shift", "key shift", "rotation"}),
    )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Computes fused attention."""
        causal = context.causal
        mask = None if context.key_mask is None else context.key_mask[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        if dropout and q.device.type == "cpu":
            return softmax_dropout_attention(q, k, v, mask, dropout, causal)
        if mask is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, dropout_p=dropout)
        if not causal:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        n = q.shape[-2]
        blocks = (range(i, min(i + MASKED_ROWS, n)) for i in range(0, n, MASKED_ROWS))
        # Checkpointed, or the backward pass would keep the masks of all blocks.
        outputs = [
            checkpoint(_causal_block, q, k, v, mask, rows, dropout, use_reentrant=False)
            for rows in blocks
        ]
        return torch.cat(outputs, -2)

    def matrix(self, q: Tensor, k: Tensor, context: Context) -> Tensor:
        """Returns softmax(q k^T / sqrt(D)) over the admissible keys, 0 where there is none."""
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        return masked_softmax(scores, admissible_keys(q, k, context))

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> Cache:
        """Returns an empty cache with memory for ``max_len`` keys."""
        size = (batch, self.num_heads, self.max_len)
        keys = torch.empty(*size, self.head_dim, device=device, dtype=dtype)
        return Cache(keys, keys.new_empty(*size, 0), 0)

    def advance(
        self, q: Tensor, k: Tensor, v: Tensor, state: Cache, hidden: Tensor | None
    ) -> tuple[Tensor, Cache]:
        """Attends to all tokens so far; the cache is written in place."""
        keys, values, length = state
        if length >= self.max_len:
            raise ValueError(f"The cache has room for {self.max_len} tokens, and it is full.")
        if length == 0:
            values = v.new_empty(*keys.shape[:3], v.shape[-1])
        keys[:, :, length : length + 1] = k
        values[:, :, length : length + 1] = v
        past = slice(0, length + 1)
        out = F.scaled_dot_product_attention(q, keys[:, :, past], values[:, :, past])
        return out, Cache(keys, values, length + 1)

    def cost(self, n: int, s: int) -> Cost:
        """Two N x S products of depth D; the fused kernel keeps one log-sum for each query."""
        return Cost(
            flops=self.num_heads * 4 * n * s * self.head_dim,
            activation_bytes=self.num_heads * 4 * n,
            parameters=0,
            state_floats=self.num_heads * 2 * self.max_len * self.head_dim,
        )


def _causal_block(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, rows: range, dropout: float
) -> Tensor:
    """Computes causal attention of some rows of queries; ``mask`` is bool (B, 1, 1, S)."""
    first, end = rows[0], rows[-1] + 1
    past = torch.ones(len(rows), end, dtype=torch.bool, device=q.device).tril(first)
    return F.scaled_dot_product_attention(
        q[:, :, first:end],
        k[:, :, :end],
        v[:, :, :end],
        attn_mask=mask[..., :end] & past,
        dropout_p=dropout,
    )
