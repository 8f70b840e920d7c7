"""BigBird: neighbouring, global and random blocks, and who draws them."""

import pytest
import torch
from attention_cases import assert_near, inputs, mask_of, softmax_over

from models import build_attention

BLOCK = 4
SIZES = {"num_heads": 2, "head_dim": 8, "max_len": 256, "model_dim": 16}


def bigbird(seed=0, dropout=0.0, max_len=256, **options):
    torch.manual_seed(seed)
    sizes = SIZES | {"max_len": max_len}
    return build_attention("bigbird", **sizes, dropout=dropout, **({"block": BLOCK} | options))


def blocks_seen(attention, n, key_mask=None):
    """Which blocks each block sees, (B, H, blocks, blocks), found by equal weights of its keys."""
    batch = 1 if key_mask is None else len(key_mask)
    zeros = torch.zeros(batch, 2, n, 8, dtype=torch.float64)
    identity = torch.eye(n, dtype=torch.float64).expand(batch, 2, n, n)
    weights = attention(zeros, zeros, identity, key_mask=key_mask)
    blocks = -(-n // BLOCK)
    padded = torch.nn.functional.pad(weights, (0, blocks * BLOCK - n, 0, blocks * BLOCK - n))
    return padded.view(batch, 2, blocks, BLOCK, blocks, BLOCK).amax((3, 5)) > 0


def near(row, last):
    return {b for b in (0, last, row - 1, row, row + 1) if 0 <= b <= last}


@pytest.mark.parametrize("random", [0, 1, 3])
@pytest.mark.parametrize("n", [60, 77])
def test_a_row_sees_neighbours_both_ends_and_as_many_random_blocks_as_asked(n, random):
    seen = blocks_seen(bigbird(random=random), n)[0]
    last = -(-n // BLOCK) - 1
    for head in seen:
        for row in range(1, last):
            blocks = set(head[row].nonzero().flatten().tolist())
            assert near(row, last) <= blocks
            assert len(blocks - near(row, last)) == random
        assert head[0].all()
        assert head[last].all()


def test_random_blocks_are_spread_over_the_whole_sequence_and_differ_by_head_and_row():
    # Public code draws from the first 1,024 tokens alone.
    counts = torch.zeros(60)
    for seed in range(30):
        seen = blocks_seen(bigbird(seed, random=3), 240)[0]
        assert not torch.equal(seen[0], seen[1])
        counts += seen[:, 1:59].sum((0, 1))
    chosen = counts[1:59] - 3 * 60  # a block is seen by itself and its two neighbours besides
    expected = 60 * 58 * 3 / 58
    assert (chosen[2:-2] - expected).abs().max() < 5 * expected**0.5


@pytest.mark.parametrize("n", [37, 64, 77])
def test_it_is_softmax_over_the_blocks_it_sees(n):
    attention = bigbird()
    q, k, v = inputs(n, batch=1)
    seen = blocks_seen(attention, n)[0]
    out = attention(q, k, v)
    for head in range(2):
        at = slice(head, head + 1)
        pairs = seen[head].tolist()
        expected = softmax_over(
            lambda i, j, pairs=pairs: pairs[i // BLOCK][j // BLOCK], q[:, at], k[:, at], v[:, at]
        )
        assert_near(out[:, at], expected, 1e-12)


@pytest.mark.parametrize("n", [1, 16, 28])
def test_so_few_blocks_that_all_are_seen_is_softmax(n):
    q, k, v = inputs(n)
    softmax = build_attention("softmax", **SIZES)
    assert_near(bigbird()(q, k, v), softmax(q, k, v), 1e-12)


@pytest.mark.parametrize("n", [29, 77])
def test_as_many_random_blocks_as_there_are_is_softmax(n):
    q, k, v = inputs(n)
    softmax = build_attention("softmax", **SIZES)
    assert_near(bigbird(random=60)(q, k, v), softmax(q, k, v), 1e-12)


def test_the_last_block_is_that_of_a_sequences_own_last_token():
    n, attention = 77, bigbird()
    mask = torch.arange(n) < torch.tensor([77, 50, 41])[:, None]
    mask[1, 20:24] = False  # a hole
    seen = blocks_seen(attention, n, mask)
    for sample, length in enumerate((77, 50, 41)):
        alone = blocks_seen(attention, length)[0]
        blocks = alone.shape[-1]
        if sample == 1:
            alone[:, :, 5] = False
        assert torch.equal(seen[sample, :, :blocks, :blocks], alone)


def test_holes_are_left_out_of_the_blocks_that_are_seen():
    attention = bigbird(random=1)
    q, k, v = inputs(40, batch=1)
    mask = mask_of("1101" * 10)
    seen = blocks_seen(attention, 40)[0, 0].tolist()
    expected = softmax_over(
        lambda i, j: seen[i // BLOCK][j // BLOCK] and j % 4 != 2, q[:, :1], k[:, :1], v[:, :1]
    )
    assert_near(attention(q, k, v, key_mask=mask)[:, :1], expected, 1e-12)


def test_the_draws_are_state_and_have_no_gradient():
    attention = bigbird()
    assert attention.draws.shape == (2, 64, 64)
    assert "draws" in attention.state_dict()
    assert not list(attention.parameters())


def test_dropout_keeps_the_mean():
    attention = bigbird(dropout=0.5, random=1).train()
    q, k, v = (x.float() for x in inputs(40, batch=1))
    torch.manual_seed(0)
    draws = torch.stack([attention(q, k, v) for _ in range(600)])
    error = draws.mean(0) - attention.eval()(q, k, v)
    assert (error.abs() < 5 * draws.std(0) / 600**0.5 + 1e-6).all()


@pytest.mark.parametrize("options", [{"block": 0}, {"random": -1}])
def test_what_is_no_number_of_blocks_is_refused(options):
    with pytest.raises(ValueError, match="block must be at least 1, and random at least 0"):
        bigbird(**options)
