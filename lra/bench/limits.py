"""Limits of a cell's process: memory that it cannot exceed, and time after which it is ended.

Two guards of memory on CPU. Inside, the kernel refuses anonymous memory beyond the limit
(RLIMIT_DATA; unlike RLIMIT_AS it does not count what is only reserved or mapped from files), so
that a tensor too large fails cleanly before it is written. Outside, the resident set is watched,
whatever it comes from, and so is what the machine has left.
"""

import os
import resource
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from lra.cells import Status

RESERVE = 0.04
"""Share of the machine's memory that a cell must leave, whatever its limit."""

INTERVAL = 0.02
"""Seconds between two looks at a process: it can touch some 0.1 GB meanwhile."""

PAGE = os.sysconf("SC_PAGE_SIZE")


def default_memory_gb() -> float | None:
    """Returns three quarters of the memory that this process may use, GB; None if unknown."""
    total = _meminfo("MemTotal")
    group = Path("/sys/fs/cgroup/memory.max")
    if group.exists() and (limit := group.read_text().strip()).isdigit():
        total = min(total or int(limit), int(limit))
    return None if total is None else round(0.75 * total / 1e9, 1)


def limit_own_memory(memory_gb: float) -> None:
    """Lets this process's resident set grow up to ``memory_gb``, by what it may allocate yet."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    held = {field: int(status[field].split()[0]) * 1024 for field in ("VmData", "VmRSS")}
    limit = max(held["VmData"], held["VmData"] + int(memory_gb * 1e9) - held["VmRSS"])
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def watch(
    process: BaseProcess, memory_gb: float | None, seconds: float
) -> tuple[Status, str] | None:
    """Waits for a process, and kills it where it goes beyond a limit.

    Returns:
        None if it ended by itself, else ``oom`` or ``timeout`` and the reason.
    """
    statm = Path(f"/proc/{process.pid}/statm")
    held = memory_gb is not None and statm.exists()
    reserve = RESERVE * (_meminfo("MemTotal") or 0)
    end = time.monotonic() + seconds
    while process.exitcode is None:
        found: tuple[Status, str] | None = None
        if held and _resident(statm) > memory_gb * 1e9:
            found = "oom", f"more than {memory_gb:g} GB"
        elif held and (_meminfo("MemAvailable") or reserve) < reserve:
            found = "oom", f"the machine had less than {reserve / 1e9:.1f} GB left"
        elif time.monotonic() > end:
            found = "timeout", f"more than {seconds:g} s"
        if found:
            process.kill()
            process.join()
            return found
        time.sleep(INTERVAL)
    return None


def _resident(statm: Path) -> int:
    try:
        return int(statm.read_text().split()[1]) * PAGE
    except (OSError, IndexError):  # it has just ended
        return 0


def _meminfo(field: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)
