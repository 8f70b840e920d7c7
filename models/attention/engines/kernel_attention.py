"""The base of mechanisms that are a pair of feature maps; they define ``features`` alone."""

import abc
from typing import NamedTuple

import torch
from torch import Tensor

from models.attention.base import Attention, Context, Cost, at_least_float32
from models.attention.engines.kernel import (
    bidirectional_sums,
    causal_sums,
    guard,
    normalised,
    spans_of,
    with_ones,
)

LOWEST = -1e30
"""Log of a weight that is 0. Finite, so that differences of two of them are numbers."""


class Features(NamedTuple):
    """Similarity of query i and key j: exp(w_j + g_{j+1} + ... + g_i) q_i.k_j.

    Attributes:
        q: Query features (B, H, N, F).
        k: Key features (B, H, S, F).
        log_weight: w (B, H, S), of any size: only differences are exponentiated. None: 0.
        log_decay: g (B, H, N) <= 0, where causal. None: 0.
    """

    q: Tensor
    k: Tensor
    log_weight: Tensor | None = None
    log_decay: Tensor | None = None


class State(NamedTuple):
    """The recurrent state.

    Attributes:
        sums: Decayed sum of phi(k) [v, 1] over the past (B, H, F, E + 1); one column of zeros
            before the first token, which tells E.
        top: Log of the unit of ``sums`` (B, H, 1), where keys have log weights.
        position: Number of tokens seen.
    """

    sums: Tensor
    top: Tensor | None
    position: int


class KernelAttention(Attention, abc.ABC):
    """Attention by features: bidirectional, cross, causal and recurrent from one definition.

    Features and sums are computed in float32 at least, whatever autocast says.
    """

    @property
    @abc.abstractmethod
    def num_features(self) -> int:
        """The number of features F of a head."""

    @property
    def signed(self) -> bool:
        """Whether similarities may be negative."""
        return False

    @property
    def weighted_keys(self) -> bool:
        """Whether ``features`` gives log weights."""
        return False

    @abc.abstractmethod
    def features(self, q: Tensor, k: Tensor, context: Context) -> Features:
        """Returns the features of queries and keys.

        Args:
            q: Queries (B, H, N, D), float32 at least.
            k: Keys (B, H, S, D), float32 at least.
            context: Mask, pattern, layer input and first position; masked keys are left out by
                the caller.
        """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Computes the attention in time and memory linear in N."""
        with torch.autocast(q.device.type, enabled=False):
            f, key_weight = self._prepared(q, k, context)
            rows = with_ones(at_least_float32(v), key_weight)
            if context.causal:
                sums = causal_sums(f.q, f.k, rows, f.log_decay)
            else:
                sums = bidirectional_sums(f.q, f.k, rows)
            return normalised(sums, self.signed).to(v.dtype)

    def matrix(self, q: Tensor, k: Tensor, context: Context) -> Tensor:
        """Returns the row-normalised similarities (B, H, N, S)."""
        with torch.autocast(q.device.type, enabled=False):
            f, key_weight = self._prepared(q, k, context)
            similarity = f.q @ f.k.transpose(-2, -1)
            if key_weight is not None:
                similarity = similarity * key_weight[..., None, :]
            if context.causal and f.log_decay is not None:
                similarity = similarity * spans_of(f.log_decay).exp()
            elif context.causal:
                similarity = similarity.tril()
            return similarity / guard(similarity.sum(-1, keepdim=True), self.signed)

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> State:
        """Returns the state before the first token; its size does not depend on the length."""
        dtype = torch.promote_types(dtype, torch.float32)
        sums = torch.zeros(batch, self.num_heads, self.num_features, 1, device=device, dtype=dtype)
        top = None
        if self.weighted_keys:
            top = sums.new_full((batch, self.num_heads, 1), LOWEST)
        return State(sums, top, 0)

    def advance(
        self, q: Tensor, k: Tensor, v: Tensor, state: State, hidden: Tensor | None
    ) -> tuple[Tensor, State]:
        """Adds one token to the sums and divides; constant time and memory."""
        if self.capabilities.needs_max_len and state.position >= self.max_len:
            raise ValueError(f"{self.name} takes {self.max_len} positions, and all are used.")
        with torch.autocast(q.device.type, enabled=False):
            context = Context(None, True, hidden, state.position)
            f = self.features(at_least_float32(q), at_least_float32(k), context)
            key_weight, log_decay, top = None, f.log_decay, state.top
            if f.log_weight is not None:
                key_weight, log_decay, top = _causal_unit(f.log_weight, f.log_decay, state.top)
            rows = with_ones(at_least_float32(v), key_weight)
            sums = state.sums
            if state.position == 0:  # room for values of any size, from here on written in place
                sums = sums.repeat(1, 1, 1, rows.shape[-1])
            if log_decay is not None:
                sums *= log_decay.exp()[..., None]
            sums.addcmul_(f.k.transpose(-2, -1), rows)
            out = normalised(f.q @ sums, self.signed).to(v.dtype)
        return out, State(sums, top, state.position + 1)

    def cost(self, n: int, s: int) -> Cost:
        """Two products of F x (E + 1) for each token; features and the F x (E + 1) sums kept."""
        f, e = self.num_features, self.head_dim
        return Cost(
            flops=self.num_heads * 2 * (n + s) * f * (e + 1),
            activation_bytes=self.num_heads * 4 * ((n + s) * (f + e + 1) + f * (e + 1)),
            parameters=sum(p.numel() for p in self.parameters()),
            state_floats=self._state_floats(),
        )

    def _state_floats(self) -> int:
        if not self.capabilities.recurrent:
            return 0
        return self.num_heads * (self.num_features * (self.head_dim + 1) + self.weighted_keys)

    def _prepared(self, q: Tensor, k: Tensor, context: Context) -> tuple[Features, Tensor | None]:
        """Returns the features, and the factor of each key: its mask and its weight."""
        f = self.features(at_least_float32(q), at_least_float32(k), context)
        mask = None if context.key_mask is None else context.key_mask[:, None, :]
        if f.log_decay is not None and mask is not None:
            f = f._replace(log_decay=f.log_decay.masked_fill(~mask, 0.0))
        if f.log_weight is None:
            return f, None if mask is None else mask.to(f.k.dtype)
        log_weight = f.log_weight if mask is None else f.log_weight.masked_fill(~mask, LOWEST)
        if context.causal:
            key_weight, log_decay, _ = _causal_unit(log_weight, f.log_decay, None)
            f = f._replace(log_decay=log_decay)
        else:
            # Any common factor cancels. Detached: no gradient flows through what cancels.
            key_weight = (log_weight - log_weight.detach().amax(-1, keepdim=True)).exp()
        return f, key_weight if mask is None else key_weight * mask


def _causal_unit(
    log_weight: Tensor, log_decay: Tensor | None, top: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Expresses the sums of step i in units of exp(m_i), m_i the largest log weight so far.

    A maximum over all keys would let the future be felt where it underflows the past. With
    m_i = max(m_{i-1} + g_i, w_i), which decays as the sums do, the recurrence

        S_i = exp(g_i) S_{i-1} + exp(w_i) x_i    becomes
        S_i / exp(m_i) = exp(m_{i-1} + g_i - m_i) S_{i-1} / exp(m_{i-1}) + exp(w_i - m_i) x_i,

    whose exponents are at most 0 but for the rounding of sums of g. The unit cancels in the
    normalisation, so it has no gradient.

    Args:
        log_weight: w (B, H, N).
        log_decay: g (B, H, N); None: 0.
        top: m before the first of these steps (B, H, 1); None: there was no key.

    Returns:
        The factors of the keys, the log decays in changing units, and the last m.
    """
    w = log_weight.detach()
    g = torch.zeros_like(w) if log_decay is None else log_decay.detach()
    if top is None:
        top = torch.full_like(w[..., :1], LOWEST)
    passed = g.cumsum(-1)
    m = passed + torch.maximum((w - passed).cummax(-1).values, top)
    change = torch.cat([top, m[..., :-1]], -1) - m
    return (log_weight - m).exp(), change + (0.0 if log_decay is None else log_decay), m[..., -1:]
