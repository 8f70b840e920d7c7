"""Sums over keys weighed by a Gaussian kernel, in tiles of the N x S weights that stay in cache.

    out_i = sum_j exp(-|q_i - k_j|^2 / (2 sqrt(D))) v_j

All exponents come out of one product of D + 2 columns. The backward pass computes the weights
again, so that nothing of size N S is kept.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.attention.base import at_least_float32
from models.dropout import DeviceDraws, Draws, draws_on, new_seed


class Tile(NamedTuple):
    """Size of the block of weights that is computed at once.

    Attributes:
        rows: The most queries.
        keys: The most keys.
        floats: The most weights, of as many heads and samples as fit.
    """

    rows: int
    keys: int
    floats: int


CPU_TILE, GPU_TILE = Tile(256, 512, 2**18), Tile(4096, 4096, 2**26)
"""On CPU the two blocks alive at a time stay in the second-level cache, at 1 MB each."""


def gaussian_sums(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """Returns sum_j exp(-|q_i - k_j|^2 / (2 sqrt(D))) v_j, computed in float32 at least.

    Args:
        q: Queries (B, H, N, D).
        k: Keys (B, H, S, D).
        v: Values (B, H, S, E).
        key_mask: Bool (B, S), True for real tokens; all others have no weight. None: all real.
        causal: Query i sees keys j <= i only.
        dropout: Probability that a weight is dropped.

    Returns:
        (B, H, N, E), in the type of ``v``. The draw depends on this thread's source of seeds alone.
    """
    masked = None if key_mask is None else ~key_mask.repeat_interleave(q.shape[1], 0)
    seed = new_seed() if dropout else 0
    with torch.autocast(q.device.type, enabled=False):
        return _GaussianSums.apply(q, k, v, masked, causal, dropout, seed)


def gaussian_matrix(q: Tensor, k: Tensor) -> Tensor:
    """Returns exp(-|q_i - k_j|^2 / (2 sqrt(D))) of all pairs (..., N, S), from their distances."""
    squares = torch.cdist(q, k, compute_mode="donot_use_mm_for_euclid_dist").square()
    return (-squares / (2 * math.sqrt(q.shape[-1]))).exp()


def gaussian_flops(n: int, s: int, d: int, e: int) -> int:
    """Returns the operations of ``gaussian_sums`` of one head: N x S products of D + 2 and E."""
    return 2 * n * s * (d + 2 + e)


def gaussian_floats(n: int, s: int, d: int, heads: int) -> int:
    """Returns the numbers that ``gaussian_sums`` makes: both factors, and a tile of weights."""
    return heads * (n + s) * (d + 2) + min(heads * n * s, CPU_TILE.floats)


class _Block(NamedTuple):
    """Some matrices and rows of the weights (matrices, rows, keys), as dropout leaves them."""

    group: slice
    rows: slice
    keys: slice
    weights: Tensor


def _factor(x: Tensor, unit: float, of_keys: bool) -> Tensor:
    """Returns y = [unit x, a, b] (B H, N, D + 2), whose products are exponents -|y - y'|^2 / 2.

    a and b are -|unit x|^2 / 2 and 1, the other way round for keys.
    """
    x = at_least_float32(x)
    factor = x.new_empty(*x.shape[:-1], x.shape[-1] + 2)
    scaled, norm, one = factor.split_with_sizes((x.shape[-1], 1, 1), -1)
    if of_keys:
        norm, one = one, norm
    torch.mul(x, unit, out=scaled)
    torch.mul(torch.linalg.vector_norm(scaled, dim=-1, keepdim=True).square_(), -0.5, out=norm)
    one.fill_(1)
    return factor.flatten(0, 1)


def _blocks(
    q: Tensor,
    k: Tensor,
    causal: bool,
    draws: Draws | DeviceDraws | None,
) -> Iterator[_Block]:
    """Yields the weights of B H matrices block by block.

    Args:
        q: Factor of the queries (B H, N, D + 2).
        k: Factor of the keys (B H, S, D + 2).
        causal: Query i sees keys j <= i only.
        draws: What dropout keeps; None: all.
    """
    (matrices, n, _), s = q.shape, k.shape[1]
    tile = CPU_TILE if q.device.type == "cpu" else GPU_TILE
    height, width = min(n, tile.rows), min(s, tile.keys)
    if causal:
        # Half of the last tile of each row is future; no more than a sixteenth of all is.
        height = min(height, max(32, -(-n // 8)))
    for group in _slices(matrices, max(1, tile.floats // max(1, height * width))):
        for rows in _slices(n, height):
            for keys in _slices(rows.stop if causal else s, width):
                exponents = q[group, rows] @ k[group, keys].mT
                # Rounding leaves a little more than 0 of large vectors that are alike.
                weights = exponents.clamp_(max=0).exp2_()
                if causal and keys.stop > rows.start + 1:
                    weights.tril_(rows.start - keys.start)
                if draws is not None:
                    weights.mul_(draws.keep(weights))
                yield _Block(group, rows, keys, weights)


def _slices(size: int, step: int) -> Iterator[slice]:
    """Yields slices of at most ``step`` that make up ``size``."""
    return (slice(i, min(i + step, size)) for i in range(0, size, max(1, step)))


class _GaussianSums(torch.autograd.Function):
    """The sums for q (B, H, N, D), k (B, H, S, D) and v (B, H, S, E), by blocks of weights W.

    W_ij = 2^(-|y_i - z_j|^2 / 2) with y = c q, z = c k and c^2 = log2(e) / sqrt(D), so that q_i has
    the gradient sum_j G_ij (z_j - y_i), where G = W o (dL/dout (c ln(2) v)^T). The factors hold a
    column of ones, with which the product that gives sum_j G_ij z_j gives sum_j G_ij besides.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        masked: Tensor | None,
        causal: bool,
        dropout: float,
        seed: int,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, masked)
        ctx.causal, ctx.dropout, ctx.seed = causal, dropout, seed
        draws = draws_on(q.device, dropout, seed)
        y, z, _ = _factors(q, k, masked)
        values = at_least_float32(v).flatten(0, 1)
        out = values.new_empty(*y.shape[:2], v.shape[-1])
        for b in _blocks(y, z, causal, draws):
            sums = out[b.group, b.rows]
            # beta is 0 where there is nothing yet.
            beta = float(b.keys.start > 0)
            torch.baddbmm(sums, b.weights, values[b.group, b.keys], beta=beta, out=sums)
        if draws is not None:
            out.mul_(draws.scale)
        return out.view(*q.shape[:-1], v.shape[-1]).to(v.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, masked = ctx.saved_tensors
        draws = draws_on(q.device, ctx.dropout, ctx.seed)
        with torch.autocast(q.device.type, enabled=False):
            y, z, unit = _factors(q, k, masked)
            values = (at_least_float32(v) * (unit * math.log(2))).flatten(0, 1)
            grad = at_least_float32(grad)
            grad = (grad if draws is None else grad * draws.scale).flatten(0, 1)
            grad_y = torch.empty_like(y)
            # Transposed, as (D, rows) x (rows, S) products are faster than (S, rows) x (rows, D).
            grad_z, grad_v = (x.new_zeros(x.mT.shape) for x in (z, values))
            for b in _blocks(y, z, ctx.causal, draws):
                grad_out = grad[b.group, b.rows]
                grad_v[b.group, :, b.keys].baddbmm_(grad_out.mT, b.weights)
                g = (grad_out @ values[b.group, b.keys].mT).mul_(b.weights)
                beta = float(b.keys.start > 0)
                grad_y[b.group, b.rows].baddbmm_(g, z[b.group, b.keys], beta=beta)
                grad_z[b.group, :, b.keys].baddbmm_(y[b.group, b.rows].mT, g)
            d = q.shape[-1]
            grad_z = grad_z.mT
            grad_q = torch.addcmul(grad_y[..., :d], grad_y[..., d, None], y[..., :d], value=-1)
            grad_k = torch.addcmul(grad_z[..., :d], grad_z[..., -1:], z[..., :d], value=-1)
        gradients = zip((grad_q, grad_k, grad_v.mT), (q, k, v), strict=True)
        return (*(g.reshape(x.shape).to(x.dtype) for g, x in gradients), *[None] * 4)


def _factors(q: Tensor, k: Tensor, masked: Tensor | None) -> tuple[Tensor, Tensor, float]:
    """Returns the factors of the exponents, and the unit of queries and keys in them."""
    # Powers of 2, which take torch a third of the time of powers of e on CPU.
    unit = math.sqrt(math.log2(math.e) / math.sqrt(q.shape[-1]))
    y, z = _factor(q, unit, of_keys=False), _factor(k, unit, of_keys=True)
    if masked is not None:
        z[..., -1].masked_fill_(masked, -torch.inf)
    return y, z, unit
