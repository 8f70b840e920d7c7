"""Linear attention: its feature maps, sums and denominators, its blindness to order."""

import pytest
import torch
from attention_cases import (
    MASKS,
    assert_near,
    build,
    capabilities,
    inputs,
    mask_of,
    with_every_mask,
)

from models.attention.base import Context
from models.attention.engines.feature_maps import FEATURE_MAPS
from models.attention.engines.kernel import (
    EPS,
    bidirectional_sums,
    causal_sums,
    guard,
    normalised,
    with_ones,
)

FEATURES = {
    "elu+1": lambda x: torch.where(x > 0, x + 1, x.clamp(max=0).exp()),
    "relu": lambda x: torch.where(x > 0, x, 0.0),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "identity": lambda x: x,
}
for_every_feature = pytest.mark.parametrize("feature", FEATURES)
SIGNED = ["leaky_relu", "identity"]
BIDIRECTIONAL = Context(key_mask=None, causal=False, hidden=None)


def named(feature):
    return "linear" if feature == "elu+1" else f"linear-{feature}"


def linear(feature, **arguments):
    return build(named(feature), **arguments)


def explicit_weights(feature, q, k, key_mask=None, causal=False):
    """phi(q).phi(k) over its sum, written out; 0 for queries without any key."""
    similarity = torch.einsum("bhid,bhjd->bhij", FEATURES[feature](q), FEATURES[feature](k))
    if key_mask is not None:
        similarity = similarity * key_mask[:, None, None, :]
    if causal:
        at = torch.arange(k.shape[2])
        similarity = similarity * (at <= at[:, None])
    total = similarity.sum(-1, keepdim=True)
    return similarity / torch.where(total == 0, 1.0, total)


def long_inputs(n):
    """Returns inputs away from 0, where signed denominators magnify whatever rounding there is."""
    q, k, v = inputs(n)
    return q + 1, k + 1, v


def column(*values):
    """Returns one head of one-dimensional vectors (1, 1, N, 1)."""
    return torch.tensor(values, dtype=torch.float64).view(1, 1, -1, 1)


# Feature maps


@for_every_feature
def test_the_feature_map_is_what_its_name_says(feature):
    x = torch.linspace(-4, 4, 81, dtype=torch.float64).view(1, 1, -1, 1)
    attention = linear(feature, num_heads=1, head_dim=1)
    features = attention.features(x, x + 0.5, BIDIRECTIONAL)
    assert_near(features.q, FEATURES[feature](x), 1e-14)
    assert_near(features.k, FEATURES[feature](x + 0.5), 1e-14)
    assert features.log_weight is None
    assert features.log_decay is None


@for_every_feature
def test_what_is_known_of_a_feature_map_is_true_of_it(feature):
    x = torch.linspace(-4, 4, 81, dtype=torch.float64)
    phi, known = FEATURES[feature], FEATURE_MAPS[feature]
    assert known.signed == bool((phi(x) < 0).any()) == (feature in SIGNED)
    assert known.homogeneous == torch.allclose(phi(3 * x), 3 * phi(x))
    assert linear(feature).signed == known.signed


def test_the_default_feature_map_is_elu_plus_one():
    q, k, v = inputs(7)
    assert torch.equal(build("linear")(q, k, v), linear("elu+1")(q, k, v))
    features = build("linear").features(column(-1, 0, 1), column(0), BIDIRECTIONAL)
    assert_near(features.q, column(torch.e**-1, 1, 2), 1e-14)


@for_every_feature
@with_every_mask
def test_weights_are_products_of_features_over_their_sum(feature, mask):
    q, k, v = inputs(9)
    key_mask = MASKS[mask](9)
    attention, expected = linear(feature), explicit_weights(feature, q, k, key_mask)
    assert_near(attention.weights(q, k, key_mask), expected, 1e-10)
    assert_near(attention(q, k, v, key_mask), expected @ v, 1e-10)


# Causal and recurrent


@for_every_feature
@with_every_mask
@pytest.mark.parametrize("n", [1, 2, 9, 128, 129, 300])
def test_causal_weights_are_those_of_the_lower_triangle_over_their_sum(feature, mask, n):
    q, k, v = long_inputs(n)
    key_mask = MASKS[mask](n)
    attention, expected = linear(feature), explicit_weights(feature, q, k, key_mask, causal=True)
    assert_near(attention.weights(q, k, key_mask, causal=True), expected, 1e-10)
    assert_near(attention(q, k, v, key_mask, causal=True), expected @ v, 1e-10)


@for_every_feature
@with_every_mask
def test_the_order_of_the_past_is_of_no_consequence(feature, mask):
    n, past = 200, 150
    q, k, v = long_inputs(n)
    key_mask = MASKS[mask](n)
    shuffled = torch.randperm(past, generator=torch.Generator().manual_seed(0))
    order = torch.cat([shuffled, torch.arange(past, n)])
    attention = linear(feature)
    out = attention(q, k, v, key_mask, causal=True)
    permuted_mask = None if key_mask is None else key_mask[:, order]
    permuted = attention(q, k[:, :, order], v[:, :, order], permuted_mask, causal=True)
    assert_near(permuted[:, :, past:], out[:, :, past:], 1e-10)
    assert (permuted[:, :, :past] - out[:, :, :past]).abs().max() > 0.1


@for_every_feature
@with_every_mask
@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 256, 299])
def test_the_causal_output_of_a_prefix_is_the_prefix_of_the_output(feature, mask, length):
    tokens = long_inputs(300)
    key_mask = MASKS[mask](300)
    attention = linear(feature)
    out = attention(*tokens, key_mask, causal=True)
    prefix_mask = None if key_mask is None else key_mask[:, :length]
    prefix = attention(*(x[:, :, :length] for x in tokens), prefix_mask, causal=True)
    assert_near(prefix, out[:, :, :length], 1e-10)


@for_every_feature
def test_the_last_causal_output_is_the_bidirectional_one(feature):
    q, k, v = long_inputs(200)
    attention = linear(feature)
    assert_near(attention(q, k, v, causal=True)[:, :, -1:], attention(q, k, v)[:, :, -1:], 1e-10)


@for_every_feature
def test_token_by_token_it_is_the_lower_triangle_and_outputs_stay(feature):
    q, k, v = long_inputs(40)
    attention = linear(feature)
    state = attention.init_state(3, torch.device("cpu"), torch.float64)
    outputs, copies = [], []
    for t in range(40):
        out, state = attention.step(*(x[:, :, t : t + 1] for x in (q, k, v)), state)
        outputs.append(out)
        copies.append(out.clone())
    expected = explicit_weights(feature, q, k, causal=True) @ v
    assert_near(torch.cat(outputs, 2), expected, 1e-10)
    assert torch.equal(torch.cat(outputs), torch.cat(copies))


@for_every_feature
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_recurrent_state_is_the_same_few_sums_whatever_the_length(feature, dtype):
    # F (E + 1) numbers of a head, F = D = 8 and E = 5, in float32 at least.
    attention = linear(feature)
    state = attention.init_state(3, torch.device("cpu"), dtype)
    assert state.sums.dtype == torch.promote_types(dtype, torch.float32)
    for length in range(1, 31):
        _, state = attention.step(*inputs(1, dtype=dtype, seed=length), state)
        assert state.sums.shape == (3, 2, 8, 6)
        assert state.sums.dtype == torch.promote_types(dtype, torch.float32)
        assert state.top is None
        assert state.position == length
    assert attention.num_features == 8
    assert attention.cost(9, 9).state_floats == 2 * 8 * (8 + 1)


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
    expected = torch.tensor([2.0, 2e-6, EPS, EPS, -EPS, -EPS, -2e-6, -2.0])
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
    declared = {"query scale", "key scale"} <= capabilities(named(feature)).identities
    assert declared == (feature != "elu+1")


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


# Sums


def test_a_row_is_a_value_and_a_one_times_the_weight_of_its_key():
    v = torch.tensor([[[[2.0, 3.0], [4.0, 5.0]]]])
    assert with_ones(v, None).tolist() == [[[[2, 3, 1], [4, 5, 1]]]]
    weight = torch.tensor([[[0.5, 0.0]]])
    assert with_ones(v, weight).tolist() == [[[[1, 1.5, 0.5], [0, 0, 0]]]]


def test_the_weights_of_keys_may_be_those_of_all_heads():
    _, _, v = inputs(4)
    mask = mask_of("1100", "1111", "0000")
    expected = torch.cat([v, torch.ones_like(v[..., :1])], -1) * mask[:, None, :, None]
    assert torch.equal(with_ones(v, mask[:, None, :].double()), expected)


def test_linear_attention_is_two_products_and_a_division():
    rows = with_ones(column(10, 20), None)
    sums = bidirectional_sums(column(1, 2), column(1, 3), rows)
    assert_near(sums[0, 0], torch.tensor([[70.0, 4.0], [140.0, 8.0]]), 1e-14)
    assert_near(normalised(sums, signed=False), column(17.5, 17.5), 1e-14)


def test_causal_sums_take_the_past_and_the_present():
    rows = with_ones(column(10, 20), None)
    sums = causal_sums(column(1, 2), column(1, 3), rows)
    assert_near(sums[0, 0], torch.tensor([[10.0, 1.0], [140.0, 8.0]]), 1e-14)
