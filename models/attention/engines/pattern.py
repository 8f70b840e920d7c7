"""Softmax attention over a pattern of keys: queries in blocks, each with the keys gathered for it.

A pattern says which keys each query may see. Queries are cut into blocks; the keys that a block may
see are put side by side, and one fused attention over all blocks does the rest, with a small mask
for what the pattern leaves out of the gathered keys. Cost O(N L D) time and O(N L) memory for L
gathered keys a block, where a mask of all N x N pairs would be slower than no pattern at all.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention.engines.dropout import softmax_dropout_attention

Rule = Callable[[Tensor, Tensor], Tensor]
"""Which pairs a pattern admits: positions of queries and of keys, that broadcast, to bool."""


class Keys(NamedTuple):
    """Keys and values gathered for blocks of queries.

    Attributes:
        k: Keys (B, blocks, H, L, D).
        v: Values (B, blocks, H, L, E).
        mask: Bool, broadcastable to (B, blocks, H, block, L); None: every query sees all L.
    """

    k: Tensor
    v: Tensor
    mask: Tensor | None


class Window(NamedTuple):
    """What is gathered around each block of queries.

    Attributes:
        block: Queries of a block.
        before: Keys before the first query of a block.
        after: Keys after the last query of a block.
    """

    block: int
    before: int
    after: int

    @property
    def length(self) -> int:
        """The number of keys gathered for a block."""
        return self.before + self.block + self.after

    def pairs(self, n: int) -> int:
        """The number of products of a query and a key for n positions, padding included."""
        return -(-n // self.block) * self.block * self.length

    def within(self, n: int) -> "Window":
        """Returns the window for n positions: one block of all, where it would see them all."""
        return self if self.length < n else Window(n, 0, 0)


def band_window(reach: int, causal: bool) -> Window:
    """Returns the window of a band |i - j| <= ``reach``, in blocks that are worth a product."""
    return Window(min(max(reach, 32), 128), reach, 0 if causal else reach)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """Computes softmax attention under a mask, with dropout on its weights.

    Args:
        q: Queries (B, H, N, D).
        k: Keys (B, H, S, D).
        v: Values (B, H, S, E).
        mask: Bool, broadcastable to (B, H, N, S), True for what is admissible; None: everything.
        p: Probability that a weight is dropped.

    Returns:
        (B, H, N, E); exactly 0 for queries without an admissible key.
    """
    if p and q.device.type == "cpu":
        return softmax_dropout_attention(q, k, v, mask, p)
    if not p or mask is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
    # With dropout in bf16 on CUDA, patterns with such queries had NaN gradients (torch 2.11).
    seen = mask.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | ~seen, dropout_p=p)
    return out.masked_fill(~seen, 0.0)


def attend_blocks(q: Tensor, keys: Keys, block: int, p: float) -> Tensor:
    """Computes attention of all queries, block by block.

    Args:
        q: Queries (B, H, N, D), of which the first ``block`` see the first block of keys, and so
            on.
        keys: What each block of queries sees.
        block: Queries of a block.
        p: Probability that a weight is dropped.

    Returns:
        (B, H, N, E).
    """
    batch, _, n, _ = q.shape
    blocks = keys.k.shape[1]
    # Beside positions in memory, as they come from the layer, heads need no copy.
    q = F.pad(q.transpose(1, 2), (0, 0, 0, 0, 0, blocks * block - n))
    q = q.reshape(batch * blocks, block, *q.shape[2:]).transpose(1, 2)
    mask = keys.mask
    if mask is not None:
        mask = mask.expand(batch, blocks, *mask.shape[2:]).flatten(0, 1)
    out = masked_attention(q, keys.k.flatten(0, 1), keys.v.flatten(0, 1), mask, p)
    out = out.transpose(1, 2).reshape(batch, blocks * block, *out.shape[1::2])
    return out[:, :n].transpose(1, 2)


def gather_windows(
    k: Tensor, v: Tensor, key_mask: Tensor | None, rule: Rule, window: Window
) -> Keys:
    """Gathers the window of each block of queries.

    Args:
        k: Keys (B, H, N, D).
        v: Values (B, H, N, E).
        key_mask: Bool (B, N), True for real tokens; None: all real.
        rule: Which of the gathered pairs the pattern admits.
        window: What is gathered.
    """
    n, device = k.shape[2], k.device
    block, before, after = window
    blocks = -(-n // block)
    padding = (before, blocks * block - n + after)

    def gathered(x: Tensor) -> Tensor:
        x = F.pad(x.transpose(1, 2), (0, 0, 0, 0, *padding))
        return x.unfold(1, window.length, block).transpose(3, 4)

    queries = torch.arange(blocks * block, device=device).view(blocks, 1, block, 1)
    keys = torch.arange(window.length, device=device) + queries[:, :, :1] - before
    mask = ((keys >= 0) & (keys < n) & rule(queries, keys))[None]
    if key_mask is not None:
        real = F.pad(key_mask, padding, value=False).unfold(1, window.length, block)
        mask = mask & real[:, :, None, None]
    elif bool(mask.all()):
        mask = None
    return Keys(gathered(k), gathered(v), mask)


def with_shared(keys: Keys, k: Tensor, v: Tensor, mask: Tensor) -> Keys:
    """Adds keys that every block sees.

    Args:
        keys: What was gathered for each block.
        k: Keys (B, H, G, D).
        v: Values (B, H, G, E).
        mask: Bool, broadcastable to (B, blocks, 1, block, G).
    """
    blocks, length = keys.k.shape[1], keys.k.shape[3]

    def joined(own: Tensor, shared: Tensor) -> Tensor:
        return torch.cat([own, shared[:, None].expand(-1, blocks, -1, -1, -1)], 3)

    own = mask.new_ones(1, 1, 1, 1, length) if keys.mask is None else keys.mask
    sizes = torch.broadcast_shapes(own.shape[:-1], mask.shape[:-1])
    masks = [part.expand(*sizes, -1) for part in (own, mask)]
    return Keys(joined(keys.k, k), joined(keys.v, v), torch.cat(masks, -1))
