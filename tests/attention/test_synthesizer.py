"""Synthesizer: learned logits of each kind written out, alone and beside the dot product."""

import pytest
import torch
from attention_cases import MASKS, assert_near, inputs, mask_of, with_every_mask

from models import build_attention
from models.attention import synthesizer as module
from models.attention.engines import biased
from models.attention.engines.biased import biased_attention

SIZES = {"num_heads": 2, "head_dim": 8, "max_len": 20, "model_dim": 12}
KINDS = ("random", "factorised", "dense")
for_every_kind = pytest.mark.parametrize("kind", KINDS)
with_and_without_dot_product = pytest.mark.parametrize("dot_product", [True, False])
both_ways = pytest.mark.parametrize("causal", [False, True], ids=["self", "causal"])


def synthesizer(kind="random", dot_product=True, dropout=0.0, **options):
    torch.manual_seed(0)
    options |= {"synthesis": kind, "dot_product": dot_product}
    attention = build_attention("synthesizer", **SIZES, dropout=dropout, **options).double()
    for parameter in attention.parameters():
        parameter.data += 0.5 * torch.randn(parameter.shape)
    return attention


def layer_input(n, batch=3):
    return inputs(n, d=12, heads=1, batch=batch, seed=5)[0][:, 0]


def learned_logits(attention, n, hidden):
    """The learned logits (B or 1, H, N, N), position by position."""
    kind = attention.config.synthesis
    if kind == "random":
        return attention.table[None, :, :n, :n]
    if kind == "factorised":
        return torch.einsum("hir,hrj->hij", attention.left[:, :n], attention.right[..., :n])[None]
    logits = torch.zeros(len(hidden), 2, n, n, dtype=torch.float64)
    for b in range(len(hidden)):
        for i in range(n):
            features = attention.first(hidden[b, i]).relu().view(2, 8)
            for h in range(2):
                logits[b, h, i] = features[h] @ attention.second[h, :, :n] + attention.bias[h, :n]
    return logits


def explicit(attention, q, k, v, hidden, key_mask=None, causal=False):
    n = q.shape[2]
    logits = learned_logits(attention, n, hidden)
    if attention.config.dot_product:
        logits = logits + torch.einsum("bhid,bhjd->bhij", q, k) / 8**0.5
    keep = torch.ones(len(q), 1, n, n, dtype=torch.bool)
    if key_mask is not None:
        keep = keep & key_mask[:, None, None]
    if causal:
        keep = keep.tril()
    top = logits.masked_fill(~keep, -1e9).amax(-1, keepdim=True)
    similarity = torch.where(keep, logits - top, -torch.inf).exp()
    total = similarity.sum(-1, keepdim=True)
    return similarity / torch.where(total > 0, total, 1.0) @ v


@both_ways
@with_every_mask
@with_and_without_dot_product
@for_every_kind
def test_it_is_the_softmax_of_what_is_learned(kind, dot_product, mask, causal):
    # Without the dot product, public code forgets the mask; its dense form mixes heads and tokens.
    attention = synthesizer(kind, dot_product)
    q, k, v = inputs(13)
    hidden, key_mask = layer_input(13), MASKS[mask](13)
    more = {"hidden": hidden} if kind == "dense" else {}
    out = attention(q, k, v, key_mask, causal, **more)
    assert_near(out, explicit(attention, q, k, v, hidden, key_mask, causal), 1e-12)


@with_and_without_dot_product
@pytest.mark.parametrize("kind", ["random", "factorised"])
def test_nothing_learned_is_softmax_or_the_mean_of_real_values(kind, dot_product):
    attention = synthesizer(kind, dot_product)
    for parameter in attention.parameters():
        parameter.data.zero_()
    q, k, v = inputs(9, batch=1)
    mask = mask_of("110111010")
    softmax = build_attention("softmax", **SIZES)
    mean = (v * mask[:, None, :, None]).sum(2, keepdim=True) / mask.sum()
    expected = softmax(q, k, v, mask) if dot_product else mean.expand_as(v)
    assert_near(attention(q, k, v, mask), expected, 1e-12)


def test_a_table_of_the_scaled_products_is_softmax():
    q, k, v = inputs(20, batch=1)
    attention = synthesizer("random", dot_product=False)
    attention.table.data = (q @ k.mT / 8**0.5)[0]
    assert_near(attention(q, k, v), build_attention("softmax", **SIZES)(q, k, v), 1e-12)


def test_a_full_rank_product_with_the_identity_is_the_random_table():
    q, k, v = inputs(20)
    random, factorised = synthesizer("random"), synthesizer("factorised", rank=20)
    factorised.left.data = torch.eye(20).double().expand(2, 20, 20).clone()
    factorised.right.data = random.table.data.clone()
    assert_near(factorised(q, k, v), random(q, k, v), 1e-12)


@pytest.mark.parametrize("kind", ["random", "factorised"])
def test_logits_far_apart_are_exact_for_samples_that_see_only_small_ones(kind):
    # Numerators in units of a row's largest would vanish where that is masked.
    attention = synthesizer(kind, dot_product=False).float()
    parameter = attention.table if kind == "random" else attention.left
    parameter.data *= 400
    q, k, v = (x.float() for x in inputs(13))
    mask = MASKS["holes and padding"](13)
    out = attention(q, k, v, mask)
    exact = explicit(attention.double(), *(x.double() for x in (q, k, v)), None, mask)
    assert_near(out.double(), exact, 1e-3 if kind == "factorised" else 1e-4)


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("random", 2 * 20 * 20),
        ("factorised", 2 * 2 * 20 * 32),
        ("dense", (12 * 16 + 16) + (2 * 8 * 20 + 2 * 20)),
    ],
)
def test_parameters_are_those_of_the_paper(kind, count):
    assert sum(p.numel() for p in synthesizer(kind).parameters()) == count


def test_tables_begin_with_one_standard_deviation_whether_factorised_or_not():
    sizes = SIZES | {"max_len": 300}
    torch.manual_seed(0)
    random = build_attention("synthesizer", **sizes, synthesis="random").table
    factors = build_attention("synthesizer", **sizes, synthesis="factorised")
    assert float(random.detach().std()) == pytest.approx(module.INIT_STD, rel=0.02)
    product = (factors.left @ factors.right).detach()
    assert float(product.std()) == pytest.approx(module.INIT_STD, rel=0.1)


@both_ways
@with_and_without_dot_product
@for_every_kind
def test_dropout_keeps_the_mean(kind, dot_product, causal):
    attention = synthesizer(kind, dot_product, dropout=0.5).train()
    q, k, v = inputs(8, batch=1)
    more = {"hidden": layer_input(8, batch=1)} if kind == "dense" else {}
    torch.manual_seed(0)
    draws = torch.stack([attention(q, k, v, causal=causal, **more) for _ in range(600)]).detach()
    error = draws.mean(0) - attention.eval()(q, k, v, causal=causal, **more)
    assert (error.abs() < 5 * draws.std(0) / 600**0.5 + 1e-9).all()


def test_a_rank_without_numbers_is_refused():
    with pytest.raises(ValueError, match="rank must be at least 1"):
        synthesizer("factorised", rank=0)


# Softmax with a bias, in pieces


@pytest.fixture(params=[2**21, 4 * 13 * 5], ids=["one block", "small blocks"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(biased, "BLOCK_BYTES", request.param)


@both_ways
@with_every_mask
@pytest.mark.parametrize("shape", [(1, 2, 13, 13), (3, 2, 13, 13), (1, 2, 1, 13), (3, 2, 1, 13)])
def test_a_bias_has_the_gradient_of_the_explicit_softmax(blocks, shape, mask, causal):
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (*inputs(13), bias)]
    q, k, v, _ = leaves
    key_mask = MASKS[mask](13)
    out = biased_attention(q, k, v, bias, key_mask, causal)
    keep = torch.ones(3, 1, 13, 13, dtype=torch.bool)
    keep = keep if key_mask is None else keep & key_mask[:, None, None]
    keep = keep.tril() if causal else keep
    logits = (q @ k.mT / 8**0.5 + bias).masked_fill(~keep, torch.finfo(torch.float64).min)
    expected = logits.softmax(-1).masked_fill(~keep, 0.0) @ v
    assert_near(out, expected, 1e-12)
    to = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=out.dtype)
    ours = torch.autograd.grad(out, leaves, to)
    for mine, other in zip(ours, torch.autograd.grad(expected, leaves, to), strict=True):
        assert_near(mine, other, 1e-12)


def test_an_infinite_bias_leaves_a_key_out():
    q, k, v = inputs(6)
    bias = torch.zeros(1, 2, 1, 6, dtype=torch.float64)
    bias[..., 2] = -torch.inf
    expected = build_attention("softmax", **SIZES)(
        q, k, v, torch.tensor([[1, 1, 0, 1, 1, 1]]).bool().expand(3, -1)
    )
    assert_near(biased_attention(q, k, v, bias), expected, 1e-12)
    assert torch.equal(
        biased_attention(q, k, v, torch.full_like(bias, -torch.inf)), torch.zeros_like(v)
    )


@both_ways
@with_every_mask
def test_what_other_devices_compute_is_the_same(mask, causal):
    bias = torch.randn(1, 2, 13, 13, generator=torch.Generator().manual_seed(2)).double()
    q, k, v = inputs(13)
    given = (bias, MASKS[mask](13), causal, 0.0, 8**-0.5)
    assert_near(biased._fused(q, k, v, *given), biased_attention(q, k, v, *given), 1e-12)
