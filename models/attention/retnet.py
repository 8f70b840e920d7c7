"""RetNet: retention, which is linear attention with a constant decay (Sun et al., 2023).

    W_ij = d^-1/2 (R_i q_i).(R_j k_j) gamma_h^(i - j), j <= i,   gamma_h = 1 - 2^(-5 - h)
    out_i = silu(G x_i) o y_i / rms(y_i),   y_i = sum_j W_ij v_j

for heads h = 0, 1, .., with rotary positions R, the root mean square of a head's channels, and a
gate G of the layer's input x; the layer's output projection follows. Weights are not normalised:
the norm cancels any factor of a row, and so the three factors by which the paper normalises its
scores for the sake of low precision. Bidirectional retention, which the paper has not, decays by
the distance: gamma_h^|i - j|. O(N d (C + d)) time in chunks of C positions, with a recurrent state
of d^2 numbers a head. Positions, and so distances, are those in the input; masked tokens count.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import register_attention
from models.attention.base import (
    Attention,
    Capabilities,
    Context,
    Cost,
    admissible_keys,
    at_least_float32,
)
from models.rotary import rotate

NORM_EPS = 1e-6
"""Added to the mean square of a head's channels."""

CHUNK = 64
"""The most positions of a chunk; at D = 32, as much work within chunks as between them."""


class State(NamedTuple):
    """The recurrent state.

    Attributes:
        sums: sum_j gamma^(i - j) (R_j k_j) v_j^T over the past (B, H, D, D).
        position: Number of tokens seen.
    """

    sums: Tensor
    position: int


@register_attention("retnet")
class RetNet(Attention):
    """Retention with its norm and gate."""

    capabilities = Capabilities(
        paper="Sun et al. 2023",
        family="kernel",
        patterns=frozenset({"self", "causal"}),
        needs_hidden=True,
        own_values=True,
        recurrent=True,
        identities=frozenset({"position shift"}),
    )

    def __init__(self, config: Any, **sizes: Any) -> None:
        super().__init__(config, **sizes)
        self.gate = nn.Linear(self.model_dim, self.num_heads * self.head_dim, bias=False)

    def rates(self, device: torch.device) -> Tensor:
        """Returns -log gamma (H,), in float64: of late heads, gamma is 1 in float32."""
        heads = torch.arange(self.num_heads, device=device, dtype=torch.float64)
        return -torch.log1p(-torch.exp2(-5 - heads))

    def _queries_and_keys(self, q: Tensor, k: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """Returns R_i q_i and R_j k_j, contiguous: what follows is far faster then."""
        q, k = (at_least_float32(x).contiguous() for x in (q, k))
        positions = torch.arange(start, start + q.shape[2], device=q.device)
        return rotate(q, positions), rotate(k, positions)

    def _gated(self, y: Tensor, hidden: Tensor | None) -> Tensor:
        """Returns silu(G x) o y / rms(y)."""
        assert hidden is not None
        gate = F.silu(F.linear(hidden.to(y.dtype), self.gate.weight.to(y.dtype)))
        gate = gate.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return gate * F.rms_norm(y, y.shape[-1:], eps=NORM_EPS)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Computes retention in chunks, its norm and its gate."""
        with torch.autocast(q.device.type, enabled=False):
            queries, keys = self._queries_and_keys(q, k)
            rows = at_least_float32(v).contiguous()
            scale: Tensor | float = self.head_dim**-0.5
            if context.key_mask is not None:
                scale = context.key_mask[:, None, :, None].to(rows.dtype) * scale
            y = retention(queries, keys, rows * scale, self.rates(q.device), context.causal)
            return self._gated(y, context.hidden).to(v.dtype)

    def matrix(self, q: Tensor, k: Tensor, context: Context) -> Tensor:
        """Returns the matrix W of retention, whose rows are not normalised."""
        with torch.autocast(q.device.type, enabled=False):
            queries, keys = self._queries_and_keys(q, k)
            at = torch.arange(q.shape[2], device=q.device)
            decay = _powers(self.rates(q.device), (at[:, None] - at).abs(), queries.dtype)
            scores = queries @ keys.mT * self.head_dim**-0.5
            return scores * decay * admissible_keys(q, k, context)

    def combine(self, weights: Tensor, v: Tensor, context: Context) -> Tensor:
        """Returns norm and gate of ``weights @ v``."""
        with torch.autocast(v.device.type, enabled=False):
            return self._gated(weights @ v.to(weights.dtype), context.hidden).to(v.dtype)

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> State:
        """Returns sums of nothing; their size does not depend on the length."""
        shape = (batch, self.num_heads, self.head_dim, self.head_dim)
        dtype = torch.promote_types(dtype, torch.float32)
        return State(torch.zeros(shape, device=device, dtype=dtype), 0)

    def advance(
        self, q: Tensor, k: Tensor, v: Tensor, state: State, hidden: Tensor | None
    ) -> tuple[Tensor, State]:
        """Lets the past decay by one step and adds a token."""
        with torch.autocast(q.device.type, enabled=False):
            queries, keys = self._queries_and_keys(q, k, state.position)
            gamma = (-self.rates(q.device)).exp().to(state.sums.dtype)
            sums = gamma[:, None, None] * state.sums + keys.mT @ at_least_float32(v)
            y = queries @ sums * self.head_dim**-0.5
            out = self._gated(y, hidden).to(v.dtype)
        return out, State(sums, state.position + 1)

    def cost(self, n: int, s: int) -> Cost:
        """Of the bidirectional form: products within chunks, sums of and for each, and the gate."""
        d, inner = self.head_dim, self.num_heads * self.head_dim
        chunks, size = _chunks(n)
        between = 8 * d if chunks > 1 else 0
        kept = size + (6 + 4 * (chunks > 1)) * d  # scores; rotated, decayed, outputs and gates
        return Cost(
            flops=inner * (chunks * size * (4 * size + between) + 2 * n * self.model_dim),
            activation_bytes=4 * self.num_heads * chunks * (size * kept + 4 * d**2 * (chunks > 1)),
            parameters=self.gate.weight.numel(),
            state_floats=inner * d,
        )


def retention(q: Tensor, k: Tensor, v: Tensor, rates: Tensor, causal: bool) -> Tensor:
    """Returns sum_j exp(-rate |i - j|) q_i.k_j v_j over all keys, or those with j <= i.

    In chunks: the quadratic form inside a chunk, and for each side one D x E sum for all chunks
    that are on it. With a constant decay, all factors of positions are the same in every chunk.

    Args:
        q: Queries (B, H, N, D).
        k: Keys (B, H, N, D).
        v: Values (B, H, N, E).
        rates: Rate of decay of each head (H,).
        causal: Keys j <= i alone.

    Returns:
        (B, H, N, E).
    """
    n = q.shape[2]
    chunks, size = _chunks(n)
    if chunks * size > n:
        q, k, v = (F.pad(x, (0, 0, 0, chunks * size - n)) for x in (q, k, v))
    q, k, v = (x.unflatten(2, (chunks, size)) for x in (q, k, v))

    def decay(steps: Tensor) -> Tensor:
        return _powers(rates, steps, q.dtype)[:, None]

    at = torch.arange(size, device=q.device)[:, None]
    within = decay((at - at.mT).abs())
    sums = ((q @ k.mT) * (within.tril() if causal else within)) @ v
    if chunks > 1:
        whole = _powers(rates, at.new_full((1, 1), size), q.dtype)
        past = _before((k * decay(size - 1 - at)).mT @ v, whole)
        sums = sums + (q * decay(at + 1)) @ past
        if not causal:
            future = _before(((k * decay(at)).mT @ v).flip(2), whole).flip(2)
            sums = sums + (q * decay(size - at)) @ future
    return sums.flatten(2, 3)[:, :, :n]


def _before(totals: Tensor, decay: Tensor) -> Tensor:
    """Returns the decayed sum of all earlier chunks' totals (B, H, chunks, D, E) for each chunk."""
    running = torch.zeros_like(totals[:, :, 0])
    before = []
    for total in totals.unbind(2):
        before.append(running)
        running = torch.addcmul(total, running, decay)
    return torch.stack(before, 2)


def _powers(rates: Tensor, steps: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns gamma_h^steps (H, X, Y) for steps (X, Y)."""
    return torch.exp(-rates[:, None, None] * steps).to(dtype)


def _chunks(n: int) -> tuple[int, int]:
    """Returns how many chunks of what size hold n positions; equal ones, hardly padded."""
    chunks = math.ceil(n / CHUNK)
    return chunks, math.ceil(n / chunks)
