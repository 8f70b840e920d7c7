"""Softmax attention is the explicit softmax in all its forms; dropout on CPU drops its weights."""

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

from models import build_attention
from models.attention.engines import dropout as engine
from models.attention.engines.dropout import softmax_dropout_attention
from models.attention.softmax import MASKED_ROWS

EXACT = 1e-10


def explicit_weights(q, k, key_mask=None, causal=False):
    """exp(q.k / sqrt(D)) over its sum, written out; 0 for queries without any key."""
    logits = torch.einsum("bhid,bhjd->bhij", q, k) / q.shape[-1] ** 0.5
    keep = torch.ones(q.shape[0], k.shape[-2]) if key_mask is None else key_mask
    keep = keep[:, None, None, :]
    if causal:
        at = torch.arange(k.shape[-2])
        keep = keep * (at <= at[:, None])
    similarity = (logits - logits.amax(-1, keepdim=True)).exp() * keep
    total = similarity.sum(-1, keepdim=True)
    return similarity / torch.where(total > 0, total, 1.0)


def assert_same_gradients(out, expected, leaves, tolerance):
    """Asserts that gradients along one random direction of the output are the same."""
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    ours = torch.autograd.grad(out, leaves, grad)
    theirs = torch.autograd.grad(expected, leaves, grad)
    for mine, other in zip(ours, theirs, strict=True):
        assert_near(mine, other, tolerance)


def softmax(max_len):
    return build_attention("softmax", num_heads=2, head_dim=8, max_len=max_len, model_dim=16)


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


# Causal


AROUND_A_BLOCK_OF_ROWS = [1, 9, MASKED_ROWS, MASKED_ROWS + 1, 2 * MASKED_ROWS + 44]


@with_every_mask
@pytest.mark.parametrize("n", AROUND_A_BLOCK_OF_ROWS)
def test_causal_attention_is_the_softmax_of_the_lower_triangle(mask, n):
    q, k, v = inputs(n)
    key_mask = MASKS[mask](n)
    attention, expected = build("softmax"), explicit_weights(q, k, key_mask, causal=True)
    assert_near(attention.weights(q, k, key_mask, causal=True), expected, 1e-12)
    assert_near(attention(q, k, v, key_mask, causal=True), expected @ v, 1e-12)


@with_every_mask
def test_causal_gradients_are_those_of_the_softmax_of_the_lower_triangle(mask):
    n = MASKED_ROWS + 2
    leaves = [x.requires_grad_() for x in inputs(n)]
    key_mask = MASKS[mask](n)
    out = build("softmax")(*leaves, key_mask, causal=True)
    expected = explicit_weights(*leaves[:2], key_mask, causal=True) @ leaves[2]
    assert_same_gradients(out, expected, leaves, 1e-12)


@pytest.mark.parametrize("n", AROUND_A_BLOCK_OF_ROWS)
def test_causal_queries_before_the_first_real_token_give_exactly_zero(n):
    q, k, v = inputs(n)
    key_mask = MASKS["holes at the start"](n)
    attention = build("softmax")
    before = (key_mask.cumsum(-1) == 0)[:, None, :, None].expand(-1, 2, -1, -1)
    out = attention(q, k, v, key_mask, causal=True)
    weights = attention.weights(q, k, key_mask, causal=True)
    assert not out.masked_select(before).any()
    assert not weights.masked_select(before).any()
    assert out.masked_select(~before).all()


# Recurrent


def taken_one_by_one(attention, q, k, v):
    """Returns the output and the cache after each token."""
    state = attention.init_state(q.shape[0], q.device, q.dtype)
    outputs, states = [], []
    for t in range(q.shape[2]):
        out, state = attention.step(*(x[:, :, t : t + 1] for x in (q, k, v)), state)
        outputs.append(out)
        states.append(state)
    return outputs, states


@pytest.mark.parametrize("e", [1, 5, 8, 13])
def test_token_by_token_it_is_the_softmax_of_the_lower_triangle(e):
    q, k, v = inputs(9, e=e)
    outputs, _ = taken_one_by_one(softmax(max_len=20), q, k, v)
    assert_near(torch.cat(outputs, 2), explicit_weights(q, k, causal=True) @ v, 1e-12)


def test_the_cache_has_memory_for_max_len_tokens_which_is_made_once():
    attention = softmax(max_len=20)
    start = attention.init_state(3, torch.device("cpu"), torch.float64)
    assert start.keys.shape == (3, 2, 20, 8)
    _, states = taken_one_by_one(attention, *inputs(20))
    assert {state.keys.shape for state in states} == {(3, 2, 20, 8)}
    assert {state.values.shape for state in states} == {(3, 2, 20, 5)}
    assert len({state.keys.data_ptr() for state in states}) == 1
    assert len({state.values.data_ptr() for state in states}) == 1
    assert [state.length for state in states] == list(range(1, 21))


def test_the_first_step_writes_into_the_memory_that_the_initial_state_has():
    attention = softmax(max_len=20)
    start = attention.init_state(3, torch.device("cpu"), torch.float64)
    _, after = attention.step(*inputs(1), start)
    assert after.keys.data_ptr() == start.keys.data_ptr()


def test_sequences_taken_by_turns_have_caches_of_their_own():
    attention = softmax(max_len=20)
    sequences = [inputs(9, seed=1), inputs(9, seed=2)]
    states = [attention.init_state(3, torch.device("cpu"), torch.float64) for _ in sequences]
    for t in range(9):
        for i, (q, k, v) in enumerate(sequences):
            token = (x[:, :, t : t + 1] for x in (q, k, v))
            out, states[i] = attention.step(*token, states[i])
            expected = explicit_weights(q, k, causal=True) @ v
            assert_near(out, expected[:, :, t : t + 1], 1e-12)


def test_later_steps_do_not_change_earlier_outputs():
    attention, qkv = softmax(max_len=20), inputs(20)
    state = attention.init_state(3, torch.device("cpu"), torch.float64)
    outputs, copies = [], []
    for t in range(20):
        out, state = attention.step(*(x[:, :, t : t + 1] for x in qkv), state)
        outputs.append(out)
        copies.append(out.clone())
    assert torch.equal(torch.cat(outputs), torch.cat(copies))


def test_a_full_cache_takes_no_more_tokens():
    attention = softmax(max_len=4)
    _, states = taken_one_by_one(attention, *inputs(4))
    with pytest.raises(ValueError, match=r"^The cache has room for 4 tokens, and it is full\.$"):
        attention.step(*inputs(1), states[-1])


def test_causal_attention_at_once_is_not_limited_by_the_cache():
    q, k, v = inputs(9)
    expected = explicit_weights(q, k, causal=True) @ v
    assert_near(softmax(max_len=4)(q, k, v, causal=True), expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_declared_state_is_the_cache_of_one_sequence(dtype):
    attention = softmax(max_len=20)
    _, [state] = taken_one_by_one(attention, *inputs(1, e=8, batch=1, dtype=dtype))
    assert state.keys.dtype == state.values.dtype == dtype
    floats = state.keys.numel() + state.values.numel()
    assert attention.cost(9, 9).state_floats == floats == 2 * 20 * 2 * 8


def test_steps_in_training_have_no_dropout():
    q, k, v = inputs(9)
    attention = build("softmax", dropout=0.5).train()
    outputs, _ = taken_one_by_one(attention, q, k, v)
    assert_near(torch.cat(outputs, 2), explicit_weights(q, k, causal=True) @ v, 1e-12)


# Dropout on CPU


with_shapes = pytest.mark.parametrize(
    ("n", "s", "causal"),
    [(n, s, False) for n, s in [(23, 23), (23, 13), (13, 23), (1, 7), (8, 1)]]
    + [(n, n, True) for n in (23, 8, 1)],
)
DROPOUT_MASKS = {
    "no mask": lambda s: None,
    "padding and holes": MASKS["holes and padding"],
    "holes at the start": MASKS["holes at the start"],
    "one sample empty": lambda s: torch.stack([torch.zeros(s), *[torch.ones(s)] * 2]).bool(),
}
with_dropout_masks = pytest.mark.parametrize("mask", DROPOUT_MASKS)


@pytest.fixture
def small_blocks(monkeypatch):
    """Makes a block two matrices by 4 or 5 rows at 13 to 23 keys; 9 matrices are 5 groups."""
    monkeypatch.setattr(engine, "BLOCK_BYTES", 4 * 23 * 2 * 4)


def draw(attention, q, k, v, key_mask=None, seed=0, causal=False):
    """Calls the attention in training, with a fixed draw."""
    torch.manual_seed(seed)
    return attention.train()(q, k, v, key_mask, causal)


def kept(attention, q, k, key_mask=None, seed=0, causal=False):
    """Returns which admissible weights a draw keeps, seen through the identity as values."""
    s = k.shape[-2]
    identity = torch.eye(s, dtype=q.dtype).expand(*k.shape[:2], s, s)
    return draw(attention, q, k, identity, key_mask, seed, causal) != 0


def quadratic(q, k, v, key_mask, keep, p, causal=False):
    return explicit_weights(q, k, key_mask, causal) * keep / (1 - p) @ v


@with_dropout_masks
@with_shapes
def test_without_dropping_it_is_the_fused_kernel(small_blocks, mask, n, s, causal):
    key_mask = DROPOUT_MASKS[mask](s)
    leaves = [x.requires_grad_() for x in inputs(n, s, heads=3)]
    attn_mask = None if key_mask is None else key_mask[:, None, None]
    out = softmax_dropout_attention(*leaves, attn_mask, dropout=0.0, causal=causal)
    if causal:
        past = torch.ones(n, s, dtype=torch.bool).tril()
        attn_mask = past if attn_mask is None else attn_mask & past
    fused = F.scaled_dot_product_attention(*leaves, attn_mask=attn_mask)
    assert_near(out, fused, 1e-12)
    assert_same_gradients(out, fused, leaves, 1e-12)


@pytest.mark.parametrize(
    "shape",
    [(3, 3, 23, 13), (3, 1, 23, 13), (1, 3, 23, 13), (1, 1, 23, 13), (3, 3, 1, 13), (23, 13)],
)
def test_a_mask_may_differ_by_sample_head_and_query(small_blocks, shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[..., 4 : 6 if shape[-2] > 1 else None, :] &= shape[-2] == 1  # queries that see nothing
    leaves = [x.requires_grad_() for x in inputs(23, 13, heads=3)]
    out = softmax_dropout_attention(*leaves, mask, dropout=0.0)
    fused = F.scaled_dot_product_attention(*leaves, attn_mask=mask)
    assert_near(out, fused, 1e-12)
    assert_same_gradients(out, fused, leaves, 1e-12)


@with_dropout_masks
@pytest.mark.parametrize("p", [0.25, 0.75])
@with_shapes
def test_dropping_is_that_of_the_quadratic_form_forward_and_backward(
    small_blocks, mask, p, n, s, causal
):
    attention = build("softmax", num_heads=3, dropout=p)
    key_mask = DROPOUT_MASKS[mask](s)
    leaves = [x.requires_grad_() for x in inputs(n, s, heads=3)]
    keep = kept(attention, *leaves[:2], key_mask, causal=causal)
    out = draw(attention, *leaves, key_mask, causal=causal)
    expected = quadratic(*leaves, key_mask, keep, p, causal)
    assert_near(out, expected, EXACT)
    assert_same_gradients(out, expected, leaves, EXACT)


@pytest.mark.parametrize("mask", ["holes at the start", "one sample empty"])
def test_causal_rows_without_a_key_give_exactly_zero_with_dropout_too(small_blocks, mask):
    leaves = [x.requires_grad_() for x in inputs(23)]
    key_mask = DROPOUT_MASKS[mask](23)
    out = draw(build("softmax", dropout=0.25), *leaves, key_mask, causal=True)
    empty = (key_mask.cumsum(-1) == 0)[:, None, :, None]
    assert not out.masked_select(empty).any()
    gradient = torch.autograd.grad(out.sum(), leaves[0])[0]
    assert not gradient.masked_select(empty).any()


def test_a_causal_draw_keeps_the_same_past_whatever_the_future(small_blocks):
    # With the same seed and length, the draws fall on the same weights.
    attention = build("softmax", dropout=0.25)
    qkv, others = inputs(23), inputs(23, seed=1)
    changed = [torch.cat([x[:, :, :9], y[:, :, 9:]], 2) for x, y in zip(qkv, others, strict=True)]
    out = draw(attention, *qkv, causal=True)
    assert torch.equal(draw(attention, *changed, causal=True)[:, :, :9], out[:, :, :9])


@pytest.mark.parametrize("causal", [False, True])
def test_one_block_for_all_is_exact_too(causal):
    attention = build("softmax", dropout=0.25)
    q, k, v = inputs(23)
    keep = kept(attention, q, k, causal=causal)
    expected = quadratic(q, k, v, None, keep, 0.25, causal)
    assert_near(draw(attention, q, k, v, causal=causal), expected, EXACT)


def test_strided_inputs_are_dropped_like_contiguous_ones(small_blocks):
    attention = build("softmax", dropout=0.25)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(23)]
    contiguous = [x.contiguous() for x in strided]
    assert torch.equal(draw(attention, *strided), draw(attention, *contiguous))


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_with_dropout_are_those_of_finite_differences(small_blocks, causal):
    attention = build("softmax", num_heads=1, head_dim=3, dropout=0.25)
    leaves = [x.requires_grad_() for x in inputs(6, d=3, e=2, batch=4, heads=1)]
    key_mask = mask_of("101101", "111111", "000000", "001101")
    assert torch.autograd.gradcheck(
        lambda *qkv: draw(attention, *qkv, key_mask, causal=causal), leaves
    )


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
@pytest.mark.parametrize("causal", [False, True])
def test_dropout_in_bf16_loses_no_more_than_the_rounding_of_its_output(autocast, scale, causal):
    # Logits of normal size and nine times larger; the output alone may be rounded to bf16.
    attention, p = build("softmax", dropout=0.25), 0.25
    q, k, v = inputs(50)
    leaves = [x.bfloat16().requires_grad_() for x in (scale * q, scale * k, v)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    keep = kept(attention, *exact[:2], causal=causal)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = draw(attention, *leaves, causal=causal)
    expected = quadratic(*exact, None, keep, p, causal)
    assert_near(out, expected, 2**-8)
    ours = torch.autograd.grad(out, leaves, torch.ones_like(out))
    theirs = torch.autograd.grad(expected, exact, torch.ones_like(expected))
    for mine, other in zip(ours, theirs, strict=True):
        assert_near(mine, other, 2**-6)
