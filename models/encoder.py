"""The encoder: embedding, positions and pre-norm Transformer blocks around any attention.

Shapes: B batch, N positions, C model dimension.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.attention import build_attention
from models.dropout import Dropout

NORM_EPS = 1e-5
INIT_STD = 0.02


@dataclass(frozen=True)
class EncoderShape:
    """Size of an encoder.

    Attributes:
        layers: Number of blocks.
        dim: Model dimension C.
        heads: Attention heads.
        head_dim: Dimension of a head.
        ffn_dim: Hidden dimension of the feed-forward layer.
        vocab_size: Rows of the embedding table.
        max_len: Number of learned positions.
        dropout: Dropout probability of embeddings and residual branches.
        attention_dropout: Dropout probability inside the attention, where it defines one.
    """

    layers: int
    dim: int
    heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    max_len: int
    dropout: float
    attention_dropout: float


class MultiHeadAttention(nn.Module):
    """Query, key, value and output projections (with bias) around a mechanism."""

    def __init__(self, shape: EncoderShape, attention: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.attention = build_attention(
            attention,
            num_heads=shape.heads,
            head_dim=shape.head_dim,
            max_len=shape.max_len,
            model_dim=shape.dim,
            dropout=shape.attention_dropout,
            **options,
        )
        self.heads = shape.heads
        # One product makes queries, keys (unless queries serve as keys) and values.
        self.parts = 2 if self.attention.capabilities.shared_query_key else 3
        inner = shape.heads * shape.head_dim
        self.project = nn.Linear(shape.dim, self.parts * inner)
        self.out = nn.Linear(inner, shape.dim)

    def forward(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        """Maps (B, N, C) to (B, N, C); ``key_mask`` is bool (B, N), True for real tokens."""
        projected = self.project(x).unflatten(-1, (self.parts, self.heads, -1))
        q, *k, v = projected.permute(2, 0, 3, 1, 4).unbind(0)
        hidden = x if self.attention.capabilities.needs_hidden else None
        out = self.attention(q, k[0] if k else q, v, key_mask=key_mask, hidden=hidden)
        return self.out(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm Transformer block: x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, shape: EncoderShape, attention: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(shape.dim, eps=NORM_EPS)
        self.attention = MultiHeadAttention(shape, attention, options)
        self.ffn_norm = nn.LayerNorm(shape.dim, eps=NORM_EPS)
        self.ffn = nn.Sequential(
            nn.Linear(shape.dim, shape.ffn_dim),
            nn.GELU(),
            Dropout(shape.dropout),
            nn.Linear(shape.ffn_dim, shape.dim),
            Dropout(shape.dropout),
        )
        self.dropout = Dropout(shape.dropout)

    def forward(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        """Maps (B, N, C) to (B, N, C)."""
        x = x + self.dropout(self.attention(self.attention_norm(x), key_mask))
        return x + self.ffn(self.ffn_norm(x))


class Encoder(nn.Module):
    """Token and learned position embeddings, blocks and a final norm."""

    def __init__(self, shape: EncoderShape, attention: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocab_size, shape.dim)
        self.positions = nn.Embedding(shape.max_len, shape.dim)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=INIT_STD)
        self.dropout = Dropout(shape.dropout)
        self.blocks = nn.ModuleList(Block(shape, attention, options) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.dim, eps=NORM_EPS)

    def forward(self, tokens: Tensor, key_mask: Tensor | None) -> Tensor:
        """Maps token ids (B, N) to (B, N, C); rows of padding are unspecified."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, key_mask)
        return self.norm(x)


def resample(model: nn.Module, generator: torch.Generator) -> None:
    """Gives every stochastic attention of ``model`` new random draws from ``generator``."""
    for block in model.modules():
        if isinstance(block, MultiHeadAttention):
            block.attention.resample(generator)
