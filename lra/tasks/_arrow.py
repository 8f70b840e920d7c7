"""A split: token sequences with labels, and the Arrow file that keeps them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Split:
    """Token sequences with labels; an example has one sequence, or two in a dual task.

    Attributes:
        tokens: The memory in which all sequences lie, (any,) unsigned; there may be other bytes
            between them.
        starts: Where in ``tokens`` each sequence begins, int64 of shape (examples,), or
            (examples, 2) in a dual task.
        lengths: The number of tokens of each, int64 of the same shape.
        labels: Class of each example, (examples,) uint8.
    """

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray

    @classmethod
    def of(cls, tokens: np.ndarray, offsets: np.ndarray, labels: np.ndarray) -> "Split":
        """Returns the split whose sequences lie one after the other.

        Args:
            tokens: All sequences; in a dual task the second of an example follows the first.
            offsets: Sequence i is ``tokens[offsets[i]:offsets[i + 1]]``, (sequences + 1,) int64.
            labels: Class of each example, (examples,) uint8.
        """
        shape = (len(labels),) if len(offsets) - 1 == len(labels) else (len(labels), 2)
        return cls(tokens, offsets[:-1].reshape(shape), np.diff(offsets).reshape(shape), labels)

    @classmethod
    def of_table(cls, tokens: np.ndarray, labels: np.ndarray) -> "Split":
        """Returns the split of sequences of one length, the rows of ``tokens``."""
        count, width = tokens.shape
        return cls.of(tokens.reshape(-1), np.arange(count + 1, dtype=np.int64) * width, labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | tuple[int, int]) -> np.ndarray:
        """Returns the sequence of example ``index``, or sequence j of example i for ``(i, j)``."""
        start = self.starts[index]
        return self.tokens[start : start + self.lengths[index]]

    def take(self, first: int, last: int) -> "Split":
        """Returns examples ``first`` up to but not including ``last``."""
        chosen = slice(first, last)
        return Split(self.tokens, self.starts[chosen], self.lengths[chosen], self.labels[chosen])


def record_batch(piece: Split) -> Any:
    """Returns a piece as a record batch: a list of tokens an example, or two lists, and a label."""
    import pyarrow as pa

    lengths, starts = piece.lengths.reshape(-1), piece.starts.reshape(-1)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    first = starts[0] if len(starts) else 0
    values = piece.tokens[first : first + offsets[-1]]
    if not np.array_equal(starts, first + offsets[:-1]):
        sequences = (piece.tokens[s : s + n] for s, n in zip(starts, lengths, strict=True))
        values = np.concatenate([piece.tokens[:0], *sequences])
    tokens = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values))
    if piece.lengths.ndim == 2:
        tokens = pa.FixedSizeListArray.from_arrays(tokens, 2)
    return pa.record_batch({"tokens": tokens, "label": pa.array(piece.labels)})


def read_split(path: Path) -> Split:
    """Opens a split; the tokens are the whole mapped file, with each sequence at its place in it.

    So a file of several record batches, whose tokens do not adjoin, is opened without a copy.
    """
    import pyarrow as pa

    mapped = pa.memory_map(str(path))
    whole = mapped.read_buffer()
    mapped.seek(0)
    starts, lengths, labels = [], [], []
    # By DLPack: pyarrow's to_numpy imports pandas, for longer than the rest takes.
    for batch in pa.ipc.open_stream(mapped):
        column = batch.column("tokens")
        lists = column.values if pa.types.is_fixed_size_list(column.type) else column
        offsets = np.from_dlpack(lists.offsets)
        shape = (len(batch),) if lists is column else (len(batch), 2)
        values = np.from_dlpack(lists.values)
        place = (values.ctypes.data - whole.address) // values.itemsize if len(values) else 0
        starts.append((place + offsets[:-1]).reshape(shape))
        lengths.append(np.diff(offsets).reshape(shape))
        labels.append(np.from_dlpack(batch.column("label")))
    tokens = np.frombuffer(whole, values.dtype, count=whole.size // values.itemsize)
    return Split(tokens, *map(np.concatenate, (starts, lengths, labels)))
