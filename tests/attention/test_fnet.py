"""FNet is the real part of the explicit two-dimensional transform, computed from half of it."""

import cmath
import math

import pytest
import torch
from attention_cases import MASKS, assert_near, mask_of, with_every_mask

from models import build_attention
from models.attention.base import Mixer
from models.encoder import Block, EncoderShape

EXACT = 1e-10

with_sizes = pytest.mark.parametrize(
    ("n", "c"), [(1, 1), (1, 5), (5, 1), (2, 2), (2, 3), (7, 8), (8, 7), (8, 8), (13, 11), (64, 6)]
)


def fnet(c):
    return build_attention("fnet", num_heads=2, head_dim=8, max_len=4096, model_dim=c)


def tokens(n, c, batch=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, n, c, generator=generator, dtype=torch.float64).to(dtype)


def dft(n):
    """F[i, j] = exp(-2 pi i j sqrt(-1) / n), entry by entry."""
    rows = [[cmath.exp(-2j * math.pi * i * j / n) for j in range(n)] for i in range(n)]
    return torch.tensor(rows, dtype=torch.complex128)


def transformed(x):
    return torch.einsum("kn,bnc,cl->bkl", dft(x.shape[1]), x.to(torch.complex128), dft(x.shape[2]))


def opposite(x):
    """x[-i, -j], with indices modulo N and C."""
    rows, columns = ([-i % size for i in range(size)] for size in x.shape[1:])
    return x[:, rows][:, :, columns]


# The transform


@with_sizes
def test_it_is_the_real_part_of_the_product_with_two_dft_matrices(n, c):
    x = tokens(n, c)
    expected = transformed(x).real
    assert_near(fnet(c)(x), expected, EXACT)
    assert_near(fnet(c).quadratic(x), expected, EXACT)


@with_sizes
def test_it_is_what_the_public_code_computes_with_the_whole_spectrum(n, c):
    x = tokens(n, c)
    assert_near(fnet(c)(x), torch.fft.fft(torch.fft.fft(x, dim=2), dim=1).real, EXACT)


@pytest.mark.parametrize("n", [2048, 2039])
def test_long_sequences_of_prime_length_too_lose_nothing_in_float32(n):
    x = tokens(n, 16, batch=1)
    expected = torch.fft.fft2(x).real
    assert_near(fnet(16)(x), expected, EXACT)
    assert_near(fnet(16)(x.float()), expected, 1e-6)


@with_sizes
def test_one_token_becomes_a_cosine_and_a_constant_becomes_one_token(n, c):
    x = torch.zeros(1, n, c, dtype=torch.float64)
    at, channel = n // 2, c // 3
    x[0, at, channel] = 1
    i, j = torch.arange(n).double(), torch.arange(c).double()
    expected = (2 * math.pi * (i[:, None] * at / n + j * channel / c)).cos()
    assert_near(fnet(c)(x)[0], expected, 1e-12)
    first = torch.zeros_like(x)
    first[0, 0, 0] = n * c
    assert_near(fnet(c)(torch.ones_like(x)), first, 1e-12)


@with_sizes
def test_it_is_linear(n, c):
    x, y, attention = tokens(n, c), tokens(n, c, seed=1), fnet(c)
    assert_near(attention(2 * x - 3 * y), 2 * attention(x) - 3 * attention(y), EXACT)


@with_sizes
def test_outputs_at_opposite_indices_are_equal(n, c):
    y = fnet(c)(tokens(n, c))
    assert_near(y, opposite(y), 1e-12)


@with_sizes
def test_twice_it_is_the_even_part_and_keeps_its_norm(n, c):
    # Parseval: the real part of the spectrum is the transform of the even part.
    x = tokens(n, c)
    even = (x + opposite(x)) / 2
    y = fnet(c)(x)
    assert_near(fnet(c)(y), n * c * even, EXACT)
    assert_near(y.square().sum(), n * c * even.square().sum(), EXACT)


def test_only_the_even_part_is_felt():
    x = tokens(9, 6)
    assert not torch.equal(x, opposite(x))
    assert_near(fnet(6)(opposite(x)), fnet(6)(x), EXACT)


# Gradients


@with_sizes
def test_it_is_its_own_transpose(n, c):
    x, y = tokens(n, c), tokens(n, c, seed=1)
    assert_near((fnet(c)(x) * y).sum(), (x * fnet(c)(y)).sum(), EXACT)


@with_sizes
def test_gradients_are_those_of_the_whole_transform(n, c):
    x, grad = tokens(n, c).requires_grad_(), tokens(n, c, seed=1)
    [actual] = torch.autograd.grad(fnet(c)(x), x, grad)
    [expected] = torch.autograd.grad(transformed(x).real, x, grad)
    assert_near(actual, expected, EXACT)


def test_first_and_second_gradients_are_those_of_finite_differences():
    x, attention = tokens(5, 4, batch=2).requires_grad_(), fnet(4)
    key_mask = mask_of("11010", "00000")
    assert torch.autograd.gradcheck(lambda x: attention(x, key_mask), x)
    assert torch.autograd.gradgradcheck(lambda x: attention(x, key_mask).sin(), x)


def test_nothing_is_kept_for_the_backward_pass():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        fnet(6)(tokens(9, 6).requires_grad_())
    assert kept == []


# Masks


@with_every_mask
def test_masked_tokens_are_zeros_whatever_stands_there(mask):
    x = tokens(9, 6)
    key_mask = MASKS[mask](9)
    real = torch.ones(3, 9, 1) if key_mask is None else key_mask[..., None]
    expected = transformed(x * real).real
    garbage = torch.where(real.bool(), x, 1e6 * tokens(9, 6, seed=1)).requires_grad_()
    for form in (fnet(6), fnet(6).quadratic):
        out = form(garbage, key_mask)
        assert_near(out, expected, EXACT)
        [gradient] = torch.autograd.grad(out.square().sum(), garbage)
        assert not gradient.masked_select(~real.bool()).any()


def test_padding_is_felt_though_what_stands_there_is_not():
    # The length of the transform is that of the padded sequence, so masks are approximate.
    x = tokens(9, 6)
    longer = torch.nn.functional.pad(x, (0, 0, 0, 3))
    out = fnet(6)(longer, torch.arange(12).expand(3, -1) < 9)
    assert_near(out, transformed(longer).real, EXACT)
    assert (out[:, :9] - fnet(6)(x)).abs().max() > 0.1
    assert fnet(6).capabilities.key_mask == "approximate"


def test_where_no_token_is_real_all_is_exactly_zero():
    out = fnet(6)(tokens(4, 6, batch=2), mask_of("0000", "1011"))
    assert not out[0].any()
    assert out[1].any()


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_reduced_precision_rounds_the_output_alone(dtype, autocast):
    x = tokens(200, 6, dtype=dtype).requires_grad_()
    key_mask = MASKS["holes and padding"](200)
    with torch.autocast("cpu", dtype, enabled=autocast):
        out = fnet(6)(x, key_mask)
    assert out.dtype == dtype
    exact = fnet(6)(x.detach().double(), key_mask)
    assert_near(out, exact, torch.finfo(dtype).eps)
    # Rounded element by element: no sum has been in reduced precision.
    assert ((out - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-4).all()
    [gradient] = torch.autograd.grad(out.sum(), x)
    assert gradient.dtype == dtype
    assert gradient.isfinite().all()


# In a model


def block():
    shape = EncoderShape(
        layers=1, dim=16, heads=2, head_dim=8, ffn_dim=32, vocab_size=10, max_len=50, dropout=0.0,
        attention_dropout=0.0, positions="learned", cls=False, projection_bias=True, norm_eps=1e-5,
        init="normal",
    )  # fmt: skip
    return Block(shape, "fnet", {})


def test_in_a_block_it_has_no_projections_and_no_parameters():
    mixer = block().attention
    assert isinstance(mixer, Mixer)
    assert list(mixer.parameters()) == list(mixer.buffers()) == []


def test_a_block_adds_the_transform_of_the_normalised_input():
    of_encoder, x = block().double(), tokens(9, 16)
    mixed = x + transformed(of_encoder.attention_norm(x)).real
    expected = mixed + of_encoder.ffn(of_encoder.ffn_norm(mixed))
    assert_near(of_encoder(x, None), expected, EXACT)


def test_the_declared_operations_are_those_of_a_real_transform_of_all_numbers():
    # 5/2 M log2 M for M = 64 x 32 = 2^11 numbers.
    assert fnet(32).cost(64, 64).flops == 5 * 2**10 * 11
    assert fnet(32).cost(64, 64).parameters == 0
    assert fnet(1).cost(1, 1).flops == 0
