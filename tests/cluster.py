"""Sweeps through a real Slurm and a real Ray on this machine; compares them with a serial sweep.

    python tests/cluster.py        (make test-cluster, which installs what it needs)

A munged, a slurmctld and a slurmd are started with a configuration of their own in a temporary
folder, whatever Slurm the machine has else; then, with the six runs of two tasks and three
attentions,

1. a serial sweep;
2. a sweep with launch=slurm, of which one job is cancelled midway and one in the queue; the same
   command again;
3. a run whose Slurm job has a time limit that it cannot keep, and is queued again until it is done;
4. a sweep with launch=ray, of which one worker is killed midway.

Runs of 2 to 4 take their steps with pauses, so that what is to come midway comes midway on every
machine. In the end weights, optimisers, predictions and metrics are those of the serial sweep bit
by bit, and the files that `lra report` writes are the same byte for byte once the records are
without what clocks and memory said. All daemons are stopped, and the folder is removed.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cluster_daemons import Failure, output, start_slurm, stop_all
from processes import often_saved

ROOT = Path(__file__).parents[1]
STEPS = 60

SWEEP = ["task=listops,pathfinder", "attention=softmax,cosformer,linear"]
CUT = ["task=listops", "attention=softmax"]
"""The run that is cut, the first of the sweep."""

SETTINGS = often_saved(STEPS)

PAUSES = '''"""Makes a run pause before every step, which changes nothing but its time."""

import os
import time

from lra.train import Trainer

step = Trainer._step


def paused(trainer):
    time.sleep(float(os.environ["PAUSE_SECONDS"]))
    step(trainer)


Trainer._step = paused
'''

MEASURED = {
    "command": "",
    "started": "2000-01-01T00:00:00+00:00",
    "sessions": 1,
    "train_seconds": 1.0,
    "evaluation_seconds": 1.0,
    "other_seconds": 1.0,
    "throughput": None,
    "peak_memory_bytes": None,
}
"""What of a record differs between two runs that end in the same way."""


def main():
    folder = Path(tempfile.mkdtemp(prefix="lra-cluster-"))
    folder.chmod(0o755)
    told = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # stops the daemons, as Ctrl-C does
    try:
        with contextlib.ExitStack() as stack:
            stack.callback(stop_all, folder)
            test(folder, stack, told)
    except Failure as failure:
        print(f"{failure}\nThe folder is left: {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    print("\n".join(["", *told, "All daemons are stopped, and nothing is left behind."]))
    return 0


def test(folder, stack, told):
    started = time.monotonic()
    (folder / "pauses.py").write_text(PAUSES)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}",
        "PATH": os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"]),
        "SLURM_CONF": str(folder / "slurm" / "slurm.conf"),
        "RAY_TMPDIR": str(folder / "ray"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PAUSE_SECONDS": "0.2",
    }
    sweeps = Sweeps(folder, environment)

    say("1. a serial sweep")
    sweeps.run("serial", 0, SWEEP)
    told.append("serial: 6 runs, one after the other")

    say("2. a sweep through Slurm")
    version = start_slurm(folder / "slurm", environment, stack)
    told.append(f"Slurm {version}: " + cancelled(sweeps))

    say("3. a time limit of Slurm, and 4. a sweep through Ray")
    slow = Sweeps(folder, environment | {"PAUSE_SECONDS": "0.8"})
    limits = ["timeout_min=1", "signal_delay_s=20", "max_num_timeout=20"]
    limited = slow.start("limited", [*CUT, *slurm(*limits)])
    import ray  # its version; what runs it is Hydra

    told.append(f"Ray {ray.__version__}: " + worker_killed(sweeps))
    slow.end("limited", limited, 0)
    steps = slow.resumed_from("limited")
    if not steps:
        raise Failure("Slurm's time limit has ended no session of the run")
    later = ", ".join(map(str, steps))
    told.insert(2, f"Slurm's time limit: the run went on from steps {later} of {STEPS}")

    say("the comparison")
    told += compare(folder)
    told.append(f"{time.monotonic() - started:.0f} seconds")


def say(what):
    print(f"\n=== {what}", flush=True)


class Sweeps:
    """Sweeps below a folder, each with the settings of this script."""

    def __init__(self, folder, environment):
        self.folder, self.environment = folder, environment

    def start(self, name, more):
        pauses = ["plugins=[pauses]"] if name != "serial" else []
        paths = [f"runs_dir={self.folder / name}", f"cache_dir={self.folder / 'cache'}"]
        return subprocess.Popen(
            [sys.executable, "-m", "lra", "train", "-m", *SETTINGS, *pauses, *paths, *more],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def end(self, name, process, code, seconds=240):
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            raise Failure(f"{output}\nthe sweep {name} did not end in {seconds} s") from None
        print(output[output.find("run  ") :], end="", flush=True)
        if process.returncode != code:
            raise Failure(f"{output}\nthe sweep {name} ended with {process.returncode}")
        return output

    def run(self, name, code, more):
        return self.end(name, self.start(name, more), code)

    def cut_folder(self, name):
        found = list((self.folder / name).glob("smoke/listops/softmax/s0-*"))
        return found[0] if found else None

    def record(self, name):
        return json.loads((self.cut_folder(name) / "record.json").read_text())

    def wait_for_steps(self, name, process):
        """Waits until the run that is to be cut has been evaluated twice."""
        end = time.monotonic() + 90
        while time.monotonic() < end:
            metrics = self.cut_folder(name) and self.cut_folder(name) / "metrics.jsonl"
            if metrics and metrics.exists() and len(metrics.read_text().splitlines()) >= 2:
                return
            if process.poll() is not None:
                raise Failure(f"{process.stdout.read()}\nthe sweep {name} ended too early")
            time.sleep(0.05)
        process.kill()
        raise Failure(f"{process.communicate()[0]}\nno run of the sweep {name} made steps")

    def resumed_from(self, name):
        """Returns the steps that the sessions of the cut run went on from."""
        log = (self.cut_folder(name) / "log.txt").read_text()
        return [int(step) for step in re.findall(r"goes on from step (\d+)", log)]


def slurm(*more):
    """Returns the overrides of a sweep through Slurm."""
    asked = ["cpus_per_task=1", "mem_gb=1", *more]
    return ["launch=slurm", *(f"hydra.launcher.{one}" for one in asked)]


def cancelled(sweeps):
    """Cancels two jobs of a sweep, gives the command again, and tells what happened."""
    sweep = sweeps.start("slurm", [*SWEEP, *slurm()])
    sweeps.wait_for_steps("slurm", sweep)
    queue = output("squeue", "--me", "--array", "--noheader", "--format=%i", **sweeps.environment)
    array = queue.split()[0].partition("_")[0]
    output("scancel", f"{array}_5", f"{array}_0", **sweeps.environment)
    table = sweeps.end("slurm", sweep, 1)
    statuses = [line.split()[1] for line in table[table.rindex("run  ") :].splitlines()[1:]]
    if statuses != ["interrupted", "ok", "ok", "ok", "ok", "not"]:
        raise Failure(f"{table}\nthe runs ended as {statuses}")
    cut = sweeps.record("slurm")
    if cut["reason"] != "SIGTERM received" or not 10 <= cut["steps"] < STEPS:
        raise Failure(f"the cancelled run ended at step {cut['steps']}: {cut['reason']}")
    sweeps.run("slurm", 0, [*SWEEP, *slurm()])
    if sweeps.resumed_from("slurm") != [cut["steps"]]:
        raise Failure(f"it went on from {sweeps.resumed_from('slurm')}, not {cut['steps']}")
    return (
        f"6 runs, one cancelled at step {cut['steps']} of {STEPS} and one in the queue; the other "
        "4 ended, and the same command ended these two, the first from its checkpoint"
    )


def worker_killed(sweeps):
    """Kills a worker of a sweep through Ray, and tells what happened."""
    sweep = sweeps.start("ray", [*SWEEP, "launch=ray"])
    sweeps.wait_for_steps("ray", sweep)
    os.kill(worker_of(sweeps.folder / "ray"), signal.SIGKILL)
    sweeps.end("ray", sweep, 0)
    steps = sweeps.resumed_from("ray")
    if len(steps) != 1 or not 10 <= steps[0] < STEPS:
        raise Failure(f"the run whose worker was killed went on from {steps}")
    return (
        f"6 runs, the worker of one killed with SIGKILL; Ray gave it to another, where it went on "
        f"from step {steps[0]} of {STEPS}"
    )


def worker_of(runs):
    """Returns the process that has started the run that is to be cut."""
    wanted = [f"runs_dir={runs}", *CUT]
    for line in output("ps", "-ww", "-eo", "ppid=,args=").splitlines():
        parent, *words = line.split()
        if (
            "train" in words
            and "-m" not in words[words.index("train") :]
            and set(wanted) <= set(words)
        ):
            return int(parent)
    raise Failure("the run that is to be cut has no process")


def compare(folder):
    """Compares all runs with those of the serial sweep, and the reports; tells what is the same."""
    from test_run import assert_same_end

    from lra.report import write

    for name in ("slurm", "ray", "limited"):
        ends = sorted(path.parent for path in (folder / name).rglob("record.json"))
        if len(ends) != (1 if name == "limited" else 6):
            raise Failure(f"the sweep {name} has left {len(ends)} runs")
        for end in ends:
            try:
                assert_same_end(end, folder / "serial" / end.relative_to(folder / name))
            except AssertionError as error:
                raise Failure(f"{end} is not as in the serial sweep: {error}") from None
    reports = {}
    for name in ("serial", "slurm", "ray"):
        without_measures(folder / name, folder / "compared" / name)
        with contextlib.redirect_stdout(None):
            write([folder / "compared" / name], folder / "results" / name)
        files = sorted(path for path in (folder / "results" / name).rglob("*") if path.is_file())
        reports[name] = {path.name: path.read_bytes() for path in files}
    for name in ("slurm", "ray"):
        if reports[name] != reports["serial"]:
            differing = [f for f, was in reports["serial"].items() if reports[name].get(f) != was]
            raise Failure(f"the reports of serial and {name} differ in {differing}")
    [_, table, *_] = reports["serial"]["leaderboard-smoke.md"].decode().split("\n## ")
    print(table)
    return [
        "weights, optimisers, predictions, metrics and scores of all runs: those of the serial "
        "sweep bit by bit",
        f"reports of the three sweeps: {', '.join(reports['serial'])} byte for byte the same, "
        "without what clocks and memory say",
    ]


def without_measures(runs, copy):
    """Copies the small files of runs, without what clocks, memory and launchers said."""
    for path in sorted(runs.rglob("record.json")):
        target = copy / path.parent.relative_to(runs)
        target.mkdir(parents=True)
        shutil.copy(path.parent / "test_predictions.npy", target)
        record = json.loads(path.read_text()) | MEASURED
        record["device"]["runs_at_once"] = 1
        for key in ("runs_at_once", "runs_dir", "plugins"):
            record["config"].pop(key)
        (target / "record.json").write_text(json.dumps(record))
        lines = map(json.loads, (path.parent / "metrics.jsonl").read_text().splitlines())
        kept = [json.dumps(line | {"seconds": float(line["step"])}) for line in lines]
        (target / "metrics.jsonl").write_text("\n".join(kept) + "\n")


if __name__ == "__main__":
    sys.exit(main())
