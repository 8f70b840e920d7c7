"""Kills training at random moments; compares its end bit by bit with the uninterrupted run's.

    python tests/kills.py [--attention softmax cosformer rfa nystrom]
                          [--task listops pathfinder citations] [--kills 100] [--seed 0]

Every session of a run is a process that dies by SIGKILL: in a training step, in an evaluation, in
the writing of a checkpoint (after every step there is one), or beside them. It is forked from this
process, which imports everything once and computes nothing, so that hundreds of kills take
minutes. The choices follow from the seed and the kills so far; what is counted is the phase that a
session was really in when it died. A run that ends before its kill is compared, and the next seed
is begun.
"""

import argparse
import itertools
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from random import Random

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a process with threads is not to be forked

import torch
import torch._dynamo  # every optimiser imports it, for longer than the run takes
from processes import often_saved
from test_run import assert_same_end

from lra import checkpoint
from lra.compose import load
from lra.run import run
from lra.train import Trainer
from models.attention import ATTENTIONS

STEPS = 40

SETTINGS = often_saved(STEPS)

ATTENTIONS_KILLED = ("softmax", "cosformer", "rfa", "nystrom")
TASKS_KILLED = ("listops", "pathfinder", "citations")

SHARES = {"training": 0.3, "evaluation": 0.3, "checkpoint writing": 0.3, "other": 0.1}
"""The phases of a session, and the shares of the kills that they are to have."""

REACH = {"training": 8, "evaluation": 2, "checkpoint writing": 8, "other": 1}
"""A kill comes in one of the first so many occurrences of a phase in a session: late enough for
progress, early enough for many kills of a run. The first ``other`` is all before the first step."""


class Failure(Exception):
    """What this script is there to find."""


@dataclass
class Session:
    """What a session did: the phases in their order, each with its seconds, and how it ended."""

    phases: list[tuple[str, float]]
    killed: bool

    def seconds(self, phase):
        return [seconds for name, seconds in self.phases if name == phase]


@dataclass
class Aim:
    """The moment of a kill: so many seconds into an occurrence (from 0) of a phase."""

    phase: str
    occurrence: int
    delay: float


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--attention", nargs="+", default=ATTENTIONS_KILLED)
    parser.add_argument("--task", nargs="+", default=TASKS_KILLED)
    parser.add_argument("--kills", type=int, default=100, help="shared out among their pairs")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for attention in given.attention:
        ATTENTIONS.get(attention)  # imports it
    scratch = Path(tempfile.mkdtemp(prefix="kills-"))
    try:
        wait(*start(lambda: prepare(given.task, scratch), scratch))
        pairs = list(itertools.product(given.attention, given.task))
        each, more = divmod(given.kills, len(pairs))
        for i, (attention, task) in enumerate(pairs):
            kill_runs(attention, task, each + (i < more), given.seed, scratch)
    except Failure as failure:
        print(f"{failure}\nThe folders are left in {scratch}.", file=sys.stderr)
        return 1
    shutil.rmtree(scratch)
    return 0


def prepare(tasks, scratch):
    """Prepares the data of all tasks; that of citations is made up."""
    write_papers(scratch / "data" / "aan")
    for task in tasks:
        load([*SETTINGS, *folders(scratch), f"task={task}"]).build_task().prepare()


def write_papers(folder):
    """Writes papers of random words, in which each cites about six others."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    random = Random(0)
    ids = [f"P{number}" for number in range(300)]
    texts = [" ".join(random.choices(ids, k=random.randrange(1, 20))) for _ in ids]
    links = {tuple(random.sample(ids, 2)) for _ in range(6 * len(ids))}
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"id": ids, "text": texts}), folder / "papers.parquet")
    rows = ["citing\tcited", *("\t".join(link) for link in sorted(links))]
    (folder / "citations.tsv").write_text("\n".join(rows) + "\n")


def folders(scratch):
    """Returns the overrides that say where data is."""
    return [f"data_dir={scratch / 'data'}", f"cache_dir={scratch / 'cache'}"]


def kill_runs(attention, task, kills, seed, scratch):
    """Kills runs of an attention on a task so many times in all, and prints what was done.

    Raises:
        Failure: If a run does not end as the uninterrupted one.
    """
    random, killed = Random(f"{attention} {task} {seed}"), Counter()
    runs = sessions = 0
    while killed.total() < kills:
        this = seed + runs
        runs += 1
        chosen = [f"attention={attention}", f"task={task}", f"seed={this}"]
        settings = [*SETTINGS, *folders(scratch), *chosen]
        earlier, steps = killed.total(), 0
        try:
            whole = session(settings, scratch, "whole")
            while True:
                aim = choose(random, killed, whole) if killed.total() < kills else None
                last = session(settings, scratch, "killed", aim)
                sessions += 1
                steps += len(last.seconds("training"))
                if not last.killed:
                    break
                killed[last.phases[-1][0]] += 1
            lost = steps - STEPS
            if lost > killed.total() - earlier:
                raise Failure(f"{lost} steps were taken again: a kill may cost one")
            wait(*start(lambda: compare(scratch), scratch))
        except Failure as failure:
            here = killed.total() - earlier
            which = f"{attention} on {task} with seed {this}, killed {here} times"
            raise Failure(f"{which}: {failure}") from None
        for name in ("whole", "killed"):
            shutil.rmtree(scratch / name)
    phases = ", ".join(f"{killed[phase]} {phase}" for phase in SHARES)
    print(
        f"{attention} on {task}: {killed.total()} kills ({phases}) of {runs} runs in {sessions} "
        "sessions; every end is the same bit by bit",
        flush=True,
    )


def choose(random, killed, whole):
    """Returns a random moment of the phase that is farthest behind its share of the kills."""
    kills = killed.total() + 1
    phases = random.sample(list(SHARES), len(SHARES))  # the first of equals is taken
    phase = max(phases, key=lambda name: SHARES[name] * kills - killed[name])
    occurrence = random.randrange(REACH[phase])
    return Aim(phase, occurrence, random.random() * whole.seconds(phase)[occurrence])


def session(settings, scratch, name, aim=None):
    """Trains in a process of its own until the end or the kill."""
    settings = [*settings, f"runs_dir={scratch / name}"]
    reading, writing = os.pipe()
    pid, log = start(lambda: train(settings, writing), scratch)
    os.close(writing)
    names, entered = ["other"], [time.perf_counter()]
    while True:
        if aim and names[-1] == aim.phase and names.count(aim.phase) == aim.occurrence + 1:
            time.sleep(aim.delay)
            os.kill(pid, signal.SIGKILL)
            aim = None
        told = os.read(reading, 1)
        entered.append(time.perf_counter())
        if not told:  # it has ended
            break
        names.append(list(SHARES)[told[0]])
    os.close(reading)
    killed = wait(pid, log)
    seconds = [after - before for before, after in itertools.pairwise(entered)]
    return Session(list(zip(names, seconds, strict=True)), killed)


def train(settings, pipe):
    """Trains, and tells the pipe about the begin and the end of every phase, a byte each."""

    def telling(phase, function):
        def call(*arguments):
            os.write(pipe, bytes([list(SHARES).index(phase)]))
            result = function(*arguments)
            os.write(pipe, bytes([list(SHARES).index("other")]))
            return result

        return call

    torch.set_num_threads(2)  # micro-batches side by side, as outside of tests
    Trainer._step = telling("training", Trainer._step)
    Trainer._evaluate = telling("evaluation", Trainer._evaluate)
    checkpoint.save = telling("checkpoint writing", checkpoint.save)
    done = run(load(settings))  # fails on a record or a checkpoint that a kill has damaged
    if done.status != "ok":
        raise Failure(f"the run ended as {done.status}: {done.reason}")


def compare(scratch):
    """Compares the two ends, and looks for what killed sessions left behind."""
    [killed], [whole] = (
        [path.parent for path in (scratch / name).rglob("record.json")]
        for name in ("killed", "whole")
    )
    try:
        assert_same_end(killed, whole)
    except AssertionError as error:
        raise Failure("the end is not the same bit by bit") from error
    differing = {path.name for path in killed.iterdir()} ^ {path.name for path in whole.iterdir()}
    if differing:
        raise Failure(f"these files are in one folder only: {sorted(differing)}")


def start(work, scratch):
    """Starts ``work`` in a process of its own; returns its id, and the file of its output."""
    log = scratch / "output.txt"
    pid = os.fork()
    if pid:
        return pid, log
    code = 1
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(pid, log):
    """Waits for a process; returns whether it was killed.

    Raises:
        Failure: If it failed, with its output.
    """
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code not in (0, -signal.SIGKILL):
        raise Failure(f"a process ended with status {code}:\n{log.read_text()}")
    return code != 0


if __name__ == "__main__":
    sys.exit(main())
