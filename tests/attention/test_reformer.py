"""Reformer: its rounds by the paper's definition, its hashes, its self mask and its padding."""

import math

import pytest
import torch
from attention_cases import MASKS, assert_near, inputs, mask_of, softmax_over, with_every_mask

from models import build_attention
from models.attention import capabilities
from models.attention.engines import sorted_chunks
from models.dropout import DeviceDraws, draws_on

HEADS, HEAD_DIM = 2, 8


def reformer(*, heads=HEADS, head_dim=HEAD_DIM, max_len=256, dropout=0.0, **options):
    sizes = {"num_heads": heads, "head_dim": head_dim, "max_len": max_len}
    sizes["model_dim"] = heads * head_dim
    torch.manual_seed(0)
    return build_attention("reformer", **sizes, dropout=dropout, **options).double()


def tokens(n, **arguments):
    """Returns queries, which are keys, and values."""
    q, _, v = inputs(n, **arguments)
    return q, v


def unit(x):
    return x / x.square().sum(-1, keepdim=True).sqrt()


# The definition


def one_round(x, vectors, widths, chunk):
    """Returns the sets of tokens that each of the tokens (N, D) sees in a round."""

    def bucket(i):
        hashes, first = [], 0
        for width in widths:
            products = x[i] @ vectors[:, first : first + width]
            hashes.append(int(torch.cat([products, -products]).argmax()))
            first += width
        return hashes

    order = sorted(range(len(x)), key=lambda i: (bucket(i), i))
    chunks = [order[at : at + chunk] for at in range(0, len(x), chunk)]
    return {i: {*own, *chunks[c - 1]} for c, own in enumerate(chunks) for i in own}


def of_one_head(x, v, vectors, widths, chunk):
    """Attention in each round, and the rounds weighed by the softmax of their log-sums."""
    out = torch.zeros(len(x), v.shape[-1], dtype=v.dtype)
    rounds = [one_round(x, vectors[:, r], widths, chunk) for r in range(vectors.shape[1])]
    for i in range(len(x)):
        log_sums, means = [], []
        for seen in rounds:
            keys = sorted(seen[i])
            logits = unit(x[keys]) @ x[i] / x.shape[-1] ** 0.5
            logits[keys.index(i)] = -5e4
            log_sums.append(logits.logsumexp(0))
            means.append(logits.softmax(0) @ v[keys])
        out[i] = torch.stack(log_sums).softmax(0) @ torch.stack(means)
    return out


def by_definition(attention, q, v, widths, chunk, key_mask=None):
    """``widths`` are the numbers of vectors of the hashes that make a bucket of so many tokens."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=v.dtype)
    for b in range(len(q)):
        real = torch.arange(q.shape[2]) if key_mask is None else key_mask[b].nonzero().squeeze(-1)
        for h in range(q.shape[1]):
            args = attention.fixed[h], widths(len(real)), chunk
            out[b, h, real] = of_one_head(q[b, h, real], v[b, h, real], *args)
    return out


@with_every_mask
@pytest.mark.parametrize(("chunk", "hashes"), [(1, 2), (3, 1), (3, 3), (8, 2)])
def test_it_is_the_papers_rounds_over_the_real_tokens(chunk, hashes, mask):
    q, v = tokens(20)
    attention = reformer(chunk=chunk, hashes=hashes).eval()
    key_mask = MASKS[mask](20)
    expected = by_definition(attention, q, v, lambda n: [-(-n // chunk)], chunk, key_mask)
    assert_near(attention(q, q, v, key_mask), expected, 1e-12)
    assert_near(attention.quadratic(q, q, v, key_mask), expected, 1e-12)


def test_beyond_the_largest_hash_a_bucket_is_several_hashes(monkeypatch):
    monkeypatch.setattr("models.attention.reformer.VECTORS", 2)
    widths = {40: [2, 2, 1], 25: [2, 2, 1], 12: [2, 1], 6: [2], 3: [1]}
    q, v = tokens(40, batch=5)
    lengths = torch.tensor(list(widths))
    key_mask = torch.arange(40) < lengths[:, None]
    attention = reformer(chunk=3).eval()
    expected = by_definition(attention, q, v, widths.get, 3, key_mask)
    assert_near(attention(q, q, v, key_mask), expected, 1e-12)
    assert_near(attention.quadratic(q, q, v, key_mask), expected, 1e-12)


# Where it is softmax attention


@pytest.mark.parametrize("hashes", [1, 2, 5])
@pytest.mark.parametrize("chunk", [25, 20, 13, 10])
def test_with_one_or_two_chunks_it_is_softmax_of_all_but_the_token_itself(chunk, hashes):
    q, v = tokens(20)
    expected = softmax_over(lambda i, j: i != j, q, unit(q), v)
    assert_near(reformer(chunk=chunk, hashes=hashes)(q, q, v), expected, 1e-12)


def test_with_more_chunks_it_is_not():
    q, v = tokens(21)
    expected = softmax_over(lambda i, j: i != j, q, unit(q), v)
    assert (reformer(chunk=10)(q, q, v) - expected).abs().max() > 1e-2


def test_a_token_that_is_alone_sees_itself():
    q, v = tokens(6, batch=2)
    key_mask = mask_of("001000", "110000")
    out = reformer(chunk=1)(q, q, v, key_mask)
    assert_near(out[0, :, 2], v[0, :, 2], 1e-14)
    assert_near(out[1, :, :2], v[1].flip(1)[:, -2:], 1e-14)
    assert_near(reformer()(q[:, :, :1], q[:, :, :1], v[:, :, :1]), v[:, :, :1], 1e-14)


def test_a_token_never_sees_itself_however_low_its_other_logits():
    # A logit of -5e4 would win against these of -1e6.
    q, v = tokens(2)
    q[:, :, 0], q[:, :, 1] = 3e6, -3e6
    out = reformer()(q, q, v)
    assert_near(out, v.flip(2), 1e-14)


# Keys


def test_the_length_of_a_query_is_not_felt_by_others():
    # Keys are unit vectors, and hashes know directions alone.
    q, v = tokens(50)
    attention = reformer(chunk=4).eval()
    factors = torch.where(torch.arange(50) % 2 == 0, 1.0, 5.0).double()
    longer = q * factors[:, None]
    out, other = (attention(x, x, v) for x in (q, longer))
    assert_near(other[:, :, ::2], out[:, :, ::2], 1e-12)
    assert (other - out)[:, :, 1::2].abs().max() > 1e-2


# Hashes


def buckets_of(attention, q, key_mask=None):
    return attention._buckets(q, key_mask)


def test_equal_vectors_land_in_one_bucket_and_opposite_ones_do_not():
    q, _ = tokens(60)
    q = torch.cat([q, 3 * q, -q], 2)
    same, longer, opposite = buckets_of(reformer(chunk=4, hashes=3), q).chunk(3, -1)
    assert torch.equal(longer, same)
    assert (opposite != same).all()


@pytest.mark.parametrize(("n", "vectors"), [(8, 1), (9, 2), (64, 8), (65, 9), (512, 64)])
def test_there_are_two_buckets_for_each_chunk(n, vectors):
    q, _ = tokens(4096, d=64, heads=1, batch=1)
    attention = reformer(heads=1, head_dim=64, chunk=8, hashes=1, max_len=4096)
    # Those of n real tokens, of which every token under the mask takes one too.
    key_mask = (torch.arange(4096) < n)[None]
    assert len(buckets_of(attention, q, key_mask).unique()) == 2 * vectors


@pytest.mark.parametrize("chunks", [1, 2, 64, 65, 128, 129, 1000, 8192, 8193, 10**6])
def test_there_are_about_as_many_buckets_however_many_hashes_make_them(chunks):
    with torch.device("meta"):
        attention = reformer(max_len=64 * chunks)
    buckets = math.prod(2 * width for width in attention._widths(64 * chunks))
    assert 2 * chunks <= buckets <= 4 * chunks
    assert attention.fixed.shape[-1] <= 64 * (1 + math.log(chunks, 128))


@pytest.mark.parametrize("angle", [0.3, 1.0, 2.0])
def test_one_vector_tells_directions_apart_as_often_as_their_angle_says(angle):
    # P(sign(a.r) = sign(b.r)) = 1 - angle / pi.
    hashes = 5000
    q = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]]).double()[None, None]
    first, second = buckets_of(reformer(heads=1, head_dim=2, hashes=hashes), q).unbind(-1)
    p = 1 - angle / math.pi
    together = (first == second).double().mean().item()
    assert abs(together - p) < 5 * math.sqrt(p * (1 - p) / hashes)


def test_heads_and_rounds_have_hashes_of_their_own():
    q = tokens(200, heads=1)[0].expand(3, HEADS, 200, HEAD_DIM)
    of_each = buckets_of(reformer(chunk=10), q).transpose(1, 2).flatten(0, 1)
    for a in range(len(of_each)):
        for b in range(a):
            assert (of_each[a] == of_each[b]).double().mean() < 0.5


# Padding and order


def test_a_masked_token_is_as_good_as_absent():
    q, v = tokens(90, batch=1)
    real = torch.arange(90) % 3 != 1
    attention = reformer(chunk=7)
    out = attention(q, q, v, real[None])[:, :, real]
    q, v = q[:, :, real], v[:, :, real]
    assert_near(out, attention(q, q, v), 1e-12)


def test_the_first_chunk_sees_the_last_one():
    q, _ = tokens(12, batch=1, heads=1)
    attention = reformer(heads=1, chunk=2, hashes=1)
    order = buckets_of(attention, q).argsort(stable=True, dim=-1).flatten()
    seen = attention.weights(q, q)[0, 0] > 0
    assert seen[order[0], order[-2:]].all()
    assert not seen[order[-1], order[:2]].any()


def test_a_changed_last_token_changes_what_earlier_ones_see_of_each_other():
    # So masking by position would not make it causal.
    assert capabilities("reformer", {}).patterns == {"self"}
    q, _ = tokens(60, batch=1)
    other = q.clone()
    other[:, :, -1] *= -1
    attention = reformer(chunk=4)
    first, second = (attention.weights(x, x)[:, :, :-1, :-1] > 0 for x in (q, other))
    assert ((first != second) & torch.ones(59, 59).tril().bool()).any()


# Draws


def test_drawing_takes_from_the_given_generator_alone_and_changes_training_alone():
    q, v = tokens(60)
    attention = reformer(chunk=4)
    state = torch.get_rng_state()
    evaluated, trained = attention.eval()(q, q, v), attention.train()(q, q, v)
    attention.resample(torch.Generator().manual_seed(1))
    assert torch.equal(attention.eval()(q, q, v), evaluated)
    resampled = attention.train()(q, q, v)
    assert (resampled - trained).abs().max() > 1e-2
    attention.resample(torch.Generator().manual_seed(1))
    assert torch.equal(attention(q, q, v), resampled)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_checkpoint_holds_both_draws():
    attention = reformer()
    assert set(attention.state_dict()) == {"fixed", "drawn"}
    assert not list(attention.parameters())


# Dropout

KINDS = {
    "on CPU": draws_on,
    "elsewhere": lambda device, p, seed: DeviceDraws(p, seed, device),
}
with_either_dropout = pytest.mark.parametrize("kind", KINDS)


@with_either_dropout
def test_dropout_keeps_the_mean(kind, monkeypatch):
    monkeypatch.setattr(sorted_chunks, "draws_on", KINDS[kind])
    attention = reformer(chunk=5, dropout=0.5).train()
    q, v = tokens(16, batch=1)
    draws = torch.stack([attention(q, q, v) for _ in range(600)])
    assert draws.std(0).min() > 1e-2
    error = draws.mean(0) - attention.eval()(q, q, v)
    assert (error.abs() < 5 * draws.std(0) / 600**0.5).all()


@with_either_dropout
def test_gradients_are_those_of_the_weights_that_dropout_keeps(kind, monkeypatch):
    monkeypatch.setattr(sorted_chunks, "draws_on", KINDS[kind])
    # One chunk at a time, so that the draws of many pieces are to be repeated.
    monkeypatch.setattr(sorted_chunks, "piece_size", lambda device: 1)
    attention = reformer(heads=1, head_dim=4, chunk=3, dropout=0.4).train()
    q, v = (x.requires_grad_() for x in tokens(10, batch=1, heads=1, d=4, e=3))
    key_mask = mask_of("1110111101")

    def out(q, v):
        torch.manual_seed(0)
        return attention(q, q, v, key_mask)

    assert torch.autograd.gradcheck(out, (q, v), atol=1e-7, rtol=1e-6)


# Options


@pytest.mark.parametrize("options", [{"hashes": 0}, {"chunk": 0}, {"chunk": -64}])
def test_what_is_no_number_of_rounds_or_tokens_is_refused(options):
    with pytest.raises(ValueError, match="hashes and chunk must be at least 1"):
        reformer(**options)
