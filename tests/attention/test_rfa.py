"""Random Feature Attention is its paper's formula, and has the statistics the paper proves.

Where many draws are needed, one instance with a head for each draw makes them at once: heads never
share a matrix.
"""

import math

import pytest
import torch
from attention_cases import MASKS, assert_near, inputs, with_every_mask

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
