"""Splits as batches on the device: their order, their pieces and their padding.

A batch is a function of (seed, step) alone, so that a resumed run sees what the uninterrupted run
would have seen. It is sorted by length and run as a few micro-batches, each padded only to its own
longest sequence; together they are exactly the batch. Of several processes each has a share of it.
"""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lra.tasks.base import Split

CPU_TOKENS = 2**13
"""Padded tokens of a training micro-batch on CPU, at most.

Measured with the `nystrom` models: activations of that size stay in cache.
"""

CPU_PIECES = 4
"""Micro-batches on CPU, at least, where lengths differ: more save less padding than they cost."""

WIDTH_MULTIPLE = 64
"""Padded lengths are multiples of this in bf16 on CPU, up to the longest of the split.

A matrix product of a new shape is compiled there, which takes longer than to compute it.
"""

CPU_TOKENS_AT_ONCE = 2**15
"""Padded tokens of the micro-batches that are computed side by side on CPU, at most."""

GPU_EVALUATION_TOKENS = 2**16
"""Padded tokens of an evaluation batch on a GPU; on CPU it is a micro-batch's."""


class MicroBatch(NamedTuple):
    """Examples of similar length; those of a dual task have two sequences each.

    Attributes:
        tokens: Token ids (B, N) or (B, 2, N) int32, 0 where padded.
        key_mask: Bool of the same shape, True for real tokens; None if there is no padding.
        labels: Classes (B,) int64.
        indices: Positions of the examples in their split (B,) int64.
        num_tokens: Real tokens.
    """

    tokens: Tensor
    key_mask: Tensor | None
    labels: Tensor
    indices: Tensor
    num_tokens: int


class Batches:
    """A split on the device.

    Args:
        split: The examples.
        device: Where they go, once.
        share: (i, n): of a batch, or of the split in evaluation, every n-th example from the i-th
            on, in order of length, so that all shares cost the same.
        precision: What the model computes in, fp32 or bf16.

    Attributes:
        evaluation_tokens: Padded tokens of an evaluation batch; None for as many as the device is
            given unless its memory runs out.
    """

    evaluation_tokens: int | None = None

    def __init__(
        self,
        split: Split,
        device: torch.device,
        share: tuple[int, int] = (0, 1),
        precision: str = "fp32",
    ) -> None:
        self._share = slice(share[0], None, share[1])
        self.lengths = split.lengths
        self._sequences = 1 if split.lengths.ndim == 1 else split.lengths.shape[1]
        longest = split.lengths if split.lengths.ndim == 1 else split.lengths.max(1)
        if (device.type, precision) == ("cpu", "bf16"):
            rounded = -(-longest // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
            longest = np.minimum(rounded, longest.max(initial=0))
        # Padded tokens that an example asks for: its longest sequence, as often as it has some.
        self.widths = self._sequences * longest
        self._starts = split.starts
        # Copied: the memory map is read-only, and the copy is what the device holds anyway.
        self._tokens = torch.from_numpy(np.array(split.tokens)).to(device)
        self.labels = torch.from_numpy(np.array(split.labels)).long().to(device)
        self._device = device
        self._epoch: tuple[int, int] | None = None
        self._order = np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def gather(self, indices: np.ndarray) -> MicroBatch:
        """Returns the examples ``indices`` as one micro-batch."""
        lengths = self.lengths[indices]
        width = int(self.widths[indices].max()) // self._sequences
        starts = torch.from_numpy(self._starts[indices]).to(self._device)[..., None]
        positions = torch.arange(width, device=self._device)
        if int(lengths.min()) == width:
            key_mask, at = None, starts + positions
        else:
            key_mask = positions < torch.from_numpy(lengths).to(self._device)[..., None]
            at = torch.where(key_mask, starts + positions, 0)
        tokens = self._tokens[at].int()
        if key_mask is not None:
            tokens = tokens.masked_fill_(~key_mask, 0)
        chosen = torch.from_numpy(indices).to(self._device)
        return MicroBatch(tokens, key_mask, self.labels[chosen], chosen, int(lengths.sum()))

    def batch(self, step: int, batch_size: int, seed: int) -> np.ndarray:
        """Returns the examples of optimiser step ``step`` (from 0), those of most tokens first.

        Every epoch is a new permutation; its last, incomplete batch is left out.
        """
        batch_size = min(batch_size, len(self))
        epoch, batch = divmod(step, len(self) // batch_size)
        if self._epoch != (seed, epoch):
            self._order = np.random.default_rng((seed, epoch)).permutation(len(self))
            self._epoch = (seed, epoch)
        chosen = self._order[batch * batch_size : (batch + 1) * batch_size]
        return chosen[np.argsort(-self.widths[chosen], kind="stable")]

    def training(self, step: int, batch_size: int, pieces: int, seed: int) -> list[MicroBatch]:
        """Returns the micro-batches of the share of optimiser step ``step`` (from 0)."""
        chosen = self.batch(step, batch_size, seed)[self._share]
        if not len(chosen):
            return []
        return [self.gather(piece) for piece in np.array_split(chosen, min(pieces, len(chosen)))]

    def evaluation(self) -> Iterator[MicroBatch]:
        """Yields every example of the share once, in batches of similar length and similar cost."""
        budget = self.evaluation_tokens or evaluation_tokens(self._device)
        order = np.argsort(-self.widths, kind="stable")[self._share]
        while len(order):
            count = max(1, budget // max(1, int(self.widths[order[0]])))
            yield self.gather(order[:count])
            order = order[count:]

    def trained_at_once(self, batch_size: int, pieces: int) -> int:
        """Returns how many of a batch's micro-batches are computed side by side, at most."""
        return min(pieces, self._at_once(math.ceil(batch_size / pieces) * self._widest))

    def evaluated_at_once(self) -> int:
        """Returns how many evaluation batches are computed side by side, at most."""
        return self._at_once(max(evaluation_tokens(self._device), self._widest))

    def _at_once(self, tokens: int) -> int:
        return max(1, CPU_TOKENS_AT_ONCE // tokens) if self._device.type == "cpu" else 1

    @property
    def _widest(self) -> int:
        return int(self.widths.max(initial=1))

    def shrink(self) -> bool:
        """Halves the tokens of an evaluation batch; returns False if the largest is one example."""
        budget = self.evaluation_tokens or evaluation_tokens(self._device)
        if budget <= self._widest:
            return False
        self.evaluation_tokens = budget // 2
        return True


def evaluation_tokens(device: torch.device) -> int:
    """Returns the padded tokens of an evaluation batch on ``device``, at most."""
    return CPU_TOKENS if device.type == "cpu" else GPU_EVALUATION_TOKENS


def resolve_micro_batches(
    setting: int | Literal["auto"], batch_size: int, widths: np.ndarray, device: torch.device
) -> int:
    """Returns the number of micro-batches of a batch for ``micro_batches=``.

    Args:
        setting: The number, or ``auto``.
        batch_size: Examples of a batch.
        widths: Padded tokens that every training example asks for.
        device: Where they are computed.
    """
    if setting != "auto":
        return min(setting, batch_size)
    if device.type != "cpu":
        return 1
    pieces = math.ceil(batch_size * int(widths.max(initial=1)) / CPU_TOKENS)
    if widths.size and widths.min() < widths.max():
        pieces = max(pieces, CPU_PIECES)
    return min(batch_size, pieces)
