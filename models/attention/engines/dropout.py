"""Softmax attention with dropout on its weights, on CPU, in pieces that stay in cache.

torch's fused CPU kernel takes no dropout. This computes

    out = (softmax(q k^T / sqrt(D)) * keep / (1 - p)) v,    keep ~ Bernoulli(1 - p) for each weight

by blocks of queries: extra memory O(block x S) instead of O(N S). The backward pass computes the
weights again, and draws the same `keep` again from the same seed.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.dropout import Draws

BLOCK_BYTES = 2**21
"""Size of a block of weights: the few alive at a time nearly fit in a core's own cache.

Constant, since the blocks decide which draw falls on which weight."""


def softmax_dropout_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool = False,
) -> Tensor:
    """Computes softmax attention with dropout on the weights.

    Args:
        q: Queries (B, H, N, D), on CPU.
        k: Keys (B, H, S, D).
        v: Values (B, H, S, E).
        mask: Bool, broadcastable to (B, H, N, S), True for what is admissible; None: everything.
        dropout: Probability p that a weight is dropped.
        causal: Query i sees keys j <= i only; with a mask that is the same for all queries.

    Returns:
        (B, H, N, E). The draw depends on this thread's source of seeds alone.
    """
    bias = None
    if mask is not None:
        mask = mask[(None,) * (4 - mask.ndim)]
        bias = torch.zeros(mask.shape, dtype=torch.promote_types(q.dtype, torch.float32))
        bias.masked_fill_(~mask, -torch.inf)
    # Scores and weights are in float32 in both directions, whatever autocast says.
    with torch.autocast("cpu", enabled=False):
        return _SoftmaxDropout.apply(q, k, v, bias, causal, Draws(dropout))


class _Block(NamedTuple):
    """One group of matrices and rows of queries, with its weights and what dropout keeps."""

    group: slice
    rows: slice
    keys: slice
    q: Tensor
    k: Tensor
    weights: Tensor
    keep: Tensor


class _Blocks:
    """Walks over blocks of queries and gives each its slices, weights and kept entries."""

    def __init__(
        self, q: Tensor, k: Tensor, bias: Tensor | None, causal: bool, draws: Draws
    ) -> None:
        batch, heads, n, d = q.shape
        s = k.shape[-2]
        self.q = (q.to(torch.promote_types(q.dtype, torch.float32)) * d**-0.5).reshape(-1, n, d)
        self.k = k.to(self.q.dtype).reshape(-1, s, d)
        self.bias = self.first = None
        self.heads = heads
        if bias is not None:
            self.bias = bias.expand(batch, *bias.shape[1:])
            # The first admissible key of each row, s where there is none.
            most, first = self.bias.max(-1, keepdim=True)
            first = first.masked_fill(most == -torch.inf, s)
            # Rows that see no key are NaN, and are looked for only where there are some.
            if bool((first > (0 if causal else s - 1)).any()):
                self.first = first
        self.causal = causal
        self.draws = draws
        # Two matrices or more, and as many rows as go into a block.
        self.matrices = max(2, BLOCK_BYTES // (4 * s * n))
        self.rows = max(1, min(n, BLOCK_BYTES // (4 * s * self.matrices)))

    def _of(self, masks: Tensor, group: slice, rows: slice) -> Tensor:
        """Returns those of ``masks`` (B, H or 1, N or 1, S or 1) for a group and rows."""
        matrices = torch.arange(len(self.q))[group]
        head = matrices % self.heads if masks.shape[1] > 1 else torch.zeros_like(matrices)
        if masks.shape[2] > 1:
            masks = masks[:, :, rows]
        return masks[matrices // self.heads, head]

    def __iter__(self) -> Iterator["_Block"]:
        n, s = self.q.shape[1], self.k.shape[1]
        for first in range(0, len(self.q), self.matrices):
            group = slice(first, first + self.matrices)
            for row in range(0, n, self.rows):
                rows = slice(row, row + self.rows)
                keys = slice(0, row + self.rows if self.causal else s)
                q, k = self.q[group, rows], self.k[group, keys]
                scores = q @ k.transpose(1, 2)
                if self.bias is not None:  # twice as fast as by baddbmm, which copies it first
                    scores += self._of(self.bias, group, rows)[..., keys]
                if self.causal:
                    future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(row + 1)
                    scores.masked_fill_(future, -torch.inf)
                weights = scores.softmax(-1)
                if self.first is not None:
                    last = torch.arange(row, row + q.shape[1])[:, None] if self.causal else s - 1
                    weights.masked_fill_(self._of(self.first, group, rows) > last, 0.0)
                yield _Block(group, rows, keys, q, k, weights, self.draws.keep(scores))


class _SoftmaxDropout(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        causal: bool,
        draws: Draws,
    ) -> Tensor:
        blocks = _Blocks(q, k, bias, causal, draws)
        values = v.to(blocks.q.dtype).reshape(-1, *v.shape[-2:])
        out = values.new_empty(values.shape[0], q.shape[-2], values.shape[-1])
        for b in blocks:
            out[b.group, b.rows] = b.weights.mul_(b.keep) @ values[b.group, b.keys]
        out = out.mul_(draws.scale).view(*q.shape[:-1], v.shape[-1]).to(v.dtype)
        ctx.save_for_backward(q, k, v, bias, out)
        ctx.causal, ctx.p, ctx.seed = causal, draws.p, draws.seed
        return out

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")  # without autocast, as forward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, out = ctx.saved_tensors
        draws = Draws(ctx.p, ctx.seed)
        blocks = _Blocks(q, k, bias, ctx.causal, draws)
        dtype = blocks.q.dtype
        values = v.to(dtype).reshape(-1, *v.shape[-2:])
        # sum_j w_ij dL/dw_ij, the term that the softmax's normalisation adds.
        row_sums = (grad.to(dtype) * out.to(dtype)).sum(-1).reshape(-1, q.shape[-2], 1)
        grad = (grad.to(dtype) * draws.scale).reshape(-1, *grad.shape[-2:])
        grad_q = torch.empty_like(blocks.q)
        # Transposed, as (D, rows) x (rows, S) products are faster than (S, rows) x (rows, D).
        grad_k, grad_v = (x.new_zeros(x.transpose(1, 2).shape) for x in (blocks.k, values))
        for b in blocks:
            grad_out = grad[b.group, b.rows]
            grad_weights = (grad_out @ values[b.group, b.keys].transpose(1, 2)).mul_(b.keep)
            grad_scores = grad_weights.sub_(row_sums[b.group, b.rows]).mul_(b.weights)
            grad_v[b.group, :, b.keys].baddbmm_(grad_out.transpose(1, 2), b.weights.mul_(b.keep))
            grad_q[b.group, b.rows] = grad_scores @ b.k
            grad_k[b.group, :, b.keys].baddbmm_(b.q.transpose(1, 2), grad_scores)
        gradients = (grad_q.mul_(q.shape[-1] ** -0.5), grad_k.mT, grad_v.mT)
        pairs = zip(gradients, (q, k, v), strict=True)
        return (*(g.reshape(x.shape).to(x.dtype) for g, x in pairs), None, None, None)
