"""The decoder: token by token it gives what it gives at once."""

import pytest
import torch

from models.attention import ATTENTIONS, capabilities
from models.decoder import Decoder
from models.encoder import EncoderShape
from models.linear import Linear

SHAPE = {
    "layers": 2,
    "dim": 16,
    "heads": 2,
    "head_dim": 8,
    "ffn_dim": 32,
    "vocab_size": 11,
    "max_len": 20,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "positions": "learned",
    "cls": False,
    "projection_bias": True,
    "norm_eps": 1e-5,
    "init": "normal",
}
RECURRENT = [name for name in ATTENTIONS.names() if capabilities(name, {}).recurrent]


def decoder(attention, options=None, **changes):
    torch.manual_seed(0)
    shape = EncoderShape(**SHAPE | changes)
    return Decoder(shape, attention, options or {}).double().eval()


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
@pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in RECURRENT), ("rfa", {"gate": True})]
)
def test_steps_give_the_logits_of_the_whole_sequence(name, options, positions):
    model = decoder(name, options, positions=positions)
    tokens = torch.randint(0, 11, (12, 20))
    state = model.init_state(12, torch.device("cpu"), torch.float64)
    with torch.no_grad():
        whole = model(tokens)
        for i in range(20):
            logits, state = model.step(tokens[:, i], state)
            torch.testing.assert_close(logits, whole[:, i], atol=1e-10, rtol=1e-7)
    assert state.position == 20


@pytest.mark.parametrize("name", ["softmax", "cosformer"])
def test_no_token_feels_those_after_it(name):
    model = decoder(name)
    tokens = torch.randint(0, 11, (1, 20))
    other = tokens.clone()
    other[:, 12:] = (other[:, 12:] + 1) % 11
    with torch.no_grad():
        difference = (model(tokens) - model(other)).abs().amax(-1)[0]
    assert difference[:12].max() == 0
    assert difference[12:].min() > 0


@pytest.mark.parametrize("name", ["fnet", "linformer"])
def test_what_has_no_recurrent_form_is_refused(name):
    with pytest.raises(ValueError, match=f"attention={name}.*not recurrent"):
        decoder(name)


@pytest.mark.parametrize("changes", [{"positions": "rotary"}, {"cls": True}])
def test_what_a_decoder_has_not_is_refused(changes):
    with pytest.raises(ValueError, match="no CLS vector, and learned or sinusoidal"):
        decoder("softmax", **changes)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(1,), (9,), (16, 1), (3, 16), (49,)])
def test_a_linear_layer_is_the_same_for_few_rows(rows, bias):
    layer = Linear(6, 5, bias=bias).double()
    x = torch.randn(*rows, 6, dtype=torch.float64)
    with torch.no_grad():
        out = layer(x)
    torch.testing.assert_close(out, torch.nn.Linear.forward(layer, x), atol=1e-14, rtol=0)
    assert out.is_contiguous()  # fused attention takes no other queries


def test_torch_compile_follows_a_linear_layer_of_any_number_of_rows():
    """Without generating code, which takes a compiler and a minute."""
    layer = Linear(16, 24)
    traced = torch.compile(layer, dynamic=True, backend="eager")
    with torch.no_grad():
        for rows in (5, 20, 60):
            x = torch.randn(rows, 16)
            torch.testing.assert_close(traced(x), layer(x))
