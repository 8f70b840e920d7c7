"""The gate of RFA is its paper's recurrence, in every form."""

import math

import pytest
import torch
from attention_cases import MASKS, assert_near, mask_of, with_every_mask
from test_rfa import (
    EXACT,
    HEAD_DIM,
    HEADS,
    alike,
    all_features,
    for_each_kernel,
    formula,
    layer_input,
    normalised_or_not,
    rfa,
    with_scale,
)


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
