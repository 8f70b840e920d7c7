"""Synthesizer: learned weights in place of q k^T, or beside it (Tay et al., ICML 2021).

    out_i = sum_j softmax_j(A_ij [+ q_i.k_j / sqrt(D)]) v_j,    for each head

    A_ij = R_ij                                 random: a learned L x L table, L = max_len
    A_ij = R1_i . R2_j                          factorised: vectors of ``rank`` numbers
    A_ij = W2_j . relu(W1 x_i + b1) + b2_j      dense: of the layer's input x_i, j a position

With the dot product, as in the arena's configurations, it is softmax attention with a bias, in
O(N^2 D) time. A table has H L^2 parameters (2 heads and 2,000 positions: 8 million a layer, often
more than the rest of a model) and a gradient of that size; R1 . R2 and W2 . relu are appended to
q . k instead, so that memory is O(N). Without the dot product, random and factorised weights are
the same for all samples: one softmax and one product per head for the whole batch. Masked keys
then are left out of numerators and denominators; the public code leaves them in, as it forgets the
mask there, and its dense form mixes up heads and positions by a reshape without a transpose.
Tables begin as N(0, 0.02), of which R1 . R2 has the deviation too; dense maps begin as torch's
linear maps. Dropout draws once for the whole batch where weights are the same for all samples, as
the public code does everywhere.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.attention import register_attention
from models.attention.base import (
    Attention,
    Capabilities,
    Context,
    Cost,
    admissible_keys,
    at_least_float32,
)
from models.attention.engines.biased import biased_attention
from models.dropout import Dropout

INIT_STD = 0.02

SPREAD = 30.0
"""Logits of a row may differ by this much before samples get numerators of their own: exp(-30) is
far from the smallest float32, so that any sample's sum is exact, whichever keys it masks."""


@register_attention("synthesizer")
class Synthesizer(Attention):
    """Softmax over learned logits, with or without those of the dot product."""

    @dataclass(frozen=True)
    class Config:
        """Options of Synthesizer.

        Attributes:
            synthesis: A learned table (random), a product of two thin ones (factorised), or a
                function of each token (dense).
            dot_product: Whether q k^T / sqrt(D) is added. If not, queries and keys are not looked
                at, though the layer projects them all the same.
            rank: Inner dimension of the factorised table.
        """

        synthesis: Literal["random", "factorised", "dense"] = "random"
        dot_product: bool = True
        rank: int = 32

        def __post_init__(self) -> None:
            if self.rank < 1:
                raise ValueError("rank must be at least 1.")

    capabilities = Capabilities(
        paper="Tay et al., ICML 2021",
        family="full",
        patterns=frozenset({"self", "causal"}),
        time="N^2",
        memory="N^2",
        dropout="weights",
        needs_max_len=True,
        rotary=True,
        identities=frozenset({"key shift", "rotation"}),
    )

    @classmethod
    def capabilities_with(cls, config: Config) -> Capabilities:
        """Memory is linear without a table; without the dot product nothing of q and k is felt."""
        able = replace(cls.capabilities, needs_hidden=config.synthesis == "dense")
        if not cls._has_table(config):
            able = replace(able, memory="N")
        if not config.dot_product:
            scales = frozenset({"query scale", "key scale"})
            able = replace(able, rotary=False, identities=able.identities | scales)
        return able

    @staticmethod
    def _has_table(config: Config) -> bool:
        """Whether an N x N table is made, and not only vectors whose products are its entries."""
        if config.synthesis == "factorised":
            return not config.dot_product
        return config.synthesis == "random"

    def __init__(self, config: Config, **sizes: Any) -> None:
        super().__init__(config, **sizes)
        heads, d, length = self.num_heads, self.head_dim, self.max_len
        if config.synthesis == "random":
            self.table = nn.Parameter(INIT_STD * torch.randn(heads, length, length))
        elif config.synthesis == "factorised":
            std = INIT_STD**0.5 * config.rank**-0.25
            self.left = nn.Parameter(std * torch.randn(heads, length, config.rank))
            self.right = nn.Parameter(std * torch.randn(heads, config.rank, length))
        else:
            self.first = nn.Linear(self.model_dim, heads * d)
            bound = d**-0.5
            self.second = nn.Parameter(torch.empty(heads, d, length).uniform_(-bound, bound))
            self.bias = nn.Parameter(torch.empty(heads, length).uniform_(-bound, bound))
        self.drop = Dropout(self.dropout)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Adds what is learned to the dot product, or uses it for all samples at once."""
        with torch.autocast(q.device.type, enabled=False):
            if self.config.synthesis != "dense" and not self.config.dot_product:
                return self._attend_by_one_table(v, context)
            n, mask, causal = q.shape[-2], context.key_mask, context.causal
            dropout = self.dropout if self.training else 0.0
            if self.config.synthesis == "random":
                table = self.table[None, :, :n, :n]
                return biased_attention(q, k, v, table, mask, causal, dropout)
            left, right, bias = self._vectors(n, context.hidden)
            left, right = (x.expand(len(q), -1, -1, -1) for x in (left, right))
            if self.config.dot_product:
                q, k = at_least_float32(q) * self.head_dim**-0.5, at_least_float32(k)
                left, right = torch.cat([q, left], -1), torch.cat([k, right], -1)
            return biased_attention(left, right, v, bias, mask, causal, dropout, scale=1.0)

    def matrix(self, q: Tensor, k: Tensor, context: Context) -> Tensor:
        """Returns the softmax of all logits over the admissible keys, 0 where there is none."""
        n = q.shape[-2]
        if self.config.synthesis == "random":
            logits = self.table[None, :, :n, :n]
        else:
            left, right, bias = self._vectors(n, context.hidden)
            logits = left @ right.mT
            logits = logits if bias is None else logits + bias
        if self.config.dot_product:
            logits = logits + q @ k.mT * self.head_dim**-0.5
        keep = admissible_keys(q, k, context)
        weights = torch.where(keep, logits.masked_fill(~keep, -torch.inf).softmax(-1), 0.0)
        return weights.expand(len(q), -1, -1, -1)

    def _vectors(self, n: int, hidden: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns the vectors whose products are the learned logits, and what is added to these.

        Returns:
            Of queries (B or 1, H, N, F), of keys (1, H, N, F) and a bias (1, H, 1, N) or None.
        """
        if self.config.synthesis == "factorised":
            return self.left[None, :, :n], self.right[None, :, :, :n].mT, None
        assert hidden is not None
        features = F.relu(self.first(hidden.to(self.first.weight.dtype)))
        left = features.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return left, self.second[None, :, :, :n].mT, self.bias[None, :, None, :n]

    def _attend_by_one_table(self, v: Tensor, context: Context) -> Tensor:
        """Computes attention whose logits are the same for all samples."""
        n, key_mask = v.shape[-2], context.key_mask
        if self.config.synthesis == "random":
            logits = at_least_float32(self.table[:, :n, :n])
        else:
            logits = at_least_float32(self.left[:, :n]) @ at_least_float32(self.right[:, :, :n])
        lowest, highest = logits.detach().aminmax(dim=-1)
        shared = key_mask is None or bool((highest - lowest).max() <= SPREAD)
        if context.causal:
            future = torch.ones(n, n, dtype=torch.bool, device=v.device).triu(1)
            logits = logits.masked_fill(future, -torch.inf)
        keep = self.drop(torch.ones_like(logits)) if self.training and self.dropout else None
        if shared:
            return _by_one_table(logits, v, key_mask, keep)
        assert key_mask is not None
        # Checkpointed, or the backward pass would keep a table for each sample.
        samples = (
            checkpoint(_by_own_table, logits, v[i : i + 1], key_mask[i], keep, use_reentrant=False)
            for i in range(len(v))
        )
        return torch.cat(list(samples))

    def cost(self, n: int, s: int) -> Cost:
        """Two products of N x S entries, or one without dot product, and those that make logits.

        What samples have in common is counted in full for one.
        """
        heads, d, config = self.num_heads, self.head_dim, self.config
        width = {"random": 0, "factorised": config.rank, "dense": d}[config.synthesis]
        inner = width + (d if config.dot_product else 0)
        flops = heads * 2 * n * s * (inner + d)
        floats = n  # the log-sums of the softmax
        if config.synthesis == "dense":
            flops += 2 * n * self.model_dim * heads * d
            floats += n * d
        if not config.dot_product and config.synthesis != "dense":
            floats += n * s * (2 if config.synthesis == "factorised" else 1)
        elif width:
            floats += (n + s) * inner
        return Cost(
            flops=flops,
            activation_bytes=heads * 4 * floats,
            parameters=sum(p.numel() for p in self.parameters()),
            state_floats=0,
        )


def _by_one_table(
    logits: Tensor, v: Tensor, key_mask: Tensor | None, keep: Tensor | None
) -> Tensor:
    """Computes softmax(logits) v with one product per head for all samples.

    Args:
        logits: (H, N, S), -inf where no sample looks.
        v: Values (B, H, S, E).
        key_mask: Bool (B, S); keys left out of sums, not of the largest logit of a row.
        keep: Factors of the weights (H, N, S): dropout.

    Returns:
        (B, H, N, E).
    """
    # Any unit of the numerators cancels; finite where a row is -inf throughout.
    top = logits.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).min)
    numerators = (logits - top).exp_()
    values = at_least_float32(v).permute(1, 2, 0, 3)  # (H, S, B, E)
    if key_mask is None:
        total = numerators.sum(-1, keepdim=True)
    else:
        real = key_mask.T.to(numerators.dtype)
        total = numerators @ real
        values = values * real[..., None]
    kept = numerators if keep is None else numerators * keep
    sums = (kept @ values.flatten(2)).unflatten(-1, (len(v), -1))
    out = sums / total.masked_fill(total == 0, 1.0)[..., None]
    return out.permute(2, 0, 1, 3).to(v.dtype)


def _by_own_table(logits: Tensor, v: Tensor, mask: Tensor, keep: Tensor | None) -> Tensor:
    """Computes the same for one sample, with ``mask`` (S,); exact for logits of any size."""
    return _by_one_table(logits.masked_fill(~mask, -torch.inf), v, None, keep)
