"""Random features of RFA have the means and variances that its paper proves, and their limit."""

import math

import pytest
import torch
from attention_cases import assert_near, inputs
from test_rfa import HEAD_DIM, rfa, unit

DRAWS, PAIRS = 400, 40


def estimates(normalise=True, length=1.0, **options):
    """Returns x, y (PAIRS, d) and DRAWS estimates of each pair's kernel (DRAWS, PAIRS, PAIRS)."""
    generator = torch.Generator().manual_seed(1)
    x, y = unit(torch.randn(2, PAIRS, HEAD_DIM, generator=generator, dtype=torch.float64))
    x, y = length * x, y / length
    attention = rfa(num_heads=DRAWS, pool=DRAWS, normalise=normalise, **options)
    f = attention.features(*(z.expand(1, DRAWS, -1, -1) for z in (x, y)), None)
    return x, y, (f.q @ f.k.mT)[0].detach()


def gaussian_moments(x, y, tau, projections):
    """exp(-|x - y|^2 / (2 tau^2)), and the variance (1 - exp(-|x - y|^2 / tau^2))^2 / (2 D)."""
    squares = (x[:, None] - y).square().sum(-1)
    kernel = (-squares / (2 * tau**2)).exp()
    return kernel, (1 - (-squares / tau**2).exp()).square() / (2 * projections)


def arccos_moments(x, y, projections):
    """The arc-cosine kernel of order 1; its square's mean is half that of order 2."""
    norms = x.norm(dim=-1)[:, None] * y.norm(dim=-1)
    cosine = (x @ y.T) / norms
    angle = cosine.acos()
    sine, rest = angle.sin(), math.pi - angle
    kernel = norms * (sine + rest * cosine) / (2 * math.pi)
    square = norms.square() * (3 * sine * cosine + rest * (1 + 2 * cosine.square()))
    return kernel, (square / (2 * math.pi) - kernel.square()) / projections


def assert_unbiased(estimated, kernel, variance):
    """The mean of all draws is within 5 standard errors, for more than 99.9 % of the pairs."""
    z = (estimated.mean(0) - kernel) / (variance / len(estimated)).sqrt()
    assert (z.abs() < 5).double().mean() > 0.999
    # As far off as standard errors say: neither more, nor suspiciously less.
    assert 0.7 < z.square().mean().sqrt() < 1.4


@pytest.mark.parametrize("tau", [1.0, 0.6, 2.0])
def test_gaussian_features_are_unbiased_with_the_variance_of_the_paper(tau):
    projections = 32
    x, y, estimated = estimates(tau=tau, projections=projections)
    kernel, variance = gaussian_moments(x, y, tau, projections)
    assert_unbiased(estimated, kernel, variance)
    assert 0.85 < (estimated.var(0) / variance).mean() < 1.15


def test_gaussian_features_are_unbiased_for_vectors_of_any_length():
    x, y, estimated = estimates(normalise=False, length=2.0, projections=32)
    assert_unbiased(estimated, *gaussian_moments(x, y, 1.0, 32))


@pytest.mark.parametrize("length", [1.0, 3.0])
def test_arccos_features_are_unbiased(length):
    # Lengths 3 and 1/3 without normalisation: the kernel is homogeneous in both.
    x, y, estimated = estimates(
        kernel="arccos", normalise=length == 1, length=length, projections=32
    )
    kernel, variance = arccos_moments(x, y, 32)
    assert_unbiased(estimated, kernel, variance)
    assert 0.85 < (estimated.var(0) / variance).mean() < 1.15
    assert (estimated >= 0).all()


def test_errors_fall_with_the_square_root_of_the_projections():
    draws = 50
    q, k, v = (x.expand(-1, draws, -1, -1) for x in inputs(6, 12, batch=3, heads=1))
    expected = (unit(q) @ unit(k).mT).softmax(-1) @ v
    sizes = [64, 256, 1024, 4096]
    errors = [
        rfa(num_heads=draws, pool=draws, projections=size, seed=size)(q, k, v) - expected
        for size in sizes
    ]
    rmse = torch.stack([error.square().mean().sqrt() for error in errors]).log()
    logs = torch.tensor(sizes, dtype=torch.float64).log()
    deviation = logs - logs.mean()
    slope = (deviation * rmse).sum() / deviation.square().sum()
    assert -0.55 < slope < -0.45


def standard_errors(x, y, factor, v, projections):
    """Exact to first order: the errors of sum_j c_j s_ij v_j / sum_j c_j s_ij, s estimated.

    o^ - o = sum_j c_j e_ij (v_j - o_i) / sum_j c_j s_ij for errors e of the similarities, and
    cos(a) cos(b) = (cos(a - b) + cos(a + b)) / 2 gives the covariances of e_ij and e_ij'.
    """

    def kernel(difference):
        return (-difference.square().sum(-1) / 2).exp()

    difference = x[:, None] - y  # (N, S, d)
    similarity = kernel(difference)
    minus = kernel(y[:, None] - y)
    plus = kernel(difference[:, :, None] + difference[:, None, :])
    covariance = (minus + plus) / 2 - similarity[:, :, None] * similarity[:, None, :]
    weights = factor * similarity
    total = weights.sum(-1, keepdim=True)
    out = weights @ v / total
    lever = factor[:, None] * (v - out[:, None]) / total[..., None]  # (N, S, E)
    variance = torch.einsum("ije,ike,ijk->ie", lever, lever, covariance) / projections
    return out, variance.sqrt()


def assert_estimates(out, expected, errors):
    """Every draw (first dimension) is within 5 standard errors, and so is their mean."""
    z = (out - expected) / errors
    assert z.abs().max() < 5
    assert 0.8 < z.square().mean().sqrt() < 1.2
    assert (z.mean(0) * len(z) ** 0.5).abs().max() < 5


@pytest.mark.parametrize("tau", [1.0, 0.7])
def test_it_tends_to_softmax_of_normalised_queries_and_keys(tau):
    draws, projections = 50, 4096
    q, k, v = inputs(6, 10, batch=1, heads=1)
    out = rfa(num_heads=draws, pool=draws, projections=projections, tau=tau)(
        *(x.expand(-1, draws, -1, -1) for x in (q, k, v))
    )
    x, y = unit(q)[0, 0] / tau, unit(k)[0, 0] / tau
    expected = (x @ y.T).softmax(-1) @ v[0, 0]
    same, errors = standard_errors(x, y, torch.ones(10, dtype=torch.float64), v[0, 0], projections)
    assert_near(same, expected, 1e-12)
    assert_estimates(out[0].detach(), expected, errors)


def test_without_normalisation_it_tends_to_softmax_because_of_the_keys_factor():
    draws, projections, tau = 50, 4096, 1.4
    q, k, v = (0.7 * x for x in inputs(6, 10, batch=1, heads=1))
    attention = rfa(num_heads=draws, pool=draws, projections=projections, tau=tau, normalise=False)
    sigma = torch.linspace(0.7, 1.3, HEAD_DIM, dtype=torch.float64)
    attention.scale.data = sigma.expand(draws, -1)
    out = attention(*(x.expand(-1, draws, -1, -1) for x in (q, k, v)))[0].detach()
    x, y, v = sigma * q[0, 0] / tau, sigma * k[0, 0] / tau, v[0, 0]
    expected = ((sigma * q[0, 0]) @ (sigma * k[0, 0]).T / tau**2).softmax(-1) @ v
    factor = (y.square().sum(-1) / 2).exp()
    same, errors = standard_errors(x, y, factor, v, projections)
    assert_near(same, expected, 1e-12)
    assert_estimates(out, expected, errors)
    # Without the factor it would be attention by the Gaussian kernel, which is told apart.
    bare, _ = standard_errors(x, y, torch.ones_like(factor), v, projections)
    z = (out - bare) / errors
    assert z.abs().max() > 20
    assert (z.mean(0) * draws**0.5).abs().median() > 10
