"""Linear attention with an elementwise feature map, row-normalised: phi(q).phi(k).

phi is elu(x) + 1 (Katharopoulos et al., ICML 2020), or one of the maps that the cosFormer paper
compares in its Table 1: ReLU, leaky ReLU (slope 0.01) and identity. Cost O(N D E), causal too, with
a recurrent state of D (E + 1) numbers a head. The two maps that are not non-negative have row sums
of either sign; their denominators keep the sign and stay 1e-6 away from 0. Public code often masks
only k or v, which leaves padding in the denominator; here the key features are masked.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from models.attention import register_attention
from models.attention.base import Capabilities, Context
from models.attention.engines import feature_maps
from models.attention.engines.feature_maps import FEATURE_MAPS
from models.attention.engines.kernel_attention import Features, KernelAttention


@register_attention("linear")
class Linear(KernelAttention):
    """Kernel attention with an elementwise feature map."""

    @dataclass(frozen=True)
    class Config:
        """Options of linear attention.

        Attributes:
            feature: The feature map phi.
        """

        feature: feature_maps.Name = "elu+1"

    capabilities = Capabilities(
        paper="Katharopoulos et al., ICML 2020",
        family="kernel",
        patterns=frozenset({"self", "causal", "cross"}),
        recurrent=True,
        identities=frozenset({"permutation", "position shift"}),
    )

    @classmethod
    def capabilities_with(cls, config: Config) -> Capabilities:
        """Adds that scales cancel, for the maps that are homogeneous."""
        base = cls.capabilities
        if not FEATURE_MAPS[config.feature].homogeneous:
            return base
        return replace(base, identities=base.identities | {"query scale", "key scale"})

    @property
    def num_features(self) -> int:
        """One feature for each dimension of the head."""
        return self.head_dim

    @property
    def signed(self) -> bool:
        """True for the maps with negative values."""
        return FEATURE_MAPS[self.config.feature].signed

    def features(self, q: Tensor, k: Tensor, context: Context) -> Features:
        """Returns phi(q) and phi(k)."""
        phi = FEATURE_MAPS[self.config.feature].function
        return Features(phi(q), phi(k))
