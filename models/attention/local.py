"""Local attention: softmax over nearby keys (the arena's baseline, Tay et al., ICLR 2021).

    block:     j // b = i // b                (blocks that do not overlap)
    neighbour: |j // b - i // b| <= 1         (own block and the two beside it)
    band:      |i - j| <= b

with b = `size`; causal attention keeps j <= i of these. Cost O(N b D), a recurrent state of the
last b (band, block) or 2 b (neighbour) keys and values a head. Blocks begin at position 0, whatever
the padding. With `block` no layer ever passes anything from one block to another, so that a CLS
token sees its own block alone; take another pattern there. The arena's JAX code reshapes to
(b, N / b) and attends over the first axis, which is a comb of every (N / b)-th token, and reshapes
its padding mask the other way.
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from models.attention import register_attention
from models.attention.base import (
    Attention,
    Capabilities,
    Context,
    Cost,
    admissible_keys,
    masked_softmax,
)
from models.attention.engines.pattern import (
    Rule,
    Window,
    attend_blocks,
    band_window,
    gather_windows,
    masked_attention,
)


class Ring(NamedTuple):
    """The recurrent state: the latest keys and values, each at its position modulo their number.

    Attributes:
        keys: (B, H, length, D).
        values: (B, H, length, E); E is 0 before the first token, which tells it.
        position: Number of tokens seen.
    """

    keys: Tensor
    values: Tensor
    position: int


@register_attention("local")
class Local(Attention):
    """Softmax attention over a block, its neighbours or a band."""

    @dataclass(frozen=True)
    class Config:
        """Options of local attention.

        Attributes:
            pattern: block, neighbour or band.
            size: Tokens b of a block, or the reach of the band to each side.
        """

        pattern: Literal["block", "neighbour", "band"] = "block"
        size: int = 64

        def __post_init__(self) -> None:
            if self.size < 1:
                raise ValueError("size must be at least 1.")

    capabilities = Capabilities(
        paper="Tay et al., ICLR 2021",
        family="pattern",
        patterns=frozenset({"self", "causal"}),
        dropout="weights",
        recurrent=True,
        rotary=True,
        identities=frozenset({"key shift", "rotation"}),
    )

    @classmethod
    def capabilities_with(cls, config: Config) -> Capabilities:
        """Adds that only distances count in a band."""
        able = cls.capabilities
        if config.pattern != "band":
            return able
        return replace(able, identities=able.identities | {"position shift"})

    def _rule(self, causal: bool) -> Rule:
        """Returns which pairs of positions the pattern admits."""
        size, pattern = self.config.size, self.config.pattern

        def rule(i: Tensor, j: Tensor) -> Tensor:
            distance = i - j if pattern == "band" else i // size - j // size
            reach = {"block": 0, "neighbour": 1, "band": size}[pattern]
            near = distance.abs() <= reach
            return near & (j <= i) if causal else near

        return rule

    def _window(self, n: int, causal: bool) -> Window:
        """Returns what is gathered for each block of queries of a sequence of n tokens."""
        size = self.config.size
        if self.config.pattern == "band":
            return band_window(size, causal).within(n)
        beside = 0 if self.config.pattern == "block" else size
        return Window(size, beside, 0 if causal else beside).within(n)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Computes attention over the window that each block of queries can see."""
        window = self._window(k.shape[2], context.causal)
        rule = self._rule(context.causal)
        keys = gather_windows(k, v, context.key_mask, rule, window)
        return attend_blocks(q, keys, window.block, self.dropout if self.training else 0.0)

    def matrix(self, q: Tensor, k: Tensor, context: Context) -> Tensor:
        """Returns softmax(q k^T / sqrt(D)) over the admissible keys of the pattern."""
        at = torch.arange(k.shape[-2], device=k.device)
        keep = admissible_keys(q, k, context) & self._rule(context.causal)(at[:, None], at)
        return masked_softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, keep)

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> Ring:
        """Returns an empty ring with memory for all that one query can see."""
        size = (batch, self.num_heads, self._reach + 1)
        keys = torch.zeros(*size, self.head_dim, device=device, dtype=dtype)
        return Ring(keys, keys.new_zeros(*size, 0), 0)

    def advance(
        self, q: Tensor, k: Tensor, v: Tensor, state: Ring, hidden: Tensor | None
    ) -> tuple[Tensor, Ring]:
        """Attends to what of the ring the pattern admits; the ring is written in place."""
        keys, values, position = state
        if position == 0:
            values = v.new_zeros(*keys.shape[:3], v.shape[-1])
        length = keys.shape[2]
        keys[:, :, position % length] = k[:, :, 0]
        values[:, :, position % length] = v[:, :, 0]
        slots = torch.arange(length, device=k.device)
        # The latest position that was written to each slot; negative: none.
        held = position - (position - slots) % length
        keep = (held >= 0) & self._rule(True)(torch.tensor(position, device=k.device), held)
        out = masked_attention(q, keys, values, keep[None, None, None], 0.0)
        return out, Ring(keys, values, position + 1)

    @property
    def _reach(self) -> int:
        """How far back a causal query may see."""
        size = self.config.size
        return {"block": size - 1, "neighbour": 2 * size - 1, "band": size}[self.config.pattern]

    def cost(self, n: int, s: int) -> Cost:
        """Two products of depth D with the gathered keys of a query's block, which are kept."""
        window = self._window(n, causal=False)
        gathered = -(-n // window.block) * window.length * 2 * self.head_dim
        return Cost(
            flops=self.num_heads * 4 * window.pairs(n) * self.head_dim,
            activation_bytes=self.num_heads * 4 * (n + gathered),
            parameters=0,
            state_floats=self.num_heads * 2 * (self._reach + 1) * self.head_dim,
        )
