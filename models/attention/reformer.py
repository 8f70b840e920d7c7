"""Reformer: softmax attention among tokens with similar hashes (Kitaev et al., ICLR 2020).

Queries serve as keys, k_j = q_j / |q_j|. In each of some rounds, tokens are hashed into buckets by
h(x) = argmax [x R, -x R] with a Gaussian R of each head and round, sorted by bucket and position,
and cut into chunks; a token sees its chunk and the one before it, the first chunk the last one.
With n_ij the number of rounds in which i sees j, and n_ii = 0 unless there is no other token,

    out_i = sum_j n_ij exp(q_i.k_j / sqrt(D)) v_j / sum_j n_ij exp(q_i.k_j / sqrt(D)),

which is what weighing the rounds by the softmax of their log-sums gives. The paper further wants
equal buckets and divides by n_ij; public code does neither by default, nor is it done here. Public
code lets a token see itself with a logit of -5e4 or so: wherever other logits are well above, that
is n_ii = 0 to the last digit. A sequence has two buckets for each of its chunks. Beyond 128, a
bucket is a pair of hashes (or more), and there are up to twice as many; with a single hash, as
short sequences have, cost would be quadratic. Public code makes pairs beyond such a limit too.
Cost O(rounds N (chunk (D + E) + D log N)).
Only tokens that are real are sorted and cut, and their number decides that of buckets, so padding
changes nothing. There is no causal form: public code masks by position, but later tokens move
earlier ones to other chunks, so a changed future changes past outputs all the same.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.attention import register_attention
from models.attention.base import Attention, Capabilities, Context, Cost, at_least_float32
from models.attention.engines.sorted_chunks import sorted_chunk_attention

VECTORS = 64
"""The most random vectors of a hash, which makes two buckets of each."""

HASHED = 64
"""Positions that are hashed at a time on CPU; their products stay in cache."""


@register_attention("reformer")
class Reformer(Attention):
    """Softmax attention with queries as keys, within chunks of tokens sorted by random hashes."""

    @dataclass(frozen=True)
    class Config:
        """Options of Reformer.

        Attributes:
            hashes: Rounds of hashing.
            chunk: Tokens of a chunk, of which a token sees two; also twice the mean size of a
                bucket.
        """

        hashes: int = 2
        chunk: int = 64

        def __post_init__(self) -> None:
            if min(self.hashes, self.chunk) < 1:
                raise ValueError("hashes and chunk must be at least 1.")

    capabilities = Capabilities(
        paper="Kitaev et al., ICLR 2020",
        family="pattern",
        time="N log N",
        dropout="weights",
        needs_max_len=True,
        shared_query_key=True,
        stochastic=True,
        rotary=True,
    )

    def __init__(self, config: Config, **sizes: Any) -> None:
        super().__init__(config, **sizes)
        shape = (self.num_heads, self.head_dim, config.hashes, sum(self._widths(self.max_len)))
        self.register_buffer("fixed", torch.randn(shape))
        self.register_buffer("drawn", self.fixed.clone())

    def resample(self, generator: torch.Generator) -> None:
        """Draws the random vectors of training; evaluation keeps its own."""
        self.drawn.copy_(torch.randn(self.drawn.shape, generator=generator))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Computes the attention of ``q`` and ``v``; the keys are made of ``q``."""
        with torch.autocast(q.device.type, enabled=False):
            q = at_least_float32(q)
            return sorted_chunk_attention(
                q,
                self._keys(q),
                at_least_float32(v),
                self._buckets(q, context.key_mask),
                (2 * VECTORS) ** len(self._widths(q.shape[-2])),
                context.key_mask,
                self.config.chunk,
                self.dropout if self.training else 0.0,
            ).to(v.dtype)

    def matrix(self, q: Tensor, k: Tensor, context: Context) -> Tensor:
        """Returns the softmax of the logits + log n_ij (B, H, N, N)."""
        with torch.autocast(q.device.type, enabled=False):
            q = at_least_float32(q)
            times = q.new_zeros(*q.shape[:-1], q.shape[-2])
            for b, tokens in enumerate(q.detach()):
                real = torch.arange(q.shape[-2], device=q.device)
                if context.key_mask is not None:
                    real = context.key_mask[b].nonzero().squeeze(-1)
                if len(real):
                    times[b][:, real[:, None], real] = self._times(tokens[:, real])
            logits = q @ self._keys(q).mT + times.clamp_min(1.0).log()
            # Finite, so that rows of masked tokens have a gradient.
            lowest = torch.finfo(q.dtype).min
            return torch.where(times > 0, logits.masked_fill(times == 0, lowest).softmax(-1), 0.0)

    def cost(self, n: int, s: int) -> Cost:
        """In each round, the hash and products of whole chunks with two chunks each."""
        rounds, d, chunk = self.config.hashes, self.head_dim, self.config.chunk
        products = 2 * n * d * sum(self._widths(n)) + 8 * math.ceil(n / chunk) * chunk**2 * d
        return Cost(
            flops=self.num_heads * rounds * products,
            # Keys; outputs, log-sums, buckets and two indices of each round.
            activation_bytes=self.num_heads * n * (4 * d + rounds * (4 * d + 8 + 24)),
            parameters=0,
            state_floats=0,
        )

    def _times(self, x: Tensor) -> Tensor:
        """Returns n_ij (H, M, M) of M real tokens (H, M, D)."""
        m, chunk = x.shape[-2], self.config.chunk
        times = x.new_zeros(len(x), m, m)
        for vectors in self._draw(m, x).unbind(2):
            bucket = torch.zeros(len(x), m, dtype=torch.long, device=x.device)
            for part in vectors.split(self._widths(m), -1):
                hashed = torch.cat([x @ part, x @ -part], -1).argmax(-1)
                bucket = 2 * VECTORS * bucket + hashed
            rank = bucket.argsort(stable=True, dim=-1).argsort(-1)
            own = rank // chunk
            before = (own - 1) % math.ceil(m / chunk)
            seen = own[:, None, :]
            times += (seen == own[..., None]) | (seen == before[..., None])
        return times if m == 1 else times * (1 - torch.eye(m, dtype=x.dtype, device=x.device))

    def _widths(self, n: int) -> list[int]:
        """Returns the number of vectors of each hash that, together, make n tokens' buckets."""
        widths, missing = [], math.ceil(n / self.config.chunk)
        while missing > VECTORS:
            widths.append(VECTORS)
            missing = math.ceil(missing / (2 * VECTORS))
        return [*widths, missing]

    def _keys(self, q: Tensor) -> Tensor:
        """Returns q / (|q| sqrt(D)); a zero vector stays zero, with a finite gradient."""
        squares = q.square().sum(-1, keepdim=True)
        return q * (squares.clamp_min(1e-12).rsqrt() * self.head_dim**-0.5)

    def _draw(self, n: int, like: Tensor) -> Tensor:
        """Returns the vectors of n tokens, the first of all (H, D, hashes, their widths' sum)."""
        vectors = self.drawn if self.training else self.fixed
        return vectors[..., : sum(self._widths(n))].to(like.dtype)

    @torch.no_grad()
    def _buckets(self, q: Tensor, key_mask: Tensor | None) -> Tensor:
        """Returns the bucket of each token in each round (hashes, B, H, N).

        Sequences with fewer tokens than N use the first of the vectors. The others are 0 for them,
        and 0 is never the largest product or the largest negative one.
        """
        n, rounds = q.shape[-2], self.config.hashes
        vectors = self._draw(n, q)
        if key_mask is not None:
            used, missing = [], -(-key_mask.sum(-1, keepdim=True) // self.config.chunk)
            for width in self._widths(n):
                used.append(torch.arange(width, device=q.device) < missing)
                missing = torch.where(missing > VECTORS, -(-missing // (2 * VECTORS)), 0)
            vectors = vectors * torch.cat(used, -1)[:, None, None, None]
        vectors = vectors.flatten(-2)
        buckets = []
        for tokens in q.split(HASHED if q.device.type == "cpu" else n, -2):
            products = (tokens @ vectors).unflatten(-1, (rounds, -1))
            bucket = torch.zeros((), dtype=torch.long, device=q.device)
            for hashed in products.split(VECTORS, -1):
                vector = hashed.abs().argmax(-1, keepdim=True)
                negative = hashed.gather(-1, vector) < 0
                bucket = 2 * VECTORS * bucket + vector + VECTORS * negative
            buckets.append(bucket)
        return torch.cat(buckets, 2).squeeze(-1).permute(3, 0, 1, 2)
