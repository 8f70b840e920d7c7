"""Softmax attention with a differentiable bias on its logits, in pieces that stay in cache.

    out = (softmax(c q k^T + bias) * keep / (1 - p)) v,    keep ~ Bernoulli(1 - p)

torch's fused CPU kernel takes no mask that needs gradients and no dropout; its fallback keeps all
B H N S weights. Here blocks of queries are evaluated one after the other, and again in the backward
pass, with the same draws. A bias that samples or queries share is read, and its gradient summed up,
while it is in cache. Keys after a sample's last real one are not looked at. Extra memory: a block,
and the gradient of the bias.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention.base import at_least_float32, own_lengths
from models.dropout import Draws

BLOCK_BYTES = 2**21
"""Size of a block of weights; constant, since the blocks decide which draw falls on which weight.
The two or three alive at a time stay in a CPU's cache."""

CAUSAL_ROWS = 128
"""Queries of a block of causal attention, at most: it computes half of their square in vain."""


def biased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Computes softmax attention with a bias.

    Args:
        q: Queries (B, H, N, D).
        k: Keys (B, H, S, D).
        v: Values (B, H, S, E).
        bias: Added to the logits; (B or 1, H, N or 1, S), where 1 is for all. -inf excludes a key.
        key_mask: Bool (B, S), True for real tokens.
        causal: Query i sees keys j <= i only.
        dropout: Probability p that a weight is dropped.
        scale: Factor c of the products; None: 1 / sqrt(D).

    Returns:
        (B, H, N, E). A query without any admissible key gives 0. The draw depends on this
        thread's source of seeds alone.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.device.type != "cpu":
        return _fused(q, k, v, bias, key_mask, causal, dropout, scale)
    draws = Draws(dropout) if dropout else None
    # Scores and weights are in float32 in both directions, whatever autocast says.
    with torch.autocast("cpu", enabled=False):
        return _Biased.apply(q, k, v, bias, key_mask, causal, draws, scale)


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    causal: bool,
    dropout: float,
    scale: float,
) -> Tensor:
    """Computes it by torch's own kernel, for devices on which that takes a bias."""
    keep = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device)
    if causal:
        keep = keep.tril()
    if key_mask is not None:
        keep = keep & key_mask[:, None, None, :]
    if bias is not None:
        keep = keep & (bias > -torch.inf)
    # Kernels differ in what they give where all is -inf: such rows see all keys, and are then 0.
    empty = ~keep.any(-1, keepdim=True)
    logits = keep.new_zeros(()) if bias is None else bias.masked_fill(bias == -torch.inf, 0.0)
    mask = torch.where(keep | empty, logits.to(v.dtype), -torch.inf)
    q, k = q.to(v.dtype), k.to(v.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    return out.masked_fill(empty, 0.0)


ALL = slice(None)


class _Block(NamedTuple):
    """Some queries of one head in some samples, with their scores.

    Attributes:
        at: Index of the samples and the head.
        rows: Which queries.
        keys: Which keys they see.
        bias: Index of what is added to their scores.
        scores: (samples, rows, keys).
    """

    at: tuple[slice, int]
    rows: slice
    keys: slice
    bias: tuple[slice, int, slice, slice] | None
    scores: Tensor


def _blocks(
    q: Tensor, k: Tensor, bias: Tensor | None, key_mask: Tensor | None, causal: bool
) -> Iterator[_Block]:
    """Walks over all queries that see a key; samples last, as they may share a bias."""
    batch, heads, n, _ = q.shape
    s = k.shape[-2]
    most = min(n, CAUSAL_ROWS) if causal else n
    rows_at_once = min(most, max(1, BLOCK_BYTES // (4 * s)))
    samples_at_once = max(1, BLOCK_BYTES // (4 * s * rows_at_once))
    none = q.new_zeros(1, 1, 1)
    counts = lengths = [s] * batch
    if key_mask is not None:
        counts, lengths = key_mask.sum(-1).tolist(), own_lengths(key_mask, k).tolist()
        padding = q.new_zeros(key_mask.shape).masked_fill_(~key_mask, -torch.inf)[:, None]
    for head in range(heads):
        for row in range(0, n, rows_at_once):
            for first in range(0, batch, samples_at_once):
                rows = slice(row, row + rows_at_once)
                samples = slice(first, first + samples_at_once)
                length = max(lengths[samples])
                keys = slice(min(length, rows.stop) if causal else length)
                if keys.stop == 0:
                    continue
                at, index, added = (samples, head), None, none
                if bias is not None:
                    own, each = (x > 1 for x in (bias.shape[0], bias.shape[2]))
                    index = (samples if own else ALL, head, rows if each else ALL, keys)
                    added = bias[index]
                scores = torch.baddbmm(added, q[at][:, rows], k[at][:, keys].mT)
                if min(counts[samples]) < length:
                    scores += padding[samples, :, keys]
                if causal:
                    future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(row + 1)
                    scores.masked_fill_(future, -torch.inf)
                yield _Block(at, rows, keys, index, scores)


class _Biased(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        key_mask: Tensor | None,
        causal: bool,
        draws: Draws | None,
        scale: float,
    ) -> Tensor:
        tensors = (q, k, v, bias)
        queries, keys, values, added = (x if x is None else at_least_float32(x) for x in tensors)
        queries = queries * scale
        # As they are where no key is seen.
        out = values.new_zeros(*q.shape[:-1], v.shape[-1])
        log_sums = out.new_full((*q.shape[:-1], 1), torch.inf)
        lowest = torch.finfo(out.dtype).min
        for b in _blocks(queries, keys, added, key_mask, causal):
            top = b.scores.amax(-1, keepdim=True).clamp_min_(lowest)
            weights = b.scores.sub_(top).exp_()
            total = weights.sum(-1, keepdim=True)
            # Rows that see no key: their outputs become 0, and so do their weights from here on.
            total.masked_fill_(total == 0, torch.inf)
            if draws is not None:
                weights *= draws.keep(weights)
            out[b.at][:, b.rows] = (weights @ values[b.at][:, b.keys]).div_(total)
            log_sums[b.at][:, b.rows] = top + total.log()
        if draws is not None:
            out *= draws.scale
        out = out.to(v.dtype)
        ctx.save_for_backward(q, k, v, bias, key_mask, out, log_sums)
        ctx.causal, ctx.draws, ctx.scale = causal, draws, scale
        return out

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, key_mask, out, log_sums = ctx.saved_tensors
        draws = None if ctx.draws is None else Draws(ctx.draws.p, ctx.draws.seed)
        tensors = (q, k, v, bias, grad, out)
        queries, keys, values, added, grad, out = (
            x if x is None else at_least_float32(x) for x in tensors
        )
        queries = queries * ctx.scale
        # sum_j w_ij dL/dw_ij, the term that the softmax's normalisation adds.
        row_sums = (grad * out).sum(-1, keepdim=True)
        if draws is not None:
            grad = grad * draws.scale
        grad_q = torch.zeros_like(queries)
        # Transposed, as (D, rows) x (rows, S) products are faster than (S, rows) x (rows, D).
        grad_k, grad_v = (x.new_zeros(x.mT.shape) for x in (keys, values))
        grad_bias = torch.zeros_like(added) if ctx.needs_input_grad[3] else None
        for b in _blocks(queries, keys, added, key_mask, ctx.causal):
            weights = b.scores.sub_(log_sums[b.at][:, b.rows]).exp_()
            grad_out = grad[b.at][:, b.rows]
            grad_scores = grad_out @ values[b.at][:, b.keys].mT
            kept = weights
            if draws is not None:
                keep = draws.keep(weights)
                grad_scores *= keep
                kept = keep.mul_(weights)
            grad_scores.sub_(row_sums[b.at][:, b.rows]).mul_(weights)
            grad_v[b.at][..., b.keys].baddbmm_(grad_out.mT, kept)
            grad_q[b.at][:, b.rows] = grad_scores @ keys[b.at][:, b.keys]
            grad_k[b.at][..., b.keys].baddbmm_(queries[b.at][:, b.rows].mT, grad_scores)
            if grad_bias is not None:
                part = grad_bias[b.bias]
                part += grad_scores.sum_to_size(part.shape)
        grad_q *= ctx.scale
        gradients = (grad_q, grad_k.mT, grad_v.mT, grad_bias)
        pairs = zip(gradients, (q, k, v, bias), strict=True)
        return (*(g if g is None else g.to(x.dtype) for g, x in pairs), None, None, None, None)
