"""Linear attention: its feature maps, its denominators of either sign, its blindness to order."""

import pytest
import torch
from attention_cases import MASKS, assert_near, build, inputs, mask_of, with_every_mask

from models.attention.engines.kernel import EPS, guard, linear_attention

FEATURES = {
    "elu+1": lambda x: torch.where(x > 0, x + 1, x.clamp(max=0).exp()),
    "relu": lambda x: torch.where(x > 0, x, 0.0),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "identity": lambda x: x,
}
for_every_feature = pytest.mark.parametrize("feature", FEATURES)
SIGNED = ["leaky_relu", "identity"]


def linear(feature, **arguments):
    mechanism = "linear" if feature == "elu+1" else f"linear-{feature}"
    return build(mechanism, **arguments)


def column(*values):
    """Returns one head of one-dimensional vectors (1, 1, N, 1)."""
    return torch.tensor(values, dtype=torch.float64).view(1, 1, -1, 1)


# Feature maps


@for_every_feature
def test_the_feature_map_is_what_its_name_says(feature):
    x = torch.linspace(-4, 4, 81, dtype=torch.float64).view(1, 1, -1, 1)
    fq, fk = linear(feature, num_heads=1, head_dim=1).features(x, x + 0.5, None)
    assert_near(fq, FEATURES[feature](x), 1e-14)
    assert_near(fk, FEATURES[feature](x + 0.5), 1e-14)


def test_the_default_feature_map_is_elu_plus_one():
    q, k, v = inputs(7)
    assert torch.equal(build("linear")(q, k, v), linear("elu+1")(q, k, v))
    fq, _ = build("linear").features(column(-1, 0, 1), column(0), None)
    assert_near(fq, column(torch.e**-1, 1, 2), 1e-14)


@for_every_feature
@with_every_mask
def test_weights_are_products_of_features_over_their_sum(feature, mask):
    q, k, v = inputs(9)
    key_mask = MASKS[mask](9)
    keep = 1.0 if key_mask is None else key_mask[:, None, None, :]
    phi = FEATURES[feature]
    similarity = phi(q) @ phi(k).mT * keep
    total = similarity.sum(-1, keepdim=True)
    expected = similarity / torch.where(total == 0, 1.0, total)
    attention = linear(feature)
    assert_near(attention.weights(q, k, key_mask), expected, 1e-10)
    assert_near(attention(q, k, v, key_mask), expected @ v, 1e-10)


# Order


@for_every_feature
@with_every_mask
def test_permuted_tokens_give_permuted_outputs(feature, mask):
    q, k, v = inputs(9)
    key_mask = MASKS[mask](9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    attention = linear(feature)
    out = attention(q, k, v, key_mask)
    permuted_mask = None if key_mask is None else key_mask[:, order]
    permuted = attention(q[:, :, order], k[:, :, order], v[:, :, order], permuted_mask)
    assert_near(permuted, out[:, :, order], 1e-10)


@for_every_feature
def test_the_order_of_keys_is_of_no_consequence(feature):
    q, k, v = inputs(9)
    attention = linear(feature)
    assert_near(attention(q, k.flip(2), v.flip(2)), attention(q, k, v), 1e-10)


# Denominators


def test_a_signed_guard_keeps_sign_and_distance_from_zero():
    denominators = torch.tensor([2.0, 2e-6, 1e-7, 0.0, -0.0, -1e-7, -2e-6, -2.0])
    expected = torch.tensor([2.0, 2e-6, EPS, EPS, EPS, -EPS, -2e-6, -2.0])
    assert torch.equal(guard(denominators, signed=True), expected)


def test_an_unsigned_guard_keeps_denominators_positive():
    denominators = torch.tensor([2.0, 2e-6, 1e-7, 0.0, -0.0, -1e-7])
    expected = torch.tensor([2.0, 2e-6, EPS, EPS, EPS, EPS])
    assert torch.equal(guard(denominators, signed=False), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_denominator_is_below_eps(dtype):
    around_zero = torch.linspace(-3, 3, 1001, dtype=dtype) * EPS
    for signed in (False, True):
        assert guard(around_zero, signed).abs().min().item() >= EPS * (1 - 1e-7)


@pytest.mark.parametrize("feature", SIGNED)
def test_a_negative_denominator_keeps_its_sign(feature):
    # All similarities are negative; their ratios to the sum are positive, as weights.
    q, k, v = column(-1, -1), column(1, 3), column(4, 8)
    attention = linear(feature, num_heads=1, head_dim=1)
    assert_near(attention.weights(q, k)[0, 0], torch.tensor([[0.25, 0.75]] * 2), 1e-14)
    assert_near(attention(q, k, v), column(7, 7), 1e-14)


def test_negated_queries_change_nothing_under_the_identity_map():
    q, k, v = inputs(9)
    attention = linear("identity")
    assert_near(attention(-q, k, v), attention(q, k, v), 1e-12)


@pytest.mark.parametrize(("tilt", "expected"), [(0.0, 2e6), (1e-9, 2e6), (-1e-9, -2e6)])
def test_a_vanishing_denominator_is_eps_of_its_own_sign(tilt, expected):
    # The similarities 1 and -1 + tilt cancel; the values make the numerator 2.
    q, k, v = column(1, 1), column(1, -1 + tilt), column(1, -1)
    out = linear("identity", num_heads=1, head_dim=1)(q, k, v)
    assert_near(out, column(expected, expected), 1e-8)


@for_every_feature
def test_rescaled_queries_and_keys_change_nothing_where_the_map_is_homogeneous(feature):
    q, k, v = inputs(9)
    attention = linear(feature)
    scale = torch.linspace(0.5, 20, 9, dtype=q.dtype)[:, None]
    difference = (attention(scale * q, 3 * k, v) - attention(q, k, v)).abs().max()
    assert (difference < 1e-10) == (feature != "elu+1")


def test_relu_with_negative_queries_alone_gives_exactly_zero():
    q, k, v = inputs(7)
    q[:, :, 2] = -q[:, :, 2].abs()
    attention = linear("relu")
    out = attention(q, k, v)
    assert not out[:, :, 2].any()
    assert not attention.weights(q, k)[:, :, 2].any()
    assert out[:, :, 3].any()


def test_relu_with_negative_keys_alone_gives_exactly_zero():
    q, k, v = inputs(7)
    assert not linear("relu")(q, -k.abs(), v).any()


@for_every_feature
def test_masked_keys_are_missing_from_the_denominator(feature):
    # phi(0) = 1 for elu+1: a mask on k or on v alone would leave it in the sum.
    k, v = column(2, 0, 0, 0), column(5, 7, 7, 7)
    out = linear(feature, num_heads=1, head_dim=1)(column(1, 1, 1, 1), k, v, mask_of("1000"))
    assert_near(out, column(5, 5, 5, 5), 1e-14)


def test_linear_attention_is_two_products_and_a_division():
    fq, fk, v = column(1, 2), column(1, 3), column(10, 20)
    assert_near(linear_attention(fq, fk, v, signed=False), column(17.5, 17.5), 1e-14)
