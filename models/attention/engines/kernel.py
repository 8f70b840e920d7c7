"""Kernel (linear) attention: similarity phi(q) . phi(k), evaluated without the N x S matrix.

    out_i = sum_j phi(q_i).phi(k_j) v_j / sum_j phi(q_i).phi(k_j)
          = phi(q_i) [sum_j phi(k_j) v_j^T] / (phi(q_i) . sum_j phi(k_j))

(Katharopoulos et al. 2020, eq. 4 to 6.) A column of ones in v makes the denominator one more column
of the same products, so these functions work on sums over keys of phi(k_j) [v_j, 1]. A mask, or
any other factor of a key, multiplies the row [v_j, 1].
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

EPS = 1e-6


def guard(denominator: Tensor, signed: bool) -> Tensor:
    """Keeps a denominator's magnitude at ``EPS`` or more, and its sign, a zero's too."""
    if not signed:
        return denominator.clamp_min(EPS)
    return denominator.abs().clamp_min(EPS).copysign(denominator)


def normalised(sums: Tensor, signed: bool) -> Tensor:
    """Divides all columns of ``sums`` (B, H, N, E + 1) but the last by the last, guarded."""
    return _Normalised.apply(sums, signed)


class _Normalised(torch.autograd.Function):
    """``normalised``, with one pass over the gradient, where slices make one of zeros each."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, signed: bool) -> Tensor:
        denominator = sums[..., -1:]
        # One reciprocal a row and products: half the time of a division.
        factor = guard(denominator, signed).reciprocal()
        # As the output projection reads it: positions outside, heads inside.
        if torch.compiler.is_compiling():  # which orders memory itself, and ends graphs at ``out``
            out = sums[..., :-1] * factor
        else:
            batch, heads, n, columns = sums.shape
            out = sums.new_empty(batch, n, heads, columns - 1).transpose(1, 2)
            torch.mul(sums[..., :-1], factor, out=out)
        ctx.save_for_backward(out, factor, (denominator.abs() if signed else denominator) >= EPS)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        out, factor, free = ctx.saved_tensors
        whole = gradient.new_empty(*gradient.shape[:-1], gradient.shape[-1] + 1)
        torch.mul(gradient, factor, out=whole[..., :-1])
        along = torch.linalg.vecdot(gradient, out)[..., None]
        torch.mul(along * free, -factor, out=whole[..., -1:])
        return whole, None


def with_ones(v: Tensor, key_weight: Tensor | None) -> Tensor:
    """Returns the rows w_j [v_j, 1] (B, H, S, E + 1).

    Args:
        v: Values (B, H, S, E).
        key_weight: Factor w of each key, broadcastable to (B, H, S); 0 for masked keys.
    """
    rows = F.pad(v, (0, 1), value=1.0)
    return rows if key_weight is None else rows * key_weight[..., None]


def projected(x: Tensor, matrices: Tensor) -> Tensor:
    """Returns x @ matrices (B, H, N, F) for x (B, H, N, D) and a matrix (D, F) of each head."""
    if x.shape[-2] > 1:
        return x @ matrices
    # One product a head: the broadcast one copies the matrices for each sequence.
    return (x.transpose(0, 2) @ matrices).transpose(0, 2)


def bidirectional_sums(fq: Tensor, fk: Tensor, rows: Tensor) -> Tensor:
    """Returns sum_j fq_i.fk_j rows_j for every query, as two matrix products.

    Cost O((N + S) F E) time, O(F E) memory.

    Args:
        fq: Query features (B, H, N, F).
        fk: Key features (B, H, S, F).
        rows: Rows (B, H, S, E).

    Returns:
        (B, H, N, E).
    """
    return _BidirectionalSums.apply(fq, fk, rows)


class _BidirectionalSums(torch.autograd.Function):
    """``bidirectional_sums``, with gradients that lie in memory as their inputs do.

    A transposed one costs the operator that is next in the backward pass six times its time.
    """

    @staticmethod
    def forward(ctx: Any, fq: Tensor, fk: Tensor, rows: Tensor) -> Tensor:
        sums = fk.mT @ rows
        ctx.save_for_backward(fq, fk, rows, sums)
        return fq @ sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fq, fk, rows, sums = ctx.saved_tensors
        of_sums = fq.mT @ gradient
        return gradient @ sums.mT, rows @ of_sums.mT, fk @ of_sums


def causal_sums(fq: Tensor, fk: Tensor, rows: Tensor, log_decay: Tensor | None = None) -> Tensor:
    """Returns sum_{j <= i} exp(g_{j+1} + ... + g_i) fq_i.fk_j rows_j for every query i.

    In chunks of C positions: the quadratic form inside a chunk, and one F x E sum for all that
    came before it. Cost O(N (F E + C (F + E))) time, O(N C + N/C F E) memory; the N x F x E
    tensor of all outer products never exists.

    Args:
        fq: Query features (B, H, N, F).
        fk: Key features (B, H, N, F).
        rows: Rows (B, H, N, E).
        log_decay: g (B, H, N), broadcastable: step i multiplies all that came before it by
            exp(g_i). None: no decay.

    Returns:
        (B, H, N, E).
    """
    n = fq.shape[-2]
    # As many chunks as are needed, of equal size: the last one is hardly padded.
    size = math.ceil(n / math.ceil(n / chunk_size(fq.device)))
    padding = -n % size

    def chunked(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, padding)) if padding else x
        return x.unflatten(-2, (-1, size))

    fq, fk, rows = chunked(fq), chunked(fk), chunked(rows)
    within = (fq @ fk.transpose(-2, -1)).tril_()
    if log_decay is None:
        sums = within @ rows
        if fq.shape[-3] > 1:
            totals = (fk.transpose(-2, -1) @ rows)[..., :-1, :, :].cumsum(-3)
            sums = sums + fq @ F.pad(totals, (0, 0, 0, 0, 1, 0))
    else:
        g = chunked(log_decay[..., None]).squeeze(-1)
        spans = spans_of(g)
        sums = (within * spans.exp()) @ rows
        if fq.shape[-3] > 1:
            from_start = g.cumsum(-1)
            totals = (fk * spans[..., -1, :, None].exp()).transpose(-2, -1) @ rows
            before = _decayed_totals(totals, from_start[..., -1].exp())
            sums = sums + (fq * from_start.exp()[..., None]) @ before
    return sums.flatten(-3, -2)[..., :n, :]


def chunk_size(device: torch.device) -> int:
    """Returns the most positions of a chunk.

    On CPU, causal cosFormer (D = 64, N = 2,048) is fastest with 64 to 128; on GPUs 64 is usual.
    """
    return 128 if device.type == "cpu" else 64


def spans_of(log_decay: Tensor) -> Tensor:
    """Returns g_{j+1} + ... + g_i for i >= j and -inf above the diagonal, (..., N, N).

    Each sum is added up by itself: a difference of two running sums would cancel.
    """
    n = log_decay.shape[-1]
    steps = log_decay[..., :, None].expand(*log_decay.shape, n).tril(-1)
    above = torch.ones(n, n, dtype=torch.bool, device=log_decay.device).triu(1)
    return steps.cumsum(-2).masked_fill(above, -torch.inf)


def _decayed_totals(totals: Tensor, decay: Tensor) -> Tensor:
    """Returns the decayed sum of all earlier chunks' totals (..., chunks, F, E) for each chunk."""
    running = torch.zeros_like(totals[..., 0, :, :])
    before = []
    # Unbound at once: the gradient of each index would be as large as all totals.
    for total, factor in zip(totals.unbind(-3), decay[..., None, None].unbind(-3), strict=True):
        before.append(running)
        running = running * factor + total
    return torch.stack(before, -3)
