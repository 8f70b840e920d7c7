"""Sinkhorn attention is its paper's formula, and softmax over two blocks where it permutes."""

import math

import pytest
import torch
from attention_cases import MASKS, assert_near, inputs, mask_of, softmax_over, with_every_mask

from models import build_attention
from models.attention.sinkhorn import sinkhorn, sorted_attention

EXACT = 1e-10
HEADS, HEAD_DIM, MAX_LEN, BLOCK = 2, 8, 24, 4


def sinkhorn_attention(*, max_len=MAX_LEN, block=BLOCK, dropout=0.0, drawn=False, **options):
    """Returns an instance that sorts firmly; in training, with noise, if it has drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        attention = build_attention(
            "sinkhorn",
            num_heads=HEADS,
            head_dim=HEAD_DIM,
            max_len=max_len,
            model_dim=HEADS * HEAD_DIM,
            dropout=dropout,
            block=block,
            **options,
        )
        attention.sort.data += 0.3 * torch.randn(attention.sort.shape)
    if drawn:
        attention.resample(generator())
    return attention.double().train(drawn)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def blocks(x, size=BLOCK):
    return x.unflatten(2, (-1, size))


# The sorting


def normalised(matrix, iterations):
    """Columns and rows of exp(matrix) divided by their sums, by turns."""
    matrix = matrix.exp()
    for _ in range(iterations):
        matrix = matrix / matrix.sum(-2, keepdim=True)
        matrix = matrix / matrix.sum(-1, keepdim=True)
    return matrix


@pytest.mark.parametrize("iterations", [1, 2, 8])
def test_columns_and_rows_are_normalised_by_turns(iterations):
    logits = normal(3, 2, 6, 6)
    assert_near(sinkhorn(logits, None, iterations), normalised(logits, iterations), 1e-12)


@pytest.mark.parametrize("iterations", [1, 8])
def test_blocks_that_are_not_sorted_have_no_part_on_either_side(iterations):
    logits = normal(2, 2, 6, 6)
    occupied = mask_of("101101", "000100")
    result = sinkhorn(logits, occupied, iterations)
    for sample in range(2):
        at = occupied[sample].nonzero()[:, 0]
        own = normalised(logits[sample][:, at][:, :, at], iterations)
        expected = torch.zeros(2, 6, 6, dtype=torch.float64)
        expected[:, at[:, None], at] = own
        assert_near(result[sample], expected, 1e-12)


@pytest.mark.parametrize(("iterations", "residual"), [(5, 1.5e-3), (8, 7e-5), (20, 3e-10)])
def test_the_matrix_is_doubly_stochastic_up_to_what_iterations_leave(iterations, residual):
    # What one draw of normal 16 x 16 logits left, at the default temperature.
    result = sinkhorn(normal(400, 1, 16, 16) / 0.75, None, iterations)
    assert_near(result.sum(-1), torch.ones(400, 1, 16), 1e-12)
    left = (result.sum(-2) - 1).abs().amax((1, 2))
    assert left.quantile(0.1) < residual < left.quantile(0.9)


def test_more_iterations_leave_less():
    logits = normal(50, 1, 16, 16)
    left = [(sinkhorn(logits, None, i).sum(-2) - 1).abs().max() for i in (1, 2, 5, 8, 20)]
    assert left == sorted(left, reverse=True)


def test_logits_of_any_size_give_permutations():
    order = torch.tensor([2, 0, 3, 1])
    logits = torch.zeros(1, 1, 4, 4, dtype=torch.float32)
    logits[0, 0, range(4), order] = 5000.0
    assert torch.equal(sinkhorn(logits, None, 8)[0, 0], torch.eye(4)[order])


# The formula


def formula(attention, q, k, key_mask=None, noise=None):
    """The weights of one sample, head and query after another."""
    size, n = attention.config.block, k.shape[2]
    number = -(-n // size)
    weights = q.new_zeros(*q.shape[:3], n)
    for sample in range(len(q)):
        real = [j for j in range(n) if key_mask is None or key_mask[sample, j]]
        sorting = sorted({j // size for j in real})
        for head in range(HEADS):
            keys = k[sample, head]
            of_block = [sum(keys[j] for j in real if j // size == u) for u in sorting]
            rows = torch.stack([x @ attention.sort[head][:, sorting] for x in of_block])
            if noise is not None:
                rows = rows + noise[head, sorting][:, sorting]
            share = q.new_zeros(number, number)
            turns = attention.config.iterations
            at = torch.tensor(sorting)
            share[at[:, None], at] = normalised(rows / attention.config.temperature, turns)
            for i in range(n):
                for j, weight in _row(q[sample, head, i], keys, share[i // size], i, real, size):
                    weights[sample, head, i, j] += weight
    return weights


def _row(query, keys, share, i, real, size):
    """Yields a query's weights of keys: of its own block, and of the average sorted to it."""
    scale = len(query) ** -0.5
    own = [j for j in real if j // size == i // size]
    similar = {j: torch.exp(query @ keys[j] * scale) for j in own}
    places = {}
    for place in range(size):
        at = [j for j in real if j % size == place and share[j // size] > 0]
        if at:
            mass = sum(share[j // size] for j in at)
            average = sum(share[j // size] * keys[j] for j in at) / mass
            places[place] = (at, mass, mass * torch.exp(query @ average * scale))
    total = sum(similar.values()) + sum(part for *_, part in places.values())
    yield from ((j, part / total) for j, part in similar.items())
    for at, mass, part in places.values():
        yield from ((j, part / total * share[j // size] / mass) for j in at)


@with_every_mask
@pytest.mark.parametrize("n", [7, 12])
@pytest.mark.parametrize("drawn", [False, True], ids=["evaluation", "training"])
def test_it_is_the_papers_formula(n, mask, drawn):
    q, k, v = inputs(n)
    attention = sinkhorn_attention(drawn=drawn)
    key_mask = MASKS[mask](n)
    with torch.no_grad():
        expected = formula(attention, q, k, key_mask, attention.noise if drawn else None)
        assert_near(attention.weights(q, k, key_mask), expected, EXACT)
        assert_near(attention(q, k, v, key_mask), expected @ v, EXACT)


@pytest.mark.parametrize(("iterations", "temperature"), [(1, 0.75), (3, 0.2), (8, 5.0)])
def test_its_gradients_are_those_of_the_formula(iterations, temperature):
    q, k, v = (x.requires_grad_() for x in inputs(11, batch=2))
    attention = sinkhorn_attention(iterations=iterations, temperature=temperature)
    key_mask = mask_of("11111111111", "10110000110")
    leaves = (q, k, v, attention.sort)
    actual = torch.autograd.grad(attention(q, k, v, key_mask).square().sum(), leaves)
    out = formula(attention, q, k, key_mask) @ v
    expected = torch.autograd.grad(out.square().sum(), leaves)
    for of_attention, of_formula in zip(actual, expected, strict=True):
        # Also of the sort, which the arena's code leaves without any.
        assert of_formula.abs().max() > 1e-3
        assert_near(of_attention, of_formula, EXACT)


@with_every_mask
def test_own_and_sorted_keys_share_one_softmax(mask):
    # The arena's code adds two, whose weights sum to 2.
    q, k, _ = inputs(11)
    key_mask = MASKS[mask](11)
    total = sinkhorn_attention().weights(q, k, key_mask).sum(-1)
    real = torch.ones(3, 11, dtype=torch.bool) if key_mask is None else key_mask
    sees = torch.stack([real[:, i // 4 * 4 : i // 4 * 4 + 4].any(1) for i in range(11)], 1)
    assert_near(total, sees[:, None].double().expand(3, HEADS, 11), 1e-12)


# Permutations


def local(**sizes):
    sizes = {"num_heads": 2, "head_dim": 8, "max_len": 24, "model_dim": 16} | sizes
    return build_attention("local", **sizes, pattern="block", size=BLOCK)


def sorted_by(order, q, k, v, key_mask=None):
    """Attention where block order[u] is sorted to block u."""
    share = torch.eye(len(order), dtype=q.dtype)[order].expand(*q.shape[:2], -1, -1)
    real = None
    if key_mask is not None:
        real = key_mask.unflatten(1, (-1, BLOCK))
        k, v = (x * key_mask[:, None, :, None] for x in (k, v))
    return sorted_attention(*map(blocks, (q, k, v)), share, real).flatten(2, 3)


@with_every_mask
def test_blocks_that_are_sorted_to_themselves_give_attention_within_blocks(mask):
    # Each key is there twice, with the same weight. Blocks are of consecutive tokens: no comb.
    q, k, v = inputs(12)
    key_mask = MASKS[mask](12)
    out = sorted_by([0, 1, 2], q, k, v, key_mask)
    assert_near(out, local()(q, k, v, key_mask), 1e-12)


@with_every_mask
@pytest.mark.parametrize("order", [[1, 2, 0], [2, 0, 1], [1, 0, 2]])
def test_a_permutation_gives_softmax_over_the_own_block_and_that_sorted_to_it(mask, order):
    q, k, v = inputs(12)
    key_mask = MASKS[mask](12)
    real = torch.ones(3, 12, dtype=torch.bool) if key_mask is None else key_mask

    def one(sample):
        def pairs(i, j):
            own = i // BLOCK
            return real[sample, j] and j // BLOCK in (own, order[own])

        at = slice(sample, sample + 1)
        return softmax_over(pairs, q[at], k[at], v[at])

    expected = torch.cat([one(sample) for sample in range(3)])
    assert_near(sorted_by(order, q, k, v, key_mask), expected, 1e-12)


@pytest.mark.parametrize("shift", [1, 2])
def test_a_learned_sort_is_found_by_what_keys_sum_up_to(shift):
    # Block u sums up to 100 e_u, and the sort asks for block u + shift where it sees that.
    q, k, v = inputs(12, batch=1)
    centred = blocks(k) - blocks(k).mean(3, keepdim=True)
    wanted = torch.zeros(3, HEAD_DIM, dtype=k.dtype)
    wanted[range(3), range(3)] = 100.0
    k = (centred + wanted[:, None] / BLOCK).flatten(2, 3)
    attention = sinkhorn_attention(max_len=12)
    order = [(u + shift) % 3 for u in range(3)]
    attention.sort.data.zero_()
    attention.sort.data[:, range(3), order] = 1.0

    def pairs(i, j):
        return j // BLOCK in (i // BLOCK, order[i // BLOCK])

    assert_near(attention(q, k, v), softmax_over(pairs, q, k, v), 1e-12)


def test_a_lower_temperature_sorts_more_firmly():
    _, k, _ = inputs(24)
    firmness = []
    for temperature in (0.05, 0.75, 100.0):
        share = sinkhorn_attention(temperature=temperature).permutation(blocks(k), None)
        firmness.append(share.amax(-1).mean().item())
    assert firmness == sorted(firmness, reverse=True)
    assert firmness[0] > 0.8
    assert firmness[2] == pytest.approx(1 / 6, rel=0.1)


def test_values_are_sorted_as_values():
    # Other public code takes sorted values from the keys.
    q, k, v = inputs(12)
    assert sorted_by([1, 2, 0], q, k, 0 * v).abs().max() == 0


# Masks


def test_a_sorted_key_weighs_what_it_has_of_real_tokens():
    # One token in the first block, two in the second, each sorted to both in equal parts.
    q, k, v = inputs(2 * BLOCK, batch=1)
    real = mask_of("10001100")
    share = torch.full((1, HEADS, 2, 2), 0.5, dtype=q.dtype)
    kept = [x * real[:, None, :, None] for x in (k, v)]
    out = sorted_attention(*map(blocks, (q, *kept)), share, real.unflatten(1, (2, BLOCK)))
    for head in range(HEADS):
        keys, values = k[0, head], v[0, head]
        both_keys, both_values = (x[[0, 4]].mean(0) for x in (keys, values))
        all_keys = torch.stack([both_keys, keys[5], keys[0]])
        all_values = torch.stack([both_values, values[5], values[0]])
        logits = q[0, head, 0] @ all_keys.T / math.sqrt(HEAD_DIM)
        weights = logits.exp() * torch.tensor([1.0, 0.5, 1.0])
        assert_near(out[0, head, 0, 0], weights @ all_values / weights.sum(), 1e-12)


def test_a_query_of_a_block_without_real_tokens_sees_nothing():
    q, k, v = inputs(12, batch=1)
    out = sinkhorn_attention()(q, k, v, mask_of("111100001111"))
    assert not out[:, :, 4:8].any()
    assert out[:, :, 8:].abs().max() > 0


def test_blocks_of_padding_and_the_rest_of_a_block_are_not_sorted():
    # Whatever the padded length is, a sample has the blocks of its own length.
    q, k, v = inputs(24)
    attention = sinkhorn_attention()
    key_mask = (torch.arange(24) < 10).expand(3, -1)
    out = attention(q, k, v, key_mask)[:, :, :10]
    assert_near(out, attention(q[:, :, :10], k[:, :, :10], v[:, :, :10]), 1e-12)


def test_a_share_too_small_to_divide_by_is_left_out():
    q, k, v = (x.float().requires_grad_() for x in inputs(2 * BLOCK, batch=1))
    real = mask_of("11110111").unflatten(1, (2, BLOCK))
    for tiny in (1e-20, 1e-38, 0.0):
        share = torch.tensor([[tiny, 1.0], [1.0, tiny]]).expand(1, HEADS, 2, 2).clone()
        share.requires_grad_()
        kept = [blocks(x) * real[:, None, ..., None] for x in (k, v)]
        out = sorted_attention(blocks(q), *kept, share, real)
        gradients = torch.autograd.grad(out.square().sum(), (q, k, v, share))
        assert all(x.isfinite().all() for x in (out, *gradients))

        def pairs(i, j):
            return j != 4

        expected = softmax_over(pairs, *(x.detach().double() for x in (q, k, v)))
        assert_near(out.flatten(2, 3), expected, 1e-5)


def test_it_has_no_causal_form():
    with pytest.raises(ValueError, match="no causal form"):
        sinkhorn_attention()(*inputs(5), causal=True)


# Noise


def test_noise_is_gumbel_noise_and_each_head_has_its_own():
    attention = sinkhorn_attention(max_len=100 * BLOCK, drawn=True)
    noise = attention.noise
    assert noise.shape == (HEADS, 100, 100)
    assert noise.mean().item() == pytest.approx(0.5772, abs=5 * 1.2825 / 20000**0.5)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.05)
    # P(noise < x) = exp(-exp(-x)).
    for x in (-1.0, 0.0, 2.0):
        below = (noise < x).double().mean().item()
        assert below == pytest.approx(math.exp(-math.exp(-x)), abs=0.02)
    assert not torch.equal(noise[0], noise[1])


def test_noise_is_divided_by_the_temperature_with_the_logits():
    _, k, _ = inputs(24)
    attention = sinkhorn_attention(drawn=True, temperature=0.5)
    logits = blocks(k).sum(3) @ attention.sort + attention.noise
    expected = normalised(logits / 0.5, 8)
    assert_near(attention.permutation(blocks(k), None), expected, 1e-12)


def test_noise_is_of_training_and_changes_by_resample_alone():
    q, k, v = inputs(24)
    quiet = sinkhorn_attention()
    evaluated = quiet(q, k, v)
    assert torch.equal(quiet.train()(q, k, v), evaluated)  # before anything is drawn
    attention = sinkhorn_attention(drawn=True)
    trained = attention(q, k, v)
    assert not torch.equal(trained, evaluated)
    assert torch.equal(attention(q, k, v), trained)
    assert torch.equal(attention.eval()(q, k, v), evaluated)
    attention.train().resample(generator(1))
    assert not torch.equal(attention(q, k, v), trained)
    attention.resample(generator())
    assert torch.equal(attention(q, k, v), trained)


# Sizes and dropout


@pytest.mark.parametrize(("max_len", "number"), [(3, 1), (4, 1), (5, 2), (24, 6)])
def test_the_sort_has_a_vector_for_each_block_that_there_may_be(max_len, number):
    attention = sinkhorn_attention(max_len=max_len)
    assert attention.sort.shape == (HEADS, HEAD_DIM, number)
    assert attention.cost(3, 3).parameters == HEADS * HEAD_DIM * number
    attention(*inputs(max_len))


def test_one_block_is_softmax_attention():
    q, k, v = inputs(9)
    expected = softmax_over(lambda i, j: True, q, k, v)
    assert_near(sinkhorn_attention(block=64)(q, k, v), expected, 1e-12)


def test_dropout_drops_weights_of_sorted_and_own_keys_once():
    # Sorted keys have the identity of their block's values, own ones that of theirs.
    batch = 60
    q, k, _ = inputs(2 * BLOCK, batch=batch)
    v = torch.eye(2 * BLOCK, dtype=q.dtype).expand(batch, HEADS, -1, -1)
    share = torch.eye(2, dtype=q.dtype)[[1, 0]].expand(batch, HEADS, 2, 2)
    arguments = (*map(blocks, (q, k, v)), share)
    torch.manual_seed(0)
    expected = sorted_attention(*arguments) / 0.75
    out = sorted_attention(*arguments, dropout=0.25)
    dropped = out == 0
    assert 0.23 < dropped.double().mean() < 0.27
    assert_near(out, torch.where(dropped, 0.0, expected), 1e-12)


def test_dropout_is_of_training():
    q, k, v = inputs(24)
    attention = sinkhorn_attention(dropout=0.5)
    evaluated = attention(q, k, v)
    assert torch.equal(sinkhorn_attention()(q, k, v), evaluated)
    assert not torch.equal(attention.train()(q, k, v), evaluated)


# Options


@pytest.mark.parametrize("options", [{"block": 0}, {"iterations": 0}])
def test_blocks_and_iterations_are_at_least_one(options):
    with pytest.raises(ValueError, match="block and iterations must be at least 1"):
        sinkhorn_attention(**options)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_the_temperature_is_positive_and_finite(temperature):
    with pytest.raises(ValueError, match="temperature must be positive and finite"):
        sinkhorn_attention(temperature=temperature)
