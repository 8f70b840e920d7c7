"""Attention mechanisms, one file each; `base` has the contract, `engines` the shared arithmetic.

Mixers, which map x to x without queries and keys, share the names and everything else. The registry
itself imports no torch: names are known from files and entry points.
"""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from lra.registry import Registry
from lra.typed import from_mapping

if TYPE_CHECKING:
    from models.attention.base import Capabilities, Mechanism

ATTENTIONS: "Registry[Mechanism]" = Registry(
    "attention",
    "models.attention",
    base="models.attention.base:Attention",
    entry_points="lra.attention",
)
register_attention = ATTENTIONS.register
register_mixer = partial(ATTENTIONS.register, base="models.attention.base:Mixer")


def build_attention(
    name: str,
    *,
    num_heads: int,
    head_dim: int,
    max_len: int,
    model_dim: int,
    dropout: float = 0.0,
    **options: Any,
) -> "Mechanism":
    """Builds a registered mechanism, an attention or a mixer.

    Args:
        name: The registered name.
        num_heads: Number of heads H.
        head_dim: Dimension D of a head.
        max_len: The longest sequence the model takes.
        model_dim: Dimension of the layer's input.
        dropout: Attention dropout probability.
        **options: Fields of the mechanism's ``Config``.

    Raises:
        ValueError: For an unknown name, an unknown option or one of the wrong type.
    """
    cls = ATTENTIONS.get(name)
    return cls(
        from_mapping(cls.Config, options, "attention"),
        num_heads=num_heads,
        head_dim=head_dim,
        max_len=max_len,
        model_dim=model_dim,
        dropout=dropout,
    )


def capabilities(name: str, options: Mapping[str, Any]) -> "Capabilities":
    """Returns what a mechanism can do under given options.

    Raises:
        ValueError: For an unknown name, an unknown option or one of the wrong type.
    """
    cls = ATTENTIONS.get(name)
    return cls.capabilities_with(from_mapping(cls.Config, options, "attention"))
