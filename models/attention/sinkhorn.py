"""Sinkhorn attention: blocks attend to themselves and a sorted block (Tay et al., ICML 2020).

    P = sinkhorn((R + noise) / T),    R_ul = w_l . sum_t k_ut    for blocks u, l and tokens t
    out of query i in block u: one softmax over the keys [(P k)_u, k_u] with values [(P v)_u, v_u]

(P k)_ut = sum_l P_ul k_lt mixes the tokens at place t of all blocks, and tends to the block that u
is sorted to as P tends to a permutation. Sinkhorn normalises columns and rows of exp(.) by turns,
rows last, so that sorted keys and values are averages. Gumbel noise is drawn for training alone,
for each head and step. Blocks of b positions cost O(N b D) for the softmax and O(N^2 D / b) for the
mixing, of which the second is the larger from N = 2 b^2 on; H D L / b parameters for L positions.

Only blocks with a real token are sorted, so padding is felt by none. Of masked tokens sorted keys
have nothing: with c_ut = sum_l P_ul over the blocks whose token t is real, they are divided by
c_ut, as are values, and weigh c_ut in the softmax. So a hard P gives exactly the other block with
its mask, and an average counts as much as it has real tokens in it. The arena's code mixes by a
matrix that does not depend on P, over every b-th token, and adds two softmaxes; other public code
takes sorted values from the keys. There is no causal form: a sorted block holds tokens of the whole
sequence, so the paper's decoder sorts by another rule, to earlier blocks alone.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import register_attention
from models.attention.base import Attention, Capabilities, Context, Cost, at_least_float32
from models.attention.engines.biased import biased_attention

INIT_STD = 0.02

LOWEST = -1e30
"""Log of a weight that is 0. Finite, so that differences of two of them are numbers."""

SMALLEST = 1e-30
"""A sorted key with less of real tokens in it than this is left out: it divides by that."""


@register_attention("sinkhorn")
class Sinkhorn(Attention):
    """Softmax over a query's own block and one block sorted to it."""

    @dataclass(frozen=True)
    class Config:
        """Options of Sinkhorn attention.

        Attributes:
            block: Positions b of a block.
            iterations: Normalisations of columns and rows.
            temperature: Divisor T of the sorting logits; P tends to a permutation as T tends to 0.
        """

        block: int = 64
        iterations: int = 8
        temperature: float = 0.75

        def __post_init__(self) -> None:
            if min(self.block, self.iterations) < 1:
                raise ValueError("block and iterations must be at least 1.")
            if not 0 < self.temperature < math.inf:
                raise ValueError("temperature must be positive and finite.")

    capabilities = Capabilities(
        paper="Tay et al., ICML 2020",
        family="pattern",
        time="N^2",
        dropout="weights",
        needs_max_len=True,
        stochastic=True,
    )

    def __init__(self, config: Config, **sizes: Any) -> None:
        super().__init__(config, **sizes)
        blocks = math.ceil(self.max_len / config.block)
        self.sort = nn.Parameter(INIT_STD * torch.randn(self.num_heads, self.head_dim, blocks))
        # No noise before the first draw.
        self.register_buffer("noise", torch.zeros(self.num_heads, blocks, blocks))

    def resample(self, generator: torch.Generator) -> None:
        """Draws Gumbel noise for training: -log of exponential draws."""
        exponential = torch.empty(self.noise.shape).exponential_(generator=generator)
        self.noise.copy_(-exponential.log())

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Sorts blocks and attends in all of them at once."""
        n = q.shape[-2]
        with torch.autocast(q.device.type, enabled=False):
            real = self._real(k, context.key_mask)
            queries, keys, values = (self._in_blocks(x) for x in (q, k, v))
            if real is not None:
                keys, values = (_masked(x, real) for x in (keys, values))
            permutation = self.permutation(keys, real)
            dropout = self.dropout if self.training else 0.0
            out = sorted_attention(queries, keys, values, permutation, real, dropout)
            return out.flatten(2, 3)[:, :, :n].to(v.dtype)

    def matrix(self, q: Tensor, k: Tensor, context: Context) -> Tensor:
        """Returns each query's weights of its own block, and of sorted tokens spread by P."""
        n = q.shape[-2]
        with torch.autocast(q.device.type, enabled=False):
            queries, keys = self._in_blocks(q), self._in_blocks(k)
            real = self._real(k, context.key_mask)
            if real is None:
                real = keys.new_ones(1, *keys.shape[2:4], dtype=torch.bool)
            keys = _masked(keys, real)
            p = self.permutation(keys, real)
            shares = torch.einsum("bhul,blt->bhult", p, real.to(p.dtype))
            mass = shares.sum(3)
            shares = shares / mass.clamp_min(SMALLEST)[:, :, :, None]
            sorted_keys = torch.einsum("bhult,bhltd->bhutd", shares, keys)
            scores = torch.stack(
                [
                    torch.einsum("bhuid,bhutd->bhuit", queries, sorted_keys),
                    torch.einsum("bhuid,bhutd->bhuit", queries, keys),
                ],
                -2,
            )
            own = real[:, None].to(p.dtype).expand_as(mass)
            factors = torch.stack([mass, own], -2)[:, :, :, None]
            some = factors > SMALLEST
            logits = scores * self.head_dim**-0.5 + torch.where(some, factors, 1.0).log()
            weights = torch.where(some, logits, LOWEST).flatten(-2).softmax(-1).view_as(logits)
            of_sorted, of_own = torch.where(some, weights, 0.0).unbind(-2)
            spread = torch.einsum("bhuit,bhult->bhuilt", of_sorted, shares)
            spread = spread + torch.diag_embed(of_own.movedim(2, -1)).movedim(-2, 2).mT
            return spread.flatten(4, 5).flatten(2, 3)[:, :, :n, :n]

    def permutation(self, keys: Tensor, real: Tensor | None) -> Tensor:
        """Returns P (B, H, M, M).

        Args:
            keys: Keys in blocks (B, H, M, b, D), 0 under the mask.
            real: Bool (B or 1, M, b); None: all.
        """
        blocks = keys.shape[2]
        logits = keys.sum(-2) @ self.sort[:, :, :blocks].to(keys.dtype)
        if self.training:
            logits = logits + self.noise[:, :blocks, :blocks].to(keys.dtype)
        occupied = None if real is None else real.any(-1)
        return sinkhorn(logits / self.config.temperature, occupied, self.config.iterations)

    def _in_blocks(self, x: Tensor) -> Tensor:
        """Returns x (B, H, N, D) as blocks (B, H, M, b, D) in float32 at least, padded by 0."""
        size = self.config.block
        padding = -x.shape[-2] % size
        x = F.pad(x, (0, 0, 0, padding)) if padding else x
        return at_least_float32(x).unflatten(-2, (-1, size))

    def _real(self, k: Tensor, key_mask: Tensor | None) -> Tensor | None:
        """Returns which places of blocks hold a real token, bool (B or 1, M, b); None: all."""
        n, size = k.shape[-2], self.config.block
        if key_mask is None:
            if n % size == 0:
                return None
            key_mask = torch.ones(1, n, dtype=torch.bool, device=k.device)
        return F.pad(key_mask, (0, -n % size)).unflatten(-1, (-1, size))

    def cost(self, n: int, s: int) -> Cost:
        """Two products of depth D for 2 b keys a query, and the mixing of M blocks and masks by M.

        Whole blocks without a mask save the mixing of masks.
        """
        heads, d, size = self.num_heads, self.head_dim, self.config.block
        blocks = math.ceil(n / size)
        places = blocks * size
        sorting = 2 * blocks * d * blocks + 2 * blocks * places * (2 * d + 1)
        attention = 2 * 2 * places * 2 * size * d
        # Iterations, blocks of q, k and v, sorted ones, and both side by side.
        floats = 2 * self.config.iterations * blocks**2 + (3 + 2 + 4) * places * d
        return Cost(
            flops=heads * (sorting + attention),
            activation_bytes=heads * 4 * floats,
            parameters=self.sort.numel(),
            state_floats=0,
        )


def sinkhorn(logits: Tensor, occupied: Tensor | None, iterations: int) -> Tensor:
    """Returns exp(logits) with columns and rows normalised by turns, rows last.

    Args:
        logits: (B, H, M, M).
        occupied: Bool (B or 1, M): the blocks that are sorted; others have neither row nor column.
        iterations: Number of turns.

    Returns:
        (B, H, M, M); rows sum to 1 and columns nearly so, but those that are not sorted are 0.
    """
    pairs = None
    if occupied is not None:
        occupied = occupied[:, None, :, None]
        pairs = occupied & occupied.mT
        logits = logits.masked_fill(~pairs, LOWEST)
    scaled = logits
    for turn in range(iterations):
        columns = scaled.logsumexp(-2, keepdim=True)
        if occupied is not None:
            columns = columns.masked_fill(~occupied.mT, 0.0)
        scaled = scaled - columns
        if turn < iterations - 1:
            rows = scaled.logsumexp(-1, keepdim=True)
            if occupied is not None:
                rows = rows.masked_fill(~occupied, 0.0)
            scaled = scaled - rows
    result = scaled.softmax(-1)
    return result if pairs is None else result.masked_fill(~pairs, 0.0)


def sorted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    permutation: Tensor,
    real: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Computes attention of each block to itself and to what P sorts to it.

    Args:
        q: Queries in blocks (B, H, M, b, D).
        k: Keys in blocks (B, H, M, b, D), 0 where they are not real.
        v: Values in blocks (B, H, M, b, E), 0 where they are not real.
        permutation: P (B, H, M, M); row u has the shares of block u's sorted block.
        real: Bool (B or 1, M, b); None: all.
        dropout: Probability that a weight is dropped.

    Returns:
        (B, H, M, b, E).
    """
    sorted_keys, sorted_values = (
        (permutation @ x.flatten(-2)).unflatten(-1, x.shape[-2:]) for x in (k, v)
    )
    bias = None
    if real is not None:
        mass = permutation @ real[:, None].to(permutation.dtype)
        some = mass > SMALLEST
        mass = mass.masked_fill(~some, 1.0)
        sorted_keys, sorted_values = (x / mass[..., None] for x in (sorted_keys, sorted_values))
        own = mass.new_zeros(real.shape).masked_fill(~real, -torch.inf)[:, None].expand_as(mass)
        bias = torch.cat([mass.log().masked_fill(~some, -torch.inf), own], -1)
        bias = bias.flatten(0, 2)[:, None, None]
    keys, values = torch.cat([sorted_keys, k], -2), torch.cat([sorted_values, v], -2)
    # One matrix of b queries and 2 b keys for each block.
    blocks = (x.flatten(0, 2)[:, None] for x in (q, keys, values))
    out = biased_attention(*blocks, bias, dropout=dropout)
    return out.view(*q.shape[:-1], v.shape[-1])


def _masked(x: Tensor, real: Tensor) -> Tensor:
    """Returns blocks (B, H, M, b, D) with 0 where no token is real."""
    return x.masked_fill(~real[:, None, ..., None], 0.0)
