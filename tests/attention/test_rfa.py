"""Random Feature Attention is its paper's formula, and has the statistics the paper proves.

Where many draws are needed, one instance with a head for each draw makes them at once: heads never
share a matrix.
"""

import math

import pytest
import torch
from attention_cases import MASKS, assert_near, inputs, mask_of, with_every_mask

from models import build_attention

EXACT = 1e-10
HEADS, HEAD_DIM, MODEL_DIM = 2, 8, 12

for_each_kernel = pytest.mark.parametrize("kernel", ["gaussian", "arccos"])
normalised_or_not = pytest.mark.parametrize("normalise", [True, False])


def rfa(*, num_heads=HEADS, head_dim=HEAD_DIM, dtype=torch.float64, seed=0, **options):
    """Returns an instance in evaluation, with a seed of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        attention = build_attention(
            "rfa",
            num_heads=num_heads,
            head_dim=head_dim,
            max_len=4096,
            model_dim=MODEL_DIM,
            **options,
        )
    return attention.to(dtype).eval()


def with_scale(attention, seed=5):
    """Gives every head and dimension a scale of its own, within 0.7 to 1.3."""
    generator = torch.Generator().manual_seed(seed)
    shape = attention.scale.shape
    attention.scale.data = 0.7 + 0.6 * torch.rand(shape, generator=generator, dtype=torch.float64)
    return attention


def alike(n, s=None, **arguments):
    """Returns q, k and v with queries near keys, so that no denominator is near 0."""
    q, k, v = inputs(n, s, **arguments)
    return 0.4 + 0.3 * q, 0.4 + 0.3 * k, v


def layer_input(n, batch=3, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, n, MODEL_DIM, generator=generator, dtype=torch.float64)


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


# The formula


def phi(x, matrix, sigma, tau, kernel):
    """The paper's features of one head's x (B, N, d), with the rows of a matrix (D, d) as w~."""
    size = len(matrix)
    projected = torch.stack([x @ (sigma * row / tau) for row in matrix], -1)
    if kernel == "arccos":
        return projected.clamp(min=0) / math.sqrt(size)
    return torch.cat([projected.sin(), projected.cos()], -1) / math.sqrt(size)


def all_features(attention, matrices, q, k):
    """phi(q), phi(k) and the keys' own factor exp(|sigma o k|^2 / (2 tau^2)) where it is due."""
    config, fq, fk, factors = attention.config, [], [], []
    for head, matrix in enumerate(matrices):
        x, y, sigma = q[:, head], k[:, head], attention.scale[head]
        if config.normalise:
            x, y = unit(x), unit(y)
        due = config.kernel == "gaussian" and not config.normalise
        squares = (sigma * y).square().sum(-1)
        factors.append((squares / (2 * config.tau**2)).exp() if due else torch.ones_like(squares))
        fq.append(phi(x, matrix, sigma, config.tau, config.kernel))
        fk.append(phi(y, matrix, sigma, config.tau, config.kernel))
    return (torch.stack(x, 1) for x in (fq, fk, factors))


def formula(attention, matrices, q, k, key_mask=None, causal=False):
    """The attention matrix: phi(q_i).phi(k_j) over its sum, with a matrix for each head."""
    fq, fk, factor = all_features(attention, matrices, q, k)
    similarity = torch.einsum("bhif,bhjf,bhj->bhij", fq, fk, factor)
    if key_mask is not None:
        similarity = similarity * key_mask[:, None, None, :]
    if causal:
        similarity = similarity.tril()
    total = similarity.sum(-1, keepdim=True)
    return similarity / torch.where(total == 0, 1.0, total)


@for_each_kernel
@normalised_or_not
@pytest.mark.parametrize(
    ("n", "s", "causal"), [(9, 9, False), (9, 9, True), (4, 9, False), (9, 4, False)]
)
@with_every_mask
def test_it_is_the_papers_formula(kernel, normalise, n, s, causal, mask):
    q, k, v = alike(n, s)
    attention = with_scale(rfa(kernel=kernel, normalise=normalise, projections=33, tau=1.3))
    key_mask = MASKS[mask](s)
    expected = formula(attention, attention.pool[:HEADS], q, k, key_mask, causal)
    assert_near(attention.weights(q, k, key_mask, causal), expected, EXACT)
    assert_near(attention(q, k, v, key_mask, causal), expected @ v, EXACT)


@for_each_kernel
@normalised_or_not
def test_its_gradients_are_those_of_the_formula(kernel, normalise):
    q, k, v = (x.requires_grad_() for x in alike(7))
    attention = with_scale(rfa(kernel=kernel, normalise=normalise, projections=33, tau=1.3))
    leaves = (q, k, v, attention.scale)
    actual = torch.autograd.grad(attention(q, k, v).square().sum(), leaves)
    out = formula(attention, attention.pool[:HEADS], q, k) @ v
    expected = torch.autograd.grad(out.square().sum(), leaves)
    for of_attention, of_formula in zip(actual, expected, strict=True):
        assert of_formula.abs().max() > 1e-3
        assert_near(of_attention, of_formula, EXACT)


def test_training_takes_the_drawn_matrices_and_evaluation_the_first_of_the_pool():
    q, k, v = alike(9)
    attention = rfa(pool=12)
    attention.resample(torch.Generator().manual_seed(3))
    assert not torch.equal(attention.drawn, torch.arange(HEADS))
    drawn = formula(attention, attention.pool[attention.drawn], q, k)
    first = formula(attention, attention.pool[:HEADS], q, k)
    assert (drawn - first).abs().max() > 1e-3
    assert_near(attention(q, k, v), first @ v, EXACT)
    attention.train()
    assert_near(attention(q, k, v), drawn @ v, EXACT)
    assert_near(attention.weights(q, k), drawn, EXACT)


def test_heads_have_matrices_of_their_own():
    q, k, _ = alike(9)
    weights = rfa().weights(q[:, :1].expand_as(q), k[:, :1].expand_as(k))
    assert (weights[:, 0] - weights[:, 1]).abs().max() > 1e-3


def test_the_scale_is_learned_and_begins_at_one():
    assert torch.equal(rfa().scale, torch.ones(HEADS, HEAD_DIM, dtype=torch.float64))


@for_each_kernel
def test_features_are_a_sine_and_a_cosine_of_each_projection_or_a_relu(kernel):
    q, k, _ = inputs(9)
    attention = rfa(kernel=kernel, projections=10)
    f = attention.features(q, k, None)
    expected = {"gaussian": 20, "arccos": 10}[kernel]
    assert f.q.shape[-1] == f.k.shape[-1] == attention.num_features == expected


@normalised_or_not
def test_a_gaussian_similarity_is_the_mean_cosine_of_projected_differences(normalise):
    # So it is 1 of a vector with itself, whatever was drawn.
    q, k, _ = inputs(9)
    attention = rfa(normalise=normalise, projections=10)
    f = attention.features(q, k, None)
    x, y = (unit(q), unit(k)) if normalise else (q, k)
    difference = x[:, :, :, None] - y[:, :, None]
    projected = torch.einsum("bhijd,hpd->bhijp", difference, attention.pool[:HEADS])
    assert_near(f.q @ f.k.mT, projected.cos().mean(-1), 1e-12)
    itself = attention.features(q, q, None)
    assert_near((itself.q * itself.k).sum(-1), torch.ones(3, HEADS, 9), 1e-12)


def test_a_wide_kernel_leaves_the_average():
    q, k, v = inputs(9)
    expected = v.mean(2, keepdim=True).expand_as(v)
    assert_near(rfa(tau=1e4)(q, k, v), expected, 1e-6)


# Statistics


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


# Large norms


def towering(n, causal):
    """Returns float32 q, k, v, and the index of the largest key that each query sees.

    The keys have |k|^2 / 2 of thousands, every seventh more than all before it. A query is the
    largest key that it sees, which has similarity 1: a sum near 0 would magnify rounding.
    """
    at = torch.arange(n)
    halves = 1000.0 * torch.where(at % 7 == 0, n + at, n - at)
    largest = halves.cummax(0).indices if causal else halves.argmax().expand(n)
    _, k, v = inputs(n, dtype=torch.float32)
    k = unit(k) * (2 * halves).sqrt()[:, None]
    return k[:, :, largest], k, v, largest


@pytest.mark.parametrize("causal", [False, True])
def test_huge_keys_neither_overflow_nor_lose_to_smaller_ones(causal):
    # exp(1000) is beyond every format. The largest key outweighs all others.
    q, k, v, largest = towering(200, causal)
    attention = rfa(normalise=False, dtype=torch.float32)
    leaves = [x.requires_grad_() for x in (q, k, v)] + [attention.scale]
    out = attention(q, k, v, causal=causal)
    assert_near(out, v[:, :, largest], 1e-5)
    for gradient in torch.autograd.grad(out.square().sum(), leaves):
        assert gradient.isfinite().all()


@torch.no_grad()
def test_huge_keys_are_no_matter_token_by_token():
    q, k, v, largest = towering(200, causal=True)
    attention = rfa(normalise=False, dtype=torch.float32)
    state, steps = attention.init_state(3, torch.device("cpu"), torch.float32), []
    for t in range(200):
        step, state = attention.step(*(x[:, :, t : t + 1] for x in (q, k, v)), state)
        steps.append(step)
    assert_near(torch.cat(steps, 2), v[:, :, largest], 1e-5)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("at", [100, 127, 128, 199])
def test_a_later_huge_key_leaves_no_trace_in_causal_outputs(at, gate):
    # A maximum over all keys, not over those so far, would underflow the earlier ones to 0 / 0.
    q, k, v = alike(200, dtype=torch.float32)
    hidden = layer_input(200).float() if gate else None
    attention = rfa(normalise=False, gate=gate, dtype=torch.float32)
    huge = k.clone()
    huge[:, :, at] *= 100
    out = attention(q, k, v, causal=True, hidden=hidden)
    changed = attention(q, huge, v, causal=True, hidden=hidden)
    assert_near(changed[:, :, :at], out[:, :, :at], 1e-6)
    assert changed.isfinite().all()
    assert_near(changed[:, :, at], v[:, :, at], 1e-5)


# The gate


def gated(**options):
    """Returns RFA-Gate with random gate parameters, so that gates are about 0.2 to 0.9."""
    attention = rfa(gate=True, **options)
    generator = torch.Generator().manual_seed(6)
    shape = attention.gate.weight.shape
    attention.gate.weight.data = 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    attention.gate.bias.data = torch.linspace(0, 1, len(attention.gate.bias), dtype=torch.float64)
    return attention


def constantly_gated(logit, **options):
    attention = rfa(gate=True, **options)
    torch.nn.init.zeros_(attention.gate.weight)
    torch.nn.init.constant_(attention.gate.bias, logit)
    return attention


def gate_loop(attention, q, k, v, hidden, key_mask=None):
    """S_t = g S_{t-1} + (1 - g) phi(k_t) v_t^T, z_t likewise, o_t = phi(q_t) S_t / phi(q_t).z_t."""
    fq, fk, factor = all_features(attention, attention.pool[: attention.num_heads], q, k)
    logits = hidden @ attention.gate.weight.T + attention.gate.bias
    gates = (1 / (1 + (-logits).exp())).transpose(1, 2)  # (B, H, N)
    outputs = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            total, norm = torch.zeros(fk.shape[-1], v.shape[-1]).double(), 0.0
            for t in range(q.shape[2]):
                if key_mask is None or key_mask[b, t]:
                    g, key = gates[b, h, t], fk[b, h, t] * factor[b, h, t]
                    total = g * total + (1 - g) * torch.outer(key, v[b, h, t])
                    norm = g * norm + (1 - g) * key
                if torch.is_tensor(norm):
                    outputs[b, h, t] = fq[b, h, t] @ total / (fq[b, h, t] @ norm)
    return outputs.detach()


@for_each_kernel
@normalised_or_not
@with_every_mask
def test_the_gate_is_the_papers_recurrence(kernel, normalise, mask):
    # Masked tokens are no steps of it: they add nothing, and the past does not decay.
    q, k, v = alike(20)
    hidden, key_mask = layer_input(20), MASKS[mask](20)
    attention = with_scale(gated(kernel=kernel, normalise=normalise, projections=20, tau=0.8))
    out = attention(q, k, v, key_mask, causal=True, hidden=hidden).detach()
    assert_near(out, gate_loop(attention, q, k, v, hidden, key_mask), EXACT)


@normalised_or_not
def test_chunks_steps_and_the_matrix_agree_beyond_one_chunk(normalise):
    n = 300
    q, k, v = alike(n, batch=1)
    hidden = layer_input(n, batch=1)
    attention = with_scale(gated(normalise=normalise))
    with torch.no_grad():
        out = attention(q, k, v, causal=True, hidden=hidden)
        assert_near(attention.weights(q, k, causal=True, hidden=hidden) @ v, out, EXACT)
        state, steps = attention.init_state(1, torch.device("cpu"), torch.float64), []
        for t in range(n):
            tokens = (x[:, :, t : t + 1] for x in (q, k, v))
            step, state = attention.step(*tokens, state, hidden=hidden[:, t : t + 1])
            steps.append(step)
    assert_near(torch.cat(steps, 2), out, EXACT)
    assert_near(out, gate_loop(attention, q, k, v, hidden), EXACT)


@normalised_or_not
def test_a_masked_token_is_as_good_as_absent(normalise):
    q, k, v = alike(12, batch=1)
    hidden, key_mask = layer_input(12, batch=1), mask_of("001101110010")
    attention = gated(normalise=normalise)
    real = key_mask[0]
    out = attention(q, k, v, key_mask, causal=True, hidden=hidden)[:, :, real]
    short = (x[:, :, real] for x in (q, k, v))
    assert_near(out, attention(*short, causal=True, hidden=hidden[:, real]), EXACT)


def test_a_gate_of_one_half_gives_geometric_weights():
    # Equal tokens leave the gate's factors alone: 1, 1/2, 1/4, ... over their sum 2 - 2^-t.
    n = 150
    ones = torch.ones(1, HEADS, n, HEAD_DIM, dtype=torch.float64)
    weights = constantly_gated(0.0).weights(ones, ones, causal=True, hidden=layer_input(n, 1))
    t = torch.arange(n, dtype=torch.float64)
    expected = torch.exp2(t - t[:, None]).tril() / (2 - torch.exp2(-t))[:, None]
    assert_near(weights, expected.expand(1, HEADS, n, n), 1e-12)


def test_a_constant_gate_multiplies_similarities_by_its_powers():
    q, k, _ = alike(150)
    weights = constantly_gated(math.log(4)).weights(q, k, causal=True, hidden=layer_input(150))
    plain = rfa()
    t = torch.arange(150, dtype=torch.float64)
    decayed = formula(plain, plain.pool[:HEADS], q, k) * (0.8 ** (t[:, None] - t)).tril()
    assert_near(weights, decayed / decayed.sum(-1, keepdim=True), EXACT)


@normalised_or_not
def test_a_closed_gate_forgets_all_but_the_current_token(normalise):
    q, k, v = alike(200)
    attention = constantly_gated(-30.0, normalise=normalise)
    out = attention(q, k, v, causal=True, hidden=layer_input(200))
    assert_near(out, v, EXACT)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
@for_each_kernel
@normalised_or_not
def test_an_open_gate_forgets_nothing_and_shrinks_nothing(kernel, normalise, dtype, tolerance):
    # 1 - g = 1e-13 is the factor of all keys: it cancels, where a guard of 1e-6 would shrink it.
    q, k, v = alike(200, dtype=dtype)
    options = {"kernel": kernel, "normalise": normalise, "dtype": dtype}
    out = constantly_gated(30.0, **options)(q, k, v, causal=True, hidden=layer_input(200).to(dtype))
    assert_near(out, rfa(**options)(q, k, v, causal=True), tolerance)


@normalised_or_not
def test_gradients_reach_the_gate_and_the_scale(normalise):
    q, k, v = alike(20)
    attention = gated(normalise=normalise)
    hidden = layer_input(20).requires_grad_()
    attention(q, k, v, causal=True, hidden=hidden).square().sum().backward()
    for leaf in (attention.gate.weight, attention.gate.bias, attention.scale, hidden):
        assert leaf.grad.isfinite().all()
        assert (leaf.grad != 0).all()


def test_the_gate_is_causal_alone_and_reads_the_layers_input():
    able = gated().capabilities
    assert able.patterns == {"causal"}
    assert able.needs_hidden
    assert rfa().capabilities.patterns == {"self", "causal", "cross"}
    assert not rfa().capabilities.needs_hidden


# The pool


def drawn(attention, generator):
    attention.resample(generator)
    return attention.drawn.tolist()


def test_a_draw_gives_every_head_a_matrix_of_the_pool_and_no_two_the_same():
    attention, generator = rfa(num_heads=4, pool=5), torch.Generator().manual_seed(0)
    for _ in range(100):
        draw = drawn(attention, generator)
        assert len(draw) == len(set(draw)) == 4
        assert set(draw) <= set(range(5))


def test_steps_differ_and_a_seed_repeats_them():
    attention = rfa(num_heads=4)
    first, second = ([drawn(attention, g) for _ in range(20)] for g in _generators(8, 8))
    assert first == second
    assert len({tuple(draw) for draw in first}) == 20
    assert [drawn(attention, g) for g in _generators(9)] != first[:1]


def _generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_all_matrices_are_drawn_equally_often_by_every_head():
    heads, pool, draws = 4, 20, 2000
    attention, generator = rfa(num_heads=heads, pool=pool), torch.Generator().manual_seed(0)
    picks = torch.tensor([drawn(attention, generator) for _ in range(draws)])
    for head in range(heads):
        counts = picks[:, head].bincount(minlength=pool).double()
        chi_square = ((counts - draws / pool).square() / (draws / pool)).sum()
        # 19 degrees of freedom: 5.4 to 45.3 is all but 0.1 % on either side, about.
        assert 5.4 < chi_square < 45.3


def test_drawing_takes_from_the_given_generator_alone_and_leaves_the_pool():
    attention = rfa()
    pool, state = attention.pool.clone(), torch.get_rng_state()
    attention.resample(torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(attention.pool, pool)


def test_a_pool_of_as_many_matrices_as_heads_gives_all_of_them():
    attention = rfa(num_heads=4, pool=4)
    assert sorted(drawn(attention, torch.Generator().manual_seed(0))) == [0, 1, 2, 3]


def test_a_pool_smaller_than_the_number_of_heads_is_refused():
    with pytest.raises(ValueError, match=r"attention.pool is 3: 4 heads need as many matrices"):
        rfa(num_heads=4, pool=3)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"projections": 0}, "projections and pool must be at least 1"),
        ({"pool": 0}, "projections and pool must be at least 1"),
        ({"tau": 0.0}, "tau must be positive and finite"),
        ({"tau": -1.0}, "tau must be positive and finite"),
        ({"tau": math.inf}, "tau must be positive and finite"),
        ({"tau": math.nan}, "tau must be positive and finite"),
        ({"kernel": "laplace"}, "kernel"),
    ],
)
def test_options_that_no_run_can_use_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        rfa(**options)


def test_a_checkpoint_holds_pool_and_draw_so_that_training_goes_on_alike():
    q, k, v = alike(9)
    attention, other = rfa(seed=0).train(), rfa(seed=1).train()
    attention.resample(torch.Generator().manual_seed(3))
    assert (other(q, k, v) - attention(q, k, v)).abs().max() > 1e-3
    other.load_state_dict(attention.state_dict())
    assert torch.equal(other(q, k, v), attention(q, k, v))
    assert torch.equal(other.eval()(q, k, v), attention.eval()(q, k, v))


@pytest.mark.parametrize("gate", [False, True])
def test_the_scale_and_the_gate_are_parameters_and_the_pool_is_none(gate):
    attention = rfa(num_heads=2, head_dim=8, gate=gate)
    learned = {"scale", "gate.weight", "gate.bias"} if gate else {"scale"}
    assert {name for name, _ in attention.named_parameters()} == learned
    assert {name for name, _ in attention.named_buffers()} == {"pool", "drawn"}
    assert set(attention.state_dict()) == learned | {"pool", "drawn"}
    assert attention.cost(16, 16).parameters == 2 * 8 + (2 * (MODEL_DIM + 1) if gate else 0)


# Denominators


def test_a_negative_denominator_keeps_its_sign():
    # With the one vector w = (2, 0), phi(q).phi(k) = cos(w.(q - k)) = cos(2 (1 - k_1)) for
    # q = (1, 0) and unit k.
    attention = rfa(num_heads=1, head_dim=2, projections=1, pool=1)
    attention.pool.copy_(torch.tensor([2.0, 0.0]))
    angles = torch.tensor([0.0, 2 / 3, 1.0], dtype=torch.float64) * math.pi
    k = torch.stack([angles.cos(), angles.sin()], -1)[None, None]
    q, v = k[:, :, :1], torch.tensor([1.0, 10, 100], dtype=torch.float64)[None, None, :, None]
    similarity = (2 * (1 - angles.cos())).cos()
    assert similarity[0] > 0
    assert similarity[1:].max() < -0.6
    for first in (0, 1):  # all three keys, and the two of negative similarity alone
        part = similarity[first:]
        assert part.sum() < -0.6
        weights = attention.weights(q, k[:, :, first:])[0, 0, 0]
        assert_near(weights, part / part.sum(), 1e-14)
        assert weights.sum().item() == pytest.approx(1, rel=1e-14)
        out = attention(q, k[:, :, first:], v[:, :, first:])
        assert out.item() == pytest.approx((part @ v[0, 0, first:]).item() / part.sum().item())


def test_rows_of_negative_sum_occur_and_their_weights_sum_to_one_all_the_same():
    q, k, _ = inputs(65, 2)
    attention = rfa(projections=2)
    f = attention.features(q, k, None)
    negative = (f.q @ f.k.mT).sum(-1) < -0.1
    assert negative.double().mean() > 0.1
    totals = attention.weights(q, k).sum(-1)[negative]
    assert_near(totals, torch.ones_like(totals), 1e-12)


@for_each_kernel
@normalised_or_not
def test_the_first_causal_output_is_the_first_value(kernel, normalise):
    # Bounding denominators by 1 would shrink it, to 0.2 of it in the published code.
    q, k, v = alike(9)
    attention = rfa(kernel=kernel, normalise=normalise)
    assert_near(attention(q, k, v, causal=True)[:, :, 0], v[:, :, 0], 1e-14)
    state = attention.init_state(3, torch.device("cpu"), torch.float64)
    out, _ = attention.step(q[:, :, :1], k[:, :, :1], v[:, :, :1], state)
    assert_near(out[:, :, 0], v[:, :, 0], 1e-14)
