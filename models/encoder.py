"""The encoder: embedding, positions and pre-norm Transformer blocks around any attention.

Shapes: B batch, N positions, C model dimension.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.attention import build_attention
from models.attention.base import Attention, Mechanism, Mixer
from models.dropout import Dropout, seeded_alike
from models.linear import Linear
from models.rotary import Rotary

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
        max_len: The largest number of tokens.
        dropout: Dropout probability of embeddings and residual branches.
        attention_dropout: Dropout probability inside the attention, where it defines one.
        positions: A ``learned`` table; ``sinusoidal``: sine in even and cosine in odd channels
            (Vaswani et al. 2017); or ``rotary``: nothing is added to embeddings, and queries and
            keys are rotated by their positions (Su et al. 2021).
        cls: Whether a learned vector is put before the tokens; it has a position of its own.
        projection_bias: Whether query, key, value and output projections have a bias.
        norm_eps: Epsilon of the layer norms.
        init: ``normal``: embeddings N(0, 0.02), linear maps as torch makes them. ``xavier``, as in
            the arena's JAX code: token embeddings N(0, 1), linear maps Xavier-uniform with biases
            N(0, 1e-6). Learned positions are N(0, 0.02) in both.
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
    positions: Literal["learned", "sinusoidal", "rotary"]
    cls: bool
    projection_bias: bool
    norm_eps: float
    init: Literal["normal", "xavier"]

    @property
    def num_positions(self) -> int:
        """The length of the longest sequence that the blocks see."""
        return self.max_len + self.cls


class MultiHeadAttention(nn.Module):
    """Query, key, value and output projections around an attention."""

    def __init__(self, shape: EncoderShape, attention: Attention) -> None:
        super().__init__()
        self.attention = attention
        self.rotary = Rotary(shape.head_dim) if shape.positions == "rotary" else None
        self.heads = shape.heads
        # One product makes queries, keys (unless queries serve as keys) and values.
        self.parts = 2 if self.attention.capabilities.shared_query_key else 3
        inner = shape.heads * shape.head_dim
        self.project = Linear(shape.dim, self.parts * inner, bias=shape.projection_bias)
        self.out = Linear(inner, shape.dim, bias=shape.projection_bias)
        if shape.init == "xavier":
            for part in self.project.weight.chunk(self.parts):
                nn.init.xavier_uniform_(part)
            nn.init.xavier_uniform_(self.out.weight)
            for linear in (self.project, self.out):
                if linear.bias is not None:
                    nn.init.normal_(linear.bias, std=1e-6)

    def forward(self, x: Tensor, key_mask: Tensor | None, causal: bool = False) -> Tensor:
        """Maps (B, N, C) to (B, N, C); ``key_mask`` is bool (B, N), True for real tokens."""
        q, *k, v = self._projected(x)
        if self.rotary is not None:
            q, *k = (self.rotary(part) for part in (q, *k))
        hidden = x if self.attention.capabilities.needs_hidden else None
        out = self.attention(q, k[0] if k else q, v, key_mask, causal, hidden)
        return self.out(out.transpose(1, 2).flatten(2))

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Maps one token (B, 1, C) and the attention's state to (B, 1, C) and the next state."""
        q, *k, v = self._projected(x)
        hidden = x if self.attention.capabilities.needs_hidden else None
        out, state = self.attention.step(q, k[0] if k else q, v, state, hidden)
        return self.out(out.transpose(1, 2).flatten(2)), state

    def _projected(self, x: Tensor) -> tuple[Tensor, ...]:
        """Returns queries, keys (unless queries serve as keys) and values, (B, H, N, D) each."""
        projected = self.project(x).unflatten(-1, (self.parts, self.heads, -1))
        return _Unbound.apply(projected.permute(2, 0, 3, 1, 4))


class _Unbound(torch.autograd.Function):
    """The parts of a projection (P, B, H, N, D), whose gradients are put together in one copy.

    Those of `unbind` are stacked, and then copied into the order of the projection.
    """

    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> tuple[Tensor, ...]:
        ctx.order = projected.stride()
        ctx.shape = projected.shape
        return projected.unbind(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        whole = gradients[0].new_empty_strided(ctx.shape, ctx.order)
        for part, gradient in zip(whole, gradients, strict=True):
            part.copy_(gradient)
        return whole


def token_mixing(shape: EncoderShape, attention: str, options: dict[str, Any]) -> nn.Module:
    """Builds the part of a block that mixes tokens: (B, N, C) and key mask to (B, N, C).

    Raises:
        ValueError: For names and options as `build_attention`; for rotary positions with a
            mechanism that cannot take them.
    """
    mechanism = build_attention(
        attention,
        num_heads=shape.heads,
        head_dim=shape.head_dim,
        max_len=shape.num_positions,
        model_dim=shape.dim,
        dropout=shape.attention_dropout,
        **options,
    )
    if shape.positions == "rotary" and not mechanism.capabilities.rotary:
        raise ValueError(f"{attention} with these options cannot take rotary positions.")
    return mechanism if isinstance(mechanism, Mixer) else MultiHeadAttention(shape, mechanism)


class Block(nn.Module):
    """A pre-norm Transformer block: x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, shape: EncoderShape, attention: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(shape.dim, eps=shape.norm_eps)
        self.attention = token_mixing(shape, attention, options)
        self.ffn_norm = nn.LayerNorm(shape.dim, eps=shape.norm_eps)
        self.ffn = nn.Sequential(
            Linear(shape.dim, shape.ffn_dim),
            nn.GELU(),
            Dropout(shape.dropout),
            Linear(shape.ffn_dim, shape.dim),
            Dropout(shape.dropout),
        )
        if shape.init == "xavier":
            for linear in (self.ffn[0], self.ffn[3]):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.normal_(linear.bias, std=1e-6)
        self.dropout = Dropout(shape.dropout)

    def forward(self, x: Tensor, key_mask: Tensor | None, causal: bool = False) -> Tensor:
        """Maps (B, N, C) to (B, N, C)."""
        x = x + self.dropout(self.attention(self.attention_norm(x), key_mask, causal))
        return x + self.ffn(self.ffn_norm(x))

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Maps one token (B, 1, C) and the attention's state to (B, 1, C) and the next state."""
        mixed, state = self.attention.step(self.attention_norm(x), state)
        x = x + self.dropout(mixed)
        return x + self.ffn(self.ffn_norm(x)), state


class Encoder(nn.Module):
    """Token and position embeddings, a CLS vector where asked for, blocks and a final norm.

    With ``checkpointing`` set, the backward pass computes each block again instead of keeping its
    activations; random draws are the same again.
    """

    def __init__(self, shape: EncoderShape, attention: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocab_size, shape.dim)
        self.positions: nn.Embedding | None = None
        if shape.positions == "learned":
            self.positions = nn.Embedding(shape.num_positions, shape.dim)
        elif shape.positions == "sinusoidal":
            self.positions = nn.Embedding.from_pretrained(sinusoids(shape.num_positions, shape.dim))
        nn.init.normal_(self.tokens.weight, std=1.0 if shape.init == "xavier" else INIT_STD)
        if shape.positions == "learned":
            nn.init.normal_(self.positions.weight, std=INIT_STD)
        self.cls = nn.Parameter(torch.zeros(shape.dim)) if shape.cls else None
        self.dropout = Dropout(shape.dropout)
        self.blocks = nn.ModuleList(Block(shape, attention, options) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.dim, eps=shape.norm_eps)
        self.checkpointing = False

    def forward(self, tokens: Tensor, key_mask: Tensor | None, causal: bool = False) -> Tensor:
        """Maps token ids (B, N) to (B, N, C), or (B, 1 + N, C) with a CLS vector first.

        Args:
            tokens: Token ids.
            key_mask: Bool (B, N), True where a token may be attended to; None for all. Rows of
                others attend too, but a mechanism for which the length matters takes the last
                True for the end of the sequence.
            causal: Whether a token feels those up to itself only.
        """
        x = self.tokens(tokens)
        if self.cls is not None:
            x = torch.cat([self.cls.expand(len(x), 1, -1), x], 1)
            if key_mask is not None:
                key_mask = nn.functional.pad(key_mask, (1, 0), value=True)
        if self.positions is not None:
            x = x + self.positions.weight[: x.shape[1]]
        x = self.dropout(x)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(
                    block, x, key_mask, causal, use_reentrant=False, context_fn=seeded_alike
                )
            else:
                x = block(x, key_mask, causal)
        return self.norm(x)


def sinusoids(length: int, dim: int) -> Tensor:
    """Returns sinusoidal positions (length, dim): sin and cos of p / 10,000^(2i / dim)."""
    rates = torch.exp(torch.arange(0, dim, 2) * (-math.log(10_000) / dim))
    angles = torch.arange(length)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :dim]


def resample(model: nn.Module, generator: torch.Generator) -> None:
    """Gives every stochastic mechanism of ``model`` new random draws from ``generator``."""
    for module in model.modules():
        if isinstance(module, Mechanism):
            module.resample(generator)
