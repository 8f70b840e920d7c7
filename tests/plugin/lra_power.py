"""Linear attention with features relu(x)^p, an example of an attention from another package."""

from dataclasses import dataclass

from torch import Tensor

from models.attention import register_attention
from models.attention.base import Capabilities, Context
from models.attention.engines.kernel_attention import Features, KernelAttention


@register_attention("power")
class Power(KernelAttention):
    """Linear attention with features relu(x)^p."""

    @dataclass(frozen=True)
    class Config:
        """Options of power attention.

        Attributes:
            power: The exponent p.
        """

        power: float = 2.0

    capabilities = Capabilities(
        paper="none",
        patterns=frozenset({"self", "causal", "cross"}),
        recurrent=True,
        identities=frozenset({"permutation", "position shift"}),
    )

    @property
    def num_features(self) -> int:
        """One for each dimension of the head."""
        return self.head_dim

    def features(self, q: Tensor, k: Tensor, context: Context) -> Features:
        """Returns relu(q)^p and relu(k)^p."""
        return Features(q.relu() ** self.config.power, k.relu() ** self.config.power)
