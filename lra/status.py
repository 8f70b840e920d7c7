"""How far runs are, from the small files in their folders alone; another machine may ask too.

Imports no torch, and takes nothing that a run could want.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lra import record
from lra.files import is_locked
from lra.record import Record
from lra.text import aligned

SILENT = 120
"""Seconds without a sign of life after which a run counts as cut, where its lock is free too."""

FILES = (record.PROGRESS, "metrics.jsonl", "record.json", "log.txt")
"""What a run writes while it works; the newest is its last sign of life."""


@dataclass
class State:
    """How far a run is.

    Attributes:
        folder: Its folder.
        status: That of its record; ``cut`` for one that is recorded as running and is not;
            ``not started`` without a record; ``damaged`` where the record cannot be read.
        step: Optimiser steps done, as far as is known.
        steps: Those of the whole run.
        accuracy: On the validation set, of the weights that would be tested now.
        seconds_left: From the time of the steps so far.
        note: The reason, or when it was heard of.
        trial: Whether it is a trial of a tuning.
    """

    folder: Path
    status: str
    step: int = 0
    steps: int | None = None
    accuracy: float | None = None
    seconds_left: float | None = None
    note: str = ""
    trial: bool = False


def status(runs: Path) -> str:
    """Returns a table of all runs below ``runs``, and their count.

    Raises:
        ValueError: If there are none.
    """
    folders = sorted(path.parent for path in runs.rglob("record.json"))
    if not folders:
        raise ValueError(
            f"There is no run below {runs}: train first (lra train), or name the folder of your "
            f"runs, as lra status FOLDER."
        )
    states = [state_of(folder) for folder in folders]
    return f"{table(states)}\n{summary(states)}"


def state_of(folder: Path) -> State:
    """Returns how far the run in ``folder`` is; there need be none."""
    try:
        found = record.load(folder)
    except ValueError as error:
        return State(folder, "damaged", note=str(error))
    if found is None:
        return State(folder, "not started")
    steps = found.config.get("train", {}).get("steps")
    state = State(folder, found.status, found.steps, steps, trial=found.trial_of is not None)
    state.accuracy = found.validation.accuracy if found.validation else _accuracy(found, folder)
    state.note = found.reason.partition("\n")[0]
    seconds = found.train_seconds + found.evaluation_seconds
    if found.status == "running":
        progress = record.load_progress(folder)
        if progress is not None:
            state.step, seconds = progress.step, progress.seconds
        silent = _silence(folder)
        # Of a run on another machine that shares the folder, the lock may not be seen here.
        state.status = "running" if is_locked(folder / ".lock") or silent < SILENT else "cut"
        if silent >= SILENT:
            state.note = f"no sign of life for {duration(silent)}"
        elif not state.step:
            state.note = "no step yet"
    if state.status in ("running", "cut", "interrupted", "timeout") and state.step and steps:
        state.seconds_left = (steps - state.step) * seconds / state.step
    return state


def table(states: Sequence[State], left: str = "time left") -> str:
    """Returns a line on each run; ``left`` heads the column of seconds left."""
    rows = [("run", "status", "steps", "%", "validation", left, "note")]
    rows += [
        (
            str(state.folder),
            f"{state.status} (trial)" if state.trial else state.status,
            f"{state.step:,}/{state.steps:,}" if state.steps else "",
            f"{100 * state.step // state.steps}" if state.steps else "",
            "" if state.accuracy is None else f"{state.accuracy:.2%}",
            "" if state.seconds_left is None else duration(state.seconds_left),
            state.note,
        )
        for state in states
    ]
    return aligned(rows)


def summary(states: Iterable[State]) -> str:
    """Returns how many runs there are, in all and of each status."""
    counts = Counter(state.status for state in states)
    told = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    return f"{counts.total()} runs: {told}"


def duration(seconds: float) -> str:
    """Returns a time in the two largest units that tell something."""
    minutes = seconds / 60
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if minutes < 99.5:
        return f"{minutes:.0f} min"
    hours, rest = divmod(round(minutes), 60)
    if hours < 48:
        return f"{hours} h {rest:02} min"
    return f"{hours // 24} d {hours % 24} h"


def _silence(folder: Path) -> float:
    """Returns the seconds since a run last wrote something."""
    times = [0.0]
    for name in FILES:
        with contextlib.suppress(OSError):  # not there, or no longer
            times.append((folder / name).stat().st_mtime)
    return max(0.0, time.time() - max(times))


def _accuracy(found: Record, folder: Path) -> float | None:
    """Returns the validation accuracy so far: of the best step, or the last, as is tested."""
    train = found.config.get("train", {})
    lines = [
        line for line in record.load_metrics(folder) if line["step"] >= train.get("best_from", 0)
    ]
    scores = [line["val_accuracy"] for line in lines]
    if not scores:
        return None
    return scores[-1] if train.get("tested") == "last" else max(scores)
