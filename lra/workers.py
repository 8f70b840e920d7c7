"""Threads that compute micro-batches side by side on CPU.

The operators of a small model gain little from more threads (two take 0.7 of the time of one, not
half); whole micro-batches do. Each thread computes with an equal share of torch's threads.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Workers:
    """Threads that each compute with an equal share of torch's threads.

    Args:
        most: How many there are at most; never more than torch has threads.

    Attributes:
        count: How many there are; 1 for the thread that asks, with all of torch's threads.
        at_once: How many of them compute at the same time; what they compute does not depend on it.
    """

    def __init__(self, most: int) -> None:
        threads = torch.get_num_threads()
        share = math.ceil(threads / max(1, most))
        self.count = self.at_once = threads // share
        if self.count > 1:
            self._pool = ThreadPoolExecutor(self.count, "micro-batches", _compute_with, (share,))

    def map(self, work: Callable[..., T], *items: Iterable[Any]) -> Iterator[T]:
        """Yields the results of ``work`` in the order of the items.

        Items are taken as they are wanted, at most two for each thread ahead of the results. When
        this ends, by an error too, no thread computes any more.
        """
        if self.count == 1:
            yield from map(work, *items)
            return
        most = 1 if self.at_once == 1 else 2 * self.at_once
        ahead: deque[Future[T]] = deque()
        try:
            for arguments in zip(*items, strict=True):
                ahead.append(self._pool.submit(work, *arguments))
                if len(ahead) == most:
                    yield _first(ahead)
            while ahead:
                yield _first(ahead)
        finally:
            for future in ahead:
                future.cancel()
            wait(ahead)

    def reduce(self) -> bool:
        """Lets one thread compute at a time from now on; returns False if that is so already."""
        reduced, self.at_once = self.at_once > 1, 1
        return reduced


def _first(ahead: "deque[Future[T]]") -> T:
    result = ahead[0].result()  # still among them while it is waited for
    ahead.popleft()
    return result


def _compute_with(threads: int) -> None:
    torch.get_num_threads()  # first, or torch's first operator in this thread sets its default
    torch.set_num_threads(threads)
