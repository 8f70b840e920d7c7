"""Skyformer is the Nyström formula on the tokens it draws, and draws each real token alike."""

import math
from fractions import Fraction

import pytest
import torch
from attention_cases import MASKS, assert_near, build, inputs, mask_of, with_every_mask

from models import build_attention
from models.attention.skyformer import DRAW_BITS, _kernel_of_itself

EXACT = 1e-10


def skyformer(*, head_dim=8, dtype=torch.float64, seed=0, **options):
    """Returns an instance of two heads in evaluation, with a seed of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        attention = build_attention(
            "skyformer", num_heads=2, head_dim=head_dim, max_len=4096, model_dim=12, **options
        )
    return attention.to(dtype).eval()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def kernel(x, y):
    """exp(-|x_i - y_j|^2 / (2 sqrt(D))), from the differences of all pairs."""
    difference = x[..., :, None, :] - y[..., None, :, :]
    return (-difference.square().sum(-1) / (2 * math.sqrt(x.shape[-1]))).exp()


def places(draws, real):
    """The real tokens floor(u count) of one sample, in exact arithmetic."""
    tokens = [i for i, token in enumerate(real) if token]
    return [tokens[int(Fraction(draw, 2**DRAW_BITS) * len(tokens))] for draw in draws.tolist()]


def formula(attention, draws, q, k, key_mask=None):
    """K(q, Z) (K(Z, Z) + ridge I)^-1 K(Z, k) for each sample, 0 for masked keys."""
    mask = torch.ones(len(k), k.shape[2], dtype=torch.bool) if key_mask is None else key_mask
    of_queries, of_keys = draws.chunk(2)
    weights = []
    for x, y, real in zip(q, k, mask, strict=True):
        z = torch.cat([x[:, places(of_queries, real)], y[:, places(of_keys, real)]], 1)
        inner = kernel(z, z) + attention.config.ridge * torch.eye(z.shape[1], dtype=z.dtype)
        weights.append(kernel(x, z) @ torch.linalg.inv(inner) @ kernel(z, y) * real)
    return torch.stack(weights)


def assert_same_gradients(out, expected, leaves, tolerance):
    """Asserts that gradients along one random direction of the output are the same."""
    grad = torch.randn(out.shape, generator=generator(1), dtype=out.dtype)
    ours = torch.autograd.grad(out, leaves, grad)
    theirs = torch.autograd.grad(expected, leaves, grad)
    for mine, other in zip(ours, theirs, strict=True):
        assert other.abs().max() > 1e-3
        assert_near(mine, other, tolerance)


# The formula


@pytest.mark.parametrize("landmarks", [2, 12, 128])
@pytest.mark.parametrize("n", [1, 2, 9])
@with_every_mask
def test_it_is_the_nystrom_formula_on_the_drawn_tokens(landmarks, n, mask):
    # 128 landmarks of 9 tokens are drawn many times over: the ridge keeps the matrix regular.
    q, k, v = inputs(n)
    key_mask = MASKS[mask](n)
    attention = skyformer(landmarks=landmarks)
    expected = formula(attention, attention.kept, q, k, key_mask)
    assert_near(attention.weights(q, k, key_mask), expected, EXACT)
    assert_near(attention(q, k, v, key_mask), expected @ v, EXACT)


@with_every_mask
def test_its_gradients_flow_through_the_landmarks_too(mask):
    leaves = [x.requires_grad_() for x in inputs(9)]
    key_mask = MASKS[mask](9)
    attention = skyformer(landmarks=12)
    expected = formula(attention, attention.kept, *leaves[:2], key_mask) @ leaves[2]
    assert_same_gradients(attention(*leaves, key_mask), expected, leaves, EXACT)


def test_gradients_are_those_of_finite_differences():
    leaves = [x.requires_grad_() for x in inputs(6, d=3, e=2, batch=2)]
    key_mask, attention = mask_of("101101", "000000"), skyformer(head_dim=3, landmarks=8)
    assert torch.autograd.gradcheck(lambda *qkv: attention(*qkv, key_mask), leaves)


@pytest.mark.parametrize("d", [1, 2, 32, 64])
def test_the_width_of_the_kernel_is_that_of_the_heads_dimension(d):
    # Public code takes 32^(1/2) for heads of any size.
    q, k, _ = inputs(5, d=d)
    attention = skyformer(head_dim=d, landmarks=4)
    assert_near(attention.weights(q, k), formula(attention, attention.kept, q, k), EXACT)


def test_a_large_ridge_leaves_the_product_of_both_kernels_over_it():
    q, k, v = inputs(9)
    attention = skyformer(landmarks=12, ridge=1e8)
    at = torch.tensor(places(attention.kept, [True] * 9))
    z = torch.cat([q[:, :, at[:6]], k[:, :, at[6:]]], 2)
    assert_near(1e8 * attention(q, k, v), kernel(q, z) @ kernel(z, k) @ v, 1e-6)


# What it approximates


def with_every_token(n, ridge):
    """Returns an instance whose landmarks are each of n queries and each of n keys once."""
    attention = skyformer(landmarks=2 * n, ridge=ridge)
    each = [-(-i * 2**DRAW_BITS // n) for i in range(n)]
    attention.kept.copy_(torch.tensor(each + each))
    return attention


@pytest.mark.parametrize("n", [1, 2, 9, 33])
def test_with_all_tokens_as_landmarks_and_hardly_a_ridge_it_is_kernelized_attention(n):
    q, k, v = inputs(n)
    attention = with_every_token(n, ridge=1e-12)
    assert_near(attention.weights(q, k), build("kernelized").weights(q, k), 1e-8)
    assert_near(attention(q, k, v), build("kernelized")(q, k, v), 1e-8)


@with_every_mask
def test_the_same_of_masked_sequences_whose_tokens_are_drawn_more_than_once(mask):
    q, k, v = inputs(9)
    key_mask = MASKS[mask](9)
    out = with_every_token(9, ridge=1e-8)(q, k, v, key_mask)
    real = torch.ones(3, 1, 9, 1) if key_mask is None else key_mask[:, None, :, None]
    assert_near(out * real, build("kernelized")(q, k, v, key_mask) * real, 1e-6)


def test_tokens_of_a_few_kinds_are_approximated_exactly_once_each_kind_is_drawn():
    kinds, _, v = inputs(4)
    which = torch.arange(200) % 4
    q, k = kinds[:, :, which], kinds[:, :, which] + 0.1
    v = v[:, :, which]
    attention = skyformer(landmarks=64, ridge=1e-7)
    assert_near(attention(q, k, v), build("kernelized")(q, k, v), 1e-6)


def test_more_landmarks_approximate_better():
    q, k, v = (0.6 * x for x in inputs(300))
    expected = build("kernelized")(q, k, v)
    errors = [
        float((skyformer(landmarks=f, ridge=1e-4)(q, k, v) - expected).norm() / expected.norm())
        for f in (8, 32, 128, 512)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 10 * errors[-1]


# Draws


def test_half_of_the_landmarks_are_queries_and_half_are_keys_at_the_same_places_in_every_head():
    q, k, _ = inputs(9)
    attention = skyformer(landmarks=12)
    z = attention._landmarks(q, k, None)
    at = places(attention.kept, [True] * 9)
    assert torch.equal(z, torch.cat([q[:, :, at[:6]], k[:, :, at[6:]]], 2))


@pytest.mark.parametrize("n", [1, 3, 1000, 4096])
def test_the_last_draw_is_the_last_token_and_the_first_the_first(n):
    # In float32, u n rounds up to n.
    attention = skyformer(landmarks=2)
    attention.kept.copy_(torch.tensor([0, 2**DRAW_BITS - 1]))
    assert attention._places(None, 1, n).tolist() == [[0, n - 1]]
    real = torch.ones(1, n + 3, dtype=torch.bool)
    real[:, [0, 2, n + 2]] = False
    if n > 1:
        assert attention._places(real, 1, n + 3).tolist() == [[1, n + 1]]


def test_every_real_token_is_drawn_equally_often_and_no_masked_one_ever():
    key_mask = MASKS["holes and padding"](20)
    attention, steps = skyformer(landmarks=50).train(), generator()
    counts = torch.zeros(3, 20)
    for _ in range(200):
        attention.resample(steps)
        drawn = attention._places(key_mask, 3, 20)
        counts += torch.stack([row.bincount(minlength=20) for row in drawn])
    for row, real in zip(counts, key_mask, strict=True):
        assert not row[~real].any()
        expected = 200 * 50 / int(real.sum())
        chi_square = ((row[real] - expected).square() / expected).sum()
        # The mean is the degrees of freedom, the variance twice that; 13 tokens at most.
        freedom = int(real.sum()) - 1
        assert chi_square < freedom + 5 * math.sqrt(2 * freedom) + 1e-9


def test_draws_are_with_replacement_and_independent():
    attention = skyformer(landmarks=2000)
    at = attention._places(None, 1, 50)[0]
    counts = at.bincount(minlength=50)
    assert counts.min() > 15
    u = attention.kept.double() / 2**DRAW_BITS
    assert abs(u.mean() - 0.5) < 5 / math.sqrt(12 * 2000)
    pairs = (u[1:] - 0.5) * (u[:-1] - 0.5) * 12
    assert abs(pairs.mean()) < 5 / math.sqrt(2000)


def test_neither_padding_nor_batch_mates_change_which_tokens_are_drawn():
    attention = skyformer(landmarks=50)
    alone = attention._places(None, 1, 9)
    key_mask = torch.arange(40) < torch.tensor([[40], [9], [3]])
    assert torch.equal(attention._places(key_mask, 3, 40)[1:2], alone)
    # The same tokens behind three that are masked.
    later = (torch.arange(40) >= 3) & (torch.arange(40) < 12)
    assert torch.equal(attention._places(later[None], 1, 40), alone + 3)


def test_training_takes_the_new_draw_and_evaluation_keeps_its_own():
    q, k, v = inputs(9)
    attention = skyformer(landmarks=6)
    before = attention.kept.clone()
    attention.resample(generator(3))
    assert torch.equal(attention.kept, before)
    assert not torch.equal(attention.drawn, before)
    first, new = (formula(attention, x, q, k) for x in (attention.kept, attention.drawn))
    assert (first - new).abs().max() > 1e-3
    assert_near(attention(q, k, v), first @ v, EXACT)
    attention.train()
    assert_near(attention(q, k, v), new @ v, EXACT)
    assert_near(attention.weights(q, k), new, EXACT)


def test_drawing_takes_from_the_given_generator_alone():
    attention = skyformer()
    state = torch.get_rng_state()
    attention.resample(generator(1))
    first = attention.drawn.clone()
    assert torch.equal(torch.get_rng_state(), state)
    attention.resample(generator(2))
    assert not torch.equal(attention.drawn, first)
    attention.resample(generator(1))
    assert torch.equal(attention.drawn, first)


def test_a_checkpoint_holds_both_draws_and_there_are_no_parameters():
    q, k, v = inputs(9)
    attention, other = skyformer(seed=0).train(), skyformer(seed=1).train()
    attention.resample(generator(3))
    other.load_state_dict(attention.state_dict())
    assert torch.equal(other(q, k, v), attention(q, k, v))
    assert torch.equal(other.eval()(q, k, v), attention.eval()(q, k, v))
    assert set(attention.state_dict()) == {"kept", "drawn"}
    assert list(attention.parameters()) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_models_precision_is_no_matter_to_the_draws(dtype):
    assert torch.equal(skyformer(dtype=dtype).kept, skyformer().kept)


# Masks and precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("garbage", [0.0, 1.0, 1e6, 1e25])
def test_without_a_real_token_all_is_exactly_zero_and_gradients_are_too(dtype, garbage):
    q, k, v = inputs(9, batch=2, dtype=dtype)
    scale = torch.tensor([garbage, 1.0], dtype=dtype)[:, None, None, None]
    leaves = [(scale * x).requires_grad_() for x in (q, k, v)]
    out = skyformer(dtype=dtype)(*leaves, mask_of("000000000", "110100000"))
    assert not out[0].any()
    for gradient in torch.autograd.grad(out[:, :, :4].sum(), leaves):
        assert not gradient[0].any()
        assert gradient.isfinite().all()
    assert not skyformer(dtype=dtype).weights(q, k, mask_of("000000000", "110100000"))[0].any()


def test_garbage_under_the_mask_gets_no_gradient_and_gives_none():
    key_mask = MASKS["holes and padding"](23)
    real = key_mask[:, None, :, None]
    out, gradients = [], []
    for garbage in (0.0, 1e6):
        leaves = [torch.where(real, x, garbage).requires_grad_() for x in inputs(23)]
        out.append(skyformer()(*leaves, key_mask) * real)
        gradients.append(torch.autograd.grad(out[-1].square().sum(), leaves))
    assert_near(out[1], out[0], EXACT)
    for clean, dirty in zip(*gradients, strict=True):
        assert_near(dirty, clean, EXACT)
        assert not dirty.masked_select(~real).any()


@pytest.mark.parametrize("nearness", [0.0, 1e-6])
@pytest.mark.parametrize("size", [1e2, 1e4, 1e6])
def test_large_tokens_and_their_copies_keep_outputs_and_gradients_finite(size, nearness):
    # Queries are like keys, so that landmarks are alike; all else is too far to be felt.
    q, _, v = inputs(50, dtype=torch.float32)
    q = (size * q).requires_grad_()
    out = skyformer(dtype=torch.float32)(q, q * (1 + nearness), v)
    assert out.isfinite().all()
    assert out.abs().max() < 100 * v.abs().max()
    [gradient] = torch.autograd.grad(out.square().sum(), q)
    assert gradient.isfinite().all()


def test_the_kernel_of_a_landmark_and_itself_is_exactly_one_however_large_it_is():
    z = 1e6 * inputs(50, d=33, dtype=torch.float32)[0]
    matrix = _kernel_of_itself(z)
    assert torch.equal(matrix.diagonal(dim1=-2, dim2=-1), torch.ones(3, 2, 50))
    assert matrix.max() == 1


@pytest.mark.parametrize("ridge", [0.1, 1e-3])
def test_float32_is_float64_for_many_landmarks_of_few_tokens_too(ridge):
    q, k, v = (0.3 * x for x in inputs(60))
    expected = skyformer(ridge=ridge)(q, k, v)
    actual = skyformer(ridge=ridge, dtype=torch.float32)(q.float(), k.float(), v.float())
    assert_near(actual, expected, 2e-5)


def test_bf16_tokens_lose_the_rounding_of_the_output_alone():
    # A solve in bf16, whose ridge is lost beside 1 + 0.1, shows.
    tokens = [x.bfloat16() for x in inputs(60)]
    with torch.autocast("cpu", torch.bfloat16):
        out = skyformer(dtype=torch.float32)(*tokens)
    assert out.dtype == torch.bfloat16
    assert_near(out, skyformer()(*(x.double() for x in tokens)), 2**-8)


# Options and forms


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"landmarks": 0}, "landmarks must be even and at least 2"),
        ({"landmarks": -2}, "landmarks must be even and at least 2"),
        ({"landmarks": 7}, "landmarks must be even and at least 2"),
        ({"ridge": 0.0}, "ridge must be positive and finite"),
        ({"ridge": -0.1}, "ridge must be positive and finite"),
        ({"ridge": math.inf}, "ridge must be positive and finite"),
        ({"ridge": math.nan}, "ridge must be positive and finite"),
    ],
)
def test_options_that_no_run_can_use_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        skyformer(**options)


def test_the_published_options_are_the_defaults():
    assert skyformer().config == type(skyformer().config)(landmarks=128, ridge=0.1)


def test_it_is_bidirectional_self_attention_alone_as_any_token_may_be_a_landmark():
    assert skyformer().capabilities.patterns == {"self"}
    q, k, v = inputs(9)
    later = k.clone()
    later[:, :, 5:] += 1
    # A later key is felt by earlier queries even where its value is 0.
    v[:, :, 5:] = 0
    attention = skyformer(landmarks=6)
    assert (attention(q, later, v) - attention(q, k, v))[:, :, :5].abs().max() > 1e-3


def test_the_declared_operations_grow_with_the_length_and_the_cube_of_the_landmarks():
    cost = skyformer(landmarks=30).cost(100, 100)
    kernels = 2 * (2 * 100 * 30 * (10 + 8))
    inner = 2 * 30 * 30 * 8 + 2 * 30**3 // 3 + 2 * 30 * 30 * 8
    assert cost.flops == 2 * (kernels + inner)
    assert cost.parameters == cost.state_floats == 0
