"""Linear attention with an elementwise feature map, row-normalised: phi(q).phi(k).

phi is elu(x) + 1 (Katharopoulos et al., ICML 2020), or one of the maps that the cosFormer paper
compares in its Table 1: ReLU, leaky ReLU (slope 0.01) and identity. Cost O(N D E). The two maps
that are not non-negative have row sums of either sign; their denominators keep the sign and stay
1e-6 away from 0. Public code often masks only k or v, which leaves padding in the denominator;
here the key features are masked.
"""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from models.attention import register_attention
from models.attention.base import Capabilities
from models.attention.engines.kernel import KernelAttention

FEATURE_MAPS = {
    "elu+1": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "identity": lambda x: x,
}


@register_attention("linear")
class Linear(KernelAttention):
    """Kernel attention with an elementwise feature map."""

    @dataclass(frozen=True)
    class Config:
        """Options of linear attention.

        Attributes:
            feature: The feature map phi.
        """

        feature: Literal["elu+1", "relu", "leaky_relu", "identity"] = "elu+1"

    capabilities = Capabilities(
        paper="Katharopoulos et al., ICML 2020", patterns=frozenset({"self", "cross"})
    )

    @property
    def num_features(self) -> int:
        """One feature for each dimension of the head."""
        return self.head_dim

    @property
    def signed(self) -> bool:
        """True for the maps with negative values."""
        return self.config.feature in ("leaky_relu", "identity")

    def features(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns phi(q) and phi(k)."""
        phi = FEATURE_MAPS[self.config.feature]
        return phi(q), phi(k)
