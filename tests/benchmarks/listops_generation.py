"""Seconds from start to cached file for the standard ListOps set; run it on an idle machine.

    taskset -c 0 python tests/benchmarks/listops_generation.py

Compared with a careful plain Python generator of the same distribution, timed on fewer examples.
"""

import random
import tempfile
import time
from pathlib import Path

from lra.tasks import build_task
from lra.tasks._listops_generator import generate

STANDARD = {"min_length": 500, "max_length": 2000, "max_depth": 10, "max_args": 10}
PLAIN_EXAMPLES = 2000


class TooLong(Exception):
    pass


def plain(count):
    """Draws trees recursively and gives up on one as soon as it is too long."""
    found = set()
    while len(found) < count:
        tokens = []

        def grow(depth, tokens=tokens):
            if depth < STANDARD["max_depth"] and random.random() <= 0.25:
                tokens.append(random.randrange(11, 15))
                for _ in range(random.randint(2, STANDARD["max_args"])):
                    grow(depth + 1)
                tokens.append(15)
            else:
                tokens.append(random.randrange(1, 11))
            if len(tokens) >= STANDARD["max_length"]:
                raise TooLong

        try:
            grow(1)
        except TooLong:
            continue
        if len(tokens) > STANDARD["min_length"]:
            found.add(bytes(tokens))


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main():
    with tempfile.TemporaryDirectory() as folder:
        task = build_task("listops", {}, data_dir=Path(folder), cache_dir=Path(folder))
        cached = seconds(task.prepare)
        opened = seconds(task.prepare)
    ours = seconds(lambda: generate(20_000, **STANDARD, seed=1)) / 20_000
    theirs = seconds(lambda: plain(PLAIN_EXAMPLES)) / PLAIN_EXAMPLES
    print(f"100,000 examples, start to cached file: {cached:.1f} s; opened again: {opened:.3f} s")
    print(f"generation alone: {1 / ours:,.0f} examples/s, plain Python {1 / theirs:,.0f}")
    print(f"ratio: {theirs / ours:.1f}")


if __name__ == "__main__":
    main()
