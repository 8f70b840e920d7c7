"""Reformer: softmax attention among tokens with similar hashes (Kitaev et al., ICLR 2020).

Queries serve as keys, k_j = q_j / |q_j|. In each of some rounds, tokens are hashed into buckets by
h(x) = argmax [x R, -x R] with a Gaussian R of each head and round, sorted by bucket and position,
and cut into chunks; a token sees its chunk and the one before it, the first chunk the last one.
With n_ij the number of rounds in which i sees j, and n_ii = 0 unless there is no other token,

    out_i = sum_j n_ij exp(q_i.k_j / sqrt(D)) v_j / sum_j n_ij exp(q_i.k_j / sqrt(D)),

which is what combining the rounds by their log-sums gives. The paper further wants equal buckets
and divides by n_ij; public code does neither by default, nor is it done here. Public code lets a
token see itself with a logit of -5e4 or so, which is lost in half precision and not always the
lowest; here it is left out. Cost O(rounds N chunk (D + E)) and a sort, O(N log N); but to hash
takes D N / chunk products more a token, which is quadratic: 1/16 of the others at N = 1,024 and as
many as they at 16,384, with chunk = 64. Memory is linear.
Only tokens that are real are sorted and cut, and their number decides that of buckets, so padding
changes nothing. There is no causal form: public code masks the future, but later tokens move
earlier ones to other chunks, so they are felt all the same.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.attention import register_attention
from models.attention.base import Attention, Capabilities, Context, Cost, at_least_float32
from models.attention.engines.sorted_chunks import sorted_chunk_attention

HASHED = 64
"""Positions hashed at a time, for memory linear in N; their products stay in a CPU's cache."""


@register_attention("reformer")
class Reformer(Attention):
    """Softmax attention with queries as keys, within chunks of tokens sorted by random hashes."""

    @dataclass(frozen=True)
    class Config:
        """Options of Reformer.

        Attributes:
            hashes: Rounds of hashing.
            chunk: Tokens of a chunk, of which a token sees two. So many tokens of a sequence share
                a random vector, which makes two buckets.
        """

        hashes: int = 2
        chunk: int = 64

        def __post_init__(self) -> None:
            if min(self.hashes, self.chunk) < 1:
                raise ValueError("hashes and chunk must be at least 1.")

    capabilities = Capabilities(
        paper="Kitaev et al., ICLR 2020",
        family="pattern",
        time="N^2",
        dropout="weights",
        needs_max_len=True,
        shared_query_key=True,
        stochastic=True,
        rotary=True,
    )

    def __init__(self, config: Config, **sizes: Any) -> None:
        super().__init__(config, **sizes)
        columns = self._chunks(self.max_len)
        vectors = torch.randn(self.num_heads, self.head_dim, config.hashes, columns)
        self.register_buffer("vectors", vectors)
        self.register_buffer("drawn", vectors.clone())

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
                2 * self._chunks(q.shape[-2]),
                context.key_mask,
                self.config.chunk,
                self.dropout if self.training else 0.0,
            ).to(v.dtype)

    def matrix(self, q: Tensor, k: Tensor, context: Context) -> Tensor:
        """Returns the softmax of the logits + log n_ij (B, H, N, N)."""
        with torch.autocast(q.device.type, enabled=False):
            q, n, chunk = at_least_float32(q), q.shape[-2], self.config.chunk
            real = torch.ones(len(q), n, dtype=torch.bool, device=q.device)
            if context.key_mask is not None:
                real = context.key_mask
            count = real.sum(-1)[:, None, None, None]
            admissible = (real[:, :, None] & real[:, None, :])[:, None]
            admissible = admissible & ((count == 1) | ~torch.eye(n, dtype=torch.bool).to(q.device))
            times, end = torch.zeros_like(q[..., :1]), 2 * self._chunks(n)
            for buckets in self._buckets(q, context.key_mask):
                order = buckets.masked_fill(~real[:, None], end).argsort(dim=-1, stable=True)
                own = order.argsort(-1)[..., None] // chunk
                before = torch.where(own == 0, (count - 1) // chunk, own - 1)
                times = times + (admissible & ((own.mT == own) | (own.mT == before)))
            logits = q @ self._keys(q).mT + times.clamp_min(1.0).log()
            # Finite, so that rows of masked tokens have a gradient.
            lowest = torch.finfo(q.dtype).min
            return torch.where(times > 0, logits.masked_fill(times == 0, lowest).softmax(-1), 0.0)

    def cost(self, n: int, s: int) -> Cost:
        """In each round, the hash and products of whole chunks with two chunks each."""
        rounds, d, chunks = self.config.hashes, self.head_dim, self._chunks(n)
        products = 2 * n * d * chunks + 8 * chunks * self.config.chunk**2 * d
        return Cost(
            flops=self.num_heads * rounds * products,
            # Keys; outputs, log-sums and two indices of each round.
            activation_bytes=self.num_heads * n * (4 * d + rounds * (4 * d + 4 + 16)),
            parameters=0,
            state_floats=0,
        )

    def _chunks(self, n: int) -> int:
        """Returns the number of chunks of n tokens, which is that of random vectors."""
        return math.ceil(n / self.config.chunk)

    def _keys(self, q: Tensor) -> Tensor:
        """Returns q / (|q| sqrt(D)); a zero vector stays zero, with a finite gradient."""
        squares = q.square().sum(-1, keepdim=True)
        return q * (squares.clamp_min(1e-12).rsqrt() * self.head_dim**-0.5)

    @torch.no_grad()
    def _buckets(self, q: Tensor, key_mask: Tensor | None) -> Tensor:
        """Returns the bucket of each token in each round (hashes, B, H, N).

        A sequence takes the first of the random vectors, one for each of its chunks. The others
        are 0 for it, and 0 is never the largest product or the largest negative one.
        """
        columns = self._chunks(q.shape[-2])
        vectors = self.drawn if self.training else self.vectors
        vectors = vectors[..., :columns].to(q.dtype)
        if key_mask is not None:
            used = (key_mask.sum(-1) + self.config.chunk - 1) // self.config.chunk
            own = torch.arange(columns, device=q.device) < used[:, None]
            vectors = vectors * own[:, None, None, None]
        buckets = []
        for tokens in q.split(HASHED, -2):
            products = (tokens @ vectors.flatten(-2)).unflatten(-1, (-1, columns))
            column = products.abs().argmax(-1, keepdim=True)
            buckets.append(column + columns * (products.gather(-1, column) < 0))
        return torch.cat(buckets, 2).squeeze(-1).permute(3, 0, 1, 2)
