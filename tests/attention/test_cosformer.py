"""cosFormer is its paper's formula, with each sequence's own length as the horizon M."""

import math

import pytest
import torch
from attention_cases import (
    MASKS,
    assert_near,
    build,
    inputs,
    mask_of,
    poisoned,
    with_every_mask,
)

EXACT = 1e-12


def cosine(n, s, horizon):
    """cos(pi/2 (i - j)/M) for i = 1..n and j = 1..s, as in eq. 8 to 10 of the paper."""
    i = torch.arange(1, n + 1, dtype=torch.float64)
    j = torch.arange(1, s + 1, dtype=torch.float64)
    return torch.cos(math.pi / 2 * (i[:, None] - j) / horizon)


def formula(q, k, horizons, key_mask=None):
    """relu(q).relu(k) cos(pi/2 (i - j)/M), row-normalised, with an M for each sample."""
    similarity = q.clamp(min=0) @ k.clamp(min=0).mT
    angles = [cosine(q.shape[2], k.shape[2], horizon) for horizon in horizons]
    similarity = similarity * torch.stack(angles)[:, None]
    if key_mask is not None:
        similarity = similarity * key_mask[:, None, None, :]
    total = similarity.sum(-1, keepdim=True)
    return similarity / torch.where(total == 0, 1.0, total)


def rows(x, lengths):
    """Keeps the rows before each sample's length; the others are padded queries."""
    return x * (torch.arange(x.shape[2]) < torch.tensor(lengths)[:, None])[:, None, :, None]


# The formula


@pytest.mark.parametrize("n", [1, 2, 7, 65])
def test_without_padding_it_is_the_formula_with_the_length_as_horizon(n):
    q, k, v = inputs(n)
    attention, expected = build("cosformer"), formula(q, k, [n] * 3)
    assert_near(attention.weights(q, k), expected, EXACT)
    assert_near(attention(q, k, v), expected @ v, EXACT)


@pytest.mark.parametrize(
    ("key_mask", "lengths"),
    [
        (mask_of("11111111", "11111000", "10000000"), [8, 5, 1]),
        (mask_of("10101010", "10010000", "11111111"), [7, 4, 8]),
        (mask_of("00000001", "00110000", "01100110"), [8, 4, 7]),
    ],
    ids=["suffix padding", "holes count", "holes at the start count"],
)
def test_with_padding_the_horizon_is_each_samples_last_real_index_plus_one(key_mask, lengths):
    q, k, v = inputs(8)
    attention, expected = build("cosformer"), formula(q, k, lengths, key_mask)
    assert_near(rows(attention.weights(q, k, key_mask), lengths), rows(expected, lengths), EXACT)
    assert_near(rows(attention(q, k, v, key_mask), lengths), rows(expected @ v, lengths), EXACT)


@pytest.mark.parametrize(("n", "s"), [(5, 8), (8, 5), (1, 9), (9, 1)])
def test_the_horizon_of_cross_attention_is_the_longer_side(n, s):
    q, k, v = inputs(n, s)
    expected = formula(q, k, [max(n, s)] * 3)
    assert_near(build("cosformer")(q, k, v), expected @ v, EXACT)


def test_the_horizon_of_cross_attention_takes_the_keys_own_length():
    q, k, v = inputs(4, 9)
    key_mask = mask_of("111111111", "101001000", "110000000")
    expected = formula(q, k, [9, 6, 4], key_mask)
    assert_near(build("cosformer")(q, k, v, key_mask), expected @ v, EXACT)


def test_dropped_padding_is_the_same_as_masked_padding():
    q, k, v = inputs(6, batch=1)
    padded = [poisoned(x, 20) for x in (q, k, v)]
    out = build("cosformer")(*padded, mask_of("1" * 6 + "0" * 20))
    assert_near(out[:, :, :6], formula(q, k, [6]) @ v, EXACT)


# Identities


@with_every_mask
def test_rescaled_query_rows_and_keys_change_nothing(mask):
    q, k, v = inputs(9)
    key_mask = MASKS[mask](9)
    scale = torch.linspace(0.5, 20, 9, dtype=q.dtype)[:, None]
    attention = build("cosformer")
    assert_near(attention(scale * q, 7 * k, v, key_mask), attention(q, k, v, key_mask), EXACT)


def test_a_far_horizon_leaves_relu_linear_attention():
    # Four tokens that count, then thousands of real ones whose keys have zero features: they have
    # no weight, but they make the sequence long.
    q, k, v = inputs(4)
    near = build("linear-relu")(q, k, v)
    silent = [torch.cat([x, -torch.ones(3, 2, 4000, x.shape[3])], dim=2) for x in (q, k, v)]
    far = build("cosformer")(*silent)[:, :, :4]
    assert_near(far, near, 1e-5)
    assert (build("cosformer")(q, k, v) - near).abs().max() > 0.01


def test_equal_tokens_attend_by_the_cosine_alone():
    q, k, _ = (torch.ones_like(x) for x in inputs(5))
    expected = cosine(5, 5, 5) / cosine(5, 5, 5).sum(-1, keepdim=True)
    assert_near(build("cosformer").weights(q, k), expected.expand(3, 2, 5, 5), EXACT)


def test_reversed_sequences_give_reversed_outputs_but_shuffled_ones_do_not_follow():
    q, k, v = inputs(9)
    attention = build("cosformer")
    out = attention(q, k, v)
    assert_near(attention(q.flip(2), k.flip(2), v.flip(2)).flip(2), out, EXACT)
    rolled = attention(q.roll(3, 2), k.roll(3, 2), v.roll(3, 2)).roll(-3, 2)
    assert (rolled - out).abs().max() > 0.01


def test_a_lone_real_token_attends_to_itself():
    q, k, v = (x.abs() for x in inputs(9))
    lone = torch.tensor([0, 5, 8])
    key_mask = torch.nn.functional.one_hot(lone, 9).bool()
    attention = build("cosformer")
    out = attention(q, k, v, key_mask)
    weights = attention.weights(q, k, key_mask)
    for sample, at in enumerate(lone):
        assert_near(weights[sample, :, at, at], torch.ones(2), EXACT)
        assert_near(out[sample, :, at], v[sample, :, at], EXACT)


# Signs and precision


@with_every_mask
@pytest.mark.parametrize(("n", "s"), [(9, 9), (4, 9), (9, 4), (65, 65)])
def test_no_weight_is_negative_not_even_of_padded_queries(mask, n, s):
    q, k, _ = (x.abs() for x in inputs(n, s))
    assert build("cosformer").weights(q, k, MASKS[mask](s)).min() >= 0


def test_the_least_weight_of_a_long_sequence_is_right_in_float32():
    # First and last token: cos(pi/2 (n - 1)/n) is 8e-4, what the split leaves of two ones.
    n = 2048
    q, k, _ = (torch.ones_like(x, dtype=torch.float32) for x in inputs(n, batch=1, heads=1))
    weights = build("cosformer", num_heads=1).weights(q, k)[0, 0]
    expected = cosine(n, n, n)[0] / cosine(n, n, n)[0].sum()
    assert weights[0, -1].item() == pytest.approx(expected[-1].item(), rel=1e-3)
    assert weights.min() > 0


def test_queries_without_any_positive_entry_give_exactly_zero():
    q, k, v = inputs(7)
    q[:, :, 2] = -q[:, :, 2].abs()
    out = build("cosformer")(q, k, v)
    assert not out[:, :, 2].any()
    assert out[:, :, 3].any()


def test_more_features_than_dimensions_are_declared():
    attention = build("cosformer", head_dim=8)
    q, k, _ = inputs(7)
    fq, fk = attention.features(q, k, None)
    assert fq.shape[-1] == fk.shape[-1] == attention.num_features == 16
