"""Local attention: blocks, neighbours and bands by their definitions, alone and against softmax."""

import pytest
import torch
from attention_cases import assert_near, inputs, mask_of, softmax_over

from models import build_attention
from models.attention import capabilities

PATTERNS = {
    "block": lambda size: lambda i, j: i // size == j // size,
    "neighbour": lambda size: lambda i, j: abs(i // size - j // size) <= 1,
    "band": lambda size: lambda i, j: abs(i - j) <= size,
}
for_every_pattern = pytest.mark.parametrize("pattern", PATTERNS)
both_ways = pytest.mark.parametrize("causal", [False, True], ids=["self", "causal"])


def local(pattern, size, **arguments):
    sizes = {"num_heads": 2, "head_dim": 8, "max_len": 256, "model_dim": 16} | arguments
    return build_attention("local", **sizes, pattern=pattern, size=size)


@both_ways
@for_every_pattern
@pytest.mark.parametrize("size", [1, 2, 5, 16, 40])
@pytest.mark.parametrize("n", [1, 2, 37, 40, 41])
def test_it_is_softmax_over_the_pairs_of_its_pattern(pattern, size, n, causal):
    q, k, v = inputs(n)
    near = PATTERNS[pattern](size)
    expected = softmax_over(lambda i, j: near(i, j) and (j <= i or not causal), q, k, v)
    assert_near(local(pattern, size)(q, k, v, causal=causal), expected, 1e-12)


@both_ways
@for_every_pattern
def test_a_size_of_the_whole_sequence_is_softmax(pattern, causal):
    q, k, v = inputs(33)
    softmax = build_attention("softmax", num_heads=2, head_dim=8, max_len=256, model_dim=16)
    assert_near(local(pattern, 33)(q, k, v, causal=causal), softmax(q, k, v, causal=causal), 1e-12)


@for_every_pattern
def test_blocks_are_of_consecutive_tokens_and_masks_are_of_the_same_tokens(pattern):
    # Public code cut the sequence to a comb, and its padding mask the other way.
    q, k, v = inputs(12, batch=1)
    mask = mask_of("111101111111")
    near = PATTERNS[pattern](4)
    expected = softmax_over(lambda i, j: near(i, j) and j != 4, q, k, v)
    assert_near(local(pattern, 4)(q, k, v, key_mask=mask), expected, 1e-12)


def test_a_length_that_blocks_divide_is_not_padded():
    # Public code appends a block of zero tokens to such sequences, and attends to it.
    q, k, v = inputs(8)
    alone = local("block", 4)(q[:, :, 4:], k[:, :, 4:], v[:, :, 4:])
    assert_near(local("block", 4)(q, k, v)[:, :, 4:], alone, 1e-12)


@both_ways
@for_every_pattern
def test_queries_all_of_whose_keys_are_masked_give_zero(pattern, causal):
    q, k, v = inputs(20, batch=1)
    mask = mask_of("00000000000000001111")
    out = local(pattern, 4)(q, k, v, key_mask=mask, causal=causal)
    assert torch.equal(out[:, :, :8], torch.zeros_like(out[:, :, :8]))
    assert out[:, :, 16:].abs().amin() > 0


@for_every_pattern
def test_the_state_holds_what_a_query_can_see_and_no_more(pattern):
    held = {"block": 4, "neighbour": 8, "band": 5}[pattern]
    attention = local(pattern, 4)
    state = attention.init_state(3, torch.device("cpu"), torch.float64)
    assert state.keys.shape == (3, 2, held, 8)


@for_every_pattern
def test_steps_go_on_past_max_len(pattern):
    q, k, v = inputs(30)
    attention = local(pattern, 4, max_len=10)
    state = attention.init_state(3, torch.device("cpu"), torch.float64)
    for t in range(30):
        at = slice(t, t + 1)
        out, state = attention.step(q[:, :, at], k[:, :, at], v[:, :, at], state)
    assert_near(out, attention(q, k, v, causal=True)[:, :, 29:], 1e-12)


def test_only_distances_count_in_a_band():
    shifts = {
        pattern: "position shift" in capabilities("local", {"pattern": pattern}).identities
        for pattern in PATTERNS
    }
    assert shifts == {"block": False, "neighbour": False, "band": True}


@for_every_pattern
def test_dropout_keeps_the_mean_of_what_the_pattern_admits(pattern):
    attention = local(pattern, 4, dropout=0.5).train()
    q, k, v = (x.float() for x in inputs(16, batch=1))
    torch.manual_seed(0)
    draws = torch.stack([attention(q, k, v) for _ in range(600)])
    error = draws.mean(0) - attention.eval()(q, k, v)
    assert (error.abs() < 5 * draws.std(0) / 600**0.5 + 1e-6).all()


def test_a_size_without_tokens_is_refused():
    with pytest.raises(ValueError, match="size must be at least 1"):
        local("band", 0)
