"""The generator of ListOps expressions: random trees, drawn and evaluated a block at a time.

Nine of ten standard attempts fail for their length, which depends on the operators alone. So the
operators of a whole block of trees are grown first, level by level (`_grow`); only the trees that
are kept are laid out (`_place`), written (`_make_block`) and evaluated (`_root_values`).
"""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from functools import partial
from itertools import count, islice, pairwise
from multiprocessing import get_context, parent_process
from typing import NamedTuple

import numpy as np

from lra.tasks._listops import CLOSE, MIN, NINE, SM, VOCAB, ZERO

_BLOCK_ATTEMPTS = 8192  # measured: 4096 to 16384 are equally fast
_BLOCK_TOKENS = 2**24  # attempts times max_length at most, which bounds the memory
_PATIENCE = 2**20  # this many attempts must find 1/1000 of what is wanted

# One integer holds all that matters of an operator's arguments: the sum of their weights. It is a
# histogram, ten fields of five bits that count the arguments of each value, and above it their sum.
_SUM_SHIFT = 50
_ONES = np.uint64(sum(1 << 5 * digit for digit in range(10)))  # 1 in every field
_WEIGHTS = np.zeros(len(VOCAB), dtype=np.uint64)  # by token id; only digits weigh anything
_WEIGHTS[ZERO : NINE + 1] = [(1 << 5 * digit) + (digit << _SUM_SHIFT) for digit in range(10)]


class _Settings(NamedTuple):
    min_length: int
    max_length: int
    max_depth: int
    max_args: int
    seed: int

    @property
    def attempts_per_block(self) -> int:
        return max(1, min(_BLOCK_ATTEMPTS, _BLOCK_TOKENS // self.max_length))


class _Level(NamedTuple):
    """The n operators at one depth of a block of trees, from left to right."""

    arity: np.ndarray  # (n,) number of arguments
    nested: np.ndarray  # (n,) bit i is set if argument i is an operator, one of the next level

    @property
    def children(self) -> np.ndarray:
        return np.bitwise_count(self.nested).astype(np.int64)


def generate(
    num_examples: int,
    *,
    min_length: int,
    max_length: int,
    max_depth: int,
    max_args: int,
    seed: int,
    processes: int = 1,
    progress: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw distinct random expressions and evaluate them.

    A node above ``max_depth`` (the root is at depth 1) is an operator with probability 1/4, which
    is part of the task, else a uniform digit. The operator is uniform over the four and has 2 to
    ``max_args`` arguments, uniformly. Trees of unsuitable length and repetitions are drawn again.
    The standard task has lengths 500 and 2000, ``max_depth`` 10 and ``max_args`` 10.

    Args:
        num_examples: How many expressions to return.
        min_length: Every expression has more tokens than this.
        max_length: Every expression has fewer tokens than this.
        max_depth: Nodes at this depth are digits, so operators nest ``max_depth - 1`` deep at most.
        max_args: Largest number of arguments, 2 to 10.
        seed: The result is a function of this and the arguments above (and, as numpy promises no
            more, of its version).
        processes: How many processes share the work. Above 1, fresh interpreters are started, so a
            script needs the usual ``if __name__ == "__main__":``.
        progress: Called now and then with the number of expressions found since the last call.

    Returns:
        The tokens of all expressions, uint8, one after the other; their offsets, int64 of shape
        (num_examples + 1,), expression i being ``tokens[offsets[i] : offsets[i + 1]]``; their
        values, uint8 of shape (num_examples,).

    Raises:
        ValueError: Arguments are out of range (all are named), or the distinct expressions that
            the limits allow are too few or too rare.
    """
    rules = {
        f"num_examples={num_examples}: must be at least 1": num_examples >= 1,
        f"min_length={min_length}: must be at least 0": min_length >= 0,
        f"max_length={max_length}: must exceed min_length={min_length} by 2 or more, as neither "
        "itself is allowed": max_length >= min_length + 2,
        f"max_depth={max_depth}: must be at least 2": max_depth >= 2,
        f"max_args={max_args}: must be 2 to 10": 2 <= max_args <= 10,
        f"seed={seed}: must be at least 0": seed >= 0,
        f"processes={processes}: must be at least 1": processes >= 1,
    }
    if problems := [rule for rule, holds in rules.items() if not holds]:
        raise ValueError("cannot generate ListOps expressions: " + "; ".join(problems))

    settings = _Settings(min_length, max_length, max_depth, max_args, seed)
    labels: dict[bytes, int] = {}  # by expression, in the order found
    found = attempts = found_then = attempts_then = 0
    with closing(_blocks(settings, processes)) as blocks:
        while found < num_examples:
            if attempts - attempts_then >= _PATIENCE:
                if 1000 * (found - found_then) < num_examples:
                    raise ValueError(
                        f"asked for {num_examples} distinct ListOps expressions with "
                        f"min_length={min_length}, max_length={max_length}, max_depth={max_depth}, "
                        f"max_args={max_args}, but found {found} in {attempts} attempts, "
                        f"{found - found_then} of them in the last {attempts - attempts_then}: "
                        "ask for fewer or widen the limits"
                    )
                found_then, attempts_then = found, attempts
            labels.update(next(blocks))
            attempts += settings.attempts_per_block
            found_before, found = found, min(len(labels), num_examples)
            if progress is not None and found > found_before:
                progress(found - found_before)

    tokens = np.frombuffer(bytearray().join(islice(labels, num_examples)), dtype=np.uint8)
    lengths = np.fromiter(map(len, labels), dtype=np.int64, count=num_examples)
    values = np.fromiter(labels.values(), dtype=np.uint8, count=num_examples)
    return tokens, _running_sum(lengths), values


def _blocks(settings: _Settings, processes: int) -> Iterator[dict[bytes, int]]:
    """Yield blocks 0, 1, 2, ... without end, made here or by worker processes."""
    make_block = partial(_make_block, settings)
    if processes == 1:
        yield from map(make_block, count())
        return
    pool = ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=_leave_with_parent
    )
    try:
        pending = deque(pool.submit(make_block, number) for number in range(2 * processes))
        for number in count(2 * processes):
            yield pending.popleft().result()
            pending.append(pool.submit(make_block, number))
    finally:
        pool.shutdown(cancel_futures=True)


def _leave_with_parent() -> None:
    """Make a worker end when its parent does, however that ends, and not before."""
    # Ctrl-C reaches workers too; they leave it to the parent, which then stops them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _make_block(settings: _Settings, number: int) -> dict[bytes, int]:
    """Make one block of attempts from random numbers of its own; return expressions and values."""
    seeds = np.random.SeedSequence(settings.seed, spawn_key=(number,))
    rng = np.random.Generator(np.random.SFC64(seeds))
    levels, lengths, has_operator = _grow(rng, settings)

    offsets = _running_sum(lengths)
    firsts = offsets[:-1]
    starts, sizes = _place(levels, firsts[has_operator])
    tokens = rng.integers(ZERO, NINE, offsets[-1], dtype=np.uint8, endpoint=True)
    for start, size in zip(starts, sizes, strict=True):
        tokens[start] = rng.integers(MIN, SM, start.size, dtype=np.uint8, endpoint=True)
        tokens[start + size - 1] = CLOSE

    values = tokens[firsts] - ZERO  # right for trees of a single digit
    values[has_operator] = _root_values(tokens, levels, starts, sizes)
    text = tokens.tobytes()
    expressions = (text[start:end] for start, end in pairwise(offsets.tolist()))
    return dict(zip(expressions, values.tolist(), strict=True))


def _grow(
    rng: np.random.Generator, settings: _Settings
) -> tuple[list[_Level], np.ndarray, np.ndarray]:
    """Draw the operators of a block of trees and drop the trees of unsuitable length.

    Returns:
        The levels of the remaining trees, root first; the trees' lengths; whether each has an
        operator at all.
    """
    attempts = settings.attempts_per_block
    has_operator = rng.integers(4, size=attempts) == 0
    # The least that a tree can still become: an operator whose arguments are not drawn yet counts
    # as the shortest one, [OP d d ], which is three tokens more than a digit in its place.
    length = 1 + 3 * has_operator.astype(np.int64)
    tree = np.flatnonzero(has_operator)  # to which tree each operator of the level belongs
    grown = []
    for depth in range(1, settings.max_depth):
        arity = rng.integers(2, settings.max_args, tree.size, dtype=np.uint8, endpoint=True)
        # Two fair bits are both set with probability 1/4, exactly.
        first, second = rng.integers(2**16, size=(2, tree.size), dtype=np.uint16)
        may_nest = (1 << arity.astype(np.uint16)) - 1 if depth + 1 < settings.max_depth else 0
        nested = first & second & may_nest
        grown.append((tree, arity, nested))

        children = np.bitwise_count(nested)
        length += np.bincount(tree, arity - 2 + 3 * children, attempts).astype(np.int64)
        # Trees that are already too long grow no further.
        tree = np.repeat(tree, children * (length[tree] < settings.max_length))
        if not tree.size:
            break

    kept = (settings.min_length < length) & (length < settings.max_length)
    levels = [_Level(arity[kept[tree]], nested[kept[tree]]) for tree, arity, nested in grown]
    return levels, length[kept], has_operator[kept]


def _place(
    levels: list[_Level], root_starts: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return, by level, the index of each operator's token and the number of tokens up to its ]."""
    sizes = [np.zeros(0, dtype=np.int64)]  # the level below the last
    for level in reversed(levels):
        sizes.insert(0, 2 + level.arity + _sum_over_children(sizes[0] - 1, level))

    starts = [root_starts]
    for level, child_sizes in zip(levels, sizes[1:], strict=True):
        children = level.children
        bits = np.unpackbits(level.nested.astype("<u2").view(np.uint8), bitorder="little")
        argument = np.flatnonzero(bits) % 16  # of each child: which argument of its parent it is
        shift = _running_sum(child_sizes - 1)  # an operator pushes what follows it to the right
        base = starts[-1] + 1 - shift[np.cumsum(children) - children]
        starts.append(np.repeat(base, children) + argument + shift[:-1])
    return starts[:-1], sizes[:-1]


def _root_values(
    tokens: np.ndarray, levels: list[_Level], starts: list[np.ndarray], sizes: list[np.ndarray]
) -> np.ndarray:
    """Evaluate all operators, the deepest first, and return the values of those at the roots.

    An operator's arguments weigh what its whole sub-tree weighs, once its children's sub-trees are
    replaced by digits. Weights of large sub-trees overflow, which does no harm: the arithmetic is
    modulo 2**64 and the weight of the arguments alone is small.
    """
    weight_before = _running_sum(_WEIGHTS[tokens])
    values = np.zeros(0, dtype=np.uint8)
    weights = np.zeros(0, dtype=np.uint64)
    for level, start, size in zip(reversed(levels), reversed(starts), reversed(sizes), strict=True):
        replacing = _sum_over_children(_WEIGHTS[values + ZERO] - weights, level)
        weights = weight_before[start + size] - weight_before[start]
        values = _apply(tokens[start], level.arity, weights + replacing)
    return values


def _apply(operators: np.ndarray, arity: np.ndarray, arguments: np.ndarray) -> np.ndarray:
    """Apply operators to arguments given as sums of weights; all of shape (n,)."""
    at_most = arguments * _ONES  # in the field of each digit: how many arguments are at most that

    def ranked(rank: np.ndarray) -> np.ndarray:
        # The rank-th smallest argument (from 0) is the first digit whose field exceeds rank. Adding
        # 15 - rank sets the top bit of just these fields, that digit's and those of larger ones.
        return 10 - np.bitwise_count((at_most + (15 - rank) * _ONES) & (16 * _ONES))

    which = operators - MIN
    first, last = np.zeros_like(arity), arity - 1
    low = ranked(np.choose(which, (first, last, last // 2, first)))
    high = ranked(np.choose(which, (first, last, arity // 2, first)))
    total = (arguments >> _SUM_SHIFT).astype(np.uint8)
    return np.where(operators == SM, total % 10, (low + high) // 2)


def _running_sum(x: np.ndarray) -> np.ndarray:
    """Return the sums of the first 0, 1, ..., n elements, shape (n + 1,)."""
    sums = np.zeros(x.size + 1, dtype=x.dtype)
    np.cumsum(x, out=sums[1:])
    return sums


def _sum_over_children(x: np.ndarray, parents: _Level) -> np.ndarray:
    """Add up x, which belongs to the operators of the next level, for each of their parents."""
    sums = _running_sum(x)
    end = np.cumsum(parents.children)
    return sums[end] - sums[end - parents.children]
