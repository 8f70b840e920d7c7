"""Synthesizer is its paper's formula, and honours masks where public code forgets them."""

import math

import pytest
import torch
from attention_cases import MASKS, assert_near, inputs, mask_of, with_every_mask

from models import build_attention
from models.attention import capabilities
from models.attention.engines import biased
from models.attention.engines.biased import biased_attention

EXACT = 1e-10
HEADS, HEAD_DIM, MODEL_DIM, MAX_LEN = 2, 8, 12, 12

for_each_synthesis = pytest.mark.parametrize("synthesis", ["random", "factorised", "dense"])
with_and_without_dot_product = pytest.mark.parametrize("dot_product", [True, False])
both_ways = pytest.mark.parametrize("causal", [False, True], ids=["self", "causal"])


def synthesizer(*, max_len=MAX_LEN, dropout=0.0, dtype=torch.float64, **options):
    """Returns an instance in evaluation whose logits are far from equal."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        attention = build_attention(
            "synthesizer",
            num_heads=HEADS,
            head_dim=HEAD_DIM,
            max_len=max_len,
            model_dim=MODEL_DIM,
            dropout=dropout,
            **options,
        )
        for parameter in attention.parameters():
            parameter.data += 0.5 * torch.randn(parameter.shape)
    return attention.to(dtype).eval()


def layer_input(n, batch=3):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(batch, n, MODEL_DIM, generator=generator, dtype=torch.float64)


# The formula


def learned_logit(attention, hidden, sample, head, i, j):
    """A_ij of one sample and head."""
    if attention.config.synthesis == "random":
        return attention.table[head, i, j]
    if attention.config.synthesis == "factorised":
        return attention.left[head, i] @ attention.right[head, :, j]
    rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
    inner = attention.first.weight[rows] @ hidden[sample, i] + attention.first.bias[rows]
    return attention.second[head, :, j] @ inner.clamp(min=0) + attention.bias[head, j]


def formula(attention, q, k, key_mask=None, causal=False, hidden=None):
    """The weights, one sample, head and query after another, over the keys that these see."""
    weights = q.new_zeros(*q.shape[:3], k.shape[2])
    for sample in range(len(q)):
        real = [j for j in range(k.shape[2]) if key_mask is None or key_mask[sample, j]]
        for head in range(HEADS):
            for i in range(q.shape[2]):
                seen = [j for j in real if j <= i or not causal]
                if not seen:
                    continue
                logits = [learned_logit(attention, hidden, sample, head, i, j) for j in seen]
                if attention.config.dot_product:
                    products = [q[sample, head, i] @ k[sample, head, j] for j in seen]
                    pairs = zip(logits, products, strict=True)
                    logits = [a + product / math.sqrt(HEAD_DIM) for a, product in pairs]
                weights[sample, head, i, seen] = torch.stack(logits).softmax(0)
    return weights


@for_each_synthesis
@with_and_without_dot_product
@both_ways
@with_every_mask
def test_it_is_the_papers_formula(synthesis, dot_product, causal, mask):
    q, k, v = inputs(7)
    attention = synthesizer(synthesis=synthesis, dot_product=dot_product, rank=3)
    given = (MASKS[mask](7), causal, layer_input(7))
    with torch.no_grad():
        expected = formula(attention, q, k, *given)
        assert_near(attention.weights(q, k, *given), expected, EXACT)
        assert_near(attention(q, k, v, *given), expected @ v, EXACT)


@for_each_synthesis
@with_and_without_dot_product
def test_its_gradients_are_those_of_the_formula(synthesis, dot_product):
    q, k, v = (x.requires_grad_() for x in inputs(5, batch=2))
    hidden = layer_input(5, batch=2).requires_grad_()
    attention = synthesizer(synthesis=synthesis, dot_product=dot_product, rank=3)
    leaves = [*attention.parameters(), v]
    leaves += [q, k] if dot_product else []
    leaves += [hidden] if synthesis == "dense" else []
    given = (mask_of("11111", "10110"), True, hidden)
    actual = torch.autograd.grad(attention(q, k, v, *given).square().sum(), leaves)
    out = formula(attention, q, k, *given) @ v
    expected = torch.autograd.grad(out.square().sum(), leaves)
    for of_attention, of_formula in zip(actual, expected, strict=True):
        assert of_formula.abs().max() > 1e-3
        assert_near(of_attention, of_formula, EXACT)


# Degenerate tables


@with_every_mask
def test_a_table_of_zeros_gives_the_mean_of_all_real_values(mask):
    q, k, v = inputs(9)
    attention = synthesizer(dot_product=False)
    attention.table.data.zero_()
    key_mask = MASKS[mask](9)
    real = torch.ones(3, 9, dtype=torch.bool) if key_mask is None else key_mask
    means = torch.stack([v[i][:, real[i]].mean(1, keepdim=True) for i in range(3)])
    assert_near(attention(q, k, v, key_mask), means.expand(-1, -1, 9, -1), 1e-12)


@both_ways
@with_every_mask
def test_a_table_of_zeros_beside_the_dot_product_gives_softmax_attention(mask, causal):
    q, k, v = inputs(9)
    attention = synthesizer()
    attention.table.data.zero_()
    sizes = {"num_heads": HEADS, "head_dim": HEAD_DIM, "max_len": 12, "model_dim": MODEL_DIM}
    softmax = build_attention("softmax", **sizes)
    given = (MASKS[mask](9), causal)
    assert_near(attention(q, k, v, *given), softmax(q, k, v, *given), 1e-12)


@both_ways
@with_every_mask
def test_a_table_of_dot_products_gives_softmax_attention_without_looking_at_them(mask, causal):
    q, k, v = inputs(9, batch=1)
    attention = synthesizer(dot_product=False)
    attention.table.data[:, :9, :9] = q[0] @ k[0].mT * HEAD_DIM**-0.5
    sizes = {"num_heads": HEADS, "head_dim": HEAD_DIM, "max_len": 12, "model_dim": MODEL_DIM}
    softmax = build_attention("softmax", **sizes)
    key_mask = MASKS[mask](9)
    key_mask = None if key_mask is None else key_mask[1:2]
    out = attention(torch.zeros_like(q), torch.zeros_like(k), v, key_mask, causal)
    assert_near(out, softmax(q, k, v, key_mask, causal), 1e-12)


@with_and_without_dot_product
@both_ways
def test_a_factorised_table_whose_left_factor_is_the_identity_is_its_right_factor(
    dot_product, causal
):
    q, k, v = inputs(9)
    factorised = synthesizer(synthesis="factorised", dot_product=dot_product, rank=MAX_LEN)
    random = synthesizer(synthesis="random", dot_product=dot_product)
    factorised.left.data[:] = torch.eye(MAX_LEN, dtype=torch.float64)
    factorised.right.data.copy_(random.table.data)
    expected = random(q, k, v, causal=causal)
    assert_near(factorised(q, k, v, causal=causal), expected, 1e-12)


# What public code does not keep apart


@for_each_synthesis
def test_masks_are_felt_without_the_dot_product_too(synthesis):
    # Public code skips the mask there. A masked token is as one that was never there.
    q, k, v = inputs(9, batch=1)
    attention, without = (
        synthesizer(synthesis=synthesis, dot_product=False, rank=3) for _ in range(2)
    )
    key_mask, hidden = mask_of("101101110"), layer_input(9, batch=1)
    real = key_mask[0].nonzero()[:, 0]
    if synthesis == "random":
        without.table.data = attention.table[:, real][:, :, real]
    elif synthesis == "factorised":
        without.left.data = attention.left[:, real]
        without.right.data = attention.right[:, :, real]
    else:
        without.second.data = attention.second[..., real]
        without.bias.data = attention.bias[..., real]
    expected = without(*(x[:, :, real] for x in (q, k, v)), hidden=hidden[:, real])
    out = attention(q, k, v, key_mask, hidden=hidden)
    assert_near(out[:, :, real], expected, 1e-12)


def test_dense_weights_of_a_token_depend_on_its_own_input_in_every_head():
    # Public code reshapes (L, H, L) to (H, L, L), and so takes rows of other tokens and heads.
    q, k, _ = inputs(9)
    attention = synthesizer(synthesis="dense", dot_product=False)
    hidden = layer_input(9)
    before = attention.weights(q, k, hidden=hidden)
    hidden[:, 4] += 1.0
    changed = (attention.weights(q, k, hidden=hidden) != before).any(-1)
    assert changed.nonzero()[:, 2].unique().tolist() == [4]
    assert changed[:, :, 4].all()
    attention.bias.data[1] += torch.linspace(0, 1, MAX_LEN)
    after = attention.weights(q, k, hidden=hidden)
    attention.bias.data[1] -= torch.linspace(0, 1, MAX_LEN)
    other = (attention.weights(q, k, hidden=hidden) - after).abs().amax((0, 2, 3))
    assert other[0] == 0
    assert other[1] > 0.01


@pytest.mark.parametrize("synthesis", ["random", "factorised"])
def test_tables_know_nothing_of_the_tokens(synthesis):
    attention = synthesizer(synthesis=synthesis, dot_product=False)
    weights = attention.weights(*inputs(9)[:2])
    assert torch.equal(weights, attention.weights(*inputs(9, seed=1)[:2]))
    assert torch.equal(weights[0], weights[2])


@with_every_mask
@both_ways
def test_logits_of_any_size_leave_the_weights_of_each_sample_exact(mask, causal):
    # What samples share are numerators in units of the largest, which they may not see.
    q, k, v = (x.requires_grad_() for x in inputs(9))
    attention = synthesizer(dot_product=False)
    attention.table.data[:, :, [0, 3]] += 2000.0
    attention.table.data[:, :, 5] -= 2000.0
    given = (MASKS[mask](9), causal)
    expected = formula(attention, q, k, *given) @ v
    out = attention(q, k, v, *given)
    assert_near(out, expected, 1e-12)
    leaves = (attention.table, v)
    actual = torch.autograd.grad(out.square().sum(), leaves)
    theirs = torch.autograd.grad(expected.square().sum(), leaves)
    for of_attention, of_formula in zip(actual, theirs, strict=True):
        assert_near(of_attention, of_formula, 1e-12)


@for_each_synthesis
@with_and_without_dot_product
def test_parameters_in_bf16_lose_no_more_than_their_own_rounding(synthesis, dot_product):
    attention = synthesizer(synthesis=synthesis, dot_product=dot_product, dtype=torch.bfloat16)
    q, k, v = (x.to(torch.bfloat16) for x in inputs(9))
    hidden = layer_input(9).to(torch.bfloat16)
    out = attention(q, k, v, hidden=hidden)
    exact = attention.double()
    expected = exact(q.double(), k.double(), v.double(), hidden=hidden.double())
    assert out.dtype == torch.bfloat16
    assert_near(out, expected, 3e-2)


# Sizes and capabilities


@with_and_without_dot_product
def test_it_has_a_table_or_two_thin_ones_or_two_maps_for_each_head(dot_product):
    expected = {
        "random": HEADS * MAX_LEN**2,
        "factorised": HEADS * 2 * MAX_LEN * 3,
        "dense": (MODEL_DIM + 1) * HEADS * HEAD_DIM + HEADS * (HEAD_DIM + 1) * MAX_LEN,
    }
    for synthesis, count in expected.items():
        attention = synthesizer(synthesis=synthesis, dot_product=dot_product, rank=3)
        assert sum(p.numel() for p in attention.parameters()) == count
        assert attention.cost(9, 9).parameters == count


def test_only_what_makes_a_table_takes_quadratic_memory():
    memory = {
        (synthesis, dot_product): capabilities(
            "synthesizer", {"synthesis": synthesis, "dot_product": dot_product}
        ).memory
        for synthesis in ("random", "factorised", "dense")
        for dot_product in (True, False)
    }
    linear = [options for options, growth in memory.items() if growth == "N"]
    assert linear == [("factorised", True), ("dense", True), ("dense", False)]


def test_the_layers_input_is_needed_for_dense_weights_alone():
    for synthesis in ("random", "factorised"):
        synthesizer(synthesis=synthesis)(*inputs(5))
    with pytest.raises(ValueError, match="needs the layer's input: pass hidden="):
        synthesizer(synthesis="dense")(*inputs(5))


@pytest.mark.parametrize("rank", [1, 32])
def test_factorised_logits_begin_with_the_deviation_of_random_ones_whatever_the_rank(rank):
    torch.manual_seed(0)
    sizes = {"num_heads": 4, "head_dim": 8, "max_len": 400, "model_dim": 32}
    random = build_attention("synthesizer", **sizes)
    thin = build_attention("synthesizer", **sizes, synthesis="factorised", rank=rank)
    assert 0.0198 < random.table.std() < 0.0202
    assert 0.018 < (thin.left @ thin.right).std() < 0.022


# Dropout


@for_each_synthesis
@with_and_without_dot_product
def test_dropout_drops_weights_once(synthesis, dot_product):
    # With the identity for values, the output is the weights.
    attention = synthesizer(synthesis=synthesis, dot_product=dot_product, dropout=0.25).train()
    q, k, _ = inputs(12, batch=40)
    hidden = layer_input(12, batch=40)
    v = torch.eye(12, dtype=q.dtype).expand(40, HEADS, 12, 12)
    torch.manual_seed(0)
    out = attention(q, k, v, hidden=hidden)
    expected = attention.weights(q, k, hidden=hidden) / 0.75
    dropped = out == 0
    assert 0.19 < dropped.double().mean() < 0.31
    assert_near(out, torch.where(dropped, 0.0, expected), 1e-12)
    shared = synthesis != "dense" and not dot_product
    assert torch.equal(dropped[0], dropped[1]) == shared
    assert_near(attention.eval()(q, k, v, hidden=hidden), 0.75 * expected, 1e-12)


# The engine under a bias


def biases(n):
    """Biases by what they are different for."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "nobody": None,
        "queries and keys": normal(1, 2, n, n),
        "keys": normal(1, 2, 1, n),
        "samples and keys": normal(3, 2, 1, n).masked_fill(normal(3, 2, 1, n) > 1, -torch.inf),
        "all": normal(3, 2, n, n).masked_fill(normal(3, 2, n, n) > 0, -torch.inf),
    }


def plain(q, k, v, bias, key_mask, causal):
    """softmax(q k^T / sqrt(D) + bias) v, 0 where no key is seen."""
    n = q.shape[2]
    logits = q @ k.mT / math.sqrt(q.shape[3])
    logits = logits if bias is None else logits + bias
    if key_mask is not None:
        logits = logits.masked_fill(~key_mask[:, None, None], -torch.inf)
    if causal:
        logits = logits.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf)
    none = (logits == -torch.inf).all(-1, keepdim=True)
    return logits.masked_fill(none, 0.0).softmax(-1).masked_fill(none, 0.0) @ v


def by_fused(q, k, v, bias, key_mask, causal):
    return biased._fused(q, k, v, bias, key_mask, causal, 0.0, q.shape[3] ** -0.5)


@pytest.mark.parametrize("form", [biased_attention, by_fused], ids=["blocks", "fused"])
@pytest.mark.parametrize("what", biases(1))
@both_ways
@pytest.mark.parametrize("mask", ["no mask", "suffix padding", "holes and padding"])
def test_blocks_of_any_size_and_the_fused_kernel_give_softmax_under_the_bias(
    form, what, causal, mask, monkeypatch
):
    n = 23
    leaves = [x.requires_grad_() for x in inputs(n)]
    bias = biases(n)[what]
    leaves += [] if bias is None else [bias.requires_grad_()]
    q, k, v = leaves[:3]
    given = (q, k, v, bias, MASKS[mask](n), causal)
    expected = plain(*given)
    gradients = torch.autograd.grad(expected.square().sum(), leaves)
    # Four queries of one sample; two samples; all at once.
    for size in (4 * n * 4, 4 * n * n * 2, 2**21):
        monkeypatch.setattr(biased, "BLOCK_BYTES", size)
        out = form(*given)
        assert_near(out, expected, 1e-12)
        ours = torch.autograd.grad(out.square().sum(), leaves)
        for actual, theirs in zip(ours, gradients, strict=True):
            assert_near(actual, theirs, 1e-12)


def test_long_causal_sequences_do_not_compute_the_future_of_their_blocks():
    n = 300
    q, k, v = inputs(n)
    expected = plain(q, k, v, biases(n)["keys"], None, True)
    assert_near(biased_attention(q, k, v, biases(n)["keys"], causal=True), expected, 1e-12)
    *_, last = biased._blocks(q[:1], k[:1], None, None, True)
    first, *_ = biased._blocks(q[:1], k[:1], None, None, True)
    assert first.scores.shape == (1, 128, 128)
    assert last.scores.shape == (1, 300 - 256, 300)


@both_ways
def test_gradients_under_dropout_are_of_the_weights_that_were_kept(causal, monkeypatch):
    n = 9
    monkeypatch.setattr(biased, "BLOCK_BYTES", 4 * n * 4)
    q, k, v = (x.requires_grad_() for x in inputs(n, batch=2))
    bias = biases(n)["queries and keys"].requires_grad_()
    key_mask = mask_of("111111100", "101111111")

    def out(*leaves):
        torch.manual_seed(1)
        return biased_attention(*leaves, key_mask, causal, 0.4)

    assert not torch.equal(out(q, k, v, bias), plain(q, k, v, bias, key_mask, causal))
    assert torch.autograd.gradcheck(out, (q, k, v, bias), fast_mode=True)


# Options


def test_options_are_checked():
    with pytest.raises(ValueError, match="rank must be at least 1"):
        synthesizer(rank=0)
    with pytest.raises(ValueError, match="Unknown value 'vanilla'"):
        synthesizer(synthesis="vanilla")
