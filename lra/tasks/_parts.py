"""Finished parts of a long computation on disk, from which an interrupted one goes on."""

import hashlib
import io
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np

from lra.files import write_atomically

Arrays = dict[str, np.ndarray]

_DIGEST = hashlib.sha256().digest_size
_SIZE = 8  # bytes of the number of bytes before compression
_CODEC = "zstd"  # a third to a tenth of the bytes; numpy's own zip takes 15 times as long


class Parts:
    """Ranges of examples, each computed once and kept in a file of its own until all are there.

    A file begins with a hash of what it is and of what it holds, so that a damaged part, or one
    of other data, is never taken for the part.

    Args:
        folder: Where the files are.
        identity: What determines the data, beside the range.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self._folder = folder
        self._identity = identity

    def has(self, part: range) -> bool:
        """Whether a part is there and sound."""
        return self._payload(part) is not None

    def read(self, part: range) -> Arrays:
        """Returns the arrays of a part by name.

        Raises:
            ValueError: If it is not there or not sound.
        """
        import pyarrow as pa

        payload = self._payload(part)
        if payload is None:
            raise ValueError(f"{self._path(part)} was lost or damaged just now. Run this again.")
        size, compressed = int.from_bytes(payload[:_SIZE]), payload[_SIZE:]
        content = pa.decompress(compressed, size, codec=_CODEC, asbytes=True)
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return dict(arrays)

    def write(self, part: range, arrays: Arrays) -> None:
        """Keeps the arrays of a part, atomically.

        Raises:
            OSError: If the disk is full or the folder is not writable.
        """
        import pyarrow as pa

        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        content = buffer.getvalue()
        payload = len(content).to_bytes(_SIZE) + pa.compress(content, codec=_CODEC, asbytes=True)
        content = self._digest(part, payload) + payload
        write_atomically(self._path(part), lambda file: file.write(content))

    def _path(self, part: range) -> Path:
        return self._folder / f"{part.start}-{part.stop}.part"

    def _payload(self, part: range) -> bytes | None:
        """Returns what a part's file holds after the hash, if it is there and sound."""
        try:
            content = self._path(part).read_bytes()
        except FileNotFoundError:
            return None
        digest, payload = content[:_DIGEST], content[_DIGEST:]
        return payload if digest == self._digest(part, payload) else None

    def _digest(self, part: range, payload: bytes) -> bytes:
        about = f"{self._identity} {part.start} {part.stop}\n".encode()
        return hashlib.sha256(about + payload).digest()


def cut(whole: range, size: int) -> list[range]:
    """Returns ``whole`` in consecutive ranges of ``size``; the last may be shorter."""
    return [whole[first : first + size] for first in range(0, len(whole), size)]


def in_threads(
    parts: Iterable[range],
    step: int,
    compute: Callable[[range], Arrays],
    finish: Callable[[range, Arrays], object],
    progress: Callable[[int], object],
) -> None:
    """Computes parts in as many threads as there are cores; numba's code lets them run at once.

    If anything is raised, in a thread or here (Ctrl-C), the others end after the step that they
    are in, and what they had of their parts is lost.

    Args:
        parts: The ranges to compute.
        step: A part is computed in steps of this many examples, of a fraction of a second.
        compute: Returns arrays of one row an example for the range of a step.
        finish: Called in the thread with a part and its arrays, once it is whole.
        progress: Called, never twice at once, with the number of examples after each step.
    """
    stopped, one_at_a_time = threading.Event(), threading.Lock()

    def run(part: range) -> None:
        try:
            steps = []
            for piece in cut(part, step):
                if stopped.is_set():
                    return
                steps.append(compute(piece))
                with one_at_a_time:
                    progress(len(piece))
            finish(part, {name: np.concatenate([s[name] for s in steps]) for name in steps[0]})
        except BaseException:
            stopped.set()
            raise

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for future in as_completed([pool.submit(run, part) for part in parts]):
                future.result()
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
