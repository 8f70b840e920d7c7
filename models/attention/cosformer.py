"""cosFormer: linear attention re-weighted by a cosine of the distance (Qin et al., ICLR 2022).

    s(i, j) = (relu(q_i) . relu(k_j)) cos(pi/2 (i - j)/M), row-normalised

(eq. 8 to 10), split exactly by cos(a - b) = cos a cos b + sin a sin b into F = 2 D features.
Cost O(N D E). The horizon M is each sequence's own length, its last real index + 1, so that
padding and batch mates change nothing; the authors' code takes the padded length and applies no
padding mask at all. For cross attention M is the larger of the number of queries and the keys'
own length.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import register_attention
from models.attention.base import Capabilities, own_lengths
from models.attention.engines.kernel import KernelAttention


@register_attention("cosformer")
class Cosformer(KernelAttention):
    """ReLU linear attention with cosine re-weighting."""

    capabilities = Capabilities(
        paper="Qin et al., ICLR 2022", patterns=frozenset({"self", "cross"})
    )

    @property
    def num_features(self) -> int:
        """A cosine and a sine part for each dimension of the head."""
        return 2 * self.head_dim

    def features(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns [relu(x) cos a, relu(x) sin a] with a = pi i / (2 M) for q and k."""
        horizon = own_lengths(key_mask, k).clamp_min(1)
        if q.shape[-2] != k.shape[-2]:
            horizon = horizon.clamp_min(q.shape[-2])
        return _reweighted(q, horizon), _reweighted(k, horizon)


def _reweighted(x: Tensor, horizon: Tensor) -> Tensor:
    """Returns the cosine and sine features (B, H, N, 2 D) of ``x`` for horizons (B,)."""
    positions = torch.arange(x.shape[-2], device=x.device)
    # Rows past the horizon are padding; they share the last angle, so that no weight is negative.
    positions = torch.minimum(positions, horizon[:, None] - 1).to(x.dtype)
    angles = ((math.pi / 2) * positions / horizon[:, None])[:, None, :, None]
    x = F.relu(x)
    return torch.cat([x * angles.cos(), x * angles.sin()], dim=-1)
