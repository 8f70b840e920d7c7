"""What every registered attention owes: its weights, masks, batch mates, gradients, refusals."""

import pytest
import torch
from attention_cases import (
    MASKS,
    assert_near,
    build,
    capabilities,
    for_every_mechanism,
    for_those_with,
    for_those_without,
    inputs,
    mask_of,
    poisoned,
    with_every_mask,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models import build_attention
from models.attention.base import Attention, Capabilities, Cost, own_lengths

EXACT = 1e-10
EXACT_FLOAT32 = 2e-5
BF16 = 3e-2
NON_NEGATIVE = ["softmax", "linear", "linear-relu", "cosformer"]

LENGTHS = [1, 2, 7, 64, 65]
HEAD_DIMS = [1, 2, 8, 16]
CROSS_LENGTHS = [(1, 7), (7, 1), (64, 65), (65, 3), (2, 64)]


# The fast form is the quadratic form


@for_every_mechanism
@with_every_mask
@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("n", LENGTHS)
def test_the_output_is_weights_times_values(mechanism, mask, n, d):
    attention = build(mechanism, head_dim=d)
    q, k, v = inputs(n, d=d, e=d + 3)
    key_mask = MASKS[mask](n)
    expected = attention.weights(q, k, key_mask) @ v
    tolerance = 1e-12 if mechanism == "softmax" else EXACT
    assert_near(attention(q, k, v, key_mask), expected, tolerance)


@for_every_mechanism
@with_every_mask
def test_the_output_in_float32_is_that_of_float64_weights(mechanism, mask):
    attention = build(mechanism)
    # Away from 0, where signed denominators magnify whatever rounding there is.
    q, k, v = ((x + 1).float() for x in inputs(65))
    key_mask = MASKS[mask](65)
    expected = attention.weights(q.double(), k.double(), key_mask) @ v.double()
    out = attention(q, k, v, key_mask)
    assert out.dtype == torch.float32
    assert_near(out, expected, EXACT_FLOAT32)


@for_those_with("cross")
@with_every_mask
@pytest.mark.parametrize(("n", "s"), CROSS_LENGTHS)
def test_cross_attention_is_weights_times_values(mechanism, mask, n, s):
    attention = build(mechanism)
    q, k, v = inputs(n, s)
    key_mask = MASKS[mask](s)
    out = attention(q, k, v, key_mask)
    assert out.shape == (3, 2, n, 5)
    assert_near(out, attention.weights(q, k, key_mask) @ v, EXACT)


@for_every_mechanism
def test_strided_inputs_give_what_contiguous_ones_give(mechanism):
    attention = build(mechanism)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(9))
    assert not q.is_contiguous()
    expected = attention(q.contiguous(), k.contiguous(), v.contiguous())
    assert_near(attention(q, k, v), expected, 1e-13)


@pytest.mark.parametrize("mechanism", NON_NEGATIVE)
@with_every_mask
@pytest.mark.parametrize(("n", "s"), [(9, 9), (4, 9), (9, 4)])
def test_weights_are_a_distribution_over_the_admissible_keys(mechanism, mask, n, s):
    q, k, _ = (x.abs() for x in inputs(n, s))
    key_mask = MASKS[mask](s)
    weights = build(mechanism).weights(q, k, key_mask)
    assert weights.shape == (3, 2, n, s)
    assert weights.min() >= 0
    assert_near(weights.sum(-1), torch.ones(3, 2, n, dtype=torch.float64), 1e-12)
    if key_mask is not None:
        excluded = weights.masked_select(~key_mask[:, None, None])
        assert not excluded.any()


# Padding and batch mates


def test_the_own_length_is_the_last_real_index_plus_one():
    keys = torch.empty(5, 2, 4, 8)
    mask = mask_of("1111", "1000", "0110", "1001", "0000")
    assert own_lengths(mask, keys).tolist() == [4, 1, 3, 4, 0]
    assert own_lengths(None, keys).tolist() == [4] * 5


@for_every_mechanism
@with_every_mask
@pytest.mark.parametrize("extra", [1, 9, 57])
def test_what_stands_in_padding_changes_no_real_output(mechanism, mask, extra):
    attention, n = build(mechanism), 7
    q, k, v = inputs(n)
    key_mask = MASKS[mask](n)
    real = torch.ones(3, n, dtype=torch.bool) if key_mask is None else key_mask
    padded_mask = torch.cat([real, torch.zeros(3, extra, dtype=torch.bool)], dim=1)
    padded = attention(*(poisoned(x, extra) for x in (q, k, v)), padded_mask)
    kept = real[:, None, :, None]
    assert padded.isfinite().all()
    assert_near(padded[:, :, :n] * kept, attention(q, k, v, key_mask) * kept, EXACT)


@for_every_mechanism
def test_what_stands_in_a_hole_changes_no_real_output(mechanism):
    attention = build(mechanism)
    q, k, v = inputs(6, batch=1)
    key_mask = mask_of("011010")
    real, hole = key_mask[:, None, :, None], ~key_mask[:, None, :, None]
    garbage = (torch.where(hole, 1e6 * (x + 1), x) for x in (q, k, v))
    assert_near(attention(*garbage, key_mask) * real, attention(q, k, v, key_mask) * real, EXACT)


@for_those_with("cross")
def test_padded_keys_change_no_output_of_cross_attention(mechanism):
    attention = build(mechanism)
    q, k, v = inputs(7, 5)
    key_mask = (torch.arange(13) < 5).expand(3, -1)
    padded = attention(q, poisoned(k, 8), poisoned(v, 8), key_mask)
    assert_near(padded, attention(q, k, v), EXACT)


@for_every_mechanism
def test_batch_mates_change_nothing(mechanism):
    attention = build(mechanism)
    alone = inputs(7, batch=1, seed=1)
    longer = [1e4 * x for x in inputs(16, batch=1, seed=2)]
    batch = [torch.cat([far, poisoned(x, 9), far]) for x, far in zip(alone, longer, strict=True)]
    key_mask = mask_of("1" * 16, "1" * 7 + "0" * 9, "1" * 12 + "0" * 4)
    together = attention(*batch, key_mask)
    assert_near(together[1:2, :, :7], attention(*alone), EXACT)


@for_every_mechanism
def test_heads_do_not_mix(mechanism):
    attention = build(mechanism)
    q, k, v = inputs(7)
    other = [torch.stack([x[:, 0], -3 * x[:, 1]], dim=1) for x in (q, k, v)]
    assert torch.equal(attention(*other)[:, 0], attention(q, k, v)[:, 0])


# Nothing to attend to


@for_every_mechanism
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [4, 3])
def test_a_sample_without_any_key_gives_exactly_zero(mechanism, dtype, n):
    if n != 4 and "cross" not in capabilities(mechanism).patterns:
        pytest.skip("no cross form")
    attention = build(mechanism)
    leaves = [x.requires_grad_() for x in inputs(n, 4, dtype=dtype)]
    key_mask = mask_of("1111", "0000", "1100")
    out = attention(*leaves, key_mask)
    assert not out[1].any()
    assert out[0].any()
    assert out[2].any()
    assert not attention.weights(*leaves[:2], key_mask)[1].any()
    out.sum().backward()
    for x in leaves:
        assert x.grad.isfinite().all()
        assert not x.grad[1].any()


@for_every_mechanism
@pytest.mark.parametrize("precision", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zero_queries_give_finite_outputs_and_gradients(mechanism, precision):
    reduced = precision in (torch.bfloat16, torch.float16)
    q, k, v = inputs(7, dtype=torch.float32 if reduced else precision)
    leaves = [x.requires_grad_() for x in (torch.zeros_like(q), k, v)]
    with torch.autocast("cpu", precision, enabled=reduced):
        out = build(mechanism)(*leaves, MASKS["suffix padding"](7))
    out.float().square().sum().backward()
    assert out.isfinite().all()
    assert all(x.grad.isfinite().all() for x in leaves)


# Gradients


def away_from_zero(x):
    """Moves entries away from the kinks of feature maps, so that differences are derivatives."""
    return (x.sign() * (x.abs() + 0.3)).requires_grad_()


@for_every_mechanism
@pytest.mark.parametrize("key_mask", [None, mask_of("101100", "111111")], ids=["all", "holes"])
def test_gradients_are_those_of_finite_differences(mechanism, key_mask):
    attention = build(mechanism, num_heads=1, head_dim=3)
    leaves = [away_from_zero(x) for x in inputs(6, d=3, e=2, batch=2, heads=1, seed=3)]
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, key_mask), leaves)


# Precision


@for_every_mechanism
def test_bf16_autocast_stays_close_to_float32(mechanism):
    attention = build(mechanism)
    q, k, v = inputs(65, dtype=torch.float32)
    key_mask = MASKS["suffix padding"](65)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v, key_mask)
    assert_near(out, attention(q, k, v, key_mask), BF16)


@for_every_mechanism
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_long_sequences_lose_nothing_but_the_rounding_of_the_output(mechanism, dtype):
    # Under autocast, with q, k and v as they come from projections (bf16), and in float32: any
    # angle, feature or sum in bf16 shows. The values depend on the position.
    n = 2048
    attention = build(mechanism, num_heads=1)
    q, k, v = (x.abs() for x in inputs(n, batch=1, heads=1))
    v[..., 0] = torch.linspace(0, 1, n) ** 4
    q, k, v = (x.to(dtype) for x in (q, k, v))
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v)
    expected = attention.weights(q.double(), k.double()) @ v.double()
    # Half a unit in the last place, or one where the fused kernel rounds its weights too.
    ulp = torch.finfo(out.dtype).eps
    tolerance = max(EXACT_FLOAT32, (1 if mechanism == "softmax" else 0.51) * ulp)
    relative = ((out.double() - expected) / expected).abs()
    assert relative.max() <= tolerance


@for_every_mechanism
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_output_has_the_dtype_of_the_values(mechanism, dtype):
    assert build(mechanism)(*inputs(5, dtype=dtype)).dtype == dtype


# Determinism and dropout


@for_every_mechanism
def test_two_calls_in_evaluation_are_equal_to_the_bit(mechanism):
    attention = build(mechanism, dropout=0.5).eval()
    q, k, v = inputs(65, dtype=torch.float32)
    key_mask = MASKS["holes and padding"](65)
    assert torch.equal(attention(q, k, v, key_mask), attention(q, k, v, key_mask))


@for_every_mechanism
def test_a_loaded_state_gives_the_same_bits(mechanism):
    attention, loaded = build(mechanism), build(mechanism)
    loaded.load_state_dict(attention.state_dict())
    q, k, v = inputs(65, dtype=torch.float32)
    assert torch.equal(loaded(q, k, v), attention(q, k, v))


@for_every_mechanism
def test_dropout_applies_where_the_capabilities_say(mechanism):
    attention = build(mechanism, dropout=0.5)
    q, k, v = inputs(7)
    trained, evaluated = attention.train()(q, k, v), attention.eval()(q, k, v)
    dropped = not torch.equal(trained, evaluated)
    assert dropped == (capabilities(mechanism).dropout == "weights")


@for_every_mechanism
def test_weights_have_no_dropout(mechanism):
    attention = build(mechanism, dropout=0.5)
    q, k, _ = inputs(7)
    assert torch.equal(attention.train().weights(q, k), attention.eval().weights(q, k))


# Declared cost


@for_every_mechanism
def test_the_declared_parameters_are_those_there_are(mechanism):
    attention = build(mechanism)
    assert attention.cost(16, 16).parameters == sum(p.numel() for p in attention.parameters())


@for_those_with("cross")
@pytest.mark.parametrize(("n", "s"), [(16, 16), (16, 40), (40, 16)])
def test_the_declared_operations_are_those_counted(mechanism, n, s):
    attention = build(mechanism)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        attention(*inputs(n, s, batch=1, e=8))
    assert attention.cost(n, s).flops == counter.get_total_flops()


@for_every_mechanism
def test_the_declared_cost_grows_as_the_capabilities_say(mechanism):
    attention = build(mechanism)
    growth = attention.cost(2**20, 2**20).flops / attention.cost(2**18, 2**18).flops
    exponent = {"N": 1, "N log N": 1, "N^1.5": 1.5, "N^2": 2}[capabilities(mechanism).growth]
    assert growth == pytest.approx(4**exponent, rel=0.15)


@for_every_mechanism
def test_a_state_is_declared_exactly_where_there_is_a_recurrent_form(mechanism):
    attention = build(mechanism)
    assert (attention.cost(16, 16).state_floats > 0) == capabilities(mechanism).recurrent


# Refusals


class SelfOnly(Attention):
    """The mean of the real values: nothing but self attention, and in need of the layer's input."""

    capabilities = Capabilities(paper="none", needs_hidden=True)

    def attend(self, q, k, v, key_mask, causal, hidden):
        return self.weights(q, k, key_mask, causal, hidden) @ v

    def weights(self, q, k, key_mask=None, causal=False, hidden=None):
        self._check(q, k, key_mask, causal, hidden)
        return q.new_full((*q.shape[:-1], k.shape[-2]), 1 / k.shape[-2])

    def cost(self, n, s):
        return Cost(0, 0, 0, 0)


@pytest.fixture
def self_only():
    return SelfOnly(None, num_heads=2, head_dim=8, max_len=16, model_dim=16)


HIDDEN = torch.zeros(3, 5, 16)


def test_a_self_attention_takes_as_many_queries_as_keys(self_only):
    assert self_only(*inputs(5), hidden=HIDDEN).shape == (3, 2, 5, 5)


def test_a_length_of_keys_of_its_own_is_refused_without_a_cross_form(self_only):
    with pytest.raises(ValueError, match=r"SelfOnly has no cross form: 5 queries, 6 keys"):
        self_only(*inputs(5, 6), hidden=HIDDEN)


def test_causal_is_refused_without_a_causal_form(self_only):
    with pytest.raises(ValueError, match="SelfOnly has no causal form; it has self"):
        self_only(*inputs(5), causal=True, hidden=HIDDEN)


def test_a_missing_layer_input_is_refused_where_it_is_needed(self_only):
    with pytest.raises(ValueError, match="pass hidden="):
        self_only(*inputs(5))


def test_a_mechanism_without_a_recurrent_form_says_so(self_only):
    q, k, v = inputs(1)
    with pytest.raises(ValueError, match="no recurrent form"):
        self_only.init_state(3, torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="no recurrent form"):
        self_only.step(q, k, v, None)


def refuses(attention, message, *inputs_, **arguments):
    """Asserts that the fast and the quadratic form both refuse."""
    q, k, v = inputs_
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, **arguments)
    with pytest.raises(ValueError, match=message):
        attention.weights(q, k, **arguments)


@for_those_without("causal")
def test_causal_is_refused_where_unsupported(mechanism):
    refuses(build(mechanism), "no causal form", *inputs(5), causal=True)


@for_every_mechanism
def test_causal_with_another_number_of_keys_is_refused(mechanism):
    refuses(build(mechanism), "(?i)causal", *inputs(5, 6), causal=True)


def test_causal_with_another_number_of_keys_is_refused_whatever_is_supported(
    self_only, monkeypatch
):
    everything = Capabilities(paper="none", patterns=frozenset({"self", "causal", "cross"}))
    monkeypatch.setattr(SelfOnly, "capabilities", everything)
    assert self_only(*inputs(5), causal=True).shape == (3, 2, 5, 5)
    refuses(self_only, "as many queries as keys, not 5 and 6", *inputs(5, 6), causal=True)


@for_every_mechanism
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int64])
def test_a_mask_that_is_not_bool_is_refused(mechanism, dtype):
    refuses(build(mechanism), f"not {dtype}", *inputs(5), key_mask=torch.ones(3, 5, dtype=dtype))


@for_every_mechanism
@pytest.mark.parametrize("shape", [(5,), (1, 5), (3, 4), (5, 3), (3, 1, 1, 5), (3, 5, 5)])
def test_a_mask_of_another_shape_is_refused(mechanism, shape):
    mask = torch.ones(shape, dtype=torch.bool)
    refuses(build(mechanism), r"key_mask must be bool of shape \(3, 5\)", *inputs(5), key_mask=mask)


SIZES = {"num_heads": 2, "head_dim": 8, "max_len": 16, "model_dim": 16}


def test_an_unknown_name_is_refused_with_the_near_match_and_all_names():
    with pytest.raises(ValueError, match="Unknown attention 'cosfromer'") as error:
        build_attention("cosfromer", **SIZES)
    assert "Did you mean cosformer?" in str(error.value)
    assert "softmax" in str(error.value)


@pytest.mark.parametrize("name", ["base", "engines", "__init__", ""])
def test_support_code_is_not_a_mechanism(name):
    with pytest.raises(ValueError, match="Unknown attention"):
        build_attention(name, **SIZES)


@pytest.mark.parametrize("name", ["softmax", "linear", "cosformer"])
def test_an_unknown_option_is_refused(name):
    with pytest.raises(ValueError, match=r"Unknown key 'attention.featur'"):
        build_attention(name, **SIZES, featur="relu")


def test_an_unknown_option_is_refused_with_the_near_match():
    with pytest.raises(ValueError, match=r"Did you mean attention.feature\?"):
        build_attention("linear", **SIZES, featur="relu")


@pytest.mark.parametrize("value", ["rellu", 3, None, True, ["relu"]])
def test_an_ill_typed_option_is_refused_with_what_is_allowed(value):
    with pytest.raises(ValueError, match=r"attention.feature: .*Allowed: .*relu"):
        build_attention("linear", **SIZES, feature=value)


def test_a_misspelt_value_is_refused_with_the_near_match():
    with pytest.raises(ValueError, match=r"Did you mean (relu|leaky_relu)"):
        build_attention("linear", **SIZES, feature="rellu")
