"""Nystromformer is its paper's formula with the means of real tokens, and softmax in its limits."""

import pytest
import torch
import torch.nn.functional as F
from attention_cases import MASKS, assert_near, inputs, mask_of, with_every_mask

from models import build_attention

EXACT = 1e-10
HEADS, HEAD_DIM = 2, 8
CONVERGED = 30


def nystrom(*, seed=0, **options):
    """Returns an instance in evaluation, with a seed of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        attention = build_attention(
            "nystrom",
            num_heads=HEADS,
            head_dim=HEAD_DIM,
            max_len=4096,
            model_dim=HEADS * HEAD_DIM,
            **options,
        )
    return attention.double().eval()


def softmax_weights(q, k, key_mask=None):
    scores = q @ k.mT * HEAD_DIM**-0.5
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None], -torch.inf)
    return scores.softmax(-1)


# The formula


def segments_of(real, landmarks):
    """Lists the real positions of each segment that has any, of one sample's real positions."""
    length = max(real, default=-1) + 1
    segments = {}
    for position in real:
        segments.setdefault(position * landmarks // length, []).append(position)
    return [segments[index] for index in sorted(segments)]


def iterated(matrix, steps):
    """The paper's iteration for one matrix, with norms of its own."""
    z = matrix.T / (matrix.abs().sum(0).max() * matrix.abs().sum(1).max())
    one = torch.eye(len(matrix), dtype=matrix.dtype)
    for _ in range(steps):
        az = matrix @ z
        z = z @ (13 * one - az @ (15 * one - az @ (7 * one - az))) / 4
    return z


def formula(attention, q, k, key_mask, inverse=None):
    """F1 F2^+ F3 and the band, of one sample and head after another; no landmark is empty."""
    config, n = attention.config, k.shape[2]
    inverse = inverse or (lambda matrix: iterated(matrix, config.iterations))
    weights = q.new_zeros(len(q), HEADS, n, n)
    for sample in range(len(q)):
        real = [j for j in range(n) if key_mask is None or key_mask[sample, j]]
        segments = segments_of(real, config.landmarks)
        for head in range(HEADS):
            x, y = q[sample, head], k[sample, head]
            queries, keys = (
                torch.stack([tokens[segment].mean(0) for segment in segments]) for tokens in (x, y)
            )
            f1, f2 = softmax_weights(x, keys), softmax_weights(queries, keys)
            f3 = softmax_weights(queries, y[real])
            weights[sample, head][:, real] = f1 @ inverse(f2) @ f3
            for i in range(n if config.conv_kernel else 0):
                for tap in range(config.conv_kernel):
                    j = i + tap - config.conv_kernel // 2
                    if j in real:
                        weights[sample, head, i, j] += attention.convolution[head, tap]
    return weights


@pytest.mark.parametrize("landmarks", [1, 4, 5, 64])
@pytest.mark.parametrize("conv_kernel", [0, 5, 35])
@with_every_mask
def test_it_is_the_papers_formula(landmarks, conv_kernel, mask):
    q, k, v = inputs(12)
    attention = nystrom(landmarks=landmarks, conv_kernel=conv_kernel)
    key_mask = MASKS[mask](12)
    expected = formula(attention, q, k, key_mask)
    assert_near(attention.weights(q, k, key_mask), expected, EXACT)
    assert_near(attention(q, k, v, key_mask), expected @ v, EXACT)


@pytest.mark.parametrize("mask", ["no mask", "holes and padding"])
def test_its_gradients_are_those_of_the_formula(mask):
    q, k, v = (x.requires_grad_() for x in inputs(9))
    attention = nystrom(landmarks=4, conv_kernel=5)
    key_mask = MASKS[mask](9)
    leaves = (q, k, v, attention.convolution)
    actual = torch.autograd.grad(attention(q, k, v, key_mask).square().sum(), leaves)
    out = formula(attention, q, k, key_mask) @ v
    expected = torch.autograd.grad(out.square().sum(), leaves)
    for of_attention, of_formula in zip(actual, expected, strict=True):
        assert of_formula.abs().max() > 1e-3
        assert_near(of_attention, of_formula, EXACT)


# Landmarks


def landmark_queries(attention, q, key_mask=None):
    """Returns the landmarks of tokens (B, H, N, D), without those of no real token."""
    means, live = attention.segments(q, key_mask)
    return [(each[keep] @ tokens) for each, keep, tokens in zip(means, live, q, strict=True)]


def test_landmarks_are_the_means_of_consecutive_tokens():
    q, _, _ = inputs(12, batch=1)
    [landmarks] = landmark_queries(nystrom(landmarks=4), q)
    assert_near(landmarks, q[0].unflatten(1, (4, 3)).mean(2), 1e-14)


def test_segments_are_as_equal_as_the_length_allows():
    q, _, _ = inputs(10, batch=1)
    [landmarks] = landmark_queries(nystrom(landmarks=4), q)
    parts = q[0].split([3, 2, 3, 2], 1)
    assert_near(landmarks, torch.stack([part.mean(1) for part in parts], 1), 1e-14)


def test_segments_are_those_of_a_samples_own_length():
    q, _, _ = inputs(12)
    key_mask = mask_of("111111110000", "111111111111", "110000000000")
    landmarks = landmark_queries(nystrom(landmarks=4), q, key_mask)
    assert_near(landmarks[0], q[0, :, :8].unflatten(1, (4, 2)).mean(2), 1e-14)
    assert_near(landmarks[1], q[1].unflatten(1, (4, 3)).mean(2), 1e-14)
    assert_near(landmarks[2], q[2, :, :2], 1e-14)


def test_means_are_those_of_real_tokens_and_segments_without_any_are_no_landmarks():
    # In public code the zeros of masked tokens go into the mean.
    q, _, _ = inputs(8, batch=1)
    [landmarks] = landmark_queries(nystrom(landmarks=4), q, mask_of("10110001"))
    expected = torch.stack([q[0, :, 0], q[0, :, 2:4].mean(1), q[0, :, 7]], 1)
    assert_near(landmarks, expected, 1e-14)


# Limits


@pytest.mark.parametrize("landmarks", [12, 64])
@with_every_mask
def test_with_a_landmark_for_each_token_and_the_inverse_it_is_softmax_attention(landmarks, mask):
    q, k, v = inputs(12)
    attention = nystrom(landmarks=landmarks, conv_kernel=0, iterations=CONVERGED)
    key_mask = MASKS[mask](12)
    expected = softmax_weights(q, k, key_mask)
    if key_mask is not None:
        # Masked queries are no landmarks.
        expected, rows = expected * key_mask[:, None, :, None], key_mask[:, None, :, None]
    else:
        rows = 1
    assert_near(attention.weights(q, k, key_mask) * rows, expected, EXACT)
    assert_near(attention(q, k, v, key_mask) * rows, expected @ v, EXACT)


def test_more_steps_come_closer_to_softmax_attention():
    q, k, _ = inputs(12)
    expected = softmax_weights(q, k)

    def error(iterations):
        attention = nystrom(conv_kernel=0, iterations=iterations)
        return (attention.weights(q, k) - expected).abs().max()

    errors = [error(iterations) for iterations in (3, 6, 12, 20)]
    assert errors[0] > 3e-2 > errors[1] > 1e-3 > errors[2] > 1e-8 > errors[3]


def test_tokens_that_are_equal_within_segments_are_attended_to_exactly():
    # F1 and F3 are then rows and columns of F2: the approximation has nothing to lose.
    q, k, v = (x.repeat_interleave(5, 2) for x in inputs(6))
    attention = nystrom(landmarks=6, conv_kernel=0, iterations=CONVERGED)
    assert_near(attention.weights(q, k), softmax_weights(q, k), EXACT)
    assert_near(attention(q, k, v), softmax_weights(q, k) @ v, EXACT)


@with_every_mask
def test_the_iteration_converges_to_the_pseudo_inverse(mask):
    q, k, _ = (2 * x for x in inputs(24))
    attention = nystrom(landmarks=6, conv_kernel=0, iterations=CONVERGED)
    key_mask = MASKS[mask](24)
    expected = formula(attention, q, k, key_mask, torch.linalg.pinv)
    assert_near(attention.weights(q, k, key_mask), expected, 1e-9)


@with_every_mask
def test_rows_sum_to_one_once_the_iteration_has_converged(mask):
    q, k, v = inputs(24)
    attention = nystrom(landmarks=6, conv_kernel=0, iterations=CONVERGED)
    out = attention(q, k, torch.full_like(v, 3.0), MASKS[mask](24))
    assert_near(out, torch.full_like(v, 3.0), 1e-9)


# Samples and masks


def test_each_matrix_begins_with_a_norm_of_its_own():
    # In public code it is the largest of the batch and all heads, and mates are felt.
    q, k, v = inputs(12)
    q[1], k[1] = 30 * q[1], 30 * k[1]
    q[:, 1], k[:, 1] = 10 * q[:, 1], 10 * k[:, 1]
    attention = nystrom(landmarks=4, iterations=2)
    alone = torch.cat([attention(*(x[i : i + 1] for x in (q, k, v))) for i in range(3)])
    assert_near(attention(q, k, v), alone, 1e-12)
    expected = formula(attention, q, k, None) @ v
    assert_near(attention(q, k, v), expected, EXACT)


@pytest.mark.parametrize("length", [3, 8, 11])
def test_padding_of_any_amount_changes_nothing(length):
    q, k, v = inputs(length)
    attention = nystrom(landmarks=8, conv_kernel=5)
    expected = attention(q, k, v)
    for padding in (1, 5, 30):
        padded = (F.pad(x, (0, 0, 0, padding), value=7.0) for x in (q, k, v))
        key_mask = (torch.arange(length + padding) < length).expand(3, -1)
        assert_near(attention(*padded, key_mask)[:, :, :length], expected, 1e-12)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("e", [5, HEAD_DIM])
def test_a_sample_without_real_tokens_gives_zero_and_nowhere_nan(e):
    q, k, v = (x.requires_grad_() for x in inputs(5, batch=2, e=e))
    attention = nystrom(landmarks=3)
    # This raises at the first NaN of a backward pass, also at one that is masked later on.
    with torch.autograd.detect_anomaly(check_nan=True):
        out = attention(q, k, v, mask_of("10110", "00000"))
        out.square().sum().backward()
    assert not out[1].any()
    assert all(x.grad.isfinite().all() for x in (q, k, v, attention.convolution))


# The convolution


@with_every_mask
def test_the_convolution_is_one_kernel_a_head_over_real_values(mask):
    q, k, v = inputs(20)
    attention, without = nystrom(conv_kernel=7), nystrom(conv_kernel=0)
    key_mask = MASKS[mask](20)
    kernel = attention.convolution[:, None]
    kept = v if key_mask is None else v * key_mask[:, None, :, None]
    channels = [F.conv1d(kept[..., e], kernel, padding=3, groups=HEADS) for e in range(5)]
    expected = without(q, k, v, key_mask) + torch.stack(channels, -1)
    assert_near(attention(q, k, v, key_mask), expected, 1e-12)


def test_the_kernel_reaches_as_far_to_the_left_as_to_the_right():
    q, k, _ = inputs(9)
    attention, without = nystrom(conv_kernel=3), nystrom(conv_kernel=0)
    band = attention.weights(q, k) - without.weights(q, k)
    left, centre, right = attention.convolution[0]
    expected = torch.diag(left.expand(8), -1) + torch.diag(right.expand(8), 1)
    assert_near(band[0, 0], expected + centre * torch.eye(9), 1e-12)


def test_the_kernel_begins_as_torch_begins_that_of_a_convolution():
    kernels = torch.stack([nystrom(seed=seed).convolution for seed in range(50)])
    assert kernels.shape == (50, HEADS, 35)
    assert 0.98 < kernels.abs().max() * 35**0.5 <= 1
    assert 0.95 < kernels.var() * 3 * 35 < 1.05


def test_without_a_convolution_it_has_no_parameters():
    assert not list(nystrom(conv_kernel=0).parameters())
    assert [p.shape for p in nystrom().parameters()] == [(HEADS, 35)]


# Forms and options


def test_it_has_neither_a_causal_nor_a_cross_form():
    with pytest.raises(ValueError, match="no causal form"):
        nystrom()(*inputs(5), causal=True)
    with pytest.raises(ValueError, match="no cross form"):
        nystrom()(*inputs(5, 6))


def test_options_are_checked():
    for name in ("landmarks", "iterations"):
        with pytest.raises(ValueError, match="landmarks and iterations must be at least 1"):
            nystrom(**{name: 0})
    for size in (-1, 4):
        with pytest.raises(ValueError, match="conv_kernel must be odd, or 0 for no convolution"):
            nystrom(conv_kernel=size)
