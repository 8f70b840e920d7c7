"""`lra train` in processes: started as a user does, or forked from one that has imported all."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROCESSES = multiprocessing.get_context("forkserver")

PRELOADED = ["lra.sweep", "lra.tune", "models.attention.softmax", "pyarrow", "torch._dynamo"]
"""Importing them takes longer than what tests run; every optimiser imports the last one."""


def often_saved(steps):
    """Returns the settings of runs that may be cut anywhere, each evaluation and step saved."""
    return [
        "protocol=smoke",
        f"train.steps={steps}",
        "train.eval_every=5",
        "checkpoint_seconds=0",
        "keep_checkpoint=true",
        "micro_batches=2",
        "tracker=none",
        "device=cpu",
    ]


def start(arguments, environment, cwd, program=(sys.executable,)):
    """Starts `lra train` as a user does."""
    # A session of its own: signals go to this process and not to the tests.
    return subprocess.Popen(
        [*program, "-m", "lra", "train", *arguments],
        env=environment,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


class Forked:
    """A process of `lra train` that starts at once, to be handled like `subprocess.Popen`.

    Args:
        arguments: Those of the command line.
        environment: All environment variables; as torch is imported, its threads are given.
        cwd: The current folder.
    """

    def __init__(self, arguments, environment, cwd):
        PROCESSES.set_forkserver_preload(PRELOADED)
        file, path = tempfile.mkstemp(prefix="output-", dir=cwd)
        os.close(file)
        self._output = Path(path)
        given = (arguments, dict(environment), cwd, path)
        self._process = PROCESSES.Process(target=_call, args=given)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self._process.kill()

    def communicate(self, timeout=None):
        """Returns what it has printed by its end, and None."""
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("lra train", timeout, self._output.read_text())
        return self._output.read_text(), None


def _call(arguments, environment, cwd, output):
    os.setsid()  # signals go to this process and not to the tests
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    from lra.cli import main

    sys.argv = ["lra", "train", *arguments]
    main(sys.argv[1:])


def wait_for_lines(path, count, process, seconds=60):
    """Waits until a file has so many lines; fails if the process ends before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if path.exists() and len(path.read_text().splitlines()) >= count:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    raise AssertionError(f"{path} never had {count} lines")


def children(pid):
    """Returns the processes that a process has started, with their command lines."""
    listed = subprocess.run(
        ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(pid)],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = (line.strip().partition(" ") for line in listed.stdout.splitlines())
    return {int(child): command for child, _, command in lines}
