"""Linformer is its paper's formula, and exact about masks: what is projected as 0 is not there."""

import pytest
import torch
from attention_cases import MASKS, assert_near, inputs, mask_of, with_every_mask

from models import build_attention

EXACT = 1e-10
HEADS, HEAD_DIM, MAX_LEN = 2, 8, 12

however_shared = pytest.mark.parametrize("sharing", ["key-value", "headwise", "none"])


def linformer(*, max_len=MAX_LEN, head_dim=HEAD_DIM, dropout=0.0, seed=0, **options):
    """Returns an instance in evaluation, with a seed of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        attention = build_attention(
            "linformer",
            num_heads=HEADS,
            head_dim=head_dim,
            max_len=max_len,
            model_dim=HEADS * head_dim,
            dropout=dropout,
            **options,
        )
    return attention.double().eval()


def with_map(attention, weights):
    """Gives an instance one map (m, max_len) for keys, values and all heads."""
    attention.projections.data = weights.double().expand_as(attention.projections).clone()
    return attention


def maps(attention, head):
    """Returns E and G (m, max_len) of a head."""
    ours = attention.projections[:, head if attention.config.sharing == "none" else 0]
    return ours[0], ours[-1]


# The formula


def formula(attention, q, k, key_mask):
    """softmax(q (E k)^T / sqrt(D)) G of one sample and head after another, key by key."""
    weights = q.new_zeros(*q.shape[:3], k.shape[2])
    for sample in range(len(q)):
        real = [j for j in range(k.shape[2]) if key_mask is None or key_mask[sample, j]]
        for head in range(q.shape[1]):
            to_keys, to_values = maps(attention, head)
            keys = sum(torch.outer(to_keys[:, j], k[sample, head, j]) for j in real)
            for i, query in enumerate(q[sample, head]):
                row = (keys @ query / len(query) ** 0.5).softmax(0)
                for j in real:
                    weights[sample, head, i, j] = row @ to_values[:, j]
    return weights


@however_shared
@pytest.mark.parametrize(("n", "s"), [(9, 9), (4, 9), (9, 4)])
@with_every_mask
def test_it_is_the_papers_formula(sharing, n, s, mask):
    q, k, v = inputs(n, s)
    attention = linformer(sharing=sharing, projected=5)
    key_mask = MASKS[mask](s)
    expected = formula(attention, q, k, key_mask)
    assert expected.abs().max() > 0.1
    assert_near(attention.weights(q, k, key_mask), expected, EXACT)
    assert_near(attention(q, k, v, key_mask), expected @ v, EXACT)


@however_shared
def test_its_gradients_are_those_of_the_formula(sharing):
    q, k, v = (x.requires_grad_() for x in inputs(7))
    attention = linformer(sharing=sharing, projected=5)
    key_mask = MASKS["holes and padding"](7)
    leaves = (q, k, v, attention.projections)
    actual = torch.autograd.grad(attention(q, k, v, key_mask).square().sum(), leaves)
    out = formula(attention, q, k, key_mask) @ v
    expected = torch.autograd.grad(out.square().sum(), leaves)
    for of_attention, of_formula in zip(actual, expected, strict=True):
        assert of_formula.abs().max() > 1e-3
        assert_near(of_attention, of_formula, EXACT)


def test_the_matrix_has_rank_m():
    q, k, _ = inputs(12)
    singular = torch.linalg.svdvals(linformer(projected=3).weights(q, k))
    assert (singular[..., 2] > 1e-6).all()
    assert (singular[..., 3:] < 1e-12).all()


# Degenerate maps


@however_shared
@pytest.mark.parametrize("n", [9, 4])
def test_with_the_identity_for_a_map_it_is_softmax_attention(sharing, n):
    q, k, v = inputs(n, 9)
    attention = with_map(linformer(sharing=sharing, projected=9, max_len=9), torch.eye(9))
    expected = (q @ k.mT * HEAD_DIM**-0.5).softmax(-1)
    assert_near(attention.weights(q, k), expected, 1e-12)
    assert_near(attention(q, k, v), expected @ v, 1e-12)


def test_with_the_means_of_blocks_for_a_map_it_is_softmax_attention_to_those():
    q, k, v = inputs(12)
    means = torch.kron(torch.eye(3), torch.full((1, 4), 0.25))
    attention = with_map(linformer(projected=3), means)
    keys, values = (x.unflatten(2, (3, 4)).mean(3) for x in (k, v))
    expected = (q @ keys.mT * HEAD_DIM**-0.5).softmax(-1) @ values
    assert_near(attention(q, k, v), expected, 1e-12)


def test_more_projected_keys_than_keys_are_allowed():
    q, k, v = inputs(3)
    attention = linformer(projected=50)
    assert_near(attention(q, k, v), formula(attention, q, k, None) @ v, EXACT)


# Masks


@however_shared
def test_a_masked_token_is_as_a_token_and_its_column_taken_out(sharing):
    # In public code masked keys and values are projected with the others.
    q, k, v = inputs(9, batch=1)
    attention, without = (linformer(sharing=sharing, projected=5) for _ in range(2))
    key_mask = mask_of("101101110")
    real = key_mask[0].nonzero()[:, 0]
    without.projections.data = attention.projections[..., real]
    expected = without(q, k[:, :, real], v[:, :, real])
    assert_near(attention(q, k, v, key_mask), expected, 1e-12)


def test_a_projected_key_that_no_real_token_reaches_still_has_its_share():
    # All m logits are in the softmax, also those of 0: a mask zeroes keys, and drops no row.
    q, k, v = inputs(4, batch=1)
    attention = with_map(linformer(projected=4, max_len=4), torch.eye(4))
    key_mask = mask_of("1100")
    similarities = (q @ k.mT * HEAD_DIM**-0.5).exp() * key_mask[:, None, None]
    expected = similarities / (similarities.sum(-1, keepdim=True) + 2)
    assert_near(attention.weights(q, k, key_mask), expected, 1e-12)
    assert_near(attention(q, k, v, key_mask), expected @ v, 1e-12)


def test_a_map_belongs_to_positions_and_shorter_sequences_use_its_first_columns():
    q, k, v = inputs(7)
    attention, shorter = linformer(projected=5), linformer(projected=5, max_len=7)
    shorter.projections.data = attention.projections[..., :7]
    assert_near(shorter(q, k, v), attention(q, k, v), 1e-12)
    with pytest.raises(ValueError, match="takes 7 positions, not 9"):
        shorter(*inputs(9))


def test_it_has_no_causal_form():
    with pytest.raises(ValueError, match="no causal form"):
        linformer()(*inputs(5), causal=True)


# Maps


@pytest.mark.parametrize(("sharing", "count"), [("key-value", 1), ("headwise", 2), ("none", 4)])
def test_the_maps_are_one_or_two_or_two_for_each_head(sharing, count):
    attention = linformer(sharing=sharing, projected=5)
    assert sum(p.numel() for p in attention.parameters()) == count * 5 * MAX_LEN
    assert attention.cost(9, 9).parameters == count * 5 * MAX_LEN
    all_maps = [each for head in range(HEADS) for each in maps(attention, head)]
    assert len({tuple(each.flatten().tolist()) for each in all_maps}) == count


def test_layers_share_nothing():
    one, two = linformer(seed=1), linformer(seed=2)
    before = two.projections.detach().clone()
    one.projections.data += 1
    assert torch.equal(two.projections, before)


@pytest.mark.parametrize("projected", [16, 256])
def test_logits_begin_at_the_scale_of_softmax_attention_whatever_m_is(projected):
    # Public code differs in this scale by a factor of 10.
    max_len = 1024
    attention = linformer(max_len=max_len, projected=projected, sharing="none")
    assert 0.97 < attention.projections.var() * max_len < 1.03
    q, k, _ = inputs(64, max_len)
    to_keys = attention.projections[0]
    logits = (q @ k.mT).std(), (q @ (to_keys @ k).mT).std()
    assert 0.9 < logits[1] / logits[0] < 1.1


# Dropout


def test_dropout_drops_weights_of_projected_keys_once():
    # With the identity for map and values, the output is the weights.
    attention = with_map(linformer(projected=12, dropout=0.25), torch.eye(12)).train()
    q, k, _ = inputs(12, batch=40)
    v = torch.eye(12, dtype=q.dtype).expand(40, HEADS, 12, 12)
    torch.manual_seed(0)
    out = attention(q, k, v)
    expected = attention.weights(q, k) / 0.75
    dropped = out == 0
    assert 0.23 < dropped.double().mean() < 0.27
    assert_near(out, torch.where(dropped, 0.0, expected), 1e-12)
    assert_near(attention.eval()(q, k, v), 0.75 * expected, 1e-12)


def test_dropout_leaves_nothing_for_a_sample_without_real_tokens():
    attention = linformer(dropout=0.5).train()
    q, k, v = (x.requires_grad_() for x in inputs(4, batch=2))
    out = attention(q, k, v, mask_of("1011", "0000"))
    assert out[0].abs().max() > 0
    assert not out[1].any()
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


# Options


def test_options_are_checked():
    with pytest.raises(ValueError, match="projected must be at least 1"):
        linformer(projected=0)
    with pytest.raises(ValueError, match="Unknown value 'layerwise'"):
        linformer(sharing="layerwise")
