"""The leaderboard of one protocol: what its records say, as rows; `lra.report.pages` shows them.

Records of one setting (equal hash) make a row, whatever their seeds; different settings are never
averaged, and different versions of a task, or different data, never share a table.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any

from lra.record import Record
from lra.report.published import Published, published
from lra.report.store import Run

NOT_LEARNED, LARGER, MODIFIED, FEWER, LEGACY = "†", "‡", "*", "¶", "§"

MARKS = {
    NOT_LEARNED: "not learned: the 95 % interval of a run reaches the majority class",
    LARGER: "more than 110 % of the parameters of the softmax model",
    MODIFIED: "departs from the protocol, as said in brackets",
    FEWER: "fewer steps than the protocol's",
    LEGACY: "legacy validation: the test split was also the validation split; the last step counts",
}

TASKS = ("listops", "text", "retrieval", "citations", "image", "pathfinder", "pathx")
"""The order of tables and columns; other tasks follow by name."""

NOT_AVERAGED = "pathx"
"""The arena's average leaves Path-X out (Tay et al. 2021, Table 1)."""


@dataclass
class Row:
    """One setting of an attention on one task, over its seeds.

    Attributes:
        label: The attention, its options that are not default, departures from the protocol, and
            by how many trials it was tuned.
        runs: The runs, finished or not.
        marks: Marks of `MARKS` that it bears.
        conditions: Device, threads and precision; speed and memory compare only where equal.
        accuracy: Mean test accuracy over finished seeds, per cent; None without any.
        sd: Standard deviation over seeds, per cent; None for fewer than two.
        low: Lower end of the 95 % interval of a single seed, per cent.
        high: Upper end.
        seeds: Finished seeds.
        status: How the other seeds ended, or ``ok``.
        rank: 1 for the highest accuracy of the table; equal accuracies share the better rank.
        steps_per_second: Mean speed; None where conditions of the seeds differ.
        speed: Steps per second over those of the table's softmax row in the same conditions.
        train_seconds: Mean time in optimiser steps.
        peak_bytes: Mean peak memory.
    """

    label: str
    runs: list[Run]
    marks: str
    conditions: str
    accuracy: float | None = None
    sd: float | None = None
    low: float | None = None
    high: float | None = None
    seeds: int = 0
    status: str = "ok"
    rank: int | None = None
    steps_per_second: float | None = None
    tokens_per_second: float | None = None
    speed: float | None = None
    train_seconds: float | None = None
    evaluation_seconds: float | None = None
    peak_bytes: float | None = None

    @property
    def first(self) -> Record:
        """A finished record, or the first."""
        done = [run.record for run in self.runs if run.record.status == "ok"]
        return (done or [self.runs[0].record])[0]

    @property
    def ratio(self) -> float | None:
        """Parameters over those of the softmax model."""
        r = self.first
        if r.parameters is None or not r.parameters_of_softmax:
            return None
        return r.parameters / r.parameters_of_softmax

    @property
    def device(self) -> tuple[str, str]:
        """Kind of device, and precision: different results are no seeds of one another."""
        return self.first.device["kind"], self.first.precision["name"]


@dataclass
class TaskTable:
    """All rows of a task, of one version and one set of data.

    Attributes:
        task: Name.
        version: Version of the task.
        data: Hash of the data, or of the settings where nothing got as far as data.
        rows: By accuracy.
        rules: Accuracy in per cent of rules that learn nothing, ascending.
        records: All records.
    """

    task: str
    version: int
    data: str
    rows: list[Row]
    rules: dict[str, float]
    records: list[Record]

    @property
    def n(self) -> int | None:
        """Number of test examples."""
        return next((r.test.n for r in self.records if r.test), None)


@dataclass
class SummaryRow:
    """An attention over the tasks.

    Attributes:
        label: As in `Row`; with device and precision where the protocol has several.
        cells: Its row in each table that has one, by the table's place.
        average: Mean accuracy over the averaged tasks, per cent; None unless it has all.
        rank: By average.
        speed: Geometric mean of the speeds over those of softmax on the averaged tasks, where it
            has all of them.
        peak_bytes: Mean peak memory, where there is such a speed.
    """

    label: str
    cells: dict[int, Row]
    average: float | None = None
    rank: int | None = None
    speed: float | None = None
    peak_bytes: float | None = None


@dataclass(frozen=True)
class Circle:
    """What one row, of a table or of the summary, is in the figure of score against speed.

    Attributes:
        place: The row's place among the rows.
        label: The row's.
        speed: Training steps per second over those of softmax.
        accuracy: Per cent.
        peak_bytes: Peak memory.
    """

    place: int
    label: str
    speed: float
    accuracy: float
    peak_bytes: float


@dataclass
class Board:
    """A protocol's tables, the summary over tasks, and the published figures beside ours.

    Args:
        runs: Its runs, at least one.
    """

    runs: list[Run]
    protocol: str = field(init=False)
    tables: list[TaskTable] = field(init=False)
    averaged: list[int] = field(init=False)
    summary: list[SummaryRow] = field(init=False)

    def __post_init__(self) -> None:
        self.protocol = self.runs[0].record.protocol
        groups: dict[tuple[Any, ...], list[Run]] = {}
        records = [run.record for run in self.runs]
        for run in self.runs:
            task = run.record.task
            name = task["name"]
            place = TASKS.index(name) if name in TASKS else len(TASKS)
            key = (place, name, task["version"], task["fingerprint"], _data(run.record, records))
            groups.setdefault(key, []).append(run)
        self.tables = [_table(key[-1], groups[key]) for key in sorted(groups)]
        self.averaged = self._averaged()
        self.summary = self._summary()

    def published(self) -> list[tuple[TaskTable, Row, dict[str, Published]]]:
        """Returns rows in default form with the published cells of that task and attention.

        Nothing, unless this protocol follows the code of a paper.
        """
        if all(cell.protocol != self.protocol for cell in published()):
            return []
        found = []
        for i in self.main_tables():
            table = self.tables[i]
            for row in sorted(table.rows, key=lambda row: row.label):
                name, plain = row.first.attention["name"], row.label == row.first.attention["name"]
                cells = {
                    cell.source: cell
                    for cell in published()
                    if (cell.task, cell.attention) == (table.task, name)
                }
                if plain and cells and row.accuracy is not None:
                    found.append((table, row, cells))
        return found

    def main_tables(self) -> list[int]:
        """Returns the table with the most rows of each task, the others being variations."""
        best: dict[str, int] = {}
        for i, table in enumerate(self.tables):
            if table.task not in best or len(table.rows) > len(self.tables[best[table.task]].rows):
                best[table.task] = i
        return list(best.values())

    def _averaged(self) -> list[int]:
        main = self.main_tables()
        return [i for i in main if self.tables[i].task != NOT_AVERAGED] or main

    def _summary(self) -> list[SummaryRow]:
        devices = {row.device for table in self.tables for row in table.rows}
        rows: dict[tuple[str, tuple[str, str]], SummaryRow] = {}
        for i, table in enumerate(self.tables):
            for row in table.rows:
                label = row.label + (f" [{', '.join(row.device)}]" if len(devices) > 1 else "")
                summary = rows.setdefault((label, row.device), SummaryRow(label, {}))
                known = summary.cells.get(i)
                # Of settings with one name, as options added later make them, the latest counts.
                if known is None or known.first.started < row.first.started:
                    summary.cells[i] = row
        for summary in rows.values():
            cells = [summary.cells.get(i) for i in self.averaged]
            scores = [cell.accuracy for cell in cells if cell and cell.accuracy is not None]
            if len(scores) == len(self.averaged):
                summary.average = mean(scores)
            timed = [cell for cell in cells if cell and cell.speed and cell.peak_bytes]
            if summary.average is not None and len(timed) == len(self.averaged) > 1:
                summary.speed = math.exp(mean(math.log(cell.speed or 1.0) for cell in timed))
                summary.peak_bytes = mean(cell.peak_bytes or 0.0 for cell in timed)
        ordered = sorted(
            rows.values(),
            key=lambda s: (
                -(s.average if s.average is not None else -1),
                -len(s.cells),
                s.label,
            ),
        )
        _rank([(s.average, s) for s in ordered])
        return ordered


def circles(rows: Sequence[Row] | Sequence[SummaryRow]) -> list[Circle]:
    """Returns the rows of the figure of score against speed: those with score, speed and memory.

    None where there would be a single one, or where no row has learned the task.

    Args:
        rows: Those of one table, or the summary.
    """
    found, learned = [], False
    for i, row in enumerate(rows):
        accuracy = row.average if isinstance(row, SummaryRow) else row.accuracy
        if row.speed and row.peak_bytes and accuracy is not None:
            found.append(Circle(i, row.label, row.speed, accuracy, row.peak_bytes))
        learned |= isinstance(row, SummaryRow) or (row.seeds > 0 and NOT_LEARNED not in row.marks)
    return found if len(found) > 1 and learned else []


def _data(r: Record, records: Sequence[Record]) -> str:
    """Returns the hash of a record's data; of a run that ended before it had any, its siblings'."""
    known = [r, *records] if "data_hash" in r.task else records
    hashes = (
        one.task["data_hash"]
        for one in known
        if one.task["fingerprint"] == r.task["fingerprint"] and "data_hash" in one.task
    )
    return next(hashes, r.task["fingerprint"])


def _table(data: str, runs: Sequence[Run]) -> TaskTable:
    settings: dict[str, list[Run]] = {}
    for run in runs:
        settings.setdefault(run.record.hash, []).append(run)
    rows = [_row(group) for group in settings.values()]
    rows.sort(
        key=lambda row: (
            -(row.accuracy if row.accuracy is not None else -1),
            row.label,
            row.first.hash,
        )
    )
    _rank([(row.accuracy, row) for row in rows])
    for row in rows:
        yardsticks = [
            other.steps_per_second
            for other in rows
            if other.label == "softmax" and other.conditions == row.conditions
        ]
        if row.steps_per_second and yardsticks and yardsticks[0]:
            row.speed = row.steps_per_second / yardsticks[0]
    records = [run.record for run in runs]
    baselines = next((r.task["baselines"] for r in records if "baselines" in r.task), {})
    rules = {name: 100 * score for name, score in sorted(baselines.items(), key=lambda b: b[1])}
    task = records[0].task
    return TaskTable(task["name"], task["version"], data, rows, rules, records)


def _rank(scored: Sequence[tuple[float | None, Any]]) -> None:
    """Writes ranks into rows that are sorted by score."""
    known = [(score, row) for score, row in scored if score is not None]
    for score, row in known:
        row.rank = 1 + sum(other > score for other, _ in known)


def _row(runs: list[Run]) -> Row:
    """Returns the figures of one setting over its seeds."""
    records = [run.record for run in runs]
    done = [r for r in records if r.status == "ok" and r.test is not None]
    failed = [r for r in records if r.status != "ok"]
    conditions = sorted({_conditions(r) for r in done or records})
    row = Row(
        label_of((done or records)[0]),
        runs,
        "",
        "; ".join(conditions),
        seeds=len(done),
        status=", ".join(sorted({r.status for r in failed})) or "ok",
    )
    row.marks = _marks(row, done)
    scores = [r.test for r in done if r.test]
    if not scores:
        return row
    row.accuracy = 100 * mean(score.accuracy for score in scores)
    if len(scores) > 1:  # over several seeds their deviation tells more than an interval
        row.sd = 100 * stdev(score.accuracy for score in scores)
    else:
        row.low, row.high = 100 * scores[0].low, 100 * scores[0].high
    if len(conditions) == 1:  # figures of two devices have no mean
        speeds = [r.throughput for r in done if r.throughput]
        memory = [r.peak_memory_bytes for r in done if r.peak_memory_bytes]
        row.train_seconds = mean(r.train_seconds for r in done)
        row.evaluation_seconds = mean(r.evaluation_seconds for r in done)
        row.steps_per_second = mean(s.steps_per_second for s in speeds) if speeds else None
        row.tokens_per_second = mean(s.tokens_per_second for s in speeds) if speeds else None
        row.peak_bytes = mean(memory) if memory else None
    return row


def label_of(r: Record) -> str:
    """Returns what the row of a record is called."""
    options = "".join(f" {key}={value}" for key, value in r.attention["non_default"].items())
    modified = ", ".join(f"{key}={value[1]}" for key, value in r.modified.items())
    tuned = f" ({r.tuning['name']} of {len(r.tuning['trials'])} trials)" if r.tuning else ""
    return r.attention["name"] + options + (f" ({modified})" if modified else "") + tuned


def _marks(row: Row, done: Sequence[Record]) -> str:
    r = row.first
    asked, steps = r.modified.get("train.steps", (0, 0))
    scores = [one.test for one in done if one.test]
    bears = {
        MODIFIED: bool(r.modified),
        FEWER: steps < asked,
        LARGER: row.ratio is not None and row.ratio > 1.1,
        LEGACY: bool(r.task.get("validation_is_test")),
        NOT_LEARNED: bool(scores)
        and mean(score.low for score in scores) <= r.task["baselines"]["majority class"],
    }
    return "".join(mark for mark, borne in bears.items() if borne)


def _conditions(r: Record) -> str:
    """Returns what speed and memory depend on; they compare only where it is the same."""
    told = f"{r.device['name']}, {r.device['threads']} threads, {r.precision['name']}"
    told += ", compiled" if r.device.get("compiled") else ""
    told += ", activation checkpointing" if r.device.get("activation_checkpointing") else ""
    shared, processes = (r.device.get(key, 1) for key in ("runs_at_once", "processes"))
    told += f", {processes} processes" if processes > 1 else ""
    return told + (f", {shared} runs at once" if shared > 1 else "")
