"""`lra train` in processes of their own, forked from one that has imported what it needs."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PROCESSES = multiprocessing.get_context("forkserver")

PRELOADED = ["lra.sweep", "lra.tune", "models.attention.softmax", "pyarrow", "torch._dynamo"]
"""Importing them takes longer than what tests run; every optimiser imports the last one."""


class Forked:
    """A process of `lra train`, to be handled like `subprocess.Popen`.

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
