"""Seconds to open prepared data: of every task that is prepared, and of one as large as Path-X.

    python tests/benchmarks/opening.py [protocol=NAME] [data_dir=FOLDER] [cache_dir=FOLDER]

The large one, 160,000 / 20,000 / 20,000 examples of 16,384 tokens, takes 3.3 GB of temporary disk.
It is compared with reading the same files into memory.
"""

import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lra.compose import load
from lra.tasks import TASKS
from lra.tasks.base import SPLITS, Built, Split, Task

PIECE = 4_000
COUNTS = dict(zip(SPLITS, (160_000, 20_000, 20_000), strict=True))


class Large(Task):
    """As many tokens as Path-X."""

    @dataclass(frozen=True)
    class Config:
        """None."""

    name, version, num_classes, vocab_size, max_len = "large", 1, 2, 256, 16_384

    def build(self):
        tokens = np.random.default_rng(0).integers(0, 256, (PIECE, self.max_len), np.uint8)
        labels = np.arange(PIECE, dtype=np.uint8) % 2
        piece = Split.of_table(tokens, labels)
        return Built({name: [piece] * (n // PIECE) for name, n in COUNTS.items()}, "made up")


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main():
    for name in TASKS.names():
        task = load([f"task={name}", *sys.argv[1:]]).build_task()
        state, reason = task.state()
        if state == "found":
            print(f"{name}: {min(seconds(task.prepare) for _ in range(5)) * 1e3:.1f} ms")
        else:
            print(f"{name}: {state}: {reason}")
    folder = Path(tempfile.mkdtemp())
    try:
        task = Large(Large.Config(), data_dir=folder, cache_dir=folder)
        task.prepare()
        opened = min(seconds(task.prepare) for _ in range(5))
        files = [task.folder / f"{name}.arrow" for name in SPLITS]
        read = seconds(lambda: [path.read_bytes() for path in files])
        size = sum(path.stat().st_size for path in files) / 1e9
        print(f"{size:.1f} GB: opened in {opened * 1e3:.1f} ms, read in {read:.1f} s")
        print(f"ratio: {read / opened:.0f}")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
