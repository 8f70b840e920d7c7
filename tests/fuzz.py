"""Damages what the program reads, at random; looks for tracebacks, hangs, and what is lost.

    python tests/fuzz.py [--cases 10000] [--seed 0] [--target NAME ...] [--number N]

What is damaged are command lines (`fuzz_commands.py`), records, checkpoints, cells and prepared
data (`fuzz_files.py`), and the data files of every task (`fuzz_data.py`). A case follows from its
target, the seed and its number alone, so that a failure can be repeated by itself. Cases run in a
process forked from this one, which imports everything once and computes nothing; one that dies or
hangs costs its case.
"""

import argparse
import contextlib
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
os.environ["TQDM_DISABLE"] = "1"

import datasets  # noqa: F401  (imported once, for all cases)
import fuzz_commands
import fuzz_data
import fuzz_files
import hydra  # noqa: F401
import torch._dynamo  # noqa: F401

TARGETS = {
    target.name: target
    for target in (fuzz_commands.CommandLines, *fuzz_files.TARGETS, *fuzz_data.TARGETS)
}

SECONDS = 20
"""A case that takes longer hangs."""

SHOWN = 12
"""Failures that are told in full; others of the same kind are counted."""


class Hang(BaseException):
    """A case that does not come to its end."""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000, help="shared out among the targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--number", type=int, help="this case alone")
    given = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="fuzz-"))
    shares = {name: TARGETS[name].share for name in given.target}
    failed = 0
    try:
        for name, share in shares.items():
            count = max(1, given.cases * share // sum(shares.values()))
            numbers = range(count) if given.number is None else [given.number]
            failed += run(TARGETS[name], given.seed, numbers, scratch)
    finally:
        shutil.rmtree(scratch)
    return int(failed > 0)


def run(target, seed, numbers, scratch):
    """Runs cases of a target, and prints what came of them; returns how many failed."""
    start = time.perf_counter()
    waiting, outcomes, failures = list(numbers), Counter(), {}
    folder = scratch / target.name.replace(" ", "-")
    while waiting:
        for number, outcome, told in in_process(target, seed, waiting, folder):
            waiting.remove(number)
            outcomes[outcome] += 1
            if outcome == "FAILED":
                failures.setdefault(told.strip().splitlines()[-1][:60], []).append((number, told))
    seconds = time.perf_counter() - start
    told = ", ".join(f"{count:,} {outcome}" for outcome, count in outcomes.most_common())
    print(f"{target.name}: {outcomes.total():,} cases in {seconds:.0f} s: {told}", flush=True)
    for several in list(failures.values())[:SHOWN]:
        number, text = several[0]
        command = f"--target '{target.name}' --seed {seed} --number {number}"
        print(f"\n{len(several)} like this: python tests/fuzz.py {command}\n{text}", flush=True)
    return outcomes["FAILED"]


def in_process(target, seed, numbers, folder):
    """Yields number, outcome and text of cases that a process of its own runs, until it ends."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        with os.fdopen(writing, "w", buffering=1) as pipe:
            work(target, seed, numbers, folder, pipe)
        os._exit(0)
    os.close(writing)
    begun, ended = None, False
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        rest = b""
        while not ended:
            ready, _, _ = select.select([pipe], [], [], 3 * SECONDS)
            if not ready:
                os.kill(pid, signal.SIGKILL)
            ended = not ready or not (read := pipe.read(1 << 16))
            *lines, rest = (rest + (b"" if ended else read)).split(b"\n")
            for line in lines:
                begun, outcome, told = json.loads(line)
                if outcome:
                    yield begun, outcome, told
                    begun = None
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if begun is not None:
        yield begun, "FAILED", f"the process ended with status {code}"
    elif code:
        raise SystemExit((folder.parent / "failure.txt").read_text())


def work(target, seed, numbers, folder, pipe):
    """Runs cases one after the other; tells the pipe when one begins, and what came of it."""
    signal.signal(signal.SIGALRM, hang)
    home = folder / "work"
    home.mkdir(parents=True, exist_ok=True)
    os.environ["HOME"] = str(home)
    os.chdir(home)
    output = os.open(home.parent / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    good = folder / "good"
    try:
        if not good.exists():
            good.mkdir()
            target.make(good)
        ready = target(good, home)
    except BaseException:
        Path(folder.parent / "failure.txt").write_text(traceback.format_exc())
        os._exit(1)
    for number in numbers:
        pipe.write(json.dumps([number, "", ""]) + "\n")
        outcome, told = "FAILED", ""
        try:
            signal.alarm(SECONDS)
            outcome = ready.case(Random(f"{target.name} {seed} {number}"))
        except BaseException:
            told = traceback.format_exc()
        finally:
            signal.alarm(0)
        with contextlib.suppress(BlockingIOError):
            pipe.write(json.dumps([number, outcome, told[-6000:]]) + "\n")


def hang(*_):
    raise Hang(f"it takes more than {SECONDS} s")


if __name__ == "__main__":
    sys.exit(main())
