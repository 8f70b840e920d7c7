"""Where the time of a training step goes, and how far it is from its floor; on an idle machine.

    python tests/benchmarks/step_parts.py [--rounds 7] [--only cosformer] [--task listops]

Steps of the `nystrom` models: real ListOps lengths, and Image with all positions filled. Parts are
the operators' own time by kind, as torch's profiler has it in one thread; what is left of a step is
Python and dispatch. The floor is the larger of the operations at the rate of a large matrix product
and of the bytes at the rate of a large copy, both measured in the same run (`lra.bench.floor` says
what is counted). Then real batches against the same batches padded to 2,000 positions, and
evaluation by the size of its batches.
"""

import argparse
import time
from functools import partial
from statistics import median
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.profiler import profile
from training_step import harness_step

from lra import batches
from lra.bench.cell import ceilings
from lra.bench.floor import classifier_floor
from lra.compose import load
from lra.tasks.base import Prepared, Split
from lra.workers import Workers

CPU = torch.device("cpu")
NAMES = ("softmax", "cosformer", "rfa", "nystrom")
PADDED = 2000
PARTS = {
    "products": ("mm", "addmm", "bmm", "baddbmm"),
    "fused attention": ("_scaled_dot_product", "_SoftmaxDropout"),
    "dropout's draws": ("ge", "bernoulli_", "mul_"),
    "norms": ("native_layer_norm",),
    "copies": ("copy_", "cat", "clone", "index", "fill_", "zero_", "constant_pad"),
    "embedding": ("embedding", "index_put"),
    "optimiser": ("_fused_adamw",),
}
"""Prefixes of operators' names; all others are elementwise operations and reductions."""


def image(examples=512, length=1024):
    """Examples that fill all positions with grey levels, none of them black."""
    random = np.random.default_rng(0)

    def split(n):
        tokens = random.integers(1, 257, n * length, dtype=np.uint16)
        labels = random.integers(0, 10, n, dtype=np.uint8)
        return Split.of(tokens, np.arange(n + 1) * length, labels)

    return Prepared({"train": split(examples), "val": split(8), "test": split(8)}, {})


def seconds(step, rounds):
    return by_turns([step], rounds)[0]


def by_turns(steps, rounds):
    """Returns the median seconds of each step, taken in turn, so that drift favours none."""
    taken = [[] for _ in steps]
    for _ in range(rounds):
        for step, times in zip(steps, taken, strict=True):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
    return list(map(median, taken))


def floor_of(trainer, element):
    """Returns operations and bytes of the trainer's first step."""
    train = trainer.config.train
    pieces = trainer.data["train"].training(0, train.batch_size, trainer.pieces, 0)
    lengths = np.concatenate([trainer.data["train"].lengths[p.indices.numpy()] for p in pieces])
    return classifier_floor(trainer.model, lengths.tolist(), True, element)


def parts_of(trainer):
    """Returns the parts of the processor's time that a step's operators take by kind.

    In one thread: the profiler sees no other, and computing side by side changes no operator.
    """
    threads, workers = torch.get_num_threads(), trainer.workers
    torch.set_num_threads(max(1, threads // workers.count))
    trainer.workers = Workers(1)
    trainer._step()
    start = time.perf_counter()
    with profile() as spent:
        trainer._step()
    whole = time.perf_counter() - start
    trainer.workers = workers
    torch.set_num_threads(threads)
    found = dict.fromkeys([*PARTS, "elementwise"], 0.0)
    for event in spent.key_averages():
        name = event.key.removeprefix("aten::")
        kind = next(
            (part for part, starts in PARTS.items() if name.startswith(starts)), "elementwise"
        )
        found[kind] += event.self_cpu_time_total / 1e6 / whole
    return found


def picture(title, trainer, rates, rounds, element):
    """Prints a step's time, its parts and its share of the floor."""
    # One batch, or the lengths differ from step to step.
    trainer.data["train"].training = with_step_zero(trainer.data["train"].training)
    trainer._step()
    whole = seconds(trainer._step, rounds)
    flops, moved = floor_of(trainer, element)
    by_product, by_copy = flops / rates["flops_per_second"], moved / rates["bytes_per_second"]
    bound = max(by_product, by_copy)
    parts = parts_of(trainer)
    known = ", ".join(f"{part} {100 * spent:.0f} %" for part, spent in parts.items() if spent)
    print(
        f"  {title:<20} {whole:7.3f} s; floor {bound:.3f} s ({100 * bound / whole:.0f} %: "
        f"{'products' if by_product > by_copy else 'copies'}); "
        f"{flops / whole / 1e9:.0f} GFLOP/s, {moved / whole / 1e9:.1f} GB/s\n      {known}"
    )


def with_step_zero(training):
    return lambda step, *rest: training(0, *rest)


def padded(trainer):
    """Makes a trainer's batches as wide as the task's longest."""
    gather = trainer.data["train"].gather

    def wide(indices):
        piece = gather(indices)
        more = (0, PADDED - piece.tokens.shape[1])
        mask = piece.key_mask
        mask = torch.ones_like(piece.tokens, dtype=torch.bool) if mask is None else mask
        return piece._replace(tokens=F.pad(piece.tokens, more), key_mask=F.pad(mask, more))

    trainer.data["train"].gather = wide
    return trainer


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default=",".join(NAMES))
    parser.add_argument("--task", choices=["listops", "image"], action="append")
    given = parser.parse_args()
    names, tasks = given.only.split(","), given.task or ["listops", "image"]
    element = {"fp32": 4, "bf16": 2}

    prepared = {"image": image()}
    if "listops" in tasks:
        prepared["listops"] = load(["task=listops", "protocol=nystrom"]).build_task().prepare()

    def trainer(task, name, *more):
        """Returns the trainer behind a benchmark's step."""
        chosen = (f"task={task}", f"attention={name}", *more)
        return harness_step(prepared[task], *chosen).__self__

    for precision in ("fp32", "bf16"):
        rates = ceilings(CPU, precision)
        print(
            f"\n{precision}, {torch.get_num_threads()} threads, torch {torch.__version__}: "
            f"product {rates['flops_per_second'] / 1e9:.0f} GFLOP/s, "
            f"copy {rates['bytes_per_second'] / 1e9:.1f} GB/s"
        )
        for task in tasks:
            print(f"{task}, protocol nystrom, a whole batch")
            for name in names:
                for dropout in (0.0, 0.1) if name in ("softmax", "nystrom") else (0.0,):
                    made = trainer(
                        task, name, f"precision={precision}", f"model.attention_dropout={dropout}"
                    )
                    title = f"{name}, dropout {dropout}" if dropout else name
                    picture(title, made, rates, given.rounds, element[precision])
        if "listops" in tasks:
            print(
                f"the same batches padded to {PADDED} positions, or to each micro-batch's longest"
            )
            for name in names:
                both = ["listops", name, f"precision={precision}"]
                whole = padded(trainer(*both, "micro_batches=1"))
                steps = [trainer(*both)._step, whole._step]
                by_turns(steps, 2 * given.rounds)  # of new widths, some products are compiled first
                taken = by_turns(steps, given.rounds)
                print(
                    f"  {name:<20} {taken[1]:.3f} s and {taken[0]:.3f} s: {taken[1] / taken[0]:.2f}"
                )
    print("evaluation of 256 examples by padded tokens of a batch, in multiples of the first, fp32")
    for task in tasks:
        for name in names:
            made = trainer(task, name)
            made.data["val"] = batches.Batches(prepared[task].splits["train"].take(0, 256), CPU)
            rates = {}
            for budget in (2**11, 2**12, 2**13, 2**14, 2**15, 2**16):
                with mock.patch.object(batches, "CPU_TOKENS", budget):
                    rates[budget] = seconds(partial(made._evaluate, made.model, "val", 0), 3)
            base = next(iter(rates.values()))
            told = ", ".join(f"{budget:,}: {base / taken:.2f}" for budget, taken in rates.items())
            print(f"  {task} {name:<12} {told}")


if __name__ == "__main__":
    main()
