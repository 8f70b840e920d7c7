"""Linformer: softmax attention to projected keys and values (Wang et al. 2020).

    out = softmax(q (E k)^T / sqrt(D)) G v,    E and G learned, m x max_len

of which the first S columns are used: O(m (N + S) (D + E)) time, O(N) memory. Keys and values under
the mask are 0 before they are projected, so that they leave no trace, and the softmax over the m
projected keys needs no mask; much public code has no mask at all. There is no causal form: each
projected key holds all positions, and a mask on the m columns would not keep the future out. E and
G begin normal with variance 1 / max_len: projections of a full sequence have the variance of a
token, and logits the scale of softmax attention's, whatever m is. Public code begins with standard
deviations of 1 / sqrt(m), 0.02 or Xavier's, and logits that differ by a factor of 10.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import register_attention
from models.attention.base import Attention, Capabilities, Context, Cost, at_least_float32
from models.attention.engines.dropout import softmax_dropout_attention


@register_attention("linformer")
class Linformer(Attention):
    """Attention to m learned combinations of the positions."""

    @dataclass(frozen=True)
    class Config:
        """Options of Linformer.

        Attributes:
            projected: Number m of projected keys and values (k in the paper).
            sharing: The maps of a layer: one E = G for keys, values and all heads (key-value), E
                and G for all heads (headwise), or E and G of each head (none).
        """

        projected: int = 256
        sharing: Literal["key-value", "headwise", "none"] = "key-value"

        def __post_init__(self) -> None:
            if self.projected < 1:
                raise ValueError("projected must be at least 1.")

    capabilities = Capabilities(
        paper="Wang et al. 2020",
        family="low rank",
        patterns=frozenset({"self", "cross"}),
        dropout="weights",
        needs_max_len=True,
        rotary=True,
        identities=frozenset({"rotation"}),
    )

    def __init__(self, config: Config, **sizes: Any) -> None:
        super().__init__(config, **sizes)
        maps = 1 if config.sharing == "key-value" else 2
        heads = self.num_heads if config.sharing == "none" else 1
        normal = torch.randn(maps, heads, config.projected, self.max_len)
        # E and G (1 or H, m, max_len), or the one map that is both.
        self.projections = nn.Parameter(normal * self.max_len**-0.5)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Computes fused attention to the projected keys."""
        dropout = self.dropout if self.training else 0.0
        with torch.autocast(q.device.type, enabled=False):
            queries = at_least_float32(q)
            keys = _projected(self.projections[0], k, context.key_mask)
            values = _projected(self.projections[-1], v, context.key_mask)
            if dropout and q.device.type == "cpu":
                out = softmax_dropout_attention(queries, keys, values, None, dropout)
            else:
                out = F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout)
            return out.to(v.dtype)

    def matrix(self, q: Tensor, k: Tensor, context: Context) -> Tensor:
        """Returns softmax(q (E k)^T / sqrt(D)) G, 0 for masked keys."""
        with torch.autocast(q.device.type, enabled=False):
            q, k = at_least_float32(q), at_least_float32(k)
            keep = k.new_ones(k.shape[0], 1, k.shape[2])
            if context.key_mask is not None:
                keep = keep * context.key_mask[:, None]
            maps = self.projections[..., : k.shape[2]].to(k.dtype)[:, None] * keep[:, None]
            scores = q @ (maps[0] @ k).transpose(-2, -1) * q.shape[-1] ** -0.5
            return scores.softmax(-1) @ maps[-1]

    def cost(self, n: int, s: int) -> Cost:
        """Two m x S and two N x m products of depth D; k and v in another order are kept."""
        m, d = self.config.projected, self.head_dim
        return Cost(
            flops=self.num_heads * 4 * (n + s) * m * d,
            activation_bytes=self.num_heads * 4 * (2 * (s + m) * d + n),
            parameters=sum(p.numel() for p in self.parameters()),
            state_floats=0,
        )


def _projected(projection: Tensor, x: Tensor, key_mask: Tensor | None) -> Tensor:
    """Projects positions, in float32 at least.

    Args:
        projection: (H or 1, m, max_len).
        x: Keys or values (B, H, S, D).
        key_mask: Bool (B, S), True for real tokens.

    Returns:
        (B, H, m, D).
    """
    x = at_least_float32(x)
    if key_mask is not None:
        x = x * key_mask[:, None, :, None]
    # One product for each map, over all samples beside each other: its gradient is one product
    # too, where a product for each sample would sum up as many gradients of the map's size.
    x = x.unflatten(1, (len(projection), -1))
    rows = x.permute(1, 3, 0, 2, 4)
    products = projection[:, :, : x.shape[3]].to(x.dtype) @ rows.flatten(2)
    # Back in the order of (B, H): fused attention is slower on keys that lie apart.
    return products.unflatten(2, rows.shape[2:]).permute(2, 0, 3, 1, 4).flatten(1, 2)
