"""A leaderboard as Markdown, LaTeX and CSV."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from lra.report.leaderboard import MARKS, NOT_AVERAGED, Board, Row, TaskTable
from lra.report.table import CROSS, DASH, Table, escaped, signed

HEADERS = (
    "attention",
    "rank",
    "test accuracy %",
    "95 % interval",
    "seeds",
    "parameters",
    "vs softmax",
    "train s",
    "steps/s",
    "speed vs softmax",
    "peak MB",
    "conditions",
)


def markdown(board: Board) -> str:
    """Returns the leaderboard as a Markdown document."""
    tables = [table.markdown(level=2) for table in _tables(board)]
    title = f"# Leaderboard, protocol {board.protocol}"
    return "\n\n".join([title, *tables, origin(board)]) + "\n"


def tex(board: Board) -> str:
    """Returns the leaderboard as LaTeX tables, to be read in by a document."""
    parts = [
        f"% Leaderboard, protocol {board.protocol}. Needs \\usepackage{{booktabs}}.",
        *(table.tex(f"Protocol {board.protocol}.") for table in _tables(board)),
        f"% {escaped(origin(board))}",
    ]
    return "\n\n".join(parts) + "\n"


def csv(board: Board) -> str:
    """Returns all rows, with unrounded figures and without marks."""
    lines = []
    for table in board.tables:
        about = {
            "protocol": board.protocol,
            "task": table.task,
            "task_version": table.version,
            "data": table.data,
        }
        lines += [about | _figures(row) for row in table.rows]
        lines += [
            about | {"kind": "rule", "name": name, "accuracy": accuracy, "n": table.n}
            for name, accuracy in table.rules.items()
        ]
        lines += [
            about
            | {
                "kind": "published",
                "name": row.label,
                "accuracy": cell.accuracy,
                "source": cell.source,
                "source_protocol": cell.protocol,
                "difference": (row.accuracy or 0.0) - cell.accuracy,
            }
            for other, row, cells in board.published()
            if other is table
            for cell in cells.values()
        ]
    return pd.DataFrame(lines).convert_dtypes().to_csv(index=False, lineterminator="\n")


def _tables(board: Board) -> list[Table]:
    tables = [task(table) for table in board.tables]
    if len(tables) > 1:
        tables.insert(0, summary(board))
    if board.published():
        tables.append(beside_published(board))
    return [table.without_empty_columns() for table in tables]


def summary(board: Board) -> Table:
    """Returns the accuracies of all tasks: `Board.summary`, then rules."""
    names = titles(board.tables)
    averaged = [names[i] for i in board.averaged]
    headers = ["attention", "rank", *names, f"average of {len(averaged)}"]
    rows = [
        [
            row.label,
            _format("{}", row.rank),
            *(_accuracy(row.cells.get(i), seeds=True) for i in range(len(names))),
            _format("{:.2f}", row.average),
        ]
        for row in board.summary
    ]
    rules = {name for table in board.tables for name in table.rules}
    order = sorted(rules, key=lambda name: (name != "majority class", name))
    rows += [
        [
            f"*{name}*",
            DASH,
            *(_format("{:.2f}", table.rules.get(name)) for table in board.tables),
            DASH,
        ]
        for name in order
    ]
    about = ["Test accuracy in per cent, ± standard deviation over the seeds in brackets."]
    left_out = sorted({table.task for table in board.tables} & {NOT_AVERAGED})
    notes = [f"Average of {', '.join(averaged)}, where a row has them all."]
    notes += [f"{name} is left out of the average, as in the arena's table." for name in left_out]
    marks = "".join(row.marks for s in board.summary for row in s.cells.values())
    return Table("all tasks", headers, rows, notes + _explained(marks), about)


def task(table: TaskTable) -> Table:
    """Returns a task's figures: the rows of the table, then rules."""
    conditions = {row.conditions for row in table.rows if row.accuracy is not None}
    rows = [_cells(row, told=len(conditions) > 1) for row in table.rows]
    rows += [
        [f"*{name}*", DASH, f"{accuracy:.2f}", *[DASH] * (len(HEADERS) - 3)]
        for name, accuracy in table.rules.items()
    ]
    notes = [f"Speed and memory: {next(iter(conditions))}."] if len(conditions) == 1 else []
    notes += _explained("".join(row.marks for row in table.rows))
    return Table(table.task, HEADERS, rows, notes, [_about(table)])


def beside_published(board: Board) -> Table:
    """Returns `Board.published` with a column for each paper's table."""
    rows = board.published()
    protocols = {cell.source: cell.protocol for _, _, cells in rows for cell in cells.values()}
    sources = sorted(protocols, key=lambda s: (protocols[s] != board.protocol, s))
    headers = ["task", "attention", "ours", *(source.partition(" (")[0] for source in sources)]
    cells = []
    for table, row, found in rows:
        line = [table.task, row.label + row.marks, f"{row.accuracy:.2f}"]
        for source in sources:
            cell = found.get(source)
            line.append(
                DASH
                if cell is None
                else f"{cell.accuracy:.2f} ({signed((row.accuracy or 0.0) - cell.accuracy)})"
            )
        cells.append(line)
    about = ["Test accuracy in per cent; in brackets, how much ours is above the published figure."]
    notes = [f"{source}: protocol {protocols[source]}." for source in sources]
    notes += _explained("".join(row.marks for _, row, _ in rows))
    return Table("beside published figures", headers, cells, notes, about, left=2)


def titles(tables: Sequence[TaskTable]) -> list[str]:
    """Returns the tables' names, with versions and data where a task has several."""
    count = [sum(other.task == table.task for other in tables) for table in tables]
    return [
        table.task if n == 1 else f"{table.task} v{table.version} {table.data[:6]}"
        for table, n in zip(tables, count, strict=True)
    ]


def _about(table: TaskTable) -> str:
    """Returns one line on the data and the training of a table."""
    train = [r.config["train"] for r in table.records if not r.modified]
    steps = ""
    if train:
        steps = f" {train[0]['steps']:,} steps of {train[0]['batch_size']:,} examples."
    for r in table.records:
        if "splits" in r.task:
            parts = [f"{s['examples']:,} {name}" for name, s in r.task["splits"].items()]
            longest = max(s["longest"] for s in r.task["splits"].values())
            return (
                f"{' / '.join(parts)} examples of up to {longest:,} tokens; version "
                f"{table.version}, data {table.data}. Chance {r.task['chance']:.0%}.{steps}"
            )
    return f"Version {table.version}, settings {table.data}.{steps}"


def _cells(row: Row, told: bool) -> list[str]:
    seeds = _format("{}", row.seeds)
    if row.seeds and row.status != "ok":
        seeds += f" (others: {row.status})"
    return [
        row.label + row.marks,
        _format("{}", row.rank),
        _accuracy(row),
        _format("{:.1f} to {:.1f}", row.low, row.high),
        seeds,
        _format("{:,}", row.first.parameters),
        _format("{:.3f}", row.ratio),
        _format("{:,.0f}", row.train_seconds),
        _format("{:.2f}", row.steps_per_second),
        _format("{:.2f}", row.speed),
        _format("{:,.1f}", None if row.peak_bytes is None else row.peak_bytes / 1e6),
        row.conditions if told else DASH,
    ]


def _accuracy(row: Row | None, seeds: bool = False) -> str:
    if row is None:
        return DASH
    if row.accuracy is None:
        return row.status if row.status == "running" else f"{CROSS} {row.status}"
    text = f"{row.accuracy:.2f}"
    if row.sd is not None:
        text += f" ± {row.sd:.2f}" + (f" ({row.seeds})" if seeds else "")
    return text + (row.marks if seeds else "")


def _figures(row: Row) -> dict[str, Any]:
    """Returns a row's figures for the CSV."""
    test = row.first.test
    return {
        "kind": "attention",
        "name": row.label,
        "rank": row.rank,
        "accuracy": row.accuracy,
        "sd": row.sd,
        "low": row.low,
        "high": row.high,
        "n": test.n if test else None,
        "seeds": row.seeds,
        "status": row.status,
        "parameters": row.first.parameters,
        "ratio": row.ratio,
        "train_seconds": row.train_seconds,
        "evaluation_seconds": row.evaluation_seconds,
        "steps_per_second": row.steps_per_second,
        "tokens_per_second": row.tokens_per_second,
        "speed_vs_softmax": row.speed,
        "peak_megabytes": None if row.peak_bytes is None else row.peak_bytes / 1e6,
        "conditions": row.conditions,
        "hash": row.first.hash,
        "source": None,
        "source_protocol": None,
        "difference": None,
    }


def _explained(marks: str) -> list[str]:
    return [f"{mark} {meaning}." for mark, meaning in MARKS.items() if mark in marks]


def origin(board: Board) -> str:
    """Returns how the tables were made: records, code, packages, dates."""
    records = [run.record for run in board.runs]
    commits = {
        str(r.commit["commit"])[:10] + (" (modified)" if r.commit["dirty"] else "") for r in records
    }
    torch = {r.versions["torch"] for r in records}
    days = sorted(r.started[:10] for r in records)
    dates = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    return (
        f"Made by `lra report` from {len(records)} records of {dates}; torch "
        f"{', '.join(sorted(torch))}; code {', '.join(sorted(commits))}."
    )


def _format(pattern: str, *values: Any) -> str:
    return DASH if values[0] is None else pattern.format(*values)
