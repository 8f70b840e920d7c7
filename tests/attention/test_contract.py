"""What every attention owes beside the checks of `lra check`: weights, heads, types, costs."""

import math

import pytest
import torch
from attention_cases import (
    ATTENDING,
    MASKS,
    MECHANISMS,
    assert_near,
    build,
    capabilities,
    for_every_mechanism,
    inputs,
    with_every_mask,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

NON_NEGATIVE = [
    "softmax",
    "linear",
    "linear-relu",
    "cosformer",
    "cosformer-elu+1",
    "cosformer-softmax",
    "cosformer-padded",
    "rfa-arccos",
]

PATTERNS = [(m, pattern) for m in ATTENDING for pattern in sorted(capabilities(m).patterns)]
for_every_pattern = pytest.mark.parametrize(("mechanism", "pattern"), PATTERNS)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def seed():
    """Makes random features and initial parameters those of every other time."""
    torch.manual_seed(0)


def made(mechanism, dtype=torch.float64, **arguments):
    """Builds a mechanism with parameters in the precision that it computes in."""
    return build(mechanism, **arguments).to(torch.promote_types(dtype, torch.float32))


def call(mechanism, pattern, n=7, dtype=torch.float64, **arguments):
    """Returns inputs of a pattern, and the arguments that go with them."""
    able = capabilities(mechanism)
    if able.own_values:
        arguments["e"] = 8
    q, k, v = inputs(n, n + 4 if pattern == "cross" else n, dtype=dtype, **arguments)
    qkv = (q, q if able.shared_query_key else k, v)
    batch, heads, _, d = q.shape
    more = {"causal": pattern == "causal"}
    if able.needs_hidden:
        generator = torch.Generator().manual_seed(1)
        hidden = torch.randn(batch, n, heads * d, generator=generator, dtype=torch.float64)
        more["hidden"] = hidden.to(dtype)
    return qkv, more


# Weights


@pytest.mark.parametrize("mechanism", NON_NEGATIVE)
@with_every_mask
@pytest.mark.parametrize(
    ("n", "s", "causal"),
    [(9, 9, False), (4, 9, False), (9, 4, False), (9, 9, True)],
    ids=["self", "fewer queries", "fewer keys", "causal"],
)
def test_non_negative_weights_are_a_distribution_over_the_admissible_keys(
    mechanism, mask, n, s, causal
):
    q, k, _ = (x.abs() for x in inputs(n, s))
    key_mask = MASKS[mask](s)
    weights = made(mechanism).weights(q, k, key_mask, causal)
    admissible = torch.ones(3, 1, n, s, dtype=torch.bool)
    if key_mask is not None:
        admissible = admissible & key_mask[:, None, None, :]
    if causal:
        admissible = admissible & (torch.arange(n)[:, None] >= torch.arange(s))
    assert weights.shape == (3, 2, n, s)
    assert weights.min() >= 0
    assert not weights.masked_select(~admissible).any()
    total = admissible.any(-1).double().expand(3, 2, n)
    assert_near(weights.sum(-1), total, 1e-12)


@for_every_pattern
def test_weights_have_no_dropout(mechanism, pattern):
    attention = made(mechanism, dropout=0.5)
    (q, k, _), more = call(mechanism, pattern)
    trained = attention.train().weights(q, k, **more)
    assert torch.equal(trained, attention.eval().weights(q, k, **more))


def test_without_keys_the_weights_have_no_columns():
    q, k, _ = inputs(5)
    for mechanism, pattern in PATTERNS:
        for key_mask in (None, torch.ones(3, 0, dtype=torch.bool)):
            if pattern == "cross":
                weights = made(mechanism).weights(q, k[:, :, :0], key_mask)
                assert weights.shape == (3, 2, 5, 0), mechanism


# Outputs


@for_every_pattern
def test_heads_do_not_mix(mechanism, pattern):
    attention = made(mechanism)
    qkv, more = call(mechanism, pattern)
    other = [torch.stack([x[:, 0], -3 * x[:, 1]], dim=1) for x in qkv]
    assert torch.equal(attention(*other, **more)[:, 0], attention(*qkv, **more)[:, 0])


@for_every_pattern
def test_strided_inputs_give_what_contiguous_ones_give(mechanism, pattern):
    attention = made(mechanism)
    contiguous, more = call(mechanism, pattern)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in contiguous]
    assert not any(x.is_contiguous() for x in strided)
    assert_near(attention(*strided, **more), attention(*contiguous, **more), 1e-13)


@for_every_pattern
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_output_has_the_dtype_of_the_values(mechanism, pattern, dtype):
    qkv, more = call(mechanism, pattern, dtype=dtype)
    assert made(mechanism, dtype)(*qkv, **more).dtype == dtype


@pytest.mark.parametrize("mechanism", [m for m in MECHANISMS if capabilities(m).recurrent])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_output_of_a_step_has_the_dtype_of_the_values(mechanism, dtype):
    attention = made(mechanism, dtype)
    qkv, more = call(mechanism, "causal", n=1, dtype=dtype)
    state = attention.init_state(3, torch.device("cpu"), dtype)
    for _ in range(2):
        out, state = attention.step(*qkv, state, hidden=more.get("hidden"))
        assert out.dtype == dtype
        assert out.shape == qkv[2].shape


@for_every_pattern
def test_dropout_applies_where_the_capabilities_say(mechanism, pattern):
    attention = made(mechanism, dropout=0.5)
    qkv, more = call(mechanism, pattern)
    trained, evaluated = attention.train()(*qkv, **more), attention.eval()(*qkv, **more)
    dropped = not torch.equal(trained, evaluated)
    assert dropped == (capabilities(mechanism).dropout == "weights")


# Declared cost


def _of_solve(matrix, right, *_, **__):
    """Of an LU factorisation (F, F) and of two triangular solves with E columns."""
    *batch, f, e = right
    return math.prod(batch) * (2 * f**3 // 3 + 2 * f * f * e)


def _of_real_transform(x, axes, *_, **__):
    """5/2 M log2 M of M numbers that are transformed together."""
    size = math.prod(x[axis] for axis in axes)
    return math.prod(x) // size * round(2.5 * size * math.log2(size))


NOT_COUNTED_BY_TORCH = {
    torch.ops.aten._linalg_solve_ex: _of_solve,
    torch.ops.aten._fft_r2c: _of_real_transform,
}


def counted(attention, *qkv, **more):
    """Returns the operations of a call, as torch counts them, and those that it does not count."""
    counter = FlopCounterMode(display=False, custom_mapping=NOT_COUNTED_BY_TORCH)
    with counter, sdpa_kernel(SDPBackend.MATH):
        attention(*qkv, **more)
    return counter.get_total_flops()


BIDIRECTIONAL = [(m, pattern) for m, pattern in PATTERNS if pattern != "causal"]


@pytest.mark.parametrize("n", [16, 40, 600])
@pytest.mark.parametrize(("mechanism", "pattern"), BIDIRECTIONAL)
def test_the_declared_operations_are_those_counted(mechanism, pattern, n):
    attention = build(mechanism)
    qkv, more = call(mechanism, pattern, n, batch=1, e=8, dtype=torch.float32)
    s = qkv[1].shape[2]
    assert attention.cost(n, s).flops == counted(attention, *qkv, **more)
    if pattern == "cross":
        q, k, v = inputs(s, n, batch=1, e=8, dtype=torch.float32)
        assert attention.cost(s, n).flops == counted(attention, q, k, v)


@pytest.mark.parametrize("mechanism", [m for m in MECHANISMS if m not in ATTENDING])
@pytest.mark.parametrize("n", [16, 600])
def test_the_declared_operations_of_a_mixer_are_those_counted(mechanism, n):
    mixes = build(mechanism)
    x = torch.randn(1, n, mixes.model_dim)
    assert mixes.cost(n, n).flops == counted(mixes, x)


@for_every_mechanism
def test_the_declared_cost_grows_as_the_capabilities_say(mechanism):
    with torch.device("meta"):  # of sizes that no memory has
        small, large = (build(mechanism, max_len=n).cost(n, n).flops for n in (2**18, 2**20))
    growth = large / small
    exponent = {"N": 1, "N log N": 1, "N^1.5": 1.5, "N^2": 2}[capabilities(mechanism).time]
    assert growth == pytest.approx(4**exponent, rel=0.15)


@pytest.mark.parametrize("mechanism", [m for m, pattern in PATTERNS if pattern == "causal"])
def test_the_operations_of_causal_attention_grow_as_the_capabilities_say(mechanism):
    operations = []
    for n in (1024, 4096):
        attention = build(mechanism, num_heads=1, max_len=n)
        arguments = {"n": n, "dtype": torch.float32, "batch": 1, "heads": 1}
        qkv, more = call(mechanism, "causal", **arguments)
        operations.append(counted(attention, *qkv, **more))
    exponent = {"N": 1, "N log N": 1, "N^1.5": 1.5, "N^2": 2}[capabilities(mechanism).time]
    # A shorter sequence may leave out less of its future.
    assert 0.6 * 4**exponent < operations[1] / operations[0] < 1.15 * 4**exponent
