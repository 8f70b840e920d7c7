"""BigBird: neighbouring, global and random blocks of keys (Zaheer et al., NeurIPS 2020).

Positions are cut into blocks of b. A block of queries sees itself and the blocks beside it, the
first and the last block, and r random others, drawn for each head and block; the first and the last
block see everything. Cost O(N (5 + r) b D), 13 % of all pairs at 4,000 tokens and 47 % at 1,024.
The last block is that which holds a sequence's own last token, and random blocks are those of the
highest draws among its blocks, so that padding and batch mates change nothing; the draws are part
of the model's state. The arena's JAX code draws from the first 1,024 tokens alone and masks softly;
public code seeds a global generator for its table. The causal form of public code is full
attention, and there is none here.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import register_attention
from models.attention.base import (
    Attention,
    Capabilities,
    Context,
    Cost,
    admissible_keys,
    masked_softmax,
    own_lengths,
)
from models.attention.engines.pattern import Keys, attend_blocks, masked_attention


class Table(NamedTuple):
    """Which blocks of keys each block of queries sees.

    Attributes:
        blocks: Indices (B, blocks, H, seen).
        valid: Bool of the same shape, False for what only fills up the row.
    """

    blocks: Tensor
    valid: Tensor


@register_attention("bigbird")
class BigBird(Attention):
    """Softmax attention over neighbouring, global and random blocks."""

    @dataclass(frozen=True)
    class Config:
        """Options of BigBird.

        Attributes:
            block: Tokens b of a block.
            random: Random blocks r that each block sees.
        """

        block: int = 64
        random: int = 3

        def __post_init__(self) -> None:
            if self.block < 1 or self.random < 0:
                raise ValueError("block must be at least 1, and random at least 0.")

    capabilities = Capabilities(
        paper="Zaheer et al., NeurIPS 2020",
        family="pattern",
        patterns=frozenset({"self"}),
        dropout="weights",
        needs_max_len=True,
        rotary=True,
        identities=frozenset({"key shift", "rotation"}),
    )

    def __init__(self, config: Config, **sizes: Any) -> None:
        super().__init__(config, **sizes)
        blocks = -(-self.max_len // config.block)
        self.register_buffer("draws", torch.rand(self.num_heads, blocks, blocks))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Computes the rows of blocks with a few keys, then those that see everything."""
        size, n, dropout = self.config.block, k.shape[2], self.dropout if self.training else 0.0
        blocks = -(-n // size)
        mask = None if context.key_mask is None else context.key_mask[:, None, None, :]
        if blocks <= 4 + self.config.random:  # the second block has four of its own
            return masked_attention(q, k, v, mask, dropout)
        last = self._last(k, context)
        table = self._table(blocks, last)
        out = attend_blocks(q, _gathered(k, v, context.key_mask, table, size), size, dropout)

        def cut(x: Tensor) -> Tensor:
            return F.pad(x, (0, 0, 0, blocks * size - n)).unflatten(2, (blocks, size))

        ends = torch.stack([torch.zeros_like(last), last], 1).expand(len(q), -1)
        samples = torch.arange(len(q), device=q.device)[:, None]
        rows = cut(q).transpose(1, 2)[samples, ends].transpose(1, 2)
        full = masked_attention(rows.flatten(2, 3), k, v, mask, dropout)
        first_rows, last_rows = full.unflatten(2, (2, size)).split(1, 2)
        at = torch.arange(blocks, device=q.device)[:, None, None]
        out = torch.where(at == last.view(-1, 1, 1, 1, 1), last_rows, cut(out))
        return torch.where(at == 0, first_rows, out).flatten(2, 3)[:, :, :n]

    def _last(self, k: Tensor, context: Context) -> Tensor:
        """Returns the block of each sequence's last token (B,), (1,) if all are of one length."""
        key_mask = context.key_mask
        lengths = own_lengths(key_mask, k if key_mask is not None else k[:1])
        return (lengths - 1).clamp_min(0) // self.config.block

    def _near(self, blocks: int, last: Tensor) -> tuple[Tensor, Tensor]:
        """Returns which blocks are seen by their place, and which exist, (B, blocks, blocks)."""
        at = torch.arange(blocks, device=last.device)
        last = last.view(-1, 1, 1)
        exists = (at <= last).expand(-1, blocks, -1)
        near = ((at[:, None] - at).abs() <= 1) | (at == 0) | (at == last)
        return near & exists, exists

    def _table(self, blocks: int, last: Tensor) -> Table:
        """Returns the blocks seen: those near first, then those of the highest draws."""
        near, exists = (x[:, None] for x in self._near(blocks, last))
        order = self.draws[:, :blocks, :blocks].masked_fill(near, 2.0).masked_fill(~exists, -1.0)
        draws, seen = order.topk(min(blocks, 5 + self.config.random), -1)
        wanted = near.sum(-1, keepdim=True) + self.config.random
        valid = (draws >= 0) & (torch.arange(seen.shape[-1], device=seen.device) < wanted)
        return Table(seen.transpose(1, 2), valid.transpose(1, 2))

    def matrix(self, q: Tensor, k: Tensor, context: Context) -> Tensor:
        """Returns softmax(q k^T / sqrt(D)) over the keys of the blocks that are seen."""
        n, size = k.shape[2], self.config.block
        blocks = -(-n // size)
        last = self._last(k, context)
        near, exists = (x[:, None] for x in self._near(blocks, last))
        draws = self.draws[:, :blocks, :blocks].masked_fill(near | ~exists, -1.0)
        rank = (draws[..., None, :] > draws[..., :, None]).sum(-1)
        seen = near | (exists & (rank < self.config.random))
        at = torch.arange(blocks, device=k.device)[:, None]
        seen = seen | (at == 0) | (at == last.view(-1, 1, 1, 1))
        seen = seen.repeat_interleave(size, 2).repeat_interleave(size, 3)[..., :n, :n]
        keep = admissible_keys(q, k, context) & seen
        return masked_softmax(q @ k.mT * q.shape[-1] ** -0.5, keep)

    def cost(self, n: int, s: int) -> Cost:
        """Products with the gathered keys, which are kept, and with all keys for two blocks."""
        size, d = self.config.block, self.head_dim
        blocks = -(-n // size)
        seen = min(blocks, 5 + self.config.random) * size
        if blocks <= 4 + self.config.random:
            pairs, kept = n * s, n
        else:
            pairs, kept = blocks * size * seen + 2 * size * s, n + 2 * blocks * seen * d
        return Cost(
            flops=self.num_heads * 4 * pairs * d,
            activation_bytes=self.num_heads * 4 * kept,
            parameters=0,
            state_floats=0,
        )


def _gathered(k: Tensor, v: Tensor, key_mask: Tensor | None, table: Table, size: int) -> Keys:
    """Puts the blocks that a table names side by side."""
    batch, heads, n, _ = k.shape
    _, blocks, _, seen = table.blocks.shape
    samples = torch.arange(batch, device=k.device).view(-1, 1, 1, 1)
    rows = (samples * blocks + table.blocks) * heads
    rows = (rows + torch.arange(heads, device=k.device)[:, None]).flatten()
    padding = blocks * size - n

    def gathered(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, padding)).unflatten(2, (blocks, size)).transpose(1, 2)
        # Whole blocks are rows, which index_select copies at once.
        picked = x.flatten(3).flatten(0, 2).index_select(0, rows)
        return picked.view(batch, blocks, heads, seen * size, -1)

    if key_mask is None:
        key_mask = torch.ones(1, n, dtype=torch.bool, device=k.device)
    real = F.pad(key_mask, (0, padding)).unflatten(1, (blocks, size))
    of = torch.arange(len(real), device=k.device).view(-1, 1, 1, 1)
    mask = (real[of, table.blocks] & table.valid[..., None]).flatten(3)[:, :, :, None]
    return Keys(gathered(k), gathered(v), None if bool(mask.all()) else mask)
