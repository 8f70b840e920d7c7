"""The encoder that tests build where its size does not matter."""

from models.encoder import EncoderShape

SMALL = EncoderShape(
    layers=2,
    dim=16,
    heads=2,
    head_dim=8,
    ffn_dim=24,
    vocab_size=12,
    max_len=64,
    dropout=0.0,
    attention_dropout=0.0,
    positions="learned",
    cls=False,
    projection_bias=True,
    norm_eps=1e-5,
    init="normal",
)
