"""Performer is FAVOR+ as its paper writes it, with the paper's statistics and no epsilon.

Where many draws are needed, one instance with a head for each draw makes them at once: heads have
vectors of their own.
"""

import math

import pytest
import torch
from attention_cases import MASKS, assert_near, inputs, mask_of, with_every_mask
from torch.utils.flop_counter import FlopCounterMode

from lra.measure import allocated_peak
from models import build_attention
from models.attention import capabilities, performer

EXACT = 1e-10
HEADS, HEAD_DIM = 2, 8
SIZES = [(9, 9, False), (9, 9, True), (4, 9, False), (9, 4, False)]

for_every_size = pytest.mark.parametrize(("n", "s", "causal"), SIZES)
orthogonal_or_not = pytest.mark.parametrize("orthogonal", [True, False])


def favor(*, num_heads=HEADS, head_dim=HEAD_DIM, dtype=torch.float64, seed=0, **options):
    """Returns an instance in evaluation, with a seed of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        attention = build_attention(
            "performer",
            num_heads=num_heads,
            head_dim=head_dim,
            max_len=4096,
            model_dim=12,
            **options,
        )
    return attention.to(dtype).eval()


def small(n, s=None, **arguments):
    """Returns q and k whose entries have a standard deviation of 0.3, and v."""
    q, k, v = inputs(n, s, **arguments)
    return 0.3 * q, 0.3 * k, v


# The formula


def phi(x, vectors):
    """F^-1/2 exp(w_f.x~ - |x~|^2 / 2) of x (..., d), vectors the w_f (F, d)."""
    x = x / x.shape[-1] ** 0.25
    features = [(x @ w - (x * x).sum(-1) / 2).exp() for w in vectors]
    return torch.stack(features, -1) / math.sqrt(len(vectors))


def formula(vectors, q, k, key_mask=None, causal=False):
    """phi(q_i).phi(k_j) over its sum, with the vectors of each head (H, F, d)."""
    heads = range(q.shape[1])
    fq, fk = (torch.stack([phi(x[:, h], vectors[h]) for h in heads], 1) for x in (q, k))
    similarity = torch.einsum("bhif,bhjf->bhij", fq, fk)
    if key_mask is not None:
        similarity = similarity * key_mask[:, None, None, :]
    if causal:
        similarity = similarity.tril()
    total = similarity.sum(-1, keepdim=True)
    return similarity / torch.where(total == 0, 1.0, total)


@for_every_size
@orthogonal_or_not
@with_every_mask
def test_it_is_the_papers_formula(n, s, causal, orthogonal, mask):
    q, k, v = inputs(n, s)
    attention, key_mask = favor(features=33, orthogonal=orthogonal), MASKS[mask](s)
    expected = formula(attention.fixed, q, k, key_mask, causal)
    assert_near(attention.weights(q, k, key_mask, causal), expected, EXACT)
    assert_near(attention(q, k, v, key_mask, causal), expected @ v, EXACT)


@for_every_size
@with_every_mask
def test_its_gradients_are_those_of_the_formula(n, s, causal, mask):
    q, k, v = leaves = [x.requires_grad_() for x in inputs(n, s)]
    attention, key_mask = favor(features=33), MASKS[mask](s)
    actual = torch.autograd.grad(attention(q, k, v, key_mask, causal).square().sum(), leaves)
    out = formula(attention.fixed, q, k, key_mask, causal) @ v
    expected = torch.autograd.grad(out.square().sum(), leaves)
    for of_attention, of_formula in zip(actual, expected, strict=True):
        assert of_formula.abs().max() > 1e-3
        assert_near(of_attention, of_formula, EXACT)


@pytest.mark.parametrize("features", [1, 2, 5, 40])
@pytest.mark.parametrize("head_dim", [1, 2, 3])
@orthogonal_or_not
def test_features_may_be_fewer_or_more_than_dimensions_and_no_multiple(
    features, head_dim, orthogonal
):
    q, k, v = inputs(9, d=head_dim)
    attention = favor(head_dim=head_dim, features=features, orthogonal=orthogonal)
    assert attention.fixed.shape == (HEADS, features, head_dim)
    assert_near(attention(q, k, v), formula(attention.fixed, q, k) @ v, EXACT)
    state = attention.init_state(3, torch.device("cpu"), torch.float64)
    step, _ = attention.step(*(x[:, :, :1] for x in (q, k, v)), state)
    assert_near(step, v[:, :, :1], EXACT)


@pytest.mark.parametrize("block", [1, 60, 150, 400, 5000])
@pytest.mark.parametrize("mask", ["no mask", "holes and padding"])
@pytest.mark.parametrize(("n", "s"), [(13, 13), (5, 13), (13, 5)])
def test_the_size_of_blocks_is_of_no_consequence(monkeypatch, block, mask, n, s):
    # One weight at a time, parts of a sequence, and two of three sequences at once.
    q, k, v = leaves = [x.requires_grad_() for x in inputs(n, s)]
    attention, key_mask = favor(features=11), MASKS[mask](s)
    monkeypatch.setattr(performer, "CPU_BLOCK", block)
    out = attention(q, k, v, key_mask)
    expected = formula(attention.fixed, q, k, key_mask) @ v
    assert_near(out, expected, EXACT)
    actual = torch.autograd.grad(out.square().sum(), leaves)
    gradients = torch.autograd.grad(expected.square().sum(), leaves)
    for of_attention, of_formula in zip(actual, gradients, strict=True):
        assert_near(of_attention, of_formula, EXACT)


def test_features_are_never_kept():
    # Those of the queries alone would be 8.4 MB; two blocks of 2 MB are what there is.
    q, k, v = (x.requires_grad_() for x in inputs(1024, batch=4, dtype=torch.float32))
    attention = favor(dtype=torch.float32)
    peak = allocated_peak(lambda: attention(q, k, v).sum().backward())
    assert peak < 4 * 4 * HEADS * 1024 * 256


def test_operations_are_those_declared():
    q, k, v = inputs(50, 70, e=HEAD_DIM, batch=1, dtype=torch.float32)
    counter = FlopCounterMode(display=False)
    attention = favor(dtype=torch.float32)
    with torch.no_grad(), counter:
        attention(q, k, v)
    assert counter.get_total_flops() == attention.cost(50, 70).flops


# Large norms, and what public code adds or subtracts


def by_logarithms(attention, q, k, key_mask=None, causal=False):
    """The formula as softmax_j of log sum_f exp(w_f.(q~_i + k~_j)) - |k~_j|^2 / 2."""
    d = q.shape[-1]
    q, k = q / d**0.25, k / d**0.25
    exponents = torch.einsum("bhijd,hfd->bhijf", q[:, :, :, None] + k[:, :, None], attention.fixed)
    scores = exponents.logsumexp(-1) - k.square().sum(-1)[:, :, None] / 2
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], -torch.inf)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    return scores.softmax(-1)


@pytest.mark.parametrize("size", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("mask", ["no mask", "suffix padding"])
def test_no_norm_is_too_large(size, mask):
    # Exponents of thousands: similarities overflow every format, or vanish.
    q, k, v = inputs(30)
    q, k = size * q, size * k
    attention, key_mask = favor(features=64), MASKS[mask](30)
    expected = by_logarithms(attention, q, k, key_mask)
    assert_near(attention(q, k, v, key_mask), expected @ v, EXACT)


@torch.no_grad()
@pytest.mark.parametrize("size", [1.0, 5.0])
def test_causal_denominators_do_not_fall_to_their_guard(size):
    # At size 5, products of features whose largest is 1 fall below 1e-6.
    q, k, v = inputs(200, batch=1)
    q, k = size * q, size * k
    attention = favor(features=64)
    expected = by_logarithms(attention, q, k, causal=True) @ v
    assert_near(attention(q, k, v, causal=True), expected, EXACT)
    state, steps = attention.init_state(1, torch.device("cpu"), torch.float64), []
    for t in range(200):
        step, state = attention.step(*(x[:, :, t : t + 1] for x in (q, k, v)), state)
        steps.append(step)
    assert_near(torch.cat(steps, 2), expected, EXACT)


@pytest.mark.parametrize("at", [100, 127, 128, 199])
def test_a_later_huge_key_leaves_no_trace_in_causal_outputs(at):
    # A maximum over all keys with an epsilon, as in public code, would erase the earlier ones.
    q, k, v = inputs(200, dtype=torch.float32)
    attention = favor(dtype=torch.float32)
    huge = k.clone()
    huge[:, :, at] *= 100
    out = attention(q, k, v, causal=True)
    changed = attention(q, huge, v, causal=True)
    assert_near(changed[:, :, :at], out[:, :, :at], 1e-6)
    assert changed.isfinite().all()


def test_a_key_of_little_similarity_has_a_weight_of_little():
    # An epsilon of 1e-4 in every feature would give 1e-4 where the formula gives e^-50.
    k = torch.zeros(1, 1, 2, 1, dtype=torch.float64)
    k[:, :, 1] = 10.0
    attention = favor(num_heads=1, head_dim=1, features=16)
    attention.fixed.fill_(0.0)
    weights = attention.weights(torch.zeros_like(k), k)
    assert_near(weights[0, 0, 0, 1] * math.e**50, torch.tensor(1.0), 1e-9)
    v = torch.tensor([0.0, 1.0], dtype=torch.float64).view(1, 1, 2, 1)
    out = attention(torch.zeros_like(k), k, v)
    assert_near(out[0, 0, 0, 0] * math.e**50, torch.tensor(1.0), 1e-9)


@pytest.mark.parametrize("kernel", ["softmax", "relu"])
def test_masked_keys_are_missing_from_the_denominator(kernel):
    # phi(0) is not 0: a mask on k or on v alone would leave it in the sum.
    q, k, v = inputs(4, batch=1)
    k[:, :, 1:] = 0.0
    out = favor(kernel=kernel)(q, k, v, mask_of("1000"))
    assert_near(out, v[:, :, :1].expand_as(out), EXACT)


# Random vectors


@orthogonal_or_not
def test_heads_and_draws_have_vectors_of_their_own(orthogonal):
    attention = favor(orthogonal=orthogonal)
    first, second = attention.fixed
    assert (first - second).abs().max() > 0.1
    attention.resample(torch.Generator().manual_seed(1))
    assert (attention.drawn - attention.fixed).abs().max() > 0.1


def test_training_takes_the_last_draw_and_evaluation_its_own():
    q, k, v = inputs(9)
    attention = favor()
    attention.resample(torch.Generator().manual_seed(3))
    assert_near(attention(q, k, v), formula(attention.fixed, q, k) @ v, EXACT)
    attention.train()
    for causal in (False, True):
        expected = formula(attention.drawn, q, k, causal=causal)
        assert_near(attention(q, k, v, causal=causal), expected @ v, EXACT)
        assert_near(attention.weights(q, k, causal=causal), expected, EXACT)


def test_a_draw_depends_on_the_generator_alone_and_draws_go_on_from_it():
    one, other = favor(seed=0), favor(seed=1)
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    draws = []
    for _ in range(3):
        for attention, generator in zip((one, other), generators, strict=True):
            attention.resample(generator)
        assert torch.equal(one.drawn, other.drawn)
        draws.append(one.drawn.clone())
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[1], draws[2])
    assert not torch.equal(one.fixed, other.fixed)


def test_both_draws_are_part_of_the_state():
    attention, copy = favor(seed=0), favor(seed=1)
    attention.resample(torch.Generator().manual_seed(7))
    copy.load_state_dict(attention.state_dict())
    q, k, v = inputs(9)
    assert torch.equal(copy(q, k, v), attention(q, k, v))
    assert torch.equal(copy.train()(q, k, v), attention.train()(q, k, v))


@pytest.mark.parametrize(("head_dim", "features"), [(8, 24), (8, 21), (8, 5), (2, 7), (1, 3)])
def test_vectors_are_orthogonal_in_blocks_of_the_dimension(head_dim, features):
    for head in favor(head_dim=head_dim, features=features).fixed:
        for block in head.split(head_dim):
            unit = block / block.norm(dim=-1, keepdim=True)
            assert_near(unit @ unit.T, torch.eye(len(block)), 1e-6)
    if features > head_dim > 1:
        first, second = head[:head_dim], head[head_dim : 2 * head_dim]
        assert (first @ second.T).abs().max() > 0.1


def test_independent_vectors_are_not_orthogonal():
    block = favor(orthogonal=False).fixed[0, :HEAD_DIM]
    assert (block @ block.T - block.square().sum(-1).diag()).abs().max() > 0.1


@orthogonal_or_not
@pytest.mark.parametrize("head_dim", [1, 2, 8])
def test_every_vector_is_standard_normal(head_dim, orthogonal):
    # The Q of a QR decomposition as LAPACK gives it has first entries of one sign.
    vectors = favor(num_heads=2000, head_dim=head_dim, features=2 * head_dim, orthogonal=orthogonal)
    draws = vectors.fixed  # (2000, F, d): a sample of each of F d entries
    error = 2000**-0.5
    assert (draws.mean(0) / error).abs().max() < 5
    assert ((draws.square().mean(0) - 1) / (2**0.5 * error)).abs().max() < 5
    assert ((draws**4).mean(0) - 3).abs().max() < 5 * 96**0.5 * error
    # Lengths are those of normal vectors: |w|^2 has mean d and variance 2 d.
    squares = draws.square().sum(-1)
    assert ((squares.mean(0) - head_dim) / ((2 * head_dim) ** 0.5 * error)).abs().max() < 5
    assert (squares.var(0) / (2 * head_dim) - 1).abs().max() < 0.5
    # And each is independent of direction and of the others' lengths.
    lengths = squares - head_dim
    covariance = lengths.T @ lengths / 2000 / (2 * head_dim)
    assert (covariance - covariance.diag().diag()).abs().max() < 8 * error
    direction = draws / squares.sqrt()[..., None]
    assert (lengths[..., None] * direction).mean(0).abs().max() < 5 * (2 * head_dim) ** 0.5 * error


# Statistics


DRAWS, PAIRS = 400, 40


def estimates(**options):
    """Returns pairs x, y (PAIRS, d) and DRAWS estimates of each kernel (DRAWS, PAIRS)."""
    generator = torch.Generator().manual_seed(1)
    shape = (2, PAIRS, HEAD_DIM)
    x, y = 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    vectors = favor(num_heads=DRAWS, **options).fixed
    return x, y, torch.stack([(phi(x, w) * phi(y, w)).sum(-1) for w in vectors])


def moments(x, y, features, orthogonal):
    """exp(x~.y~), and the variance exp(2 x~.y~) (exp(r) - 1) / F with r = |x~ + y~|^2.

    Two orthogonal vectors have |w + w'|^2 ~ chi^2 with 2 d degrees of freedom, in a direction that
    is uniform. So the mean of exp((w + w').z) is not exp(|z|^2), but the hypergeometric series
    sum_k (d)_k / (d/2)_k (|z|^2 / 2)^k / k!, which is less: each vector of a block has d - 1 others
    with which its errors are correlated negatively.
    """
    x, y = (z / z.shape[-1] ** 0.25 for z in (x, y))
    kernel, r = (x * y).sum(-1).exp(), (x + y).square().sum(-1)
    relative = r.exp() - 1
    if orthogonal:
        series = term = torch.ones_like(r)
        for k in range(60):
            term = term * (HEAD_DIM + k) / (HEAD_DIM / 2 + k) * (r / 2) / (k + 1)
            series = series + term
        relative = relative + (HEAD_DIM - 1) * (series * (-r).exp() - 1)
    return kernel, kernel.square() * relative / features


@orthogonal_or_not
@pytest.mark.parametrize("features", [8, 32])
def test_similarities_are_unbiased_with_the_variance_that_theory_has(features, orthogonal):
    x, y, estimated = estimates(features=features, orthogonal=orthogonal)
    kernel, variance = moments(x, y, features, orthogonal)
    z = (estimated.mean(0) - kernel) / (variance / DRAWS).sqrt()
    assert (z.abs() < 5).double().mean() > 0.999
    assert 0.7 < z.square().mean().sqrt() < 1.4
    assert 0.85 < (estimated.var(0) / variance).mean() < 1.15


def test_orthogonal_vectors_have_less_variance():
    x, y, _ = estimates(features=8)
    _, independent = moments(x, y, 32, orthogonal=False)
    _, orthogonal = moments(x, y, 32, orthogonal=True)
    assert (orthogonal < independent).all()
    spread = [estimates(features=32, orthogonal=o)[2].var(0).mean() for o in (True, False)]
    assert spread[0] < 0.95 * spread[1]


def output_error(features, orthogonal=False, scale=HEAD_DIM**-0.5):
    """Returns the root mean square error of outputs, for softmax of q.k times a scale."""
    draws = 50
    q, k, v = (x.expand(-1, draws, -1, -1) for x in small(6, 12, batch=3, heads=1))
    attention = favor(num_heads=draws, features=features, orthogonal=orthogonal, seed=features)
    expected = (q @ k.mT * scale).softmax(-1) @ v
    return (attention(q, k, v) - expected).square().mean().sqrt()


def test_errors_fall_with_the_square_root_of_the_features():
    sizes = [64, 256, 1024, 4096]
    rmse = torch.stack([output_error(size) for size in sizes]).log()
    logs = torch.tensor(sizes, dtype=torch.float64).log()
    deviation = logs - logs.mean()
    slope = (deviation * rmse).sum() / deviation.square().sum()
    assert -0.55 < slope < -0.45


def test_orthogonal_vectors_err_less():
    assert output_error(256, orthogonal=True) < 0.9 * output_error(256, orthogonal=False)


def test_it_tends_to_softmax_over_the_square_root_of_the_dimension():
    # Scaled twice, as in public code, it would tend to softmax of q.k / d.
    assert output_error(4096) < 0.2 * output_error(4096, scale=1 / HEAD_DIM)


# The relu kernel


@for_every_size
@with_every_mask
def test_the_relu_kernel_is_relu_and_a_little_without_projection_and_scale(n, s, causal, mask):
    q, k, v = inputs(n, s)
    key_mask = MASKS[mask](s)
    fq, fk = (x.clamp(min=0) + 1e-3 for x in (q, k))
    similarity = torch.einsum("bhif,bhjf->bhij", fq, fk)
    if key_mask is not None:
        similarity = similarity * key_mask[:, None, None, :]
    if causal:
        similarity = similarity.tril()
    expected = similarity / similarity.sum(-1, keepdim=True).clamp(min=1e-12)
    attention = favor(kernel="relu")
    assert_near(attention.weights(q, k, key_mask, causal), expected, EXACT)
    assert_near(attention(q, k, v, key_mask, causal), expected @ v, EXACT)


def test_where_the_little_is_nothing_the_relu_kernel_is_linear_attention_with_relu():
    q, k, v = inputs(9)
    q, k = 1e9 * q.abs(), 1e9 * k
    linear = build_attention(
        "linear", num_heads=HEADS, head_dim=HEAD_DIM, max_len=9, model_dim=12, feature="relu"
    )
    for causal in (False, True):
        attention = favor(kernel="relu")
        k[:, :, 0].abs_()  # so that the first query sees a key
        assert_near(attention(q, k, v, causal=causal), linear(q, k, v, causal=causal), 1e-9)


def test_the_relu_kernel_draws_nothing():
    attention = favor(kernel="relu", features=3)
    attention.resample(torch.Generator().manual_seed(1))
    assert not attention.state_dict()
    assert attention.num_features == HEAD_DIM
    able = capabilities("performer", {"kernel": "relu"})
    assert not able.stochastic
    assert not able.rotary
    assert capabilities("performer", {}).stochastic
    assert capabilities("performer", {}).rotary


# Options


def test_defaults_are_256_orthogonal_features_of_the_softmax_kernel():
    config = favor().config
    assert (config.kernel, config.features, config.orthogonal) == ("softmax", 256, True)


@pytest.mark.parametrize("features", [0, -1])
def test_there_is_at_least_one_feature(features):
    with pytest.raises(ValueError, match="features must be at least 1"):
        favor(features=features)
