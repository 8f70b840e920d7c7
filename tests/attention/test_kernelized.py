"""Kernelized attention is the explicit Gaussian matrix, in whatever tiles it is computed."""

import math

import pytest
import torch
from attention_cases import MASKS, assert_near, build, inputs, mask_of, with_every_mask

from models.attention.engines import gaussian as engine
from models.attention.engines.gaussian import Tile
from models.dropout import DeviceDraws

EXACT = 1e-12


def explicit_weights(q, k, key_mask=None, causal=False):
    """exp(-|q_i - k_j|^2 / (2 sqrt(D))), from the differences of all pairs."""
    difference = q[:, :, :, None] - k[:, :, None]
    squares = torch.einsum("bhijd,bhijd->bhij", difference, difference)
    weights = (-squares / (2 * math.sqrt(q.shape[-1]))).exp()
    if key_mask is not None:
        weights = weights * key_mask[:, None, None, :]
    if causal:
        at = torch.arange(k.shape[2])
        weights = weights * (at <= at[:, None])
    return weights


def assert_same_gradients(out, expected, leaves, tolerance):
    """Asserts that gradients along one random direction of the output are the same."""
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    ours = torch.autograd.grad(out, leaves, grad)
    theirs = torch.autograd.grad(expected, leaves, grad)
    for mine, other in zip(ours, theirs, strict=True):
        assert_near(mine, other, tolerance)


@pytest.fixture(params=["one tile", "small tiles", "small tiles of two matrices"])
def tiles(request, monkeypatch):
    """Makes tiles of 5 x 8 weights, so that 23 tokens are 5 x 3 tiles with remainders."""
    floats = {"small tiles": 40, "small tiles of two matrices": 80}
    if request.param in floats:
        monkeypatch.setattr(engine, "CPU_TILE", Tile(5, 8, floats[request.param]))


with_shapes = pytest.mark.parametrize(
    ("n", "s", "causal"),
    [(n, n, causal) for n in (1, 8, 23) for causal in (False, True)]
    + [(n, s, False) for n, s in [(13, 23), (23, 6), (1, 23)]],
)


# The formula


@with_every_mask
@with_shapes
def test_it_is_the_explicit_gaussian_matrix_times_the_values(tiles, mask, n, s, causal):
    q, k, v = inputs(n, s)
    key_mask = MASKS[mask](s)
    attention, expected = build("kernelized"), explicit_weights(q, k, key_mask, causal)
    assert_near(attention.weights(q, k, key_mask, causal), expected, EXACT)
    assert_near(attention(q, k, v, key_mask, causal), expected @ v, EXACT)


@with_every_mask
@with_shapes
def test_its_gradients_are_those_of_the_explicit_matrix(tiles, mask, n, s, causal):
    leaves = [x.requires_grad_() for x in inputs(n, s)]
    key_mask = MASKS[mask](s)
    out = build("kernelized")(*leaves, key_mask, causal)
    expected = explicit_weights(*leaves[:2], key_mask, causal) @ leaves[2]
    assert_same_gradients(out, expected, leaves, EXACT)


@pytest.mark.parametrize("n", [255, 257, 512, 513])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths_around_the_tiles_of_a_cpu_are_no_matter(n, causal):
    leaves = [x.requires_grad_() for x in inputs(n, batch=1, d=3)]
    out = build("kernelized", head_dim=3)(*leaves, causal=causal)
    expected = explicit_weights(*leaves[:2], causal=causal) @ leaves[2]
    assert_near(out, expected, EXACT)
    assert_same_gradients(out, expected, leaves, EXACT)


@pytest.mark.parametrize("d", [1, 2, 16, 64])
def test_the_width_of_the_kernel_grows_with_the_heads_dimension(d):
    # Public Skyformer code has the width of 32 dimensions for heads of any size.
    q, k, _ = inputs(5, d=d)
    squares = torch.cdist(q, k).square()
    weights = build("kernelized", head_dim=d).weights(q, k)
    assert_near(-2 * d**0.5 * weights.log(), squares, 1e-10)


def test_a_query_weighs_a_key_like_itself_by_one_and_no_key_by_more():
    q, _, _ = inputs(9)
    weights = build("kernelized").weights(q, q)
    assert torch.equal(weights.diagonal(dim1=-2, dim2=-1), torch.ones(3, 2, 9))
    assert weights.max() == 1
    assert weights.min() > 0


def test_over_its_row_sums_it_is_softmax_if_keys_are_of_equal_length():
    # The queries' factor cancels, and so does that of keys of one length.
    q, k, v = inputs(9)
    k = 3 * k / k.norm(dim=-1, keepdim=True)
    attention = build("kernelized")
    out = attention(q, k, v) / attention(q, k, torch.ones_like(v))
    assert_near(out, build("softmax")(q, k, v), EXACT)


def test_it_is_the_softmax_numerator_with_a_factor_of_each_query_and_key():
    q, k, v = inputs(9)
    scale = 8**-0.5
    of_query, of_key = ((-x.square().sum(-1) * scale / 2).exp() for x in (q, k))
    numerator = (q @ k.mT * scale).exp() @ (of_key[..., None] * v)
    assert_near(build("kernelized")(q, k, v), of_query[..., None] * numerator, EXACT)


def test_outputs_grow_with_the_number_of_keys_as_nothing_divides_them():
    q, k, v = inputs(9)
    attention = build("kernelized")
    twice = attention(q, torch.cat([k, k], 2), torch.cat([v, v], 2))
    assert_near(twice, 2 * attention(q, k, v), EXACT)


def test_a_query_far_from_all_keys_gives_almost_nothing():
    q, k, v = inputs(9)
    assert build("kernelized")(q + 20, k, v).abs().max() < 1e-30


def test_one_vector_added_to_all_queries_and_keys_changes_nothing():
    q, k, v = inputs(9)
    shift = torch.linspace(-3, 3, 8, dtype=q.dtype)
    attention = build("kernelized")
    assert_near(attention(q + shift, k + shift, v), attention(q, k, v), EXACT)
    assert (attention(q, k + shift, v) - attention(q, k, v)).abs().max() > 0.1


@pytest.mark.parametrize("size", [1e3, 1e5, 1e8])
def test_rounding_of_large_vectors_that_are_alike_leaves_no_weight_above_one(size):
    # The exponent is a difference of numbers up to size^2, of which float32 keeps 7 digits.
    q, _, _ = inputs(50, dtype=torch.float32)
    q = (size * q).requires_grad_()
    weights = build("kernelized")(q, q, torch.eye(50).expand(3, 2, -1, -1))
    assert weights.max() <= 1
    assert weights.min() >= 0
    [gradient] = torch.autograd.grad(weights.sum(), q)
    assert gradient.isfinite().all()


# Masks


def test_without_a_real_key_all_is_exactly_zero_and_so_are_gradients(tiles):
    leaves = [x.requires_grad_() for x in inputs(4, batch=2)]
    out = build("kernelized")(*leaves, mask_of("0000", "1011"))
    assert not out[0].any()
    for gradient in torch.autograd.grad(out.sum(), leaves):
        assert not gradient[0].any()
        assert gradient[1].isfinite().all()


@pytest.mark.parametrize("causal", [False, True])
def test_garbage_under_the_mask_gets_no_gradient_and_gives_none(tiles, causal):
    q, k, v = inputs(23)
    key_mask = MASKS["holes and padding"](23)
    real = key_mask[:, None, :, None]
    out, gradients = [], []
    for garbage in (0.0, 1e6):
        leaves = [torch.where(real, x, garbage).requires_grad_() for x in (q, k, v)]
        out.append(build("kernelized")(*leaves, key_mask, causal) * real)
        gradients.append(torch.autograd.grad(out[-1].square().sum(), leaves))
    assert_near(out[1], out[0], EXACT)
    for clean, dirty in zip(*gradients, strict=True):
        assert_near(dirty, clean, EXACT)
        assert not dirty.masked_select(~real).any()


# Tiles


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "s"), [(23, 23), (3, 30), (30, 3)])
def test_tiles_keep_their_size_and_cover_every_admissible_weight_once(monkeypatch, n, s, causal):
    if causal and n != s:
        return
    tile = Tile(5, 8, 80)
    monkeypatch.setattr(engine, "CPU_TILE", tile)
    q, k, _ = inputs(n, s)
    y, z, _ = engine._factors(q, k, None)
    weights, times = torch.zeros(6, n, s, dtype=q.dtype), torch.zeros(6, n, s)
    for b in engine._blocks(y, z, causal, None):
        _, height, width = b.weights.shape
        assert height <= tile.rows
        assert width <= tile.keys
        assert b.weights.numel() <= tile.floats
        weights[b.group, b.rows, b.keys] += b.weights
        times[b.group, b.rows, b.keys] += 1
    expected = explicit_weights(q, k, causal=causal).flatten(0, 1)
    assert_near(weights, expected, EXACT)
    assert times.max() == 1
    assert (times[expected > 0] == 1).all()
    if causal:
        # Tiles of the future alone are left out.
        assert not times[:, :5, 8:].any()


# Gradients


def test_gradients_are_those_of_finite_differences(tiles):
    leaves = [x.requires_grad_() for x in inputs(6, d=3, e=2, batch=2, heads=1)]
    key_mask = mask_of("101101", "000000")
    attention = build("kernelized", num_heads=1, head_dim=3)
    assert torch.autograd.gradcheck(lambda *qkv: attention(*qkv, key_mask), leaves)
    assert torch.autograd.gradcheck(lambda *qkv: attention(*qkv, key_mask, True), leaves)


def test_a_second_derivative_is_refused_rather_than_wrong():
    leaves = [x.requires_grad_() for x in inputs(4)]
    out = build("kernelized")(*leaves)
    [gradient] = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_strided_inputs_give_the_same_as_contiguous_ones(tiles):
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(23)]
    attention = build("kernelized")
    assert torch.equal(attention(*strided), attention(*(x.contiguous() for x in strided)))


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 inputs", "bf16 autocast"])
def test_bf16_rounds_outputs_and_gradients_alone(autocast):
    leaves = [x.bfloat16().requires_grad_() for x in inputs(50)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = build("kernelized")(*leaves)
        ours = torch.autograd.grad(out, leaves, torch.ones_like(out))
    expected = explicit_weights(*exact[:2]) @ exact[2]
    assert out.dtype == torch.bfloat16
    assert_near(out, expected, 2**-8)
    theirs = torch.autograd.grad(expected, exact, torch.ones_like(expected))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.bfloat16
        assert_near(mine, other, 2**-7)


# Dropout


@pytest.fixture(params=["cpu", "other devices"])
def draws(request, monkeypatch):
    """The draws of CPU, and those of other devices, which torch makes on CPU as well."""
    if request.param != "cpu":
        monkeypatch.setattr(
            engine, "draws_on", lambda device, p, seed: DeviceDraws(p, seed, device)
        )


def draw(attention, *arguments, seed=0, **options):
    """Calls the attention in training, with a fixed draw."""
    torch.manual_seed(seed)
    return attention.train()(*arguments, **options)


def kept(attention, q, k, key_mask=None, causal=False, seed=0):
    """Returns which weights a draw keeps, seen through the identity as values."""
    s = k.shape[2]
    identity = torch.eye(s, dtype=q.dtype).expand(*k.shape[:2], s, s)
    return draw(attention, q, k, identity, key_mask, causal, seed=seed) != 0


@with_every_mask
@with_shapes
@pytest.mark.parametrize("p", [0.25, 0.75])
def test_dropping_is_that_of_the_explicit_matrix_forward_and_backward(
    tiles, draws, mask, p, n, s, causal
):
    attention = build("kernelized", dropout=p)
    key_mask = MASKS[mask](s)
    leaves = [x.requires_grad_() for x in inputs(n, s)]
    keep = kept(attention, *leaves[:2], key_mask, causal)
    out = draw(attention, *leaves, key_mask, causal)
    weights = explicit_weights(*leaves[:2], key_mask, causal) * keep / (1 - p)
    assert_near(out, weights @ leaves[2], EXACT)
    assert_same_gradients(out, weights @ leaves[2], leaves, EXACT)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_drops_each_weight_with_probability_p_independently(monkeypatch, draws, p):
    monkeypatch.setattr(engine, "CPU_TILE", Tile(16, 32, 2**10))
    q, k, _ = inputs(128, batch=2, heads=4)
    keep = kept(build("kernelized", num_heads=4, dropout=p), q, k).double()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(keep.mean() - (1 - p)) < 5 * deviation / keep.numel() ** 0.5
    centred = (keep - (1 - p)) / deviation
    # Sample, head, row (also one tile of 16 apart) and column (also one tile of 32 apart).
    for axis, distance in [(0, 1), (1, 1), (1, 2), (2, 1), (2, 16), (3, 1), (3, 4), (3, 32)]:
        length = keep.shape[axis] - distance
        pairs = centred.narrow(axis, 0, length) * centred.narrow(axis, distance, length)
        assert abs(pairs.mean()) < 5 / pairs.numel() ** 0.5, (axis, distance)


def test_the_seed_of_torch_decides_the_draw(tiles, draws):
    attention = build("kernelized", dropout=0.25)
    qkv = inputs(23, dtype=torch.float32)
    first = draw(attention, *qkv, seed=1)
    assert torch.equal(draw(attention, *qkv, seed=1), first)
    assert not torch.equal(draw(attention, *qkv, seed=2), first)
    assert not torch.equal(attention(*qkv), attention(*qkv))


@pytest.mark.parametrize(("p", "training"), [(0.25, False), (0.0, True), (0.0, False)])
def test_nothing_is_dropped_or_drawn_in_evaluation_or_at_zero(p, training):
    attention = build("kernelized", dropout=p).train(training)
    q, k, v = inputs(9)
    before = torch.get_rng_state()
    assert_near(attention(q, k, v), explicit_weights(q, k) @ v, EXACT)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_declared_operations_are_two_products_one_of_them_two_columns_wider():
    cost = build("kernelized").cost(100, 50)
    assert cost.flops == 2 * (2 * 100 * 50 * 10 + 2 * 100 * 50 * 8)
    assert cost.parameters == cost.state_floats == 0
