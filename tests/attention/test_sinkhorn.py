"""Sinkhorn attention: the sorting matrix, what becomes of hard ones, masks and noise."""

import pytest
import torch
from attention_cases import assert_near, inputs, mask_of, softmax_over

from models import build_attention
from models.attention.sinkhorn import sinkhorn, sorted_attention

SIZES = {"num_heads": 2, "head_dim": 8, "max_len": 64, "model_dim": 16}
BLOCK = 4


def attention(*, dropout=0.0, **options):
    torch.manual_seed(0)
    options = {"block": BLOCK} | options
    return build_attention("sinkhorn", **SIZES, dropout=dropout, **options).double().eval()


def in_blocks(*tensors):
    return [x.unflatten(2, (-1, BLOCK)) for x in tensors]


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# The sorting matrix


def test_rows_are_distributions_and_columns_nearly_so():
    p = sinkhorn(normal(2, 3, 7, 7), None, 20)
    assert (p >= 0).all()
    assert_near(p.sum(-1), torch.ones(2, 3, 7).double(), 1e-14)
    assert_near(p.sum(-2), torch.ones(2, 3, 7).double(), 1e-5)


def test_more_iterations_come_nearer_to_doubly_stochastic():
    logits = normal(50, 1, 16, 16)
    residual = {}
    for iterations in (1, 2, 5, 8, 20):
        columns = sinkhorn(logits, None, iterations).sum(-2)
        residual[iterations] = float((columns - 1).abs().amax(-1).median())
    assert sorted(residual.values(), reverse=True) == list(residual.values())
    # What the literature's code is measured to leave on normal 16 x 16 logits.
    assert residual[5] < 5e-3
    assert residual[8] < 5e-4
    assert residual[20] < 1e-7


def test_it_is_columns_and_rows_divided_by_their_sums_by_turns():
    logits = normal(1, 2, 5, 5)
    p = logits.exp()
    for _ in range(6):
        p = p / p.sum(-2, keepdim=True)
        p = p / p.sum(-1, keepdim=True)
    assert_near(sinkhorn(logits, None, 6), p, 1e-13)


def test_a_matrix_that_is_doubly_stochastic_stays():
    p = 0.5 * torch.eye(4).double() + 0.5 * torch.eye(4).roll(1, 0).double() + 1e-300
    assert_near(sinkhorn(p.log()[None, None], None, 8)[0, 0], p, 1e-12)


def test_large_differences_give_a_permutation():
    order = torch.tensor([2, 0, 3, 1])
    p = sinkhorn(1e4 * torch.eye(4).double()[order][None, None], None, 8)
    assert torch.equal(p[0, 0].round(decimals=9), torch.eye(4).double()[order])


def test_blocks_without_real_tokens_have_neither_row_nor_column():
    logits = normal(2, 3, 5, 5)
    occupied = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0]]).bool()
    p = sinkhorn(logits, occupied, 8)
    kept = [0, 2, 3]
    expected = sinkhorn(logits[:1][:, :, kept][..., kept], None, 8)
    assert_near(p[:1][:, :, kept][..., kept], expected, 1e-13)
    assert p[0, :, [1, 4]].abs().sum() + p[0, :, :, [1, 4]].abs().sum() == 0
    assert p[1].abs().sum() == 0


def test_its_logits_are_descriptors_of_keys_by_a_map_of_each_head_over_the_temperature():
    mechanism = attention(temperature=0.5)
    _, k, _ = inputs(12)
    logits = torch.einsum("bhutd,hdl->bhul", *in_blocks(k), mechanism.sort[:, :, :3])
    assert_near(mechanism.permutation(*in_blocks(k), None), sinkhorn(2 * logits, None, 8), 1e-13)


# The attention


def test_sorting_each_block_to_itself_is_block_local_softmax():
    # The two copies of every key cancel.
    q, k, v = inputs(20)
    identity = torch.eye(5).double().expand(3, 2, 5, 5)
    out = sorted_attention(*in_blocks(q, k, v), identity).flatten(2, 3)
    local = build_attention("local", **SIZES, pattern="block", size=BLOCK)
    assert_near(out, local(q, k, v), 1e-12)


def test_sorting_by_a_shift_is_softmax_over_the_own_and_the_shifted_block():
    q, k, v = inputs(20)
    shift = torch.eye(5).double().roll(2, 1).expand(3, 2, 5, 5)
    out = sorted_attention(*in_blocks(q, k, v), shift).flatten(2, 3)

    def pairs(i, j):
        return j // BLOCK in (i // BLOCK, (i // BLOCK + 2) % 5)

    assert_near(out, softmax_over(pairs, q, k, v), 1e-12)


def test_a_hard_sort_takes_the_mask_of_the_block_along():
    q, k, v = inputs(20, batch=1)
    mask = mask_of("11011111001111111101")
    real = mask[:, None, :, None]
    shift = torch.eye(5).double().roll(1, 1).expand(1, 2, 5, 5)
    blocks = in_blocks(q, k * real, v * real)
    out = sorted_attention(*blocks, shift, mask.unflatten(1, (-1, BLOCK))).flatten(2, 3)

    def pairs(i, j):
        return j // BLOCK in (i // BLOCK, (i // BLOCK + 1) % 5) and bool(mask[0, j])

    assert_near(out, softmax_over(pairs, q, k, v), 1e-12)


def test_soft_sorts_mix_tokens_at_one_place_of_their_blocks():
    mechanism = attention()
    q, k, v = inputs(12, batch=1)
    p = mechanism.permutation(*in_blocks(k), None)
    queries, keys, values = in_blocks(q, k, v)
    out = torch.empty_like(values)
    for u in range(3):
        mixed_k, mixed_v = (
            sum(p[:, :, u, m, None, None] * x[:, :, m] for m in range(3)) for x in (keys, values)
        )
        both_k = torch.cat([mixed_k, keys[:, :, u]], 2)
        both_v = torch.cat([mixed_v, values[:, :, u]], 2)
        logits = torch.einsum("bhid,bhjd->bhij", queries[:, :, u], both_k) / 8**0.5
        out[:, :, u] = logits.softmax(-1) @ both_v
    assert_near(mechanism(q, k, v), out.flatten(2, 3), 1e-12)


def test_the_sort_is_learned():
    # In the arena's code the sorted keys do not depend on the sorting matrix.
    mechanism = attention()
    q, k, v = inputs(12)
    mechanism(q, k, v).square().sum().backward()
    assert (mechanism.sort.grad[:, :, :3].abs().amax((1, 2)) > 0).all()


def test_noise_is_drawn_for_training_alone_and_is_gumbels():
    mechanism = attention()
    q, k, v = inputs(24)
    evaluated = mechanism(q, k, v)
    mechanism.train()
    assert_near(mechanism(q, k, v), evaluated, 1e-14)  # before the first draw
    noise = []
    for seed in range(40):
        mechanism.resample(torch.Generator().manual_seed(seed))
        noise.append(mechanism.noise.clone())
    noise = torch.stack(noise).flatten()
    assert noise.mean() == pytest.approx(0.5772, abs=5 * 1.2825 / len(noise) ** 0.5)
    assert noise.var() == pytest.approx(1.6449, rel=0.1)
    assert (mechanism(q, k, v) - evaluated).abs().max() > 1e-3
    assert torch.equal(mechanism.eval()(q, k, v), evaluated)


def test_dropout_keeps_the_mean():
    mechanism = attention(dropout=0.5).train()
    q, k, v = inputs(12, batch=1)
    torch.manual_seed(0)
    draws = torch.stack([mechanism(q, k, v) for _ in range(600)]).detach()
    error = draws.mean(0) - mechanism.eval()(q, k, v)
    assert (error.abs() < 5 * draws.std(0) / 600**0.5 + 1e-9).all()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"block": 0}, "block and iterations must be at least 1"),
        ({"iterations": 0}, "block and iterations must be at least 1"),
        ({"temperature": 0.0}, "temperature must be positive and finite"),
    ],
)
def test_impossible_options_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        attention(**options)
