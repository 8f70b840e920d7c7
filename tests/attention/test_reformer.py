"""Reformer: hashes, sorted chunks and rounds written out, and what becomes softmax of it."""

import math

import pytest
import torch
from attention_cases import assert_near, inputs, mask_of

from models import build_attention
from models.attention.engines import sorted_chunks

HEADS, HEAD_DIM = 2, 8


def reformer(*, max_len=256, dropout=0.0, seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"num_heads": HEADS, "head_dim": HEAD_DIM, "max_len": max_len, "model_dim": 16}
    return build_attention("reformer", **sizes, dropout=dropout, **options).double().eval()


def attend(attention, q, v, key_mask=None):
    return attention(q, q, v, key_mask=key_mask)


def shared_softmax(q, v, real=None):
    """Softmax of q_i.q_j / (|q_j| sqrt(D)) over all other tokens, or itself if there is none."""
    n = q.shape[2]
    real = list(range(n)) if real is None else real
    out = torch.zeros_like(v)
    for i in range(n):
        seen = [j for j in real if j != i] or [i]
        keys = q[:, :, seen] / q[:, :, seen].norm(dim=-1, keepdim=True)
        logits = torch.einsum("bhd,bhjd->bhj", q[:, :, i], keys) / math.sqrt(q.shape[3])
        out[:, :, i] = torch.einsum("bhj,bhje->bhe", logits.softmax(-1), v[:, :, seen])
    return out


def written_out(vectors, q, v, real, chunk):
    """One head of one sample: q (N, D), v (N, E), vectors (D, rounds, columns), a list of real.

    Each round by itself, then the rounds by the softmax of their log-sums.
    """
    outputs, log_sums = [], []
    used = math.ceil(len(real) / chunk)
    for r in range(vectors.shape[1]):
        bucket = {}
        for i in real:
            products = q[i] @ vectors[:, r, :used]
            bucket[i] = int(torch.cat([products, -products]).argmax())
        order = sorted(real, key=lambda i: (bucket[i], i))
        chunks = [order[at : at + chunk] for at in range(0, len(order), chunk)]
        out, log_sum = torch.zeros(len(q), v.shape[1]).double(), torch.zeros(len(q)).double()
        for at, members in enumerate(chunks):
            seen = members if len(chunks) == 1 else chunks[at - 1] + members
            for i in members:
                others = [j for j in seen if j != i] or [i]
                keys = q[others] / q[others].norm(dim=-1, keepdim=True)
                logits = keys @ q[i] / math.sqrt(q.shape[1])
                log_sum[i] = logits.logsumexp(0)
                out[i] = logits.softmax(0) @ v[others]
        outputs.append(out)
        log_sums.append(log_sum)
    parts = torch.stack(log_sums).softmax(0)[..., None]
    return (parts * torch.stack(outputs)).sum(0)


@pytest.mark.parametrize("chunk", [3, 8])
@pytest.mark.parametrize("hashes", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 2, 17, 24, 40])
def test_it_is_the_rounds_of_sorted_chunks_written_out(n, hashes, chunk):
    attention = reformer(hashes=hashes, chunk=chunk)
    q, _, v = inputs(n, batch=2)
    out = attend(attention, q, v)
    for b in range(2):
        for h in range(HEADS):
            vectors = attention.vectors[h]
            expected = written_out(vectors, q[b, h], v[b, h], list(range(n)), chunk)
            assert_near(out[b, h], expected, 1e-12)


@pytest.mark.parametrize(
    "row", ["1101110111110011100", "0000000000000000010", "1000000000000000001"]
)
def test_only_real_tokens_are_hashed_sorted_and_cut(row):
    attention = reformer(hashes=2, chunk=3)
    q, _, v = inputs(19, batch=1)
    real = [i for i, token in enumerate(row) if token == "1"]
    out = attend(attention, q, v, mask_of(row))
    for h in range(HEADS):
        expected = written_out(attention.vectors[h], q[0, h], v[0, h], real, 3)
        assert_near(out[0, h][real], expected[real], 1e-12)


@pytest.mark.parametrize("hashes", [1, 2, 4])
@pytest.mark.parametrize("chunk", [15, 29, 30, 64])
def test_one_or_two_chunks_are_softmax_over_all_other_tokens(chunk, hashes):
    # With two chunks, the own one and the one before are everything, and nothing counts twice.
    attention = reformer(hashes=hashes, chunk=chunk)
    q, _, v = inputs(30)
    assert_near(attend(attention, q, v), shared_softmax(q, v), 1e-12)


def test_a_token_sees_itself_only_where_it_is_alone():
    attention = reformer()
    q, _, v = inputs(5, batch=1)
    alone = attend(attention, q, v, mask_of("00100"))
    assert_near(alone[:, :, 2], v[:, :, 2], 1e-12)
    pair = attend(attention, q, v, mask_of("00101"))
    assert_near(pair[:, :, 2], v[:, :, 4], 1e-12)


def test_equal_vectors_are_in_one_bucket_and_opposite_ones_are_not():
    attention = reformer(chunk=4, hashes=3)
    q = inputs(32)[0]
    q[:, :, 20] = q[:, :, 3]
    q[:, :, 21] = 7 * q[:, :, 3]
    q[:, :, 22] = -q[:, :, 3]
    buckets = attention._buckets(q, None)
    assert torch.equal(buckets[..., 20], buckets[..., 3])
    assert torch.equal(buckets[..., 21], buckets[..., 3])
    assert (buckets[..., 22] != buckets[..., 3]).all()


def test_similar_vectors_share_buckets_more_often_than_others():
    attention = reformer(chunk=4, hashes=64)
    q = inputs(64)[0]
    q[:, :, 1::2] = q[:, :, ::2] + 0.1 * inputs(32, seed=1)[0]
    buckets = attention._buckets(q, None)
    near = (buckets[..., ::2] == buckets[..., 1::2]).double().mean()
    far = (buckets[..., ::2] == buckets.roll(2, -1)[..., ::2]).double().mean()
    assert near > 0.7
    assert far < 0.1


def test_the_names_of_buckets_are_of_no_consequence_for_two_chunks():
    attention = reformer(chunk=16, hashes=2)
    q, _, v = inputs(32)
    out = attend(attention, q, v)
    attention.vectors.copy_(attention.vectors.flip(-1))
    assert_near(attend(attention, q, v), out, 1e-12)


def test_queries_are_not_normalised_and_keys_are():
    attention = reformer(chunk=64)
    q, _, v = inputs(10)
    longer = q.clone()
    longer[:, :, 4] *= 5  # as a key, it stays what it was
    out, other = attend(attention, q, v), attend(attention, longer, v)
    rows = [i for i in range(10) if i != 4]
    assert_near(other[:, :, rows], out[:, :, rows], 1e-12)
    assert (other[:, :, 4] - out[:, :, 4]).abs().max() > 1e-3


def test_training_draws_and_evaluation_keeps_its_own():
    attention = reformer(chunk=4, hashes=1)
    q, _, v = inputs(40)
    evaluated = attend(attention, q, v)
    kept = attention.vectors.clone()
    attention.train().resample(torch.Generator().manual_seed(1))
    assert not torch.equal(attend(attention, q, v), evaluated)
    assert torch.equal(attention.vectors, kept)
    assert torch.equal(attend(attention.eval(), q, v), evaluated)


def test_later_tokens_move_earlier_ones_which_is_why_there_is_no_causal_form():
    attention = reformer(chunk=4, hashes=1)
    assert attention.capabilities.patterns == {"self"}
    buckets = attention._buckets(inputs(40)[0], None)
    alone, among = (
        (x.argsort(dim=-1, stable=True).argsort(-1) // 4)[..., :20]
        for x in (buckets[..., :20], buckets)
    )
    assert not torch.equal(alone, among)


@pytest.mark.parametrize("weights", [2**17, 40])
def test_pieces_of_any_size_give_the_same(monkeypatch, weights):
    attention = reformer(chunk=4, hashes=2)
    q, _, v = (x.requires_grad_() for x in inputs(30))
    whole = attend(attention, q, v)
    grad = torch.autograd.grad(whole.square().sum(), (q, v))
    monkeypatch.setattr(sorted_chunks, "piece_size", lambda device: weights)
    again = attend(attention, q, v)
    assert_near(again, whole, 1e-12)
    for mine, other in zip(torch.autograd.grad(again.square().sum(), (q, v)), grad, strict=True):
        assert_near(mine, other, 1e-12)


def test_dropout_keeps_the_mean_and_its_gradient_is_that_of_the_same_draw():
    attention = reformer(chunk=4, hashes=2, dropout=0.5).train()
    attention.drawn.copy_(attention.vectors)
    q, _, v = inputs(16, batch=1)
    torch.manual_seed(0)
    draws = torch.stack([attend(attention, q, v) for _ in range(600)])
    error = draws.mean(0) - attend(attention.eval(), q, v)
    assert (error.abs() < 5 * draws.std(0) / 600**0.5 + 1e-9).all()

    attention.train()
    v.requires_grad_()

    def drawn(values):
        torch.manual_seed(3)
        return attend(attention, q, values)

    # Linear in the values: the gradient's product with them is the output's sum.
    out = drawn(v)
    (grad,) = torch.autograd.grad(out.sum(), v)
    assert_near((grad * v).sum().detach(), out.sum().detach(), 1e-12)


@pytest.mark.parametrize("options", [{"hashes": 0}, {"chunk": 0}])
def test_what_is_no_number_of_rounds_or_tokens_is_refused(options):
    with pytest.raises(ValueError, match="hashes and chunk must be at least 1"):
        reformer(**options)
