"""What the attention tests share: every mechanism with every choice it has, inputs and masks."""

from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch

from models import attention as registered
from models import build_attention
from models.attention import ATTENTIONS
from models.attention.base import Attention


def _variants():
    """Every registered mechanism with its defaults, and with each other value of its choices."""
    for name in ATTENTIONS.names():
        yield name, {}
        config = ATTENTIONS.get(name).Config
        for field, hint in get_type_hints(config).items():
            for value in _choices(hint):
                if value != getattr(config(), field):
                    yield name, {field: value}


def _choices(hint):
    if hint is bool:
        return [False, True]
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [choice for part in get_args(hint) for choice in _choices(part)]


def _label(name, options):
    parts = (
        key if value is True else f"no-{key}" if value is False else value
        for key, value in options.items()
    )
    return "-".join([name, *parts])


MECHANISMS = {_label(name, options): (name, options) for name, options in _variants()}
"""Attentions and mixers."""

ATTENDING = [m for m in MECHANISMS if issubclass(ATTENTIONS.get(MECHANISMS[m][0]), Attention)]
"""Attentions alone."""

for_every_mechanism = pytest.mark.parametrize("mechanism", MECHANISMS)


def capabilities(mechanism):
    return registered.capabilities(*MECHANISMS[mechanism])


def for_those_with(pattern):
    having = [name for name in MECHANISMS if pattern in capabilities(name).patterns]
    return pytest.mark.parametrize("mechanism", having)


def for_those_without(pattern):
    lacking = [name for name in MECHANISMS if pattern not in capabilities(name).patterns]
    return pytest.mark.parametrize("mechanism", lacking)


def build(mechanism, num_heads=2, head_dim=8, dropout=0.0, max_len=4096):
    name, options = MECHANISMS[mechanism]
    return build_attention(
        name,
        num_heads=num_heads,
        head_dim=head_dim,
        max_len=max_len,
        model_dim=num_heads * head_dim,
        dropout=dropout,
        **options,
    )


def inputs(n, s=None, *, d=8, e=5, batch=3, heads=2, dtype=torch.float64, seed=0):
    """Returns normal q (B, H, n, d), k (B, H, s, d) and v (B, H, s, e)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((n, d), (s or n, d), (s or n, e))
    return tuple(
        torch.randn(batch, heads, *shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in shapes
    )


def poisoned(x, extra):
    """Appends ``extra`` tokens of large garbage."""
    generator = torch.Generator().manual_seed(9)
    shape = (*x.shape[:2], extra, x.shape[3])
    return torch.cat([x, 1e6 * torch.randn(shape, generator=generator, dtype=x.dtype)], dim=2)


def mask_of(*rows):
    """Returns a key mask from strings such as "1101"."""
    return torch.tensor([[token == "1" for token in row] for row in rows])


def _suffix(s):
    lengths = torch.tensor([s, (s + 1) // 2, 1])
    return torch.arange(s) < lengths[:, None]


def _interior_holes(s):
    at = torch.arange(s)
    return torch.stack([at % 3 != 1, (at == 0) | (at == s - 1), at >= 0])


def _holes_at_the_start(s):
    return torch.arange(s) >= torch.tensor([0, s // 2, s - 1])[:, None]


def _holes_and_padding(s):
    return _interior_holes(s) & _suffix(s)


MASKS = {
    "no mask": lambda s: None,
    "suffix padding": _suffix,
    "interior holes": _interior_holes,
    "holes at the start": _holes_at_the_start,
    "holes and padding": _holes_and_padding,
}
"""Key masks (3, s) by kind; every row has a real token."""

with_every_mask = pytest.mark.parametrize("mask", MASKS)


def assert_near(actual, expected, tolerance):
    """Asserts that two tensors differ by ``tolerance`` times the larger of 1 and ``expected``."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= tolerance * max(1.0, expected.abs().max().item()), error


def softmax_over(pairs, q, k, v):
    """Softmax attention over the pairs (i, j) that ``pairs`` admits, one query at a time."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=v.dtype)
    for i in range(q.shape[2]):
        seen = [j for j in range(k.shape[2]) if pairs(i, j)]
        if seen:
            logits = torch.einsum("bhd,bhjd->bhj", q[:, :, i], k[:, :, seen]) / q.shape[3] ** 0.5
            out[:, :, i] = torch.einsum("bhj,bhje->bhe", logits.softmax(-1), v[:, :, seen])
    return out
