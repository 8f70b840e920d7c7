"""Pairs of texts as bytes, cut to a length: which are refused, and splits of them in pieces."""

from collections.abc import Iterable, Iterator

import numpy as np

from lra.tasks.base import Split

VOCAB_SIZE = 257
"""An id is a byte + 1; 0 is padding."""

PIECE_BYTES = 32 << 20
"""What a piece of a split holds before the next begins: the writer keeps two at a time."""

_LAST_BYTE = 0xF4  # of UTF-8, so that byte + 1 fits a byte


def check_text(text: bytes) -> None:
    """Refuses a text that is empty or holds a byte that UTF-8 has not.

    Raises:
        ValueError: The reason, without the place.
    """
    if not text:
        raise ValueError("a document without text")
    values = np.frombuffer(text, dtype=np.uint8)
    if values.max() > _LAST_BYTE:
        place = int(np.argmax(values > _LAST_BYTE))
        raise ValueError(
            f"a document has the byte 0x{text[place]:02x} at its byte {place}: it is not UTF-8"
        )


def pieces(pairs: Iterable[tuple[bytes, bytes, int]]) -> Iterator[Split]:
    """Yields pairs as parts of a dual split, each made when it is asked for.

    Args:
        pairs: Two checked texts and the class of each example.

    Yields:
        Splits of ids, uint8, of about ``PIECE_BYTES``.
    """
    tokens, lengths, labels = bytearray(), [0], bytearray()
    for first, second, label in pairs:
        tokens += first
        tokens += second
        lengths += len(first), len(second)
        labels.append(label)
        if len(tokens) >= PIECE_BYTES:
            yield _split(tokens, lengths, labels)
            tokens, lengths, labels = bytearray(), [0], bytearray()
    if labels:
        yield _split(tokens, lengths, labels)


def _split(texts: bytearray, lengths: list[int], labels: bytearray) -> Split:
    tokens = np.frombuffer(texts, dtype=np.uint8)
    tokens += 1  # in place: the memory is not used again
    offsets = np.cumsum(lengths, dtype=np.int64)
    return Split.of(tokens, offsets, np.frombuffer(labels, dtype=np.uint8))
