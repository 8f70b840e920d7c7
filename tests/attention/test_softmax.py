"""Softmax attention is the explicit softmax; dropout on CPU drops its weights, and only those."""

import pytest
import torch
import torch.nn.functional as F
from attention_cases import (
    MASKS,
    assert_near,
    build,
    inputs,
    mask_of,
    with_every_mask,
)

from models.attention.engines import dropout as engine
from models.attention.engines.dropout import softmax_dropout_attention

EXACT = 1e-10


def explicit_weights(q, k, key_mask=None):
    """exp(q.k / sqrt(D)) over its sum, written out; 0 for samples without any key."""
    logits = torch.einsum("bhid,bhjd->bhij", q, k) / q.shape[-1] ** 0.5
    keep = torch.ones(q.shape[0], k.shape[-2]) if key_mask is None else key_mask
    similarity = (logits - logits.amax(-1, keepdim=True)).exp() * keep[:, None, None, :]
    total = similarity.sum(-1, keepdim=True)
    return similarity / torch.where(total > 0, total, 1.0)


# The mechanism


@with_every_mask
@pytest.mark.parametrize(("n", "s"), [(1, 1), (9, 9), (65, 65), (4, 9), (9, 4)])
def test_it_is_the_softmax_of_the_scaled_products(mask, n, s):
    q, k, v = inputs(n, s)
    key_mask = MASKS[mask](s)
    attention, expected = build("softmax"), explicit_weights(q, k, key_mask)
    assert_near(attention.weights(q, k, key_mask), expected, 1e-14)
    assert_near(attention(q, k, v, key_mask), expected @ v, 1e-13)


def test_a_constant_added_to_all_logits_of_a_query_changes_nothing():
    q, k, v = inputs(9)
    # q . (k + c) = q . k + q . c, the same for every key.
    shifted = k + torch.linspace(-3, 3, 8, dtype=k.dtype)
    attention = build("softmax")
    assert_near(attention(q, shifted, v), attention(q, k, v), 1e-12)
    assert_near(attention.weights(q, shifted), attention.weights(q, k), 1e-12)


def test_huge_logits_choose_the_best_key():
    q, k, v = inputs(9)
    best = torch.einsum("bhid,bhjd->bhij", q, k).argmax(-1)
    chosen = v.gather(2, best[..., None].expand(-1, -1, -1, 5))
    assert_near(build("softmax")(1e6 * q, k, v), chosen, 1e-12)


# Dropout on CPU


SHAPES = [(23, 23), (23, 13), (13, 23), (1, 7), (8, 1)]
DROPOUT_MASKS = {
    "no mask": lambda s: None,
    "padding and holes": MASKS["holes and padding"],
    "one sample empty": lambda s: torch.stack([torch.zeros(s), *[torch.ones(s)] * 2]).bool(),
}
with_dropout_masks = pytest.mark.parametrize("mask", DROPOUT_MASKS)


@pytest.fixture
def small_blocks(monkeypatch):
    """Makes a block two matrices by 4 or 5 rows at 13 to 23 keys; 9 matrices are 5 groups."""
    monkeypatch.setattr(engine, "BLOCK_BYTES", 4 * 23 * 2 * 4)


def draw(attention, q, k, v, key_mask=None, seed=0):
    """Calls the attention in training, with a fixed draw."""
    torch.manual_seed(seed)
    return attention.train()(q, k, v, key_mask)


def kept(attention, q, k, key_mask=None, seed=0):
    """Returns which admissible weights a draw keeps, seen through the identity as values."""
    s = k.shape[-2]
    identity = torch.eye(s, dtype=q.dtype).expand(*k.shape[:2], s, s)
    return draw(attention, q, k, identity, key_mask, seed) != 0


def quadratic(q, k, v, key_mask, keep, p):
    return explicit_weights(q, k, key_mask) * keep / (1 - p) @ v


@with_dropout_masks
@pytest.mark.parametrize(("n", "s"), SHAPES)
def test_without_dropping_it_is_the_fused_kernel(small_blocks, mask, n, s):
    key_mask = DROPOUT_MASKS[mask](s)
    leaves = [x.requires_grad_() for x in inputs(n, s, heads=3)]
    out = softmax_dropout_attention(*leaves, key_mask, dropout=0.0)
    attn_mask = None if key_mask is None else key_mask[:, None, None]
    fused = F.scaled_dot_product_attention(*leaves, attn_mask=attn_mask)
    assert_near(out, fused, 1e-12)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    gradients = zip(
        torch.autograd.grad(out, leaves, grad),
        torch.autograd.grad(fused, leaves, grad),
        strict=True,
    )
    for ours, theirs in gradients:
        assert_near(ours, theirs, 1e-12)


@with_dropout_masks
@pytest.mark.parametrize("p", [0.25, 0.75])
@pytest.mark.parametrize(("n", "s"), SHAPES)
def test_dropping_is_that_of_the_quadratic_form_forward_and_backward(small_blocks, mask, p, n, s):
    attention = build("softmax", num_heads=3, dropout=p)
    key_mask = DROPOUT_MASKS[mask](s)
    leaves = [x.requires_grad_() for x in inputs(n, s, heads=3)]
    keep = kept(attention, *leaves[:2], key_mask)
    out = draw(attention, *leaves, key_mask)
    expected = quadratic(*leaves, key_mask, keep, p)
    assert_near(out, expected, EXACT)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    ours = torch.autograd.grad(out, leaves, grad)
    theirs = torch.autograd.grad(expected, leaves, grad)
    for mine, other in zip(ours, theirs, strict=True):
        assert_near(mine, other, EXACT)


def test_one_block_for_all_is_exact_too():
    attention = build("softmax", dropout=0.25)
    q, k, v = inputs(23)
    keep = kept(attention, q, k)
    assert_near(draw(attention, q, k, v), quadratic(q, k, v, None, keep, 0.25), EXACT)


def test_strided_inputs_are_dropped_like_contiguous_ones(small_blocks):
    attention = build("softmax", dropout=0.25)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(23)]
    contiguous = [x.contiguous() for x in strided]
    assert torch.equal(draw(attention, *strided), draw(attention, *contiguous))


def test_gradients_with_dropout_are_those_of_finite_differences(small_blocks):
    attention = build("softmax", num_heads=1, head_dim=3, dropout=0.25)
    leaves = [x.requires_grad_() for x in inputs(6, d=3, e=2, heads=1)]
    key_mask = mask_of("101101", "111111", "000000")
    assert torch.autograd.gradcheck(lambda *qkv: draw(attention, *qkv, key_mask), leaves)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_drops_each_weight_with_probability_p_independently(monkeypatch, p):
    monkeypatch.setattr(engine, "BLOCK_BYTES", 4 * 128 * 2 * 16)
    q, k, _ = inputs(128, batch=2, heads=4)
    keep = kept(build("softmax", num_heads=4, dropout=p), q, k).double()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(keep.mean() - (1 - p)) < 5 * deviation / keep.numel() ** 0.5
    centred = (keep - (1 - p)) / deviation
    # Sample, head, row (also one block of 16 rows apart) and column.
    for axis, distance in [(0, 1), (1, 1), (1, 2), (2, 1), (2, 16), (3, 1), (3, 4)]:
        length = keep.shape[axis] - distance
        pairs = centred.narrow(axis, 0, length) * centred.narrow(axis, distance, length)
        assert abs(pairs.mean()) < 5 / pairs.numel() ** 0.5, (axis, distance)


def test_the_mean_of_many_draws_is_the_output_without_dropout():
    draws, p = 2000, 0.25
    one = inputs(5, batch=1)
    out = draw(build("softmax", dropout=p), *(x.expand(draws, -1, -1, -1) for x in one))
    expected = build("softmax")(*one)
    error = (out.mean(0) - expected[0]).abs()
    assert (error < 5 * out.std(0) / draws**0.5).all()
    assert (out.std(0) > 0.01).all()


def test_the_seed_of_torch_decides_the_draw(small_blocks):
    attention = build("softmax", dropout=0.25)
    qkv = inputs(23, dtype=torch.float32)
    first = draw(attention, *qkv, seed=1)
    assert torch.equal(draw(attention, *qkv, seed=1), first)
    assert not torch.equal(draw(attention, *qkv, seed=2), first)
    assert not torch.equal(attention(*qkv), attention(*qkv))


@pytest.mark.parametrize("threads", [1, 2, 4, 8])
def test_the_number_of_threads_does_not_decide_the_draw(small_blocks, monkeypatch, threads):
    attention = build("softmax", num_heads=4, dropout=0.25)
    q, k, _ = inputs(23, heads=4)
    expected = kept(attention, q, k)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert torch.equal(kept(attention, q, k), expected)


@pytest.mark.parametrize(("p", "training"), [(0.25, False), (0.0, True), (0.0, False)])
def test_nothing_is_dropped_or_drawn_in_evaluation_or_at_zero(p, training):
    attention = build("softmax", dropout=p).train(training)
    q, k, v = inputs(9)
    before = torch.get_rng_state()
    assert_near(attention(q, k, v), explicit_weights(q, k) @ v, 1e-13)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_the_dtype_of_inputs_and_gradients(small_blocks, dtype):
    attention = build("softmax", dropout=0.25)
    leaves = [x.requires_grad_() for x in inputs(23, dtype=dtype)]
    out = draw(attention, *leaves, MASKS["suffix padding"](23))
    assert out.dtype == dtype
    out.sum().backward()
    assert [x.grad.dtype for x in leaves] == [dtype] * 3


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 inputs", "bf16 autocast"])
@pytest.mark.parametrize("scale", [1, 3])
def test_dropout_in_bf16_loses_no_more_than_the_rounding_of_its_output(autocast, scale):
    # Logits of normal size and nine times larger; the output alone may be rounded to bf16.
    attention, p = build("softmax", dropout=0.25), 0.25
    q, k, v = inputs(50)
    leaves = [x.bfloat16().requires_grad_() for x in (scale * q, scale * k, v)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    keep = kept(attention, *exact[:2])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = draw(attention, *leaves)
    expected = quadratic(*exact, None, keep, p)
    assert_near(out, expected, 2**-8)
    ours = torch.autograd.grad(out, leaves, torch.ones_like(out))
    theirs = torch.autograd.grad(expected, exact, torch.ones_like(expected))
    for mine, other in zip(ours, theirs, strict=True):
        assert_near(mine, other, 2**-6)
