"""Rotary positions: the rotation written out, and attention that feels distances alone."""

import dataclasses
import math

import pytest
import torch
from encoder_shapes import SMALL

from lra.compose import load
from models import build_attention
from models.classifier import Classifier
from models.rotary import Rotary, rotate

SHAPE = dataclasses.replace(SMALL, layers=1, positions="rotary")


def classifier(attention):
    torch.manual_seed(0)
    more = {"zero_is_padding": False, "dual": False, "nli_features": False}
    return Classifier(
        SHAPE, attention, {}, num_classes=3, head_dims=(8,), pooling="mean_valid", **more
    ).double()


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("dim", [2, 3, 8, 9])
def test_each_pair_of_channels_is_turned_by_its_angle(dim):
    x, half = normal(5, dim), dim // 2
    turned = rotate(x, torch.arange(5))
    for p in range(5):
        for i in range(half):
            angle = p * 10_000 ** (-i / half)
            a, b = x[p, i], x[p, i + half]
            assert turned[p, i] == pytest.approx(float(a * math.cos(angle) - b * math.sin(angle)))
            assert turned[p, i + half] == pytest.approx(
                float(b * math.cos(angle) + a * math.sin(angle))
            )
    assert torch.equal(turned[:, 2 * half :], x[:, 2 * half :])


def test_products_depend_on_distances_and_norms_stay():
    q, k = normal(1, 8), normal(2, 8)[1:]
    products = [
        float(rotate(q, torch.tensor([i + 7])) @ rotate(k, torch.tensor([i])).T)
        for i in (0, 5, 300, 4000)
    ]
    assert products == pytest.approx([products[0]] * 4, rel=1e-9)
    assert float(rotate(q, torch.tensor([123])).norm()) == pytest.approx(float(q.norm()))


def test_angles_of_far_positions_keep_their_precision_in_bfloat16():
    x = normal(4096, 8).to(torch.bfloat16)
    exact = rotate(x.double(), torch.arange(4096))
    with torch.autocast("cpu", torch.bfloat16):
        turned = Rotary(8)(x)
    assert turned.dtype == torch.bfloat16
    assert (turned.double() - exact).abs().max() < 2**-8 * exact.abs().max()


def test_float32_keeps_its_precision_at_far_positions():
    x = normal(4096, 8).float()
    exact = rotate(x.double(), torch.arange(4096))
    assert (rotate(x, torch.arange(4096)).double() - exact).abs().max() < 1e-6


@pytest.mark.parametrize("attention", ["softmax", "local"])
def test_a_model_has_no_table_and_feels_the_order_of_tokens(attention):
    model = classifier(attention)
    assert model.encoder.positions is None
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6]])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    assert not torch.allclose(model(tokens, mask), model(tokens.flip(1), mask), rtol=1e-6)


def test_a_model_feels_distances_alone():
    model = classifier("softmax")
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6]])
    later = torch.cat([torch.zeros(1, 9, dtype=torch.long), tokens], 1)
    masks = [torch.ones(1, 6, dtype=torch.bool), torch.arange(15)[None] >= 9]
    torch.testing.assert_close(
        model(tokens, masks[0]), model(later, masks[1]), rtol=1e-10, atol=1e-12
    )


def test_a_mechanism_whose_similarity_is_no_function_of_products_is_refused():
    with pytest.raises(ValueError, match="cosformer with these options cannot take rotary"):
        classifier("cosformer")
    overrides = ["task=listops", "attention=cosformer", "model.positions=rotary"]
    with pytest.raises(ValueError, match="attention=cosformer with these options cannot take"):
        load(overrides)


def test_one_channel_cannot_be_turned():
    with pytest.raises(ValueError, match="head_dim must be at least 2"):
        Rotary(1)
    with pytest.raises(ValueError, match=r"model\.head_dim must be at least 2"):
        load(["task=listops", "model.positions=rotary", "model.head_dim=1"])


def test_the_option_is_a_setting_of_the_model():
    config = load(["task=listops", "attention=softmax", "model.positions=rotary"])
    assert config.model.positions == "rotary"
    assert "model.positions" in config.modified


def test_rotated_softmax_is_what_rotated_queries_and_keys_give():
    q, k, v = (normal(1, 2, 20, 8) + i for i in range(3))
    attention = build_attention("softmax", num_heads=2, head_dim=8, max_len=64, model_dim=16)
    turned = [rotate(x, torch.arange(20)) for x in (q, k)]
    logits = torch.empty(1, 2, 20, 20, dtype=torch.float64)
    for i in range(20):
        for j in range(20):
            relative = rotate(k[:, :, j : j + 1], torch.tensor([j - i]))
            logits[:, :, i, j] = (q[:, :, i] * relative[:, :, 0]).sum(-1) / math.sqrt(8)
    expected = logits.softmax(-1) @ v
    torch.testing.assert_close(attention(*turned, v), expected, rtol=1e-10, atol=1e-12)
