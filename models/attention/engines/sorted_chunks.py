"""Softmax attention in sorted order: tokens see their own chunk and the one before.

In each of some rounds a sequence is sorted by labels and cut into chunks of c tokens, the first of
which follows the last. With n_ij the number of rounds in which i sees j,

    out_i = sum_j n_ij exp(q_i.k_j) v_j / sum_j n_ij exp(q_i.k_j),    n_ii = 0 unless i is alone

in time and memory linear in N but for the sort. Masked tokens are in no chunk, so that padding
takes no time. Chunks are walked over in pieces that stay in cache, and weights exist within a piece
alone; the backward pass computes them again, and draws the same dropout again from the same seed.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.dropout import draws_on, new_seed


def sorted_chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    labels: Tensor,
    num_labels: int,
    key_mask: Tensor | None,
    chunk: int,
    dropout: float = 0.0,
) -> Tensor:
    """Computes softmax attention within chunks of tokens sorted by label, then position.

    Args:
        q: Queries (B, H, N, D), float32 at least; logits are q.k.
        k: Keys (B, H, N, D) of the same tokens and type.
        v: Values (B, H, N, E) of the same type.
        labels: Integers (rounds, B, H, N), from 0 to ``num_labels`` - 1.
        num_labels: An upper bound of the labels; its size costs nothing.
        key_mask: Bool (B, N), True for real tokens. Others neither see nor are seen.
        chunk: Number of tokens c of a chunk; a sequence's last one may have fewer.
        dropout: Probability that a weight is dropped, in each round by itself.

    Returns:
        (B, H, N, E), 0 for masked tokens. Dropout's draw depends on this thread's source of seeds
        alone.
    """
    batch, heads, n, _ = q.shape
    # As projections of a layer lie in memory, so that little is copied.
    rows = (x.transpose(1, 2).reshape(-1, x.shape[-1]) for x in (q, k, v))
    seed = new_seed() if dropout else 0
    with torch.no_grad():
        layout = _layout(labels, num_labels, key_mask, chunk, q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        out = _SortedChunks.apply(*rows, layout, dropout, seed)
    return out.view(batch, n, heads, -1).transpose(1, 2)


def piece_size(device: torch.device) -> int:
    """Returns the most weights of a piece, of which a few times as many are in memory.

    On CPU, these fit in the last-level cache; elsewhere, few pieces are wanted.
    """
    return 2**19 if device.type == "cpu" else 2**26


class _Layout(NamedTuple):
    """Which token is where, for the T chunks of all rounds and sequences, one after another.

    A token's row is its place in tensors (B N H, ...). Its slot is that in tensors
    ((T + 1) c, ...) of all chunks and one more, which has no tokens.

    Attributes:
        rows: Row of the token in each slot (T, c); after the end of a sequence, of its last one.
        previous: The chunk before each chunk (T,).
        bias: What is added to logits of the chunk before and of the own chunk (T, 1, 2 c): -inf
            for slots without a token, and for the chunk before where it is the same one.
        itself: What is added to a token's logit with itself (T, 1): -inf unless it is alone.
        slots: Slot of each token in each round (rounds, B N H); past all chunks if it is masked.
    """

    rows: Tensor
    previous: Tensor
    bias: Tensor
    itself: Tensor
    slots: Tensor


def _layout(
    labels: Tensor, num_labels: int, key_mask: Tensor | None, chunk: int, dtype: torch.dtype
) -> _Layout:
    rounds, batch, heads, n = labels.shape
    device = labels.device
    if key_mask is None:
        key_mask = torch.ones(batch, n, dtype=torch.bool, device=device)
    real = key_mask[:, None].expand(labels.shape).flatten(0, 2)

    # One stable sort of everything, as torch is slower at many short ones. A group is a round of a
    # head of a sequence; in each, masked tokens come last.
    group = torch.arange(len(real), device=device)[:, None]
    sort_keys = torch.where(real, labels.flatten(0, 2), num_labels) + group * (num_labels + 1)
    order = sort_keys.flatten().sort(stable=True).indices
    at = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=device))
    rank = at.view(real.shape) - group * n

    count = real.sum(-1)
    chunks = (count + chunk - 1) // chunk
    first = chunks.cumsum(0) - chunks
    slots = torch.where(real, first[:, None] * chunk + rank, chunks.sum() * chunk)

    # From here on, for each chunk.
    group = group.flatten().repeat_interleave(chunks)
    first, chunks, count = first[group], chunks[group], count[group, None]
    this = torch.arange(len(group), device=device)
    previous = torch.where(this == first, this + chunks, this) - 1
    rank = (this - first)[:, None] * chunk + torch.arange(chunk, device=device)
    filled = rank < count
    seen = torch.cat([filled[previous] & (previous != this)[:, None], filled], 1)
    token = order[group[:, None] * n + torch.minimum(rank, count - 1)] % (batch * heads * n)
    row = torch.arange(batch * heads * n, device=device).view(batch, n, heads).transpose(1, 2)
    zero, lowest = (torch.tensor(x, dtype=dtype, device=device) for x in (0.0, -torch.inf))
    return _Layout(
        rows=row.flatten()[token],
        previous=previous,
        bias=torch.where(seen, zero, lowest)[:, None],
        itself=torch.where(count == 1, zero, lowest),
        slots=slots.view(rounds, batch, heads, n).transpose(2, 3).reshape(rounds, -1),
    )


class _Piece(NamedTuple):
    """P chunks with all that they see; tensors but the rows are in memory that is used again.

    Attributes:
        chunks: Which ones.
        rows: Rows of their tokens (P c,).
        seen: Rows of the tokens of the chunks before them and of their own (P 2 c,).
        q: (P, c, D).
        k: (P, 2 c, D).
        v: (P, 2 c, E).
        scores: Logits (P, c, 2 c).
        weights: Their softmax (P, c, 2 c).
    """

    chunks: slice
    rows: Tensor
    seen: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    scores: Tensor
    weights: Tensor


def _pieces(q: Tensor, k: Tensor, v: Tensor, layout: _Layout) -> Iterator[_Piece]:
    """Walks over all chunks; q, k and v are of shape (B N H, ...)."""
    total, chunk = layout.rows.shape
    size = max(1, min(total, piece_size(q.device) // (2 * chunk**2)))
    memory = [x.new_empty(size * 2 * chunk, x.shape[-1]) for x in (q, k, v)]
    products, softmax = q.new_empty(2, size, chunk, 2 * chunk)

    def take(i: int, x: Tensor, rows: Tensor) -> Tensor:
        return torch.index_select(x, 0, rows, out=memory[i][: len(rows)])

    for begin in range(0, total, size):
        chunks = slice(begin, min(begin + size, total))
        own, before = layout.rows[chunks], layout.rows[layout.previous[chunks]]
        rows, seen = own.flatten(), torch.cat([before, own], 1).flatten()
        queries = take(0, q, rows).unflatten(0, (-1, chunk))
        keys, values = (
            take(i, x, seen).unflatten(0, (-1, 2 * chunk)) for i, x in enumerate((k, v), 1)
        )
        scores = torch.baddbmm(layout.bias[chunks], queries, keys.mT, out=products[: len(own)])
        scores[..., chunk:].diagonal(dim1=1, dim2=2).add_(layout.itself[chunks])
        weights = torch.softmax(scores, -1, out=softmax[: len(own)])
        yield _Piece(chunks, rows, seen, queries, keys, values, scores, weights)


class _SortedChunks(torch.autograd.Function):
    """The attention of rows: q, k, v and the output are of shape (B N H, ...)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: _Layout, dropout: float, seed: int
    ) -> Tensor:
        total, chunk = layout.rows.shape
        draws = draws_on(v.device, dropout, seed)
        means = v.new_empty(total + 1, chunk, v.shape[-1])
        means[total] = 0.0
        log_sums = v.new_zeros(total + 1, chunk)
        for p in _pieces(q, k, v, layout):
            # The largest weight is exp(the largest logit) / sum: no need of other exponentials.
            log_sums[p.chunks] = p.scores.amax(-1) - p.weights.amax(-1).log()
            if draws is not None:
                p.weights.mul_(draws.keep(p.weights))
            torch.bmm(p.weights, p.v, out=means[p.chunks])
        # The part that each round has in the softmax over what is seen in any.
        parts = log_sums.flatten()[layout.slots].softmax(0)
        scale = 1.0 if draws is None else draws.scale
        out = torch.zeros_like(v)
        for slots, part in zip(layout.slots, parts, strict=True):
            out.addcmul_(means.flatten(0, 1).index_select(0, slots), part[:, None], value=scale)
        ctx.save_for_backward(q, k, v, out, parts)
        ctx.layout, ctx.dropout, ctx.seed = layout, dropout, seed
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, parts = ctx.saved_tensors
        layout, draws = ctx.layout, draws_on(grad.device, ctx.dropout, ctx.seed)
        scale, keep = 1.0 if draws is None else draws.scale, None
        total, chunk = layout.rows.shape
        # Slots without a token have no part, and so give no gradient to the token they repeat.
        slot_parts = parts.new_zeros((total + 1) * chunk)
        slot_parts = slot_parts.scatter_(0, layout.slots.flatten(), parts.flatten())
        slot_parts = slot_parts.view(total + 1, chunk, 1)
        # sum_j w_ij dL/dw_ij, the term that the softmax's normalisation adds.
        row_sums = (grad * out).sum(-1)
        grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (q, k, v))
        with torch.autocast(grad.device.type, enabled=False):
            for p in _pieces(q, k, v, layout):
                part = slot_parts[p.chunks]
                row_sum = row_sums[p.rows].view_as(part) * part
                grad_out = grad.index_select(0, p.rows).unflatten(0, (-1, chunk)) * (part * scale)
                grad_weights = torch.bmm(grad_out, p.v.mT, out=p.scores)
                if draws is not None:
                    keep = draws.keep(p.weights)
                    grad_weights.mul_(keep)
                grad_scores = grad_weights.sub_(row_sum).mul_(p.weights)
                kept = p.weights if keep is None else p.weights.mul_(keep)
                grad_q.index_add_(0, p.rows, (grad_scores @ p.k).flatten(0, 1))
                grad_k.index_add_(0, p.seen, (grad_scores.mT @ p.q).flatten(0, 1))
                grad_v.index_add_(0, p.seen, (kept.mT @ grad_out).flatten(0, 1))
        return grad_q, grad_k, grad_v, None, None, None
