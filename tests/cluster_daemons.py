"""The daemons of a Slurm of one node, with files of their own in one folder, and their end."""

import contextlib
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PACKAGES = {"munged": "munge", "mungekey": "munge", "slurmctld": "slurm-wlm", "slurmd": "slurm-wlm"}

SLURM = """\
ClusterName=lra
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={megabytes} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
# cred_expire: so many seconds a job that is queued again waits. linuxproc: signals reach all
# processes of a job, as with control groups, which containers have not.


class Failure(Exception):
    """What this script is there to find."""


def start_slurm(folder, environment, stack):
    """Starts munged, slurmctld and slurmd, to be stopped by the stack; returns Slurm's version."""
    path = environment["PATH"]
    missing = {package for name, package in PACKAGES.items() if not shutil.which(name, path=path)}
    if os.geteuid() != 0:
        raise Failure("Slurm's daemons need root: run this as root, or with sudo.")
    if missing:
        quiet = {"DEBIAN_FRONTEND": "noninteractive", **environment}
        output("apt-get", "update", "-qq", **quiet)
        recommended = "--no-install-recommends"
        output("apt-get", "install", "-qq", "-y", recommended, *sorted(missing), **quiet)
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    key = folder / "munge.key"
    output("mungekey", "--create", f"--keyfile={key}", **environment)
    files = {"key-file": key, "socket": folder / "munge.socket", "pid-file": folder / "munged.pid",
             "log-file": folder / "munged.log", "seed-file": folder / "munged.seed"}  # fmt: skip
    settings = SLURM.format(
        folder=folder,
        host=platform.node().partition(".")[0],
        controller_port=free_port(),
        node_port=free_port(),
        cpus=min(2, os.cpu_count()),
        megabytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20 - 100,
    )
    (folder / "slurm.conf").write_text(settings)
    munge = ["--foreground", "--force", *(f"--{name}={path}" for name, path in files.items())]
    for daemon, ready in (
        (["munged", *munge], lambda: files["socket"].exists()),
        (["slurmctld", "-D"], lambda: "UP" in output("scontrol", "ping", **environment)),
        (["slurmd", "-D"], lambda: "idle" in output("sinfo", "-h", "-o", "%t", **environment)),
    ):
        log = stack.enter_context((folder / f"{daemon[0]}.txt").open("w"))
        process = subprocess.Popen(daemon, env=environment, stdout=log, stderr=log)
        stack.callback(stop, process)
        end = time.monotonic() + 30
        while not ready():
            if time.monotonic() > end or process.poll() is not None:
                raise Failure(f"{daemon[0]} did not start:\n{Path(log.name).read_text()}")
            time.sleep(0.2)
    return output("slurmd", "-V", **environment).split()[-1]


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def output(*command, **environment):
    done = subprocess.run(
        command, env=environment or None, capture_output=True, text=True, check=False
    )
    if done.returncode and command[0] != "scontrol":  # which fails as long as there is nobody
        raise Failure(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return done.stdout


def stop(process):
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def stop_all(folder):
    """Kills what is left of all that this script has started.

    Raises:
        Failure: If there is something.
    """
    left, end = processes(folder), time.monotonic() + (0 if sys.exc_info()[0] else 20)
    while left and time.monotonic() < end:
        time.sleep(0.5)
        left = processes(folder)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if left and sys.exc_info()[0] is None:
        raise Failure(f"these processes were left: {left}")


def processes(folder):
    """Returns the processes that this script has started: its folder is in their environment."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in (path / "environ").read_bytes():
                command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if command:  # else it has ended
                    found[int(path.name)] = command
    return found
