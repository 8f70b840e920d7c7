"""Many processes on one store and on one run folder: nothing is lost, nothing written twice.

    python tests/writers.py [--processes 8]

Every process is forked from this one, which imports everything once and computes nothing. First all
finish a run of their own at the same moment, while another process reads the store again and
again. Then all begin the same run at the same moment.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a process with threads is not to be forked

import numpy as np
import torch._dynamo  # noqa: F401  (every optimiser imports it, for longer than the run takes)
from kills import Failure, start, wait

from lra import record
from lra.compose import load
from lra.files import Busy
from lra.run import run, run_folder
from lra.status import state_of
from lra.train import Trainer
from models.attention import ATTENTIONS

SETTINGS = ["protocol=smoke", "train.steps=6", "train.eval_every=2", "train.warmup_steps=2"]
SETTINGS += ["tracker=none", "device=cpu", "micro_batches=1", "checkpoint_seconds=0"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=8)
    given = parser.parse_args()
    ATTENTIONS.get("softmax")  # imports it
    scratch = Path(tempfile.mkdtemp(prefix="writers-"))
    settings = [*SETTINGS, f"cache_dir={scratch / 'cache'}", f"runs_dir={scratch / 'runs'}"]
    try:
        wait(*start(lambda: load(settings).build_task().prepare(), scratch))
        one_store(settings, given.processes, scratch)
        one_folder(settings, given.processes, scratch)
    except Failure as failure:
        print(f"{failure}\nThe folders are left in {scratch}.", file=sys.stderr)
        return 1
    shutil.rmtree(scratch)
    return 0


def all_at_once(work, count, scratch):
    """Runs ``work(i)`` in so many processes and waits for all."""
    folders = [scratch / f"log-{i}" for i in range(count)]
    started = []
    for i, folder in enumerate(folders):
        folder.mkdir(exist_ok=True)
        started.append(start(lambda i=i: work(i), folder))
    for process in started:
        if wait(*process):
            raise Failure("a process was killed")


def one_store(settings, count, scratch):
    """All finish at once; whatever is read meanwhile and afterwards is whole."""
    barrier = multiprocessing.Barrier(count)
    over = multiprocessing.Event()
    folders = [run_folder(load([*settings, f"seed={i}"])) for i in range(count)]

    def finish(i):
        test = Trainer.test

        def at_once(trainer):
            test(trainer)
            barrier.wait(60)

        Trainer.test = at_once
        done = run(load([*settings, f"seed={i}"]))
        if done.status != "ok":
            raise Failure(f"seed {i} ended as {done.status}: {done.reason}")

    def read():
        reads = 0
        while not over.is_set() or not reads:
            for folder in folders:
                record.load(folder)  # fails on one that is half written
                if state_of(folder).status == "damaged":
                    raise Failure(state_of(folder).note)
            reads += 1

    (scratch / "reader").mkdir()
    reader = start(read, scratch / "reader")
    try:
        all_at_once(finish, count, scratch)
    finally:
        over.set()
        wait(*reader)
    for i, folder in enumerate(folders):
        done = record.load(folder)
        predictions, labels = np.load(folder / "test_predictions.npy")
        if done.seed != i or done.test.accuracy != (predictions == labels).mean():
            raise Failure(f"{folder} does not hold what its run did")
        check_whole(folder)
    print(f"{count} processes finished at once: {count} whole records", flush=True)


def one_folder(settings, count, scratch):
    """All begin the same run at once: one has it, the others are refused or find it finished."""
    barrier = multiprocessing.Barrier(count)
    trained = multiprocessing.Value("i", 0)
    refused = multiprocessing.Value("i", 0)
    settings = [*settings, "attention=linear"]
    folder = run_folder(load(settings))

    def begin(_):
        fit = Trainer.fit

        def counted(trainer):
            with trained.get_lock():
                trained.value += 1
            fit(trainer)

        Trainer.fit = counted
        config = load(settings)
        barrier.wait(60)
        try:
            run(config)
        except Busy:
            with refused.get_lock():
                refused.value += 1

    all_at_once(begin, count, scratch)
    done = record.load(folder)
    if (trained.value, done.status, done.sessions) != (1, "ok", 1):
        raise Failure(f"{trained.value} processes trained {folder}, in {done.sessions} sessions")
    check_whole(folder)
    late = count - 1 - refused.value
    print(
        f"{count} processes began one run: 1 trained, {refused.value} were refused, "
        f"{late} found it finished",
        flush=True,
    )


def check_whole(folder):
    """Looks for lines that two processes wrote, and for what must not be left."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if [line["step"] for line in lines] != [2, 4, 6]:
        raise Failure(f"{folder}/metrics.jsonl has the steps {[line['step'] for line in lines]}")
    files = {path.name for path in folder.iterdir()}
    expected = {"record.json", "metrics.jsonl", "test_predictions.npy", "log.txt", ".lock"}
    if files != expected:
        raise Failure(f"{folder} has other files than expected: {sorted(files ^ expected)}")


if __name__ == "__main__":
    sys.exit(main())
