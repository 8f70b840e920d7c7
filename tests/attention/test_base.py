"""What the base classes refuse and say, and how attentions are built by name and options."""

import re

import pytest
import torch
from attention_cases import build, inputs, mask_of

from models import attention as registered
from models import build_attention, register_attention, register_mixer
from models.attention.base import Attention, Capabilities, Cost, Mixer, own_lengths


class Mean(Attention):
    """The mean of all values; what it declares is its only option."""

    Config = Capabilities

    @classmethod
    def capabilities_with(cls, config):
        return config

    def attend(self, q, k, v, context):
        return self.matrix(q, k, context) @ v

    def matrix(self, q, k, context):
        return q.new_full((*q.shape[:-1], k.shape[-2]), 1 / k.shape[-2])

    def cost(self, n, s):
        return Cost(0, 0, 0, 0)


def mean(*patterns, **declared):
    """Builds an attention of two heads of 8 dimensions and 16 positions that declares this."""
    able = Capabilities(paper="none", patterns=frozenset(patterns), **declared)
    return Mean(able, num_heads=2, head_dim=8, max_len=16, model_dim=16)


def accepts(attention, *qkv, **arguments):
    """Asserts that the fast form takes the arguments."""
    shape = (*qkv[0].shape[:3], qkv[2].shape[3])
    assert attention(*qkv, **arguments).shape == shape


def refuses(message, attention, q, k, v, **arguments):
    """Asserts that the fast and the quadratic form both refuse, with exactly this message."""
    for form, tensors in ((attention, (q, k, v)), (attention.weights, (q, k))):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            form(*tensors, **arguments)


def test_another_number_of_keys_is_refused_without_a_cross_form():
    accepts(mean("self"), *inputs(5))
    accepts(mean("cross"), *inputs(5, 6))
    refuses("Mean has no cross form: 5 queries, 6 keys.", mean("self"), *inputs(5, 6))


def test_causal_is_refused_without_a_causal_form():
    accepts(mean("causal"), *inputs(5), causal=True)
    message = "Mean has no causal form; it has cross, self."
    refuses(message, mean("self", "cross"), *inputs(5), causal=True)


def test_bidirectional_is_refused_without_such_a_form():
    accepts(mean("cross"), *inputs(5))
    refuses("Mean has no bidirectional form; it has causal.", mean("causal"), *inputs(5))


def test_causal_with_another_number_of_keys_is_refused_whatever_is_supported():
    message = "Causal attention needs as many queries as keys, not 5 and 6."
    refuses(message, mean("self", "causal", "cross"), *inputs(5, 6), causal=True)


def test_more_than_max_len_positions_are_refused_where_that_is_a_limit():
    everything = ("self", "causal", "cross")
    limited = mean(*everything, needs_max_len=True)
    accepts(limited, *inputs(16))
    accepts(mean(*everything), *inputs(17))
    message = "Mean takes 16 positions, not 17."
    refuses(message, limited, *inputs(17))
    refuses(message, limited, *inputs(17), causal=True)
    refuses(message, limited, *inputs(17, 3))
    refuses(message, limited, *inputs(3, 17))


def test_a_missing_layer_input_is_refused_where_it_is_needed():
    accepts(mean("self", needs_hidden=True), *inputs(5), hidden=torch.zeros(3, 5, 16))
    message = "Mean needs the layer's input: pass hidden=."
    refuses(message, mean("self", needs_hidden=True), *inputs(5))


@pytest.mark.parametrize("shape", [(1, 5, 16), (3, 6, 16), (3, 1, 16), (3, 5, 15), (5, 16)])
def test_a_layer_input_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=re.escape(str(shape))):
        mean("self", needs_hidden=True)(*inputs(5), hidden=torch.zeros(shape))


def test_a_mask_is_refused_where_masks_are_not_honoured():
    mask = torch.ones(3, 5, dtype=torch.bool)
    accepts(mean("self", key_mask="none"), *inputs(5))
    accepts(mean("self", key_mask="approximate"), *inputs(5), key_mask=mask)
    message = "Mean cannot honour a key_mask: pass whole sequences."
    refuses(message, mean("self", key_mask="none"), *inputs(5), key_mask=mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int64])
def test_a_mask_that_is_not_bool_is_refused(dtype):
    message = (
        f"key_mask must be bool of shape (3, 5), True for real tokens, not {dtype} of shape (3, 5)."
    )
    refuses(message, mean("self"), *inputs(5), key_mask=torch.ones(3, 5, dtype=dtype))


@pytest.mark.parametrize("shape", [(5,), (1, 5), (3, 4), (5, 3), (3, 1, 1, 5), (3, 5, 5)])
def test_a_mask_of_another_shape_is_refused(shape):
    message = (
        "key_mask must be bool of shape (3, 5), True for real tokens, not torch.bool of shape "
        f"{shape}."
    )
    refuses(message, mean("self"), *inputs(5), key_mask=torch.ones(shape, dtype=torch.bool))


def test_the_mask_of_cross_attention_is_that_of_the_keys():
    q, k, v = inputs(5, 6)
    accepts(mean("cross"), q, k, v, key_mask=torch.ones(3, 6, dtype=torch.bool))
    message = (
        "key_mask must be bool of shape (3, 6), True for real tokens, not torch.bool of shape "
        "(3, 5)."
    )
    refuses(message, mean("cross"), q, k, v, key_mask=torch.ones(3, 5, dtype=torch.bool))


@pytest.mark.parametrize(
    "shape", [(3, 1, 5, 8), (3, 3, 5, 8), (3, 2, 5, 7), (3, 2, 5, 1), (3, 5, 8), (3, 1, 2, 5, 8)]
)
def test_other_heads_and_dimensions_than_those_built_for_are_refused(shape):
    q, k, v = inputs(5)
    other = torch.zeros(shape, dtype=q.dtype)
    expected = f"must be of shape (3, 2, N, 8), not {shape}."
    refuses(f"Queries {expected}", mean("self"), other, k, v)
    refuses(f"Keys {expected}", mean("self"), q, other, v)


def test_values_of_another_width_are_refused_where_the_mechanism_has_its_own():
    attention = mean("self", own_values=True)
    accepts(attention, *inputs(5, e=8))
    q, k, v = inputs(5, e=7)
    message = "Values must be of shape (3, 2, 5, 8), as the keys, not (3, 2, 5, 7)."
    for form in (attention, attention.quadratic):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            form(q, k, v)


def test_queries_of_another_batch_are_refused():
    q, k, v = inputs(5)
    message = "Queries must be of shape (3, 2, N, 8), not (1, 2, 5, 8)."
    refuses(message, mean("self"), q[:1], k, v)


@pytest.mark.parametrize("shape", [(3, 2, 4, 6), (1, 2, 5, 6), (3, 1, 5, 6), (3, 5, 6), (3, 2, 5)])
def test_values_of_another_shape_than_the_keys_are_refused(shape):
    q, k, _ = inputs(5)
    with pytest.raises(ValueError, match=r"Values must be of shape \(3, 2, 5, ") as error:
        mean("self")(q, k, torch.zeros(shape, dtype=q.dtype))
    assert f"as the keys, not {shape}." in str(error.value)


def test_a_mechanism_without_a_recurrent_form_says_so():
    attention = mean("self", "causal")
    with pytest.raises(ValueError, match=r"^Mean has no recurrent form\.$"):
        attention.init_state(3, torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match=r"^Mean has no recurrent form\.$"):
        attention.step(*inputs(1), None)


def test_a_mechanism_that_is_declared_recurrent_without_being_so_says_what_to_define():
    attention = mean("self", "causal", recurrent=True)
    with pytest.raises(NotImplementedError, match=r"recurrent: define initial_state"):
        attention.init_state(3, torch.device("cpu"), torch.float32)
    with pytest.raises(NotImplementedError, match=r"recurrent: define advance"):
        attention.step(*inputs(1), (torch.zeros(3),))


def test_a_step_takes_one_token_of_each_sequence_of_its_state():
    attention = build("linear")
    state = attention.init_state(3, torch.device("cpu"), torch.float64)
    for wrong in (inputs(2), inputs(1, batch=1), (*inputs(1)[:2], inputs(2)[2])):
        with pytest.raises(ValueError, match=r"one token of each of the state's 3 sequences"):
            attention.step(*wrong, state)
    attention.step(*inputs(1), state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("key_mask", [None, torch.ones(3, 0, dtype=torch.bool)])
def test_no_keys_at_all_give_zeros_without_asking_the_mechanism(dtype, key_mask):
    q, k, v = (x.to(dtype) for x in inputs(5))
    out = mean("cross")(q, k[:, :, :0], v[:, :, :0], key_mask)
    assert torch.equal(out, torch.zeros(3, 2, 5, 5, dtype=dtype))


def test_the_own_length_is_the_last_real_index_plus_one():
    keys = torch.empty(5, 2, 4, 8)
    mask = mask_of("1111", "1000", "0110", "1001", "0000")
    assert own_lengths(mask, keys).tolist() == [4, 1, 3, 4, 0]
    assert own_lengths(None, keys).tolist() == [4] * 5


# Mixers


class Reversed(Mixer):
    """The other half of the channels first, of real tokens alone."""

    Config = Capabilities

    @classmethod
    def capabilities_with(cls, config):
        return config

    def mix(self, x, context):
        real = True if context.key_mask is None else context.key_mask[..., None]
        return x.flip(-1) * real

    def mix_quadratic(self, x, context):
        return self.mix(x, context)

    def cost(self, n, s):
        return Cost(0, 0, 0, 0)


def mixer(*patterns, **declared):
    able = Capabilities(paper="none", patterns=frozenset(patterns), **declared)
    return Reversed(able, num_heads=2, head_dim=8, max_len=16, model_dim=6)


def mixer_refuses(message, mixes, *arguments, **more):
    """Asserts that the fast and the quadratic form both refuse, with exactly this message."""
    for form in (mixes, mixes.quadratic):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            form(*arguments, **more)


def test_a_mixer_maps_the_layers_input_to_its_like():
    x = torch.randn(3, 5, 6)
    assert torch.equal(mixer("self")(x), x.flip(-1))


@pytest.mark.parametrize("shape", [(3, 5, 7), (3, 6), (3, 2, 5, 6)])
def test_a_mixer_refuses_input_of_another_shape(shape):
    message = f"The layer's input must be of shape (B, N, 6), not {shape}."
    mixer_refuses(message, mixer("self"), torch.zeros(shape))


def test_a_mixer_refuses_what_it_does_not_declare():
    x, mask = torch.zeros(3, 5, 6), torch.ones(3, 5, dtype=torch.bool)
    message = "Reversed has no causal form; it has self."
    mixer_refuses(message, mixer("self"), x, causal=True)
    message = "Reversed has no bidirectional form; it has causal."
    mixer_refuses(message, mixer("causal"), x)
    message = "Reversed cannot honour a key_mask: pass whole sequences."
    mixer_refuses(message, mixer("self", key_mask="none"), x, mask)
    message = "Reversed takes 16 positions, not 17."
    mixer_refuses(message, mixer("self", needs_max_len=True), torch.zeros(3, 17, 6))


@pytest.mark.parametrize(
    "mask", [torch.ones(3, 5), torch.ones(3, 4).bool(), torch.ones(1, 5).bool()]
)
def test_a_mixer_refuses_other_masks(mask):
    message = (
        "key_mask must be bool of shape (3, 5), True for real tokens, not "
        f"{mask.dtype} of shape {tuple(mask.shape)}."
    )
    mixer_refuses(message, mixer("self"), torch.zeros(3, 5, 6), mask)


def test_attentions_and_mixers_are_registered_by_what_they_are():
    with pytest.raises(TypeError, match=r"must be a subclass of models\.attention\.base:Mixer"):
        register_mixer("mean")(Mean)
    with pytest.raises(TypeError, match=r"must be a subclass of models\.attention\.base:Attention"):
        register_attention("reversed")(Reversed)


# Refusals of names and options


SIZES = {"num_heads": 2, "head_dim": 8, "max_len": 16, "model_dim": 16}


def test_an_unknown_name_is_refused_with_the_near_match_and_all_names():
    with pytest.raises(ValueError, match="Unknown attention 'cosfromer'") as error:
        build_attention("cosfromer", **SIZES)
    assert "Did you mean cosformer" in str(error.value)
    assert "softmax" in str(error.value)


@pytest.mark.parametrize("name", ["base", "engines", "__init__", ""])
def test_support_code_is_not_a_mechanism(name):
    with pytest.raises(ValueError, match="Unknown attention"):
        build_attention(name, **SIZES)


@pytest.mark.parametrize("name", ["softmax", "linear", "cosformer", "rfa"])
def test_an_unknown_option_is_refused(name):
    with pytest.raises(ValueError, match=r"Unknown key 'attention.featur'"):
        build_attention(name, **SIZES, featur="relu")
    with pytest.raises(ValueError, match=r"Unknown key 'attention.featur'"):
        registered.capabilities(name, {"featur": "relu"})


def test_an_unknown_option_is_refused_with_the_near_match():
    with pytest.raises(ValueError, match=r"Did you mean attention.feature\?"):
        build_attention("linear", **SIZES, featur="relu")


@pytest.mark.parametrize("value", ["rellu", 3, None, True, ["relu"]])
@pytest.mark.parametrize("name", ["linear", "cosformer"])
def test_an_ill_typed_option_is_refused_with_what_is_allowed(name, value):
    with pytest.raises(ValueError, match=r"attention.feature: .*Allowed: .*relu"):
        build_attention(name, **SIZES, feature=value)
    with pytest.raises(ValueError, match=r"attention.feature: .*Allowed: .*relu"):
        registered.capabilities(name, {"feature": value})


def test_a_misspelt_value_is_refused_with_the_near_match():
    with pytest.raises(ValueError, match=r"Did you mean (relu|leaky_relu)"):
        build_attention("linear", **SIZES, feature="rellu")
