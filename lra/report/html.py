"""All leaderboards as one HTML page that loads nothing: tables, figures and the runs' records.

Cells are those of `lra.report.pages`; the browser sorts, hides and draws them and averages nothing.
Data stand in the page as JSON that can end no tag, the script shows them as text alone, and the
page's policy has a browser run that script and no other, and load nothing.
"""

import base64
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from lra.record import load_metrics
from lra.report import pages
from lra.report.figures import styles
from lra.report.leaderboard import Board, Row, SummaryRow, TaskTable, circles
from lra.report.published import published
from lra.report.store import Run
from lra.report.table import CROSS, DASH, Table

PAGE = Path(__file__).parent / "page"

SCRIPTS = ("table.js", "record.js", "charts.js", "leaderboard.js")
"""Ours, in the order in which they are read."""

MEANS = ("speed vs softmax", "peak MB", "parameters vs softmax")
"""Columns that the table of all tasks has on the page alone."""

RUN_COLUMNS = (
    "attention",
    "task",
    "seed",
    "status",
    "test accuracy %",
    "95 % interval",
    "validation accuracy %",
    "steps",
    "train s",
    "steps/s",
    "peak MB",
    "started",
    "run",
)

EXACT = 2**53
"""Larger integers are rounded by a browser."""


def page(boards: Sequence[Board]) -> str:
    """Returns the page of all protocols."""
    chart = (PAGE / "vendor" / "chart-4.6.1.umd.min.js").read_text(encoding="utf-8")
    licence = (PAGE / "vendor" / "chart-LICENSE.md").read_text(encoding="utf-8")
    parts = {
        "style": (PAGE / "leaderboard.css").read_text(encoding="utf-8"),
        # Its last line would have a browser look for a file beside the page.
        "chart": f"/*\n{licence}*/\n{chart.partition('//# sourceMappingURL')[0]}",
        "script": '"use strict";\n'
        + "\n".join((PAGE / name).read_text(encoding="utf-8") for name in SCRIPTS),
        "data": _data(boards),
    }
    style, *scripts = (_digest(parts[name]) for name in ("style", "chart", "script"))
    parts["policy"] = (
        f"default-src 'none'; img-src data:; style-src {style}; script-src {' '.join(scripts)}; "
        f"base-uri 'none'; form-action 'none'"
    )
    template = (PAGE / "leaderboard.html").read_text(encoding="utf-8")
    # In one pass: what stands in a part is no place for another one.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], template)


def _digest(text: str) -> str:
    """Returns what names an inline style or script in a page's policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _data(boards: Sequence[Board]) -> str:
    """Returns all that the page shows as JSON, a line for each protocol, run and section."""
    rows = [row for board in boards for table in board.tables for row in table.rows]
    labels = {run.folder: row.label for row in rows for run in row.runs}
    runs = [run for board in boards for run in board.runs]
    places = {run.folder: i for i, run in enumerate(runs)}
    sections: dict[str, int] = {}
    lines = {
        "protocols": [_json(_protocol(board, places)) for board in boards],
        "runs": [_json(_run(run, labels[run.folder], sections)) for run in runs],
        "sections": list(sections),
    }
    parts = [f'"{name}": [\n' + ",\n".join(told) + "\n]" for name, told in lines.items()]
    return "{" + ",\n".join(parts) + "}"


def _json(value: Any) -> str:
    """Returns JSON without a character that a tag or a line end of JavaScript is made of."""
    text = json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029]", lambda odd: f"\\u{ord(odd[0]):04x}", text)


def _plain(value: Any) -> Any:
    """Returns a value with numbers that JSON or a browser lacks as text."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    lacking = (isinstance(value, float) and not math.isfinite(value)) or (
        isinstance(value, int) and abs(value) > EXACT
    )
    return str(value) if lacking else value


def _run(run: Run, label: str, sections: dict[str, int]) -> dict[str, Any]:
    """Returns a record and its evaluations, the sections that runs share by their places.

    Args:
        run: The run.
        label: Of its row.
        sections: JSON of the sections so far, to which those of the run are added.
    """

    def place(section: Any) -> dict[str, int]:
        return {"section": sections.setdefault(_json(section), len(sections))}

    told = dataclasses.asdict(run.record)
    told["config"] = {k: place(v) if isinstance(v, dict) else v for k, v in told["config"].items()}
    for name in ("task", "attention", "precision", "device", "versions", "commit"):
        told[name] = place(told[name])
    evaluations = [
        [line["step"], line["seconds"], line["val_accuracy"], line.get("val_loss")]
        for line in load_metrics(run.folder)
    ]
    return {"label": label, "record": told, "evaluations": evaluations}


def _protocol(board: Board, places: Mapping[Path, int]) -> dict[str, Any]:
    """Returns what the page shows of a protocol; runs are told by their places."""
    views = [_task(board, i, places) for i in range(len(board.tables))]
    if len(views) > 1:
        views.insert(0, _summary(board, places))
    beside = [_about(row, places) for _, row, _ in board.published()]
    return {
        "name": board.protocol,
        "origin": pages.origin(board).replace("`", ""),
        "looks": styles(board),
        "views": views,
        "beside": _table(pages.beside_published(board), beside) if beside else None,
        "runs": _runs(board, places),
    }


def _summary(board: Board, places: Mapping[Path, int]) -> dict[str, Any]:
    """Returns the table over all tasks, with speed, memory and size beside the scores."""
    names = pages.titles(board.tables)
    table = pages.summary(board)
    means = [_means(board, row) for row in board.summary]
    means += [[DASH] * len(MEANS)] * (len(table.rows) - len(means))
    note = f"{', '.join(MEANS)}: means over the averaged tasks, geometric ones of ratios."
    wider = dataclasses.replace(
        table,
        columns=[*table.columns, *MEANS],
        rows=[[*cells, *more] for cells, more in zip(table.rows, means, strict=True)],
        notes=[*table.notes, note],
    )
    about = []
    for row in board.summary:
        links = {names[i]: _places(cell, places) for i, cell in row.cells.items()}
        first = next(iter(row.cells.values()))
        about.append(
            _about(first, places)
            | {"label": row.label, "runs": [i for link in links.values() for i in link]}
            | {"links": links}
        )
    columns = {board.tables[i].task: names[i] for i in board.main_tables()}
    return _table(wider, about, _printed(board, wider, columns)) | {
        "panels": [_panel(t, name, places) for t, name in zip(board.tables, names, strict=True)],
        "circles": [dataclasses.astuple(circle) for circle in circles(board.summary)],
        "score": f"average of {len(board.averaged)} tasks",
    }


def _means(board: Board, row: SummaryRow) -> list[str]:
    ratios = [row.cells[i].ratio for i in board.averaged if i in row.cells]
    known = [ratio for ratio in ratios if ratio]
    return [
        DASH if row.speed is None else f"{row.speed:.2f}",
        DASH if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.1f}",
        DASH if len(known) < len(board.averaged) else f"{geometric_mean(known):.3f}",
    ]


def _task(board: Board, i: int, places: Mapping[Path, int]) -> dict[str, Any]:
    """Returns a task's table."""
    table, title = board.tables[i], pages.titles(board.tables)[i]
    cells = pages.task(table)
    column = {table.task: "test accuracy %"} if i in board.main_tables() else {}
    about = [_about(row, places) for row in table.rows]
    return _table(cells, about, _printed(board, cells, column)) | {
        "title": title,
        "panels": [_panel(table, title, places)],
        "circles": [dataclasses.astuple(circle) for circle in circles(table.rows)],
        "score": title,
    }


def _about(row: Row, places: Mapping[Path, int]) -> dict[str, Any]:
    """Returns what the page has to know of a row beside its cells."""
    return {
        "label": row.label,
        "attention": row.first.attention["name"],
        "modified": bool(row.first.modified),
        "runs": _places(row, places),
    }


def _places(row: Row, places: Mapping[Path, int]) -> list[int]:
    return [places[run.folder] for run in row.runs]


def _panel(table: TaskTable, title: str, places: Mapping[Path, int]) -> dict[str, Any]:
    """Returns what learning curves are drawn of."""
    return {
        "title": title,
        "majority": table.rules.get("majority class"),
        "runs": [i for row in table.rows for i in _places(row, places)],
    }


def _printed(board: Board, table: Table, columns: Mapping[str, str]) -> list[dict[str, Any]]:
    """Returns the rows of papers whose code this protocol follows, for the end of a table.

    Args:
        board: The leaderboard.
        table: The table.
        columns: Where the accuracy of each task stands.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for cell in published():
        if cell.protocol != board.protocol or cell.task not in columns:
            continue
        group = f"Published: {cell.source}, protocol {cell.protocol}; not ranked"
        fresh = {
            "cells": [cell.attention, *[DASH] * (len(table.columns) - 1)],
            "group": group,
            "attention": cell.attention,
            "label": cell.attention,
            "published": True,
        }
        row = rows.setdefault((cell.source, cell.attention), fresh)
        row["cells"][list(table.columns).index(columns[cell.task])] = f"{cell.accuracy:.2f}"
    return list(rows.values())


def _table(
    table: Table, about: Sequence[Mapping[str, Any]], printed: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Returns a table for the page, without columns in which nothing stands.

    Args:
        table: Its cells.
        about: What the page has to know of the first rows; the others are rules.
        printed: Rows of papers.
    """
    rules = [[name.strip("*"), *figures] for name, *figures in table.rows[len(about) :]]
    cells = [*table.rows[: len(about)], *rules, *(row["cells"] for row in printed)]
    kept = dataclasses.replace(table, rows=cells).without_empty_columns()
    told = [*about, *[{"group": "Rules that learn nothing"}] * len(rules), *printed]
    return {
        "title": kept.heading,
        "above": kept.above,
        "columns": kept.columns,
        "left": kept.left,
        "notes": kept.notes,
        "rows": [{**row, "cells": shown} for row, shown in zip(told, kept.rows, strict=True)],
    }


def _runs(board: Board, places: Mapping[Path, int]) -> dict[str, Any]:
    """Returns every run as a row of its own."""
    cells, about = [], []
    for table, title in zip(board.tables, pages.titles(board.tables), strict=True):
        for row in table.rows:
            for run in row.runs:
                cells.append([row.label + row.marks, title, *_figures(run)])
                about.append(_about(row, places) | {"runs": [places[run.folder]]})
    return _table(Table("runs", RUN_COLUMNS, cells), about)


def _figures(run: Run) -> list[str]:
    r = run.record
    score = r.test if r.status == "ok" else None
    failed = r.status if r.status == "running" else f"{CROSS} {r.status}"
    memory = r.peak_memory_bytes
    return [
        str(r.seed),
        r.status,
        failed if score is None else f"{100 * score.accuracy:.2f}",
        DASH if score is None else f"{100 * score.low:.1f} to {100 * score.high:.1f}",
        DASH if r.validation is None else f"{100 * r.validation.accuracy:.2f}",
        f"{r.steps:,}",
        f"{r.train_seconds:,.0f}",
        DASH if r.throughput is None else f"{r.throughput.steps_per_second:.2f}",
        DASH if memory is None else f"{memory / 1e6:,.1f}",
        r.started[:16].replace("T", " "),
        f"s{r.seed}-{r.hash}",
    ]
