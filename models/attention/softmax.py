"""Softmax attention: softmax(q k^T / sqrt(D)) v (Vaswani et al., NeurIPS 2017).

Fused `scaled_dot_product_attention` wherever it exists: O(N^2 D) time, O(N) memory. On CPU the
fused kernel has no attention dropout, and the fallback of torch materialises all N^2 weights
several times; there, `engines/dropout.py` computes the same in pieces that stay in cache. A query
without any admissible key gives 0, where additive masks of -1e9 give the mean of all values.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import register_attention
from models.attention.base import Attention, Capabilities, Cost
from models.attention.engines.dropout import softmax_dropout_attention


@register_attention("softmax")
class Softmax(Attention):
    """Scaled dot-product attention."""

    capabilities = Capabilities(
        paper="Vaswani et al., NeurIPS 2017",
        patterns=frozenset({"self", "cross"}),
        growth="N^2",
        dropout="weights",
    )

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        causal: bool,
        hidden: Tensor | None,
    ) -> Tensor:
        """Computes fused attention."""
        dropout = self.dropout if self.training else 0.0
        if dropout and q.device.type == "cpu":
            return softmax_dropout_attention(q, k, v, key_mask, dropout)
        mask = None if key_mask is None else key_mask[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)

    def weights(
        self,
        q: Tensor,
        k: Tensor,
        key_mask: Tensor | None = None,
        causal: bool = False,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Returns softmax(q k^T / sqrt(D)) over the admissible keys, 0 where there is none."""
        self._check(q, k, key_mask, causal, hidden)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        if key_mask is None:
            return scores.softmax(-1)
        keep = key_mask[:, None, None, :]
        return torch.where(keep, scores.masked_fill(~keep, -torch.inf).softmax(-1), 0.0)

    def cost(self, n: int, s: int) -> Cost:
        """Two N x S products of depth D; the fused kernel keeps one log-sum for each query."""
        return Cost(
            flops=self.num_heads * 4 * n * s * self.head_dim,
            activation_bytes=self.num_heads * 4 * n,
            parameters=0,
            state_floats=0,
        )
