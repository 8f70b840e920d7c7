"""Elementwise feature maps phi of linear attention, and what is known of them."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor

Name = Literal["elu+1", "relu", "leaky_relu", "identity"]


class FeatureMap(NamedTuple):
    """An elementwise map.

    Attributes:
        function: The map.
        signed: It takes negative values, so that similarities may be negative.
        homogeneous: phi(c x) = c phi(x) for c > 0, so that scales cancel in the normalisation.
    """

    function: Callable[[Tensor], Tensor]
    signed: bool
    homogeneous: bool


FEATURE_MAPS: dict[Name, FeatureMap] = {
    "elu+1": FeatureMap(lambda x: F.elu(x) + 1, signed=False, homogeneous=False),
    "relu": FeatureMap(F.relu, signed=False, homogeneous=True),
    "leaky_relu": FeatureMap(F.leaky_relu, signed=True, homogeneous=True),
    "identity": FeatureMap(lambda x: x, signed=True, homogeneous=True),
}
"""elu(x) + 1 is of Katharopoulos et al. (ICML 2020); the others are compared in Table 1 of the
cosFormer paper (Qin et al., ICLR 2022). Leaky ReLU has torch's slope of 0.01."""
