"""Kernelized attention: a Gaussian kernel in place of softmax (Chen et al., NeurIPS 2021).

    out_i = sum_j exp(-|q_i - k_j|^2 / (2 sqrt(D))) v_j

It is the softmax numerator with factors exp(-|q|^2 / (2 sqrt(D))) and exp(-|k|^2 / (2 sqrt(D))),
and no division: weights are at most 1, their sum is anything up to N, so that outputs grow with the
length, and a query far from all keys gives almost 0. This is the model that Skyformer approximates.
It costs O(N^2 D) time, and O(N) memory, as weights are computed in pieces and again in the backward
pass (`engines/gaussian.py`), where the public code holds several N x N matrices. That code zeroes
masked queries and keys as well; here masked keys have no weight, and queries are as they are.
Attention dropout applies to the weights, as in that code.
"""

from torch import Tensor

from models.attention import register_attention
from models.attention.base import (
    Attention,
    Capabilities,
    Context,
    Cost,
    admissible_keys,
    at_least_float32,
)
from models.attention.engines.gaussian import (
    gaussian_floats,
    gaussian_flops,
    gaussian_matrix,
    gaussian_sums,
)


@register_attention("kernelized")
class Kernelized(Attention):
    """Unnormalised attention by a Gaussian kernel."""

    capabilities = Capabilities(
        paper="Chen et al., NeurIPS 2021",
        family="full",
        patterns=frozenset({"self", "causal", "cross"}),
        time="N^2",
        dropout="weights",
        rotary=True,
        identities=frozenset({"permutation", "position shift", "rotation"}),
    )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Computes the attention tile by tile, in float32 at least."""
        dropout = self.dropout if self.training else 0.0
        return gaussian_sums(q, k, v, context.key_mask, context.causal, dropout)

    def matrix(self, q: Tensor, k: Tensor, context: Context) -> Tensor:
        """Returns exp(-|q - k|^2 / (2 sqrt(D))) for the admissible keys, 0 for all others."""
        weights = gaussian_matrix(at_least_float32(q), at_least_float32(k))
        return weights.masked_fill(~admissible_keys(q, k, context), 0.0)

    def cost(self, n: int, s: int) -> Cost:
        """Two products of N x S weights; keeps their factors and a tile of them."""
        d = self.head_dim
        return Cost(
            flops=self.num_heads * gaussian_flops(n, s, d, d),
            activation_bytes=4 * gaussian_floats(n, s, d, self.num_heads),
            parameters=0,
            state_floats=0,
        )
