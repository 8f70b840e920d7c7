"""Longformer: the band, the global tokens and their own projections, written out."""

import pytest
import torch
from attention_cases import assert_near, inputs, mask_of, softmax_over

from models import build_attention
from models.attention import capabilities

SIZES = {"num_heads": 2, "head_dim": 8, "max_len": 256, "model_dim": 12}
both_ways = pytest.mark.parametrize("causal", [False, True], ids=["self", "causal"])


def longformer(dropout=0.0, **options):
    torch.manual_seed(0)
    return build_attention("longformer", **SIZES, dropout=dropout, **options).double()


def layer_input(n, batch=3):
    return inputs(n, d=12, heads=1, batch=batch, seed=5)[0][:, 0]


def own_projections(attention, hidden):
    """The global queries, keys and values (B, H, N, D), each projected as a layer does."""
    projected = hidden @ attention.project_global.weight.T
    return projected.unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)


def written_out(attention, q, k, v, hidden, causal=False, real=None):
    """Band and global keys for local rows, everything by own projections for global rows."""
    reach, count = attention.config.window // 2, attention.config.global_tokens
    real = [True] * q.shape[2] if real is None else real

    def admits(i, j):
        return real[j] and (j <= i or not causal)

    local = softmax_over(lambda i, j: admits(i, j) and (abs(i - j) <= reach or j < count), q, k, v)
    everywhere = softmax_over(admits, *own_projections(attention, hidden))
    return torch.cat([everywhere[:, :, :count], local[:, :, count:]], 2)


@both_ways
@pytest.mark.parametrize("window", [0, 2, 6, 10, 512])
@pytest.mark.parametrize("count", [1, 3, 20])
@pytest.mark.parametrize("n", [1, 3, 40])
def test_band_and_global_tokens_are_those_of_the_paper(window, count, n, causal):
    attention = longformer(window=window, global_tokens=count)
    q, k, v = inputs(n, e=8)
    hidden = layer_input(n)
    out = attention(q, k, v, causal=causal, hidden=hidden)
    assert_near(out, written_out(attention, q, k, v, hidden, causal), 1e-12)


@both_ways
def test_a_long_sequence_is_cut_into_blocks_and_gives_the_same(causal):
    attention = longformer(window=10, global_tokens=2)
    q, k, v = inputs(150, e=8, batch=1)
    hidden = layer_input(150, batch=1)
    out = attention(q, k, v, causal=causal, hidden=hidden)
    assert_near(out, written_out(attention, q, k, v, hidden, causal), 1e-12)


def test_masked_keys_are_masked_for_global_rows_and_as_global_keys():
    attention = longformer(window=4, global_tokens=2)
    q, k, v = inputs(16, e=8, batch=1)
    hidden, mask = layer_input(16, batch=1), mask_of("1011110111111000")
    out = attention(q, k, v, key_mask=mask, hidden=hidden)
    assert_near(out, written_out(attention, q, k, v, hidden, real=mask[0].tolist()), 1e-12)


@both_ways
def test_without_global_tokens_it_is_a_local_band_and_has_no_parameters(causal):
    attention = longformer(window=6, global_tokens=0)
    band = build_attention("local", **SIZES, pattern="band", size=3)
    q, k, v = inputs(50)
    assert_near(attention(q, k, v, causal=causal), band(q, k, v, causal=causal), 1e-12)
    assert not list(attention.parameters())


def test_a_window_of_twice_the_sequence_is_softmax_where_projections_are_the_layers():
    attention = longformer(window=80, global_tokens=2)
    hidden = layer_input(40)
    q, k, v = own_projections(attention, hidden)  # as if the layer's were these
    softmax = build_attention("softmax", **SIZES)
    assert_near(attention(q, k, v, hidden=hidden), softmax(q, k, v), 1e-12)


def test_with_all_tokens_global_it_is_softmax_of_the_global_projections():
    attention = longformer(window=4, global_tokens=40)
    q, k, v = inputs(40, e=8)
    hidden = layer_input(40)
    softmax = build_attention("softmax", **SIZES)
    expected = softmax(*own_projections(attention, hidden))
    assert_near(attention(q, k, v, hidden=hidden), expected, 1e-12)


def test_global_projections_triple_what_a_layer_projects_for_its_heads():
    [weight] = longformer().parameters()
    assert weight.shape == (3 * 2 * 8, 12)


def test_only_a_band_takes_rotary_positions():
    # Global queries and keys are projected here, where nobody turns them.
    assert not capabilities("longformer", {}).rotary
    assert capabilities("longformer", {"global_tokens": 0}).rotary


def test_dropout_keeps_the_mean_of_global_and_local_rows():
    attention = longformer(dropout=0.5, window=6).train()
    q, k, v = inputs(16, e=8, batch=1)
    hidden = layer_input(16, batch=1)
    torch.manual_seed(0)
    draws = torch.stack([attention(q, k, v, hidden=hidden) for _ in range(600)]).detach()
    error = draws.mean(0) - attention.eval()(q, k, v, hidden=hidden)
    assert (error.abs() < 5 * draws.std(0) / 600**0.5 + 1e-9).all()


@pytest.mark.parametrize("window", [-2, 5])
def test_a_window_that_has_no_halves_is_refused(window):
    with pytest.raises(ValueError, match="window must be even and not negative"):
        longformer(window=window)


def test_a_negative_number_of_global_tokens_is_refused():
    with pytest.raises(ValueError, match="global_tokens must not be negative"):
        longformer(global_tokens=-1)
