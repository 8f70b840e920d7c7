"""Sparse Transformer: fixed and strided patterns by their definitions, and their strides."""

import math

import pytest
import torch
from attention_cases import assert_near, inputs, mask_of, softmax_over

from models import build_attention
from models.attention import capabilities

STRIDE, SUMMARY = 5, 2


def fixed(i, j, stride=STRIDE, summary=SUMMARY):
    return i // stride == j // stride or j % stride >= stride - summary


def strided(i, j, stride=STRIDE):
    return abs(i - j) < stride or (i - j) % stride == 0


PATTERNS = {"fixed": fixed, "strided": strided}
for_every_pattern = pytest.mark.parametrize("pattern", PATTERNS)
both_ways = pytest.mark.parametrize("causal", [False, True], ids=["self", "causal"])


def sparse(pattern, *, max_len=256, dropout=0.0, **options):
    options = {"stride": STRIDE, "summary": SUMMARY} | options
    sizes = {"num_heads": 2, "head_dim": 8, "max_len": max_len, "model_dim": 16}
    return build_attention("sparse", **sizes, dropout=dropout, pattern=pattern, **options)


@both_ways
@for_every_pattern
@pytest.mark.parametrize("n", [1, 4, 5, 6, 23, 25])
def test_it_is_softmax_over_the_pairs_of_its_pattern(pattern, n, causal):
    q, k, v = inputs(n)
    admits = PATTERNS[pattern]
    expected = softmax_over(lambda i, j: admits(i, j) and (j <= i or not causal), q, k, v)
    assert_near(sparse(pattern)(q, k, v, causal=causal), expected, 1e-12)


@both_ways
@for_every_pattern
def test_far_keys_of_the_own_block_count_once(pattern, causal):
    # A key that is both near and far would get twice its weight.
    q, k, _ = inputs(17)
    identity = torch.eye(17, dtype=torch.float64).expand(3, 2, 17, 17)
    weights = sparse(pattern)(torch.zeros_like(q), k, identity, causal=causal)
    smallest = torch.where(weights > 0, weights, torch.inf).amin(-1)
    assert_near(weights.amax(-1), smallest, 1e-12)


@both_ways
@for_every_pattern
def test_masked_keys_are_left_out_near_and_far(pattern, causal):
    q, k, v = inputs(20, batch=1)
    mask = mask_of("11110011110111101100")
    admits = PATTERNS[pattern]
    expected = softmax_over(
        lambda i, j: admits(i, j) and bool(mask[0, j]) and (j <= i or not causal), q, k, v
    )
    out = sparse(pattern)(q, k, v, key_mask=mask, causal=causal)
    assert_near(out, expected, 1e-12)


@both_ways
@for_every_pattern
def test_a_stride_of_the_whole_sequence_is_softmax(pattern, causal):
    q, k, v = inputs(19)
    softmax = build_attention("softmax", num_heads=2, head_dim=8, max_len=256, model_dim=16)
    out = sparse(pattern, stride=19)(q, k, v, causal=causal)
    assert_near(out, softmax(q, k, v, causal=causal), 1e-12)


@pytest.mark.parametrize("max_len", [1, 16, 1000, 2000, 4096])
def test_the_stride_is_the_root_of_max_len_and_holds_the_summary(max_len):
    attention = sparse("fixed", max_len=max_len, stride=None, summary=10)
    assert attention.stride == round(math.sqrt(max_len))
    assert attention.summary == min(10, attention.stride)


def test_growth_is_quadratic_where_the_stride_does_not_grow():
    assert capabilities("sparse", {}).time == "N^1.5"
    assert capabilities("sparse", {"stride": 50}).time == "N^2"


@for_every_pattern
def test_dropout_keeps_the_mean_near_and_far(pattern):
    attention = sparse(pattern, dropout=0.5).train()
    q, k, v = (x.float() for x in inputs(16, batch=1))
    torch.manual_seed(0)
    draws = torch.stack([attention(q, k, v) for _ in range(600)])
    error = draws.mean(0) - attention.eval()(q, k, v)
    assert (error.abs() < 5 * draws.std(0) / 600**0.5 + 1e-6).all()


@pytest.mark.parametrize("options", [{"stride": 0}, {"stride": -3}, {"summary": 0}])
def test_what_is_no_number_of_tokens_is_refused(options):
    with pytest.raises(ValueError, match="stride and summary must be at least 1"):
        sparse("fixed", **options)
