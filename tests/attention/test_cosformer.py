"""cosFormer is its paper's formula: each sequence's own length is the horizon M, or max_len."""

import math

import pytest
import torch
from attention_cases import (
    MASKS,
    assert_near,
    build,
    capabilities,
    inputs,
    mask_of,
    poisoned,
    with_every_mask,
)

from models import build_attention
from models.attention.base import Context

EXACT = 1e-12


def logits(q, k):
    return torch.einsum("bhid,bhjd->bhij", q, k) / q.shape[-1] ** 0.5


SIMILARITIES = {
    "relu": lambda q, k: q.clamp(min=0) @ k.clamp(min=0).mT,
    "elu+1": lambda q, k: elu_plus_one(q) @ elu_plus_one(k).mT,
    "leaky_relu": lambda q, k: torch.maximum(q, q / 100) @ torch.maximum(k, k / 100).mT,
    "identity": lambda q, k: q @ k.mT,
    "softmax": lambda q, k: logits(q, k).exp(),
}
UNWEIGHTED = {
    "relu": "linear-relu",
    "elu+1": "linear",
    "leaky_relu": "linear-leaky_relu",
    "identity": "linear-identity",
    "softmax": "softmax",
}
for_every_similarity = pytest.mark.parametrize("feature", SIMILARITIES)


def elu_plus_one(x):
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def cosformer(max_len=4096, **options):
    sizes = {"num_heads": 2, "head_dim": 8, "model_dim": 16}
    return build_attention("cosformer", **sizes, max_len=max_len, **options)


def cosine(n, s, horizon):
    """cos(pi/2 (i - j)/M) for i = 1..n and j = 1..s, as in eq. 8 to 10 of the paper."""
    i = torch.arange(1, n + 1, dtype=torch.float64)
    j = torch.arange(1, s + 1, dtype=torch.float64)
    return torch.cos(math.pi / 2 * (i[:, None] - j) / horizon)


def formula(q, k, horizons, key_mask=None, causal=False, feature="relu"):
    """s(q_i, k_j) cos(pi/2 (i - j)/M), row-normalised, with an M for each sample."""
    angles = [cosine(q.shape[2], k.shape[2], horizon) for horizon in horizons]
    similarity = SIMILARITIES[feature](q, k) * torch.stack(angles)[:, None]
    if key_mask is not None:
        similarity = similarity * key_mask[:, None, None, :]
    if causal:
        at = torch.arange(k.shape[2])
        similarity = similarity * (at <= at[:, None])
    total = similarity.sum(-1, keepdim=True)
    return similarity / torch.where(total == 0, 1.0, total)


def lengths_of(key_mask, s):
    """Returns the last real index plus one of each of three samples."""
    if key_mask is None:
        return [s] * 3
    return [max(j + 1 for j in range(s) if sample[j]) for sample in key_mask]


def rows(x, lengths):
    """Keeps the rows before each sample's length; the others are padded queries."""
    return x * (torch.arange(x.shape[2]) < torch.tensor(lengths)[:, None])[:, None, :, None]


def similar(n, s=None):
    """Returns inputs with products away from 0, where signed denominators magnify rounding."""
    q, k, v = inputs(n, s)
    return 0.4 + 0.3 * q, 0.4 + 0.3 * k, v


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


# Causal and recurrent


@with_every_mask
@pytest.mark.parametrize("max_len", [65, 66, 1000])
def test_the_horizon_of_causal_attention_is_max_len(mask, max_len):
    q, k, v = inputs(65)
    key_mask = MASKS[mask](65)
    attention = cosformer(max_len)
    expected = formula(q, k, [max_len] * 3, key_mask, causal=True)
    assert_near(attention.weights(q, k, key_mask, causal=True), expected, EXACT)
    assert_near(attention(q, k, v, key_mask, causal=True), expected @ v, EXACT)


def test_another_max_len_is_another_causal_attention_and_the_same_bidirectional_one():
    q, k, v = inputs(65)
    near, far = cosformer(65), cosformer(1000)
    assert (near(q, k, v, causal=True) - far(q, k, v, causal=True)).abs().max() > 0.01
    assert torch.equal(near(q, k, v), far(q, k, v))


@pytest.mark.parametrize("n", [1, 127, 128, 129, 300])
def test_the_formula_holds_across_the_chunks_of_causal_attention(n):
    q, k, v = inputs(n)
    expected = formula(q, k, [300] * 3, causal=True) @ v
    assert_near(cosformer(300)(q, k, v, causal=True), expected, EXACT)


@pytest.mark.parametrize("length", [1, 9, 128, 129, 299])
def test_the_causal_output_of_a_prefix_is_the_prefix_of_the_output(length):
    tokens, attention = inputs(300), cosformer(300)
    prefix = attention(*(x[:, :, :length] for x in tokens), causal=True)
    assert_near(prefix, attention(*tokens, causal=True)[:, :, :length], EXACT)


@pytest.mark.parametrize("max_len", [40, 1000])
@pytest.mark.parametrize("feature", sorted(SIMILARITIES.keys() - {"softmax"}))
def test_token_by_token_it_is_the_formula_with_max_len_as_horizon(feature, max_len):
    q, k, v = similar(40)
    attention = cosformer(max_len, feature=feature)
    state = attention.init_state(3, torch.device("cpu"), torch.float64)
    outputs = []
    for t in range(40):
        out, state = attention.step(*(x[:, :, t : t + 1] for x in (q, k, v)), state)
        outputs.append(out)
        # F = 2 D = 16 features of a head, and E + 1 = 6 sums of each.
        assert state.sums.shape == (3, 2, 16, 6)
    expected = formula(q, k, [max_len] * 3, causal=True, feature=feature) @ v
    assert_near(torch.cat(outputs, 2), expected, EXACT)
    assert attention.cost(9, 9).state_floats == 2 * 16 * (8 + 1)


def test_more_than_max_len_steps_are_refused():
    attention, token = cosformer(5), inputs(1)
    state = attention.init_state(3, torch.device("cpu"), torch.float64)
    for _ in range(5):
        _, state = attention.step(*token, state)
    message = r"^Cosformer takes 5 positions, and all are used\.$"
    with pytest.raises(ValueError, match=message):
        attention.step(*token, state)


@for_every_similarity
@pytest.mark.parametrize(
    ("n", "s", "causal"), [(6, 6, False), (6, 6, True), (6, 2, False), (2, 6, False)]
)
def test_more_than_max_len_tokens_are_refused(feature, n, s, causal):
    attention, (q, k, v) = cosformer(5, feature=feature), inputs(n, s)
    message = r"^Cosformer takes 5 positions, not 6\.$"
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, causal=causal)
    with pytest.raises(ValueError, match=message):
        attention.weights(q, k, causal=causal)


# The padded length as horizon


@with_every_mask
@pytest.mark.parametrize(("n", "s"), [(9, 9), (4, 9), (9, 4), (1, 9), (65, 65)])
def test_the_published_horizon_is_that_of_the_tensors_under_the_mask(mask, n, s):
    q, k, v = inputs(n, s)
    key_mask = MASKS[mask](s)
    attention = cosformer(horizon="padded")
    expected = formula(q, k, [max(n, s)] * 3, key_mask)
    assert_near(attention.weights(q, k, key_mask), expected, EXACT)
    assert_near(attention(q, k, v, key_mask), expected @ v, EXACT)


@for_every_similarity
@pytest.mark.parametrize(("n", "s"), [(9, 9), (4, 9), (9, 4)])
def test_the_published_horizon_is_the_own_length_without_padding(feature, n, s):
    qkv = inputs(n, s)
    own, padded = (cosformer(feature=feature, horizon=h) for h in ("own", "padded"))
    assert torch.equal(own(*qkv), padded(*qkv))


def test_with_the_published_horizon_padding_is_felt():
    q, k, v = inputs(6, batch=1)
    longer = [poisoned(x, 20) for x in (q, k, v)]
    out = cosformer(horizon="padded")(*longer, mask_of("1" * 6 + "0" * 20))[:, :, :6]
    assert_near(out, formula(q, k, [26]) @ v, EXACT)
    assert (out - cosformer()(q, k, v)).abs().max() > 0.01


@with_every_mask
def test_the_published_horizon_leaves_causal_attention_as_it_is(mask):
    qkv, key_mask = inputs(9), MASKS[mask](9)
    own, padded = (cosformer(20, horizon=h) for h in ("own", "padded"))
    assert torch.equal(padded(*qkv, key_mask, True), own(*qkv, key_mask, True))


# Other similarities


@for_every_similarity
@with_every_mask
@pytest.mark.parametrize(
    ("n", "s", "causal"),
    [(9, 9, False), (9, 9, True), (4, 9, False), (9, 4, False)],
    ids=["self", "causal", "fewer queries", "fewer keys"],
)
def test_every_similarity_is_reweighted_by_the_cosine(feature, mask, n, s, causal):
    q, k, v = inputs(n, s) if feature in ("relu", "elu+1", "softmax") else similar(n, s)
    key_mask = MASKS[mask](s)
    attention = cosformer(20, feature=feature)
    lengths = lengths_of(key_mask, s)
    horizons = [20] * 3 if causal else lengths if n == s else [max(n, own) for own in lengths]
    # Causal and cross attention have no padded queries; their rows are all of the formula.
    real = lengths if n == s and not causal else [n] * 3
    expected = formula(q, k, horizons, key_mask, causal, feature)
    weights = attention.weights(q, k, key_mask, causal)
    assert_near(rows(weights, real), rows(expected, real), EXACT)
    out = attention(q, k, v, key_mask, causal)
    assert_near(rows(out, real), rows(expected @ v, real), EXACT)


@pytest.mark.parametrize("feature", ["leaky_relu", "identity"])
@pytest.mark.parametrize("causal", [False, True])
def test_signed_similarities_have_weights_of_either_sign(feature, causal):
    q, k, _ = inputs(9)
    weights = cosformer(9, feature=feature).weights(q, k, causal=causal)
    assert weights.min() < 0
    assert_near(weights, formula(q, k, [9] * 3, None, causal, feature), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_huge_logits_of_softmax_similarity_choose_the_best_key(dtype, scale):
    q, k, v = inputs(9)
    past = torch.ones(9, 9, dtype=torch.bool).tril()
    for causal, keep in ((False, past | ~past), (True, past)):
        best = (scale * logits(q, k)).masked_fill(~keep, -torch.inf).argmax(-1)
        chosen = v.gather(2, best[..., None].expand(-1, -1, -1, 5))
        leaves = [x.to(dtype).requires_grad_() for x in (scale * q, k, v)]
        out = cosformer(9, feature="softmax")(*leaves, causal=causal)
        assert_near(out, chosen, EXACT if dtype == torch.float64 else 1e-6)
        out.sum().backward()
        assert all(x.grad.isfinite().all() for x in leaves)


def test_huge_logits_of_keys_that_may_not_be_seen_take_no_weight_from_the_others():
    q, k, v = (x.abs() for x in inputs(9))
    huge = torch.cat([k[:, :, :5], 1e6 * k[:, :, 5:]], 2)
    attention = cosformer(9, feature="softmax")
    key_mask = mask_of("111110000").expand(3, -1)
    expected = formula(q, k, [5] * 3, key_mask, feature="softmax")
    assert_near(attention.weights(q, huge, key_mask)[:, :, :5], expected[:, :, :5], EXACT)
    expected = formula(q, k, [9] * 3, causal=True, feature="softmax") @ v
    assert_near(attention(q, huge, v, causal=True)[:, :, :5], expected[:, :, :5], EXACT)


@for_every_similarity
def test_softmax_similarity_alone_is_quadratic_and_has_no_recurrent_form(feature):
    able, attention = capabilities(cosformer_named(feature)), cosformer(feature=feature)
    assert attention.capabilities == able
    if feature != "softmax":
        assert (able.time, able.memory, able.recurrent) == ("N", "N", True)
        return
    assert (able.time, able.memory, able.recurrent) == ("N^2", "N^2", False)
    assert attention.cost(9, 9).state_floats == 0
    assert attention.cost(18, 18).flops == 4 * attention.cost(9, 9).flops
    with pytest.raises(ValueError, match=r"^Cosformer has no recurrent form\.$"):
        attention.init_state(3, torch.device("cpu"), torch.float64)
    with pytest.raises(ValueError, match=r"^Cosformer has no recurrent form\.$"):
        attention.step(*inputs(1), None)


def cosformer_named(feature):
    return "cosformer" if feature == "relu" else f"cosformer-{feature}"


# Identities


@for_every_similarity
@with_every_mask
def test_a_far_horizon_leaves_the_attention_without_reweighting(feature, mask):
    # Causal attention has max_len as its horizon; at 10^8, the cosine is 1 but for 10^-14.
    qkv = similar(9)
    key_mask = MASKS[mask](9)
    plain = build(UNWEIGHTED[feature])(*qkv, key_mask, causal=True)
    far = cosformer(10**8, feature=feature)(*qkv, key_mask, causal=True)
    assert_near(far, plain, EXACT)
    near = cosformer(9, feature=feature)(*qkv, key_mask, causal=True)
    assert (near - plain).abs().max() > 0.01


@for_every_similarity
def test_scales_cancel_where_the_similarity_is_homogeneous(feature):
    q, k, v = similar(9)
    scale = torch.linspace(0.5, 20, 9, dtype=q.dtype)[:, None]
    attention = cosformer(feature=feature)
    homogeneous = feature in ("relu", "leaky_relu", "identity")
    declared = capabilities(cosformer_named(feature)).identities
    assert ({"query scale", "key scale"} <= declared) == homogeneous
    difference = (attention(scale * q, 7 * k, v) - attention(q, k, v)).abs().max()
    assert (difference < EXACT) == homogeneous


def test_a_long_sequence_leaves_relu_linear_attention():
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


@pytest.mark.parametrize("feature", ["relu", "elu+1", "softmax"])
@with_every_mask
@pytest.mark.parametrize(
    ("n", "s", "causal"),
    [(9, 9, False), (4, 9, False), (9, 4, False), (65, 65, False), (65, 65, True)],
)
def test_no_weight_is_negative_not_even_of_padded_queries(feature, mask, n, s, causal):
    q, k, _ = (x.abs() for x in inputs(n, s))
    attention = cosformer(max(n, s), feature=feature)
    assert attention.weights(q, k, MASKS[mask](s), causal).min() >= 0


@pytest.mark.parametrize("causal", [False, True])
def test_the_least_weight_of_a_long_sequence_is_right_in_float32(causal):
    # Last and first token: cos(pi/2 (n - 1)/n) is 8e-4, what the split leaves of two ones.
    n = 2048
    q, k, v = (torch.ones_like(x, dtype=torch.float32) for x in inputs(n, batch=1))
    v[:, :, 1:] = 0
    attention = cosformer(n)
    weights = attention.weights(q, k, causal=causal)[0, 0, -1]
    expected = cosine(n, n, n)[-1] / cosine(n, n, n)[-1].sum()
    assert weights[0].item() == pytest.approx(expected[0].item(), rel=1e-3)
    assert weights.min() > 0
    # Its value alone is 1.
    out = attention(q, k, v, causal=causal)[0, 0, -1]
    assert out.tolist() == pytest.approx([expected[0].item()] * 5, rel=1e-3)


def test_queries_without_any_positive_entry_give_exactly_zero():
    q, k, v = inputs(7)
    q[:, :, 2] = -q[:, :, 2].abs()
    out = build("cosformer")(q, k, v)
    assert not out[:, :, 2].any()
    assert out[:, :, 3].any()


def test_more_features_than_dimensions_are_declared():
    attention = build("cosformer", head_dim=8)
    q, k, _ = inputs(7)
    features = attention.features(q, k, Context(key_mask=None, causal=False, hidden=None))
    assert features.q.shape[-1] == features.k.shape[-1] == attention.num_features == 16
