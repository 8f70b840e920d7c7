"""RetNet: rotary retention with a constant decay, written out, then its norm and its gate."""

import math

import pytest
import torch
from attention_cases import MASKS, assert_near, inputs, mask_of, with_every_mask
from torch.utils.flop_counter import FlopCounterMode

from models import build_attention
from models.attention import capabilities
from models.attention.retnet import CHUNK, NORM_EPS, retention

EXACT = 1e-10
HEADS, MODEL_DIM = 2, 12

causal_or_not = pytest.mark.parametrize("causal", [False, True])


def retnet(*, num_heads=HEADS, head_dim=8, dtype=torch.float64, seed=0):
    """Returns an instance with a seed of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        attention = build_attention(
            "retnet", num_heads=num_heads, head_dim=head_dim, max_len=4096, model_dim=MODEL_DIM
        )
    return attention.to(dtype)


def tokens(n, d=8, batch=3, heads=HEADS, dtype=torch.float64):
    """Returns q, k, v with E = D and the layer's input."""
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(batch, n, MODEL_DIM, generator=generator, dtype=torch.float64).to(dtype)
    return *inputs(n, d=d, e=d, batch=batch, heads=heads, dtype=dtype), hidden


# The formula


def rotated(x):
    """Turns channels i and i + D/2 of the vector at position p by p 10,000^(-2i / D)."""
    out, half = x.clone(), x.shape[-1] // 2
    for p in range(x.shape[-2]):
        for i in range(half):
            angle = p * 10_000 ** (-i / half)
            a, b = x[..., p, i], x[..., p, i + half]
            out[..., p, i] = a * math.cos(angle) - b * math.sin(angle)
            out[..., p, i + half] = a * math.sin(angle) + b * math.cos(angle)
    return out


def formula(q, k, key_mask=None, causal=False):
    """d^-1/2 (R_i q_i).(R_j k_j) gamma_h^|i - j| for real keys, gamma_h = 1 - 2^(-5 - h)."""
    weights = torch.einsum("bhid,bhjd->bhij", rotated(q), rotated(k)) / math.sqrt(q.shape[-1])
    at = torch.arange(q.shape[2], dtype=torch.float64)
    for h in range(q.shape[1]):
        weights[:, h] *= (1 - 2.0 ** (-5 - h)) ** (at[:, None] - at).abs()
    if key_mask is not None:
        weights = weights * key_mask[:, None, None, :]
    return weights.tril() if causal else weights


def finished(attention, y, hidden):
    """silu(G x) o y / rms(y), the gate's channels one head after the other."""
    gate = torch.einsum("bnm,cm->bnc", hidden, attention.gate.weight)
    gate = gate * torch.sigmoid(gate)
    heads, d = y.shape[1], y.shape[3]
    gate = torch.stack([gate[..., h * d : (h + 1) * d] for h in range(heads)], 1)
    return gate * y / (y.square().sum(-1, keepdim=True) / d + NORM_EPS).sqrt()


@causal_or_not
@with_every_mask
@pytest.mark.parametrize("n", [1, 2, 9, CHUNK, CHUNK + 1, 200])
def test_it_is_retention_then_norm_then_gate(causal, mask, n):
    q, k, v, hidden = tokens(n)
    attention, key_mask = retnet(), MASKS[mask](n)
    expected = formula(q, k, key_mask, causal)
    assert_near(attention.weights(q, k, key_mask, causal, hidden), expected, EXACT)
    out = attention(q, k, v, key_mask, causal, hidden)
    assert_near(out, finished(attention, expected @ v, hidden), EXACT)


@causal_or_not
@pytest.mark.parametrize("d", [1, 2, 3, 7, 16])
def test_heads_may_have_any_dimension(causal, d):
    # With D odd, the last channel is not rotated.
    q, k, v, hidden = tokens(130, d)
    attention = retnet(head_dim=d)
    expected = finished(attention, formula(q, k, causal=causal) @ v, hidden)
    assert_near(attention(q, k, v, causal=causal, hidden=hidden), expected, EXACT)


@causal_or_not
def test_its_gradients_are_those_of_the_formula(causal):
    q, k, v, hidden = (x.requires_grad_() for x in tokens(150, batch=2))
    attention, key_mask = retnet(), MASKS["holes and padding"](150)[:2]
    leaves = (q, k, v, hidden, attention.gate.weight)
    out = attention(q, k, v, key_mask, causal, hidden)
    expected = finished(attention, formula(q, k, key_mask, causal) @ v, hidden)
    to = torch.randn_like(out)
    actual = torch.autograd.grad((out * to).sum(), leaves)
    gradients = torch.autograd.grad((expected * to).sum(), leaves)
    for of_attention, of_formula in zip(actual, gradients, strict=True):
        assert of_formula.abs().max() > 1e-3
        assert_near(of_attention, of_formula, 1e-9)


# Decay


@causal_or_not
def test_the_weights_of_equal_tokens_are_powers_of_the_heads_gamma(causal):
    # One channel is not rotated, so that the decay alone is left.
    n, heads = 150, 4
    ones = torch.ones(1, heads, n, 1, dtype=torch.float64)
    hidden = torch.ones(1, n, MODEL_DIM, dtype=torch.float64)
    weights = retnet(num_heads=heads, head_dim=1).weights(ones, ones, None, causal, hidden)[0]
    gammas = [31 / 32, 63 / 64, 127 / 128, 255 / 256]
    for i, j in [(0, 0), (1, 0), (149, 0), (0, 149), (70, 64), (64, 70)]:
        for h, gamma in enumerate(gammas):
            expected = 0.0 if causal and j > i else gamma ** abs(i - j)
            assert float(weights[h, i, j]) == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.parametrize("n", [1, 5, CHUNK, 200])
def test_two_sided_retention_is_both_directions_less_what_they_share(n):
    q, k, v, _ = tokens(n)
    rates = torch.tensor([0.03, 0.4], dtype=torch.float64)
    past = retention(q, k, v, rates, causal=True)
    future = retention(*(x.flip(2) for x in (q, k, v)), rates, causal=True).flip(2)
    own = (q * k).sum(-1, keepdim=True) * v
    assert_near(retention(q, k, v, rates, causal=False), past + future - own, EXACT)


def test_without_decay_retention_is_products_and_their_running_sums():
    q, k, v, _ = tokens(200)
    rates = torch.zeros(HEADS, dtype=torch.float64)
    assert_near(retention(q, k, v, rates, causal=False), q @ (k.mT @ v), EXACT)
    sums = (k[..., None] * v[..., None, :]).cumsum(2)
    expected = (q[..., None, :] @ sums).squeeze(-2)
    assert_near(retention(q, k, v, rates, causal=True), expected, EXACT)


def test_the_first_of_many_heads_forgets_and_the_last_does_not():
    # In float32, gamma = 1 - 2^-34 would be 1 and its logarithm 0; that of 1 - x is about -x.
    attention = retnet(num_heads=30, head_dim=1, dtype=torch.float32)
    rates = attention.rates(torch.device("cpu"))
    assert float(rates[0]) == pytest.approx(-math.log(31 / 32), rel=1e-14)
    assert float(rates[29]) == pytest.approx(2.0**-34, rel=1e-9)
    n = 4000
    q = torch.ones(1, 30, n, 1)
    weights = retention(q, q, (torch.arange(n) == 0).float()[:, None] * q, rates, causal=True)
    assert float(weights[0, 0, 1000, 0]) == pytest.approx((31 / 32) ** 1000, rel=1e-4)
    assert float(weights[0, 0, -1, 0]) < 1e-37
    assert float(weights[0, 29, -1, 0]) == pytest.approx(1.0)


# Positions


@causal_or_not
def test_weights_depend_on_distances_alone(causal):
    q, k, _, hidden = tokens(200)
    attention = retnet()
    weights = attention.weights(q, k, None, causal, hidden)
    part = slice(130, 200)
    alone = attention.weights(q[:, :, part], k[:, :, part], None, causal, hidden[:, part])
    assert_near(alone, weights[:, :, part, part], EXACT)


@causal_or_not
def test_masked_tokens_keep_their_places(causal):
    # The weights of real keys are as if all were real: nothing is renumbered or normalised.
    q, k, v, hidden = tokens(9)
    attention, key_mask = retnet(), mask_of("101100110", "010000000", "111111111")
    weights = attention.weights(q, k, None, causal, hidden) * key_mask[:, None, None, :]
    out = attention(q, k, v, key_mask, causal, hidden)
    assert_near(out, finished(attention, weights @ v, hidden), EXACT)


def test_steps_give_what_chunks_give():
    n = 2 * CHUNK + 9
    q, k, v, hidden = tokens(n)
    attention = retnet()
    state, steps = attention.init_state(3, torch.device("cpu"), torch.float64), []
    with torch.no_grad():
        for t in range(n):
            token = (x[:, :, t : t + 1] for x in (q, k, v))
            step, state = attention.step(*token, state, hidden=hidden[:, t : t + 1])
            steps.append(step)
        assert_near(torch.cat(steps, 2), attention(q, k, v, causal=True, hidden=hidden), EXACT)
    assert state.sums.shape == (3, HEADS, 8, 8)
    assert state.position == n
    assert attention.cost(n, n).state_floats == HEADS * 8 * 8


def test_it_takes_no_rotary_positions_beside_its_own():
    assert not capabilities("retnet", {}).rotary


# Norm, gate and mask


def test_the_norm_cancels_the_size_of_values_and_keeps_their_mean():
    q, k, v, hidden = tokens(20)
    attention = retnet()
    out = attention(q, k, 1e3 * v, hidden=hidden)
    assert_near(attention(q, k, 1e6 * v, hidden=hidden), out, 1e-6)
    # Before the gate: mean square 1 of each head's channels, and no mean is taken off.
    gate = torch.nn.functional.silu(attention.gate(hidden))
    normed = out / gate.unflatten(-1, (HEADS, 8)).transpose(1, 2)
    assert_near(normed.square().mean(-1), torch.ones(3, HEADS, 20), 1e-6)
    assert normed.mean(-1).abs().max() > 0.3


def test_of_one_channel_the_norm_leaves_the_sign():
    q, k, v, hidden = tokens(20, d=1)
    attention = retnet(head_dim=1)
    sign = (formula(q, k) @ v).sign()
    gate = torch.nn.functional.silu(attention.gate(hidden)).mT[..., None]
    assert_near(attention(q, k, 1e6 * v, hidden=hidden), gate * sign, 1e-6)


def test_each_head_and_channel_has_a_gate_of_its_own():
    q, k, v, hidden = tokens(5)
    attention = retnet()
    whole = attention(q, k, v, hidden=hidden)
    with torch.no_grad():
        attention.gate.weight[8 + 3] = 0.0
    out = attention(q, k, v, hidden=hidden)
    assert not out[:, 1, :, 3].any()
    whole[:, 1, :, 3] = 0.0
    assert torch.equal(out, whole)


@causal_or_not
def test_without_real_keys_the_output_is_zero_and_gradients_are_finite(causal):
    leaves = [x.requires_grad_() for x in tokens(70, dtype=torch.float32)]
    q, k, v, hidden = leaves
    key_mask = torch.zeros(3, 70, dtype=torch.bool)
    key_mask[1, 66:] = True
    out = retnet(dtype=torch.float32)(q, k, v, key_mask, causal, hidden)
    assert not out[0].any()
    assert out[1, :, :66].any() != causal
    assert out[1, :, 66:].any()
    for gradient in torch.autograd.grad(out.square().sum(), leaves):
        assert gradient.isfinite().all()


def test_a_mask_that_masks_nothing_changes_nothing():
    # The scale once was in float32 where there was a mask.
    q, k, v, hidden = tokens(20)
    attention = retnet()
    out = attention(q, k, v, torch.ones(3, 20, dtype=torch.bool), hidden=hidden)
    assert torch.equal(out, attention(q, k, v, hidden=hidden))


@pytest.mark.parametrize("n", [5, CHUNK, CHUNK + 1, 300])
def test_operations_are_those_declared(n):
    q, k, v, hidden = tokens(n, batch=1, dtype=torch.float32)
    counter = FlopCounterMode(display=False)
    attention = retnet(dtype=torch.float32)
    with torch.no_grad(), counter:
        attention(q, k, v, hidden=hidden)
    assert counter.get_total_flops() == attention.cost(n, n).flops
