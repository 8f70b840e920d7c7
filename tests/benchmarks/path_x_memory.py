"""Time and peak memory of a Path-X training step, with and without activation checkpointing.

    python tests/benchmarks/path_x_memory.py [--only softmax,cosformer]

The `nystrom` model with 8 examples of 16,384 positions, all filled, without attention dropout: one
in a micro-batch, as many side by side as `lra train` has it, and all at once. Each is measured in a
process of its own, as the peak of its resident set above what it held before the model.
"""

import argparse
import multiprocessing
import time

import numpy as np
import torch
from training_step import harness_step

from lra.tasks.base import Prepared, Split

LENGTH, BATCH = 128 * 128, 8


def examples(count):
    random = np.random.default_rng(0)
    tokens = random.integers(1, 257, count * LENGTH, dtype=np.uint16)
    labels = random.integers(0, 2, count, dtype=np.uint8)
    split = Split.of(tokens, np.arange(count + 1) * LENGTH, labels)
    return Prepared({"train": split, "val": split.take(0, 1), "test": split.take(0, 1)}, {})


def measured(overrides):
    """Returns seconds and peak bytes of a step, and how many micro-batches were side by side."""
    fixed = ("task=pathx", "model.attention_dropout=0", f"train.batch_size={BATCH}")
    step = harness_step(examples(BATCH), *fixed, *overrides)
    trainer = step.__self__
    taken = []
    for _ in range(2):
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    return taken[-1], trainer.memory.read(), trainer.workers.count


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="softmax,cosformer")
    names = parser.parse_args().only.split(",")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for name in names:
            for pieces in (BATCH, 1):
                for checkpointing in ("false", "true"):
                    chosen = [f"attention={name}", f"micro_batches={pieces}"]
                    chosen += [f"activation_checkpointing={checkpointing}"]
                    seconds, peak, beside = pool.apply(measured, (chosen,))
                    print(
                        f"  {name:<10} {beside * BATCH // pieces} at once, checkpointing "
                        f"{checkpointing:<5} {seconds:7.1f} s  {peak / 1e9:6.2f} GB",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
