"""Kernel (linear) attention: similarity phi(q) . phi(k), evaluated without the N x S matrix.

    out_i = sum_j phi(q_i).phi(k_j) v_j / sum_j phi(q_i).phi(k_j)
          = phi(q_i) [sum_j phi(k_j) v_j^T] / (phi(q_i) . sum_j phi(k_j))

(Katharopoulos et al. 2020, eq. 4 to 6.) Cost O((N + S) F E) time, O((N + S) F + F E) memory, for
F features. Features and sums are computed in float32 at least, whatever autocast says.
"""

import abc

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention.base import Attention, Cost, at_least_float32

EPS = 1e-6


def guard(denominator: Tensor, signed: bool) -> Tensor:
    """Keeps a denominator's magnitude at ``EPS`` or more, and its sign (0 counts as positive)."""
    if not signed:
        return denominator.clamp_min(EPS)
    small = torch.where(denominator < 0, -EPS, EPS).to(denominator.dtype)
    return torch.where(denominator.abs() < EPS, small, denominator)


def linear_attention(fq: Tensor, fk: Tensor, v: Tensor, signed: bool) -> Tensor:
    """Bidirectional or cross kernel attention as two matrix products.

    Args:
        fq: Query features (B, H, N, F).
        fk: Key features (B, H, S, F), 0 for masked keys.
        v: Values (B, H, S, E).
        signed: Whether a row's similarities may sum to a negative number.

    Returns:
        (B, H, N, E); exactly 0 where a query has no key or no similarity to any.
    """
    # A column of ones in v makes the denominator another column of the same products.
    sums = fq @ (fk.transpose(-2, -1) @ F.pad(v, (0, 1), value=1.0))
    return sums[..., :-1] / guard(sums[..., -1:], signed)


class KernelAttention(Attention, abc.ABC):
    """Base of mechanisms that are a pair of feature maps: they define ``features`` alone."""

    @property
    @abc.abstractmethod
    def num_features(self) -> int:
        """The number of features F of a head."""

    @property
    def signed(self) -> bool:
        """Whether similarities may be negative."""
        return False

    @abc.abstractmethod
    def features(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the features of queries (B, H, N, F) and of keys (B, H, S, F).

        Args:
            q: Queries (B, H, N, D), float32 at least.
            k: Keys (B, H, S, D), float32 at least.
            key_mask: As in ``forward``; the caller zeroes the features of masked keys.
        """

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        causal: bool,
        hidden: Tensor | None,
    ) -> Tensor:
        """Computes the attention by ``linear_attention``."""
        with torch.autocast(q.device.type, enabled=False):
            fq, fk = self._masked_features(q, k, key_mask)
            return linear_attention(fq, fk, at_least_float32(v), self.signed).to(v.dtype)

    def weights(
        self,
        q: Tensor,
        k: Tensor,
        key_mask: Tensor | None = None,
        causal: bool = False,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Returns the row-normalised similarities (B, H, N, S)."""
        self._check(q, k, key_mask, causal, hidden)
        with torch.autocast(q.device.type, enabled=False):
            fq, fk = self._masked_features(q, k, key_mask)
            similarity = fq @ fk.transpose(-2, -1)
            return similarity / guard(similarity.sum(-1, keepdim=True), self.signed)

    def cost(self, n: int, s: int) -> Cost:
        """Two products of F x (E + 1) for each token; features and the F x (E + 1) sums kept."""
        f, e = self.num_features, self.head_dim
        return Cost(
            flops=self.num_heads * 2 * (n + s) * f * (e + 1),
            activation_bytes=self.num_heads * 4 * ((n + s) * (f + e + 1) + f * (e + 1)),
            parameters=sum(p.numel() for p in self.parameters()),
            state_floats=0,
        )

    def _masked_features(
        self, q: Tensor, k: Tensor, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        fq, fk = self.features(at_least_float32(q), at_least_float32(k), key_mask)
        if key_mask is not None:
            # The features themselves: a mask on k or v alone leaves phi(0) in the denominator.
            fk = fk * key_mask[:, None, :, None]
        return fq, fk
