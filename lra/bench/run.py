"""Runs the cells of a plan, one fresh process each, and keeps each as soon as it has ended."""

import logging
import multiprocessing
import random
import shlex
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from lra import cells
from lra.bench.cell import Job, work
from lra.bench.limits import default_memory_gb, watch
from lra.bench.plan import Plan, plan
from lra.cells import Ceilings, Cell, Measured
from lra.files import Busy, locked
from lra.plugins import import_plugins, named_plugins
from lra.report import efficiency
from lra.signals import handled
from lra.text import shareable
from lra.typed import from_mapping

LOG = logging.getLogger("lra")

PROCESSES = multiprocessing.get_context("forkserver")
"""Fresh processes, forked from one that has imported what they need and computed nothing."""

PRELOADED = ["lra.bench.cell", "torch._dynamo"]
"""The second is what a first optimiser imports."""

ORDER = 0
"""Seed of the order of the cells: shuffled, so that a drift of the machine favours none."""


def bench(overrides: Sequence[str]) -> int:
    """Measures what is not measured yet, and writes tables and figures of all there is.

    Returns:
        0, or 1 if a cell failed otherwise than by its limits.

    Raises:
        ValueError: For a mistake in the overrides, or if another process measures into the file.
    """
    plugins = named_plugins(list(overrides))
    import_plugins(plugins)
    asked = plan(overrides, plugins)
    asked.path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # KeyboardInterrupt leaves no process; in background jobs of shells SIGINT is ignored.
        with locked(asked.path, wait=False), handled(signal.default_int_handler):
            failed = _measure(asked, shareable(shlex.join(["lra", "bench", *overrides])))
            efficiency.write(asked.path)
    except Busy:
        raise ValueError(f"Another lra bench is writing to {asked.path}: wait for it.") from None
    return int(failed)


def _measure(asked: Plan, command: str) -> bool:
    """Measures the cells that are not there; returns whether one failed."""
    config, known = asked.config, cells.load(asked.path).cells
    memory_gb = config.memory_gb
    if memory_gb is None and asked.device.type == "cpu":
        memory_gb = default_memory_gb()

    def kept(cell: Cell) -> bool:
        found = known.get(cell.key)
        return (
            found is not None and config.reuse == "auto" and found.holds(memory_gb, config.seconds)
        )

    waiting = [cell for cell in asked.cells if not kept(cell)]
    LOG.info(
        "%d cells, %d of them measured before", len(asked.cells), len(asked.cells) - len(waiting)
    )
    if not waiting:
        return False
    PROCESSES.set_forkserver_preload(PRELOADED)
    cells.append(asked.path, _ceilings(asked))
    random.Random(ORDER).shuffle(waiting)
    failed = False
    for number, cell in enumerate(waiting, 1):
        result = _in_process(asked, cell, memory_gb)
        measured = from_mapping(
            Measured,
            result
            | {
                "cell": asdict(cell),
                "memory_gb": memory_gb,
                "seconds": config.seconds,
                "date": _now(),
                "command": command,
            },
            "",
        )
        cells.append(asked.path, measured)
        failed = failed or measured.status == "failed"
        LOG.info("%d/%d %s", number, len(waiting), _told(measured))
    return failed


def _ceilings(asked: Plan) -> Ceilings:
    result = _in_process(asked, None, None)
    if result["status"] != "ok":
        raise ValueError(f"The machine's ceilings cannot be measured: {result['reason']}")
    given = asked.cells[0].conditions
    return Ceilings(
        precision=given.precision,
        device=given.device,
        torch=given.torch,
        flops_per_second=result["flops_per_second"],
        bytes_per_second=result["bytes_per_second"],
        date=_now(),
    )


def _in_process(asked: Plan, cell: Cell | None, memory_gb: float | None) -> dict[str, Any]:
    """Returns what a process of its own measures, or how it ended."""
    config, conditions = asked.config, asked.cells[0].conditions
    threads = conditions.device["threads"]
    job = Job(
        cell=cell,
        device=str(asked.device),
        precision=conditions.precision,
        threads=threads,
        memory_gb=memory_gb,
        end=time.time() + config.seconds,
        repetitions=config.repetitions,
        measure_seconds=config.measure_seconds,
        plugins=asked.plugins,
    )
    receiver, sender = PROCESSES.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile() as errors, receiver:
        process = PROCESSES.Process(target=work, args=(job, sender, errors.name))
        process.start()
        sender.close()
        try:
            ended = watch(
                process, memory_gb if asked.device.type == "cpu" else None, config.seconds
            )
        finally:  # a Ctrl-C too
            process.kill()
            process.join()
        if ended:
            return {"status": ended[0], "reason": ended[1]}
        if process.exitcode == 0:
            return receiver.recv()
        lines = errors.read().decode(errors="replace").split("\n")
    # SIGKILL is the kernel's own way out when memory ends; we have not sent it.
    status = "oom" if process.exitcode == -signal.SIGKILL else "failed"
    return {"status": status, "reason": shareable(_crash(process.exitcode, lines))}


def _crash(code: int, lines: list[str]) -> str:
    told = next((line.strip() for line in reversed(lines) if line.strip()), "")
    if code < 0:
        return f"the process was killed by {signal.Signals(-code).name}. {told}".strip()
    return f"the process ended with exit code {code}. {told}".strip()


def _told(measured: Measured) -> str:
    cell, figures = measured.cell, measured.figures
    what = f"{cell.mode} {cell.name} {cell.length:,}"
    if figures is None:
        return f"{what}: {measured.status}: {measured.reason}"
    step = figures.step
    spread = (step.high - step.low) / step.median
    memory = "" if figures.peak_bytes is None else f", {figures.peak_bytes / 1e6:,.0f} MB"
    return f"{what}: {step.median:.4g} s, spread {spread:.0%} of {step.repetitions}{memory}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
