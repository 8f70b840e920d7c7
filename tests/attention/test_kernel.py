"""The engine of kernel attention: sums in chunks are the plain sums, with decays and weights."""

import math

import pytest
import torch
from attention_cases import assert_near
from hypothesis import given, settings
from hypothesis import strategies as st

from lra.measure import allocated_peak
from models.attention.engines import kernel
from models.attention.engines.kernel import (
    bidirectional_sums,
    causal_sums,
    normalised,
    spans_of,
    with_ones,
)
from models.attention.engines.kernel_attention import LOWEST, _causal_unit

EXACT = 1e-12
BATCH, HEADS, F, E = 2, 3, 6, 5
RESET = -1e30
"""Log of a decay that forgets everything."""

with_and_without_decay = pytest.mark.parametrize("decays", [False, True])


@pytest.fixture(params=[1, 4, 7])
def small_chunks(request, monkeypatch):
    """The positions of a chunk: small, so that short sequences have many."""
    monkeypatch.setattr(kernel, "chunk_size", lambda device: request.param)
    return request.param


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator_of(seed), dtype=torch.float64)


def features(n, s=None, seed=0):
    """Returns fq (B, H, n, F), fk (B, H, s, F) and rows (B, H, s, E)."""
    s = n if s is None else s
    shapes = ((n, F), (s, F), (s, E))
    return [normal(BATCH, HEADS, *shape, seed=seed + i) for i, shape in enumerate(shapes)]


def decays_of(n, seed=9):
    """Returns log decays (B, H, n) of 0 to about -3, different everywhere."""
    return -normal(BATCH, HEADS, n, seed=seed).abs()


def loop(fq, fk, rows, log_decay=None):
    """S_i = exp(g_i) S_{i-1} + fk_i rows_i^T and fq_i S_i, position by position."""
    total = fk.new_zeros(*fk.shape[:2], fk.shape[-1], rows.shape[-1])
    outputs = []
    for i in range(fq.shape[2]):
        if log_decay is not None:
            total = total * log_decay[:, :, i].exp()[..., None, None]
        total = total + torch.einsum("bhf,bhe->bhfe", fk[:, :, i], rows[:, :, i])
        outputs.append(torch.einsum("bhf,bhfe->bhe", fq[:, :, i], total))
    return torch.stack(outputs, 2)


# Sums without an order


@pytest.mark.parametrize(("n", "s"), [(1, 1), (7, 7), (3, 9), (9, 3)])
def test_bidirectional_sums_are_the_double_sum(n, s):
    fq, fk, rows = features(n, s)
    expected = torch.zeros(BATCH, HEADS, n, E, dtype=torch.float64)
    for i in range(n):
        for j in range(s):
            similarity = (fq[:, :, i] * fk[:, :, j]).sum(-1, keepdim=True)
            expected[:, :, i] += similarity * rows[:, :, j]
    assert_near(bidirectional_sums(fq, fk, rows), expected, EXACT)


def test_gradients_of_bidirectional_sums_lie_in_memory_as_their_inputs_do():
    """Transposed ones make what comes next in the backward pass slow."""
    inputs = [torch.randn(2, 3, 7, width, requires_grad=True) for width in (4, 4, 5)]
    sums = bidirectional_sums(*inputs)
    given = torch.randn_like(sums)
    gradients = torch.autograd.grad(sums, inputs, given)
    fq, fk, rows = inputs
    expected = torch.autograd.grad(fq @ (fk.mT @ rows), inputs, given)
    for gradient, formula, x in zip(gradients, expected, inputs, strict=True):
        torch.testing.assert_close(gradient, formula)
        assert gradient.stride() == x.stride()


def test_normalised_rows_lie_in_memory_as_the_output_projection_reads_them():
    out = normalised(torch.rand(2, 3, 7, 5), signed=False)
    assert out.transpose(1, 2).is_contiguous()


def test_a_column_of_ones_makes_the_denominator_and_a_weight_counts_in_both():
    fq, fk, rows = (x.abs() for x in features(4, 7))
    weight = torch.linspace(0, 3, 7, dtype=torch.float64).expand(BATCH, 1, -1)
    out = normalised(bidirectional_sums(fq, fk, with_ones(rows, weight)), signed=False)
    similarity = torch.einsum("bhif,bhjf,bgj->bhij", fq, fk, weight)
    assert_near(out, similarity @ rows / similarity.sum(-1, keepdim=True), EXACT)


# Causal sums


@with_and_without_decay
@pytest.mark.parametrize("n", range(1, 14))
def test_causal_sums_are_those_of_the_plain_loop(small_chunks, n, decays):
    fq, fk, rows = features(n)
    log_decay = decays_of(n) if decays else None
    assert_near(causal_sums(fq, fk, rows, log_decay), loop(fq, fk, rows, log_decay), EXACT)


@with_and_without_decay
@pytest.mark.parametrize("n", [127, 128, 129, 257])
def test_causal_sums_are_those_of_the_plain_loop_at_the_real_chunk_size(n, decays):
    assert kernel.chunk_size(torch.device("cpu")) == 128
    fq, fk, rows = features(n)
    log_decay = 0.1 * decays_of(n) if decays else None
    assert_near(causal_sums(fq, fk, rows, log_decay), loop(fq, fk, rows, log_decay), EXACT)


def test_decays_may_be_shared_by_samples_or_heads(small_chunks):
    fq, fk, rows = features(10)
    for shape in ((BATCH, 1, 10), (1, HEADS, 10), (1, 1, 10)):
        log_decay = -normal(*shape).abs()
        full = log_decay.expand(BATCH, HEADS, 10)
        assert_near(causal_sums(fq, fk, rows, log_decay), loop(fq, fk, rows, full), EXACT)


def test_no_decay_is_a_decay_of_one(small_chunks):
    fq, fk, rows = features(10)
    zeros = torch.zeros(BATCH, HEADS, 10, dtype=torch.float64)
    assert_near(causal_sums(fq, fk, rows, zeros), causal_sums(fq, fk, rows), EXACT)


def test_the_decay_of_the_first_position_is_of_nothing(small_chunks):
    fq, fk, rows = features(10)
    log_decay = decays_of(10)
    other = log_decay.clone()
    other[:, :, 0] = RESET
    assert_near(causal_sums(fq, fk, rows, other), causal_sums(fq, fk, rows, log_decay), EXACT)


@pytest.mark.parametrize("at", range(1, 10))
def test_a_full_reset_begins_anew(small_chunks, at):
    fq, fk, rows = features(10)
    log_decay = decays_of(10)
    log_decay[:, :, at] = RESET
    sums = causal_sums(fq, fk, rows, log_decay)
    before = [x[:, :, :at] for x in (fq, fk, rows, log_decay)]
    after = [x[:, :, at:] for x in (fq, fk, rows, log_decay)]
    assert_near(sums, torch.cat([causal_sums(*before), causal_sums(*after)], 2), EXACT)


def test_a_constant_decay_gives_geometric_weights(small_chunks):
    # All features are 1, so a sum over rows of 1 is 1 + d + ... + d^i = (1 - d^(i + 1)) / (1 - d).
    n, decay = 40, 0.9
    ones = torch.ones(1, 1, n, 1, dtype=torch.float64)
    log_decay = torch.full((1, 1, n), math.log(decay), dtype=torch.float64)
    terms = torch.arange(1, n + 1, dtype=torch.float64)
    sums = causal_sums(ones, ones, ones, log_decay)[0, 0, :, 0]
    assert_near(sums, (1 - decay**terms) / (1 - decay), EXACT)
    one_row = torch.nn.functional.one_hot(torch.tensor(0), n).double().view(1, 1, n, 1)
    sums = causal_sums(ones, ones, one_row, log_decay)[0, 0, :, 0]
    assert_near(sums, decay ** (terms - 1), EXACT)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    chunk=st.integers(1, 8),
    steps=st.lists(
        st.sampled_from([0.0, RESET, -1e4, -1e-9]) | st.floats(-6, 0), min_size=1, max_size=24
    ),
    seed=st.integers(0, 99),
)
def test_any_length_chunk_and_decay_gives_the_plain_loop(chunk, steps, seed):
    fq, fk, rows = features(len(steps), seed=seed)
    log_decay = torch.tensor(steps, dtype=torch.float64).expand(BATCH, HEADS, -1).clone()
    log_decay[1:] = log_decay[1:].flip(-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "chunk_size", lambda device: chunk)
        sums = causal_sums(fq, fk, rows, log_decay)
        plain = causal_sums(fq, fk, rows)
    assert_near(sums, loop(fq, fk, rows, log_decay), EXACT)
    assert_near(plain, loop(fq, fk, rows), EXACT)


@with_and_without_decay
def test_gradients_of_causal_sums_are_those_of_the_plain_loop(small_chunks, decays):
    leaves = features(10)
    if decays:
        leaves.append(decays_of(10))
        leaves[-1][:, :, 6] = RESET
    leaves = [x.requires_grad_() for x in leaves]
    to = normal(BATCH, HEADS, 10, E, seed=4)
    actual = torch.autograd.grad((causal_sums(*leaves) * to).sum(), leaves)
    expected = torch.autograd.grad((loop(*leaves) * to).sum(), leaves)
    for of_chunks, of_loop in zip(actual, expected, strict=True):
        assert_near(of_chunks, of_loop, EXACT)


@with_and_without_decay
def test_the_tensor_of_all_outer_products_never_exists(decays):
    n, f, e = 2048, 64, 64
    fq, fk, rows = torch.ones(1, 1, n, f), torch.ones(1, 1, n, f), torch.ones(1, 1, n, e)
    log_decay = torch.zeros(1, 1, n) if decays else None
    peak = allocated_peak(lambda: causal_sums(fq, fk, rows, log_decay))
    assert peak < 4 * n * f * e / 6


# Spans of log decays


def test_spans_are_the_sums_written_out():
    g = decays_of(9)
    spans = spans_of(g)
    for i in range(9):
        for j in range(9):
            if j > i:
                expected = torch.full((BATCH, HEADS), -torch.inf, dtype=torch.float64)
                assert torch.equal(spans[:, :, i, j], expected)
            else:
                assert_near(spans[:, :, i, j], g[:, :, j + 1 : i + 1].sum(-1), 1e-14)


def test_spans_after_a_large_decay_do_not_cancel_in_float32():
    g = torch.cat([torch.tensor([-1e4]), -torch.linspace(1e-5, 2e-5, 50)])
    exact = torch.stack([g.double()[2 : i + 1].sum() for i in range(2, 51)])
    spans = spans_of(g)[2:, 1]
    assert ((spans.double() - exact) / exact).abs().max() < 1e-6
    # As differences of running sums, which are near 10,000, all of this is rounded away.
    running = g.cumsum(0)
    differences = (running[2:] - running[1]).double()
    assert ((differences - exact) / exact).abs().max() > 0.5


@pytest.mark.parametrize("start", [0, 50, 127])
def test_sums_after_a_large_decay_do_not_cancel_in_float32(start):
    # The large decay is anywhere in the first chunk, and the sums go on into the third.
    n = 300
    fq, fk, rows = (x.abs() for x in features(n))
    log_decay = -1e-4 * normal(BATCH, HEADS, n, seed=8).abs()
    log_decay[:, :, start] = -1e4
    single = [x.float() for x in (fq, fk, rows, log_decay)]
    expected = loop(*(x.double() for x in single))
    assert ((causal_sums(*single) - expected) / expected).abs().max() < 3e-6


# Weights of any size


def weighted(fq, fk, v, log_weight, log_decay=None, top=None):
    """Returns what causal attention by the engine gives with log weights and decays."""
    key_weight, in_units, _ = _causal_unit(log_weight, log_decay, top)
    return normalised(causal_sums(fq, fk, with_ones(v, key_weight), in_units), signed=False)


def plainly_weighted(fq, fk, v, log_weight, log_decay=None):
    """exp(w_j + g_{j+1} + ... + g_i) fq_i.fk_j over its sum, as it stands."""
    n = fq.shape[2]
    g = torch.zeros_like(log_weight) if log_decay is None else log_decay
    exponents = torch.stack(
        [
            torch.stack(
                [log_weight[..., j] + g[..., j + 1 : i + 1].sum(-1) for j in range(n)], dim=-1
            )
            for i in range(n)
        ],
        dim=-2,
    )
    similarity = (exponents.exp() * (fq @ fk.mT)).tril()
    return similarity @ v / similarity.sum(-1, keepdim=True)


def positive(n, seed=0):
    fq, fk, v = features(n, seed=seed)
    return fq.abs(), fk.abs(), v


def log_weights(n, spread=3.0):
    return spread * normal(BATCH, HEADS, n, seed=12)


@with_and_without_decay
@pytest.mark.parametrize("n", [1, 2, 13])
def test_units_change_nothing(small_chunks, n, decays):
    fq, fk, v = positive(n)
    log_weight, log_decay = log_weights(n), decays_of(n) if decays else None
    expected = plainly_weighted(fq, fk, v, log_weight, log_decay)
    assert_near(weighted(fq, fk, v, log_weight, log_decay), expected, EXACT)


@with_and_without_decay
def test_the_unit_is_the_largest_weight_so_far_as_it_has_decayed(decays):
    w, g = log_weights(30), decays_of(30) if decays else torch.zeros(BATCH, HEADS, 30).double()
    units, last = [], torch.full((BATCH, HEADS), LOWEST, dtype=torch.float64)
    for i in range(30):
        last = torch.maximum(last + g[..., i], w[..., i])
        units.append(last)
    units = torch.stack(units, -1)
    key_weight, in_units, top = _causal_unit(w, g if decays else None, None)
    assert_near(key_weight, (w - units).exp(), EXACT)
    assert_near(in_units[..., 1:], units[..., :-1] + g[..., 1:] - units[..., 1:], EXACT)
    assert_near(top, units[..., -1:], EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("spread", [1.0, 100.0, 1e4])
@pytest.mark.parametrize("decay", [0.0, 1.0, 100.0])
def test_no_exponent_is_positive(dtype, spread, decay):
    # But for rounding: of the sum of all decays, and of the weights.
    w, g = log_weights(500, spread).to(dtype), decay * decays_of(500).to(dtype)
    largest = float(w.abs().max() + g.sum(-1).abs().max())
    rounding = 4 * torch.finfo(dtype).eps * largest
    for log_decay in (None, g):
        key_weight, in_units, _ = _causal_unit(w, log_decay, None)
        assert key_weight.max().log() <= rounding
        assert in_units.max() <= rounding


@with_and_without_decay
@pytest.mark.parametrize("constant", [-1e4, -50.0, 50.0, 1e4])
def test_a_constant_added_to_all_log_weights_changes_nothing(small_chunks, constant, decays):
    fq, fk, v = positive(13)
    log_weight, log_decay = log_weights(13), decays_of(13) if decays else None
    out = weighted(fq, fk, v, log_weight, log_decay)
    # 10,000 + w has lost 4 digits of w.
    assert_near(weighted(fq, fk, v, log_weight + constant, log_decay), out, 1e-10)


def test_weights_that_grow_by_thousands_leave_the_last_and_those_that_fall_the_first(small_chunks):
    fq, fk, v = positive(13)
    rising = torch.arange(13, dtype=torch.float64).expand(BATCH, HEADS, -1) * 1000
    assert_near(weighted(fq, fk, v, rising), v, EXACT)
    assert_near(weighted(fq, fk, v, -rising), v[:, :, :1].expand_as(v), EXACT)
    # A decay that falls faster than the weights do leaves the last again.
    assert_near(weighted(fq, fk, v, -rising, torch.full_like(rising, -2000)), v, EXACT)


def test_weights_of_zero_are_forgotten_when_a_key_comes(small_chunks):
    fq, fk, v = positive(13)
    log_weight = log_weights(13)
    log_weight[:, :, :5] = LOWEST
    short = (x[:, :, 5:] for x in (fq, fk, v, log_weight))
    out = weighted(fq, fk, v, log_weight)[:, :, 5:]
    assert_near(out, weighted(*short), EXACT)


@with_and_without_decay
@pytest.mark.parametrize("piece", [1, 3])
def test_pieces_that_hand_on_the_last_unit_give_the_same(piece, decays):
    w, g = log_weights(12, spread=30.0), decays_of(12) if decays else None
    whole = _causal_unit(w, g, None)
    top, pieces = torch.full((BATCH, HEADS, 1), LOWEST, dtype=torch.float64), []
    for at in range(0, 12, piece):
        part = slice(at, at + piece)
        *made, top = _causal_unit(w[..., part], None if g is None else g[..., part], top)
        pieces.append(made)
    for i in range(2):
        assert_near(torch.cat([made[i] for made in pieces], -1), whole[i], EXACT)
    assert_near(top, whole[2], EXACT)


@with_and_without_decay
def test_gradients_through_the_units_are_those_of_the_plain_formula(small_chunks, decays):
    # The unit has none, as it cancels; so it must cancel in the gradient too.
    leaves = [*positive(10), log_weights(10)] + ([decays_of(10)] if decays else [])
    leaves = [x.requires_grad_() for x in leaves]
    to = normal(BATCH, HEADS, 10, E, seed=4)
    actual = torch.autograd.grad((weighted(*leaves) * to).sum(), leaves)
    expected = torch.autograd.grad((plainly_weighted(*leaves) * to).sum(), leaves)
    for of_engine, of_formula in zip(actual, expected, strict=True):
        assert of_formula.abs().max() > 1e-3
        assert_near(of_engine, of_formula, EXACT)
