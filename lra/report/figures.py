"""Figures of a leaderboard: learning curves, seeds as points, score against speed and memory."""

import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogLocator

from lra.files import write_atomically
from lra.record import load_metrics
from lra.report.leaderboard import Board, Circle, Row, TaskTable, circles

COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#8c564b",
    "#7f3fbf",
    "#999999",
)
"""Told apart by most colour-blind readers (after Okabe & Ito 2008); softmax is black."""

DASHES = ("-", "--", ":")
PANELS = 3
"""Panels beside one another."""

LARGEST = 700
"""Area of a panel's largest circle, square points."""

NAME_TRIALS = 64
"""Places that are tried for a name: four for every 7 points up and down."""


def write(board: Board, out: Path) -> list[Path]:
    """Writes the figures of a board and returns their paths; one that would be empty is left out.

    Args:
        board: The leaderboard.
        out: The folder.
    """
    paths = []
    for name, draw in (("curves", curves), ("seeds", seeds), ("tradeoff", tradeoff)):
        path = out / f"{name}-{board.protocol}.png"
        with rc_context({"text.parse_math": False}):  # a name with two dollar signs is no formula
            figure = draw(board)
            if figure is not None:
                save(figure, path)
                paths.append(path)
    return paths


def curves(board: Board) -> Figure | None:
    """Draws validation accuracy against steps and against time, the mean over seeds."""
    tables = [table for table in board.tables if any(_curve(row) for row in table.rows)]
    if not tables:
        return None
    figure = Figure(figsize=(10, 2.9 * len(tables) + 0.9), layout="constrained")
    axes = figure.subplots(len(tables), 2, squeeze=False, sharey="row")
    looks = styles(board)
    for table, (by_step, by_time) in zip(tables, axes, strict=True):
        for row in table.rows:
            points = _curve(row)
            if not points:
                continue
            steps, seconds, accuracies = zip(*points, strict=True)
            by_step.plot(steps, accuracies, **looks[row.label])
            by_time.plot([s / 60 for s in seconds], accuracies, **looks[row.label])
        for axis in (by_step, by_time):
            _mark_majority(axis.axhline, table)
        by_step.set_ylabel(f"{table.task}\nvalidation accuracy %")
        by_step.set_xlabel("step")
        by_time.set_xlabel("minutes, evaluations included")
    _legend(figure, [*axes[:, 0]])
    _title(
        figure,
        f"Learning curves, protocol {board.protocol}",
        "dotted: majority class" + _measured(board),
    )
    return figure


def seeds(board: Board) -> Figure | None:
    """Draws the test accuracy of every seed as a point; of a single seed with its interval."""
    tables = [table for table in board.tables if any(row.seeds for row in table.rows)]
    if not tables:
        return None
    figure, panels = _panels(
        len(tables), max(sum(row.seeds > 0 for row in table.rows) for table in tables)
    )
    looks = styles(board)
    for table, axis in zip(tables, panels, strict=True):
        rows = [row for row in table.rows if row.accuracy is not None][::-1]
        for y, row in enumerate(rows):
            colour = looks[row.label]["color"]
            scores = [r.record.test for r in row.runs if r.record.status == "ok" and r.record.test]
            axis.plot([100 * s.accuracy for s in scores], [y] * len(scores), "o", color=colour)
            if row.low is not None and row.high is not None:
                axis.plot([row.low, row.high], [y, y], "-", color=colour, linewidth=1)
            else:
                axis.plot(row.accuracy, y, "|", color=colour, markersize=14)
        axis.set_yticks(range(len(rows)), [row.label + row.marks for row in rows], fontsize=8)
        axis.set_title(table.task, fontsize=10)
        axis.set_xlabel("test accuracy %")
        axis.grid(axis="x", color="#dddddd", linewidth=0.6)
        _mark_majority(axis.axvline, table)
    _title(
        figure,
        f"Test accuracy of every seed, protocol {board.protocol}",
        "upright: mean of seeds; level: 95 % interval of a single seed; dotted: majority class",
    )
    return figure


def tradeoff(board: Board) -> Figure | None:
    """Draws score against speed, both beside softmax's, with peak memory as a circle's area.

    The form of cosFormer's Figure 1 (Qin et al., ICLR 2022). Speed is the geometric mean over
    tasks where a panel shows the average. Tasks that no row has learned are left out.
    """
    every = [(f"average of {len(board.averaged)} tasks", circles(board.summary))]
    every += [(table.task, circles(table.rows)) for table in board.tables]
    panels = [(title, shown) for title, shown in every if shown]
    if not panels:
        return None
    figure, axes = _panels(len(panels), 14)
    looks = styles(board)
    for (title, shown), axis in zip(panels, axes, strict=True):
        largest = max(circle.peak_bytes for circle in shown)
        for circle in shown:
            area = LARGEST * circle.peak_bytes / largest
            colour = looks[circle.label]["color"]
            axis.scatter(circle.speed, circle.accuracy, s=area, color=colour, alpha=0.45)
        axis.set_xscale("log")
        axis.set_title(f"{title}; largest circle {largest / 1e6:,.0f} MB", fontsize=10)
        axis.set_xlabel("training steps/s, softmax = 1")
        axis.set_ylabel("test accuracy %")
        axis.margins(0.18)
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
        axis.grid(color="#eeeeee", linewidth=0.6)
    _title(
        figure,
        f"Score against training speed, protocol {board.protocol}",
        "area of a circle: peak memory of training" + _measured(board),
    )
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # names are placed where the layout has put the circles
    for (_, shown), axis in zip(panels, axes, strict=True):
        _name(axis, shown, canvas.get_renderer())
    return figure


def _curve(row: Row) -> list[tuple[int, float, float]]:
    """Returns (step, seconds, validation accuracy %) at steps that all finished seeds evaluated."""
    seeds = [
        {line["step"]: line for line in load_metrics(run.folder)}
        for run in row.runs
        if run.record.status == "ok"
    ]
    shared = set.intersection(*(set(lines) for lines in seeds)) if seeds else set()
    return [
        (
            step,
            mean(lines[step]["seconds"] for lines in seeds),
            100 * mean(lines[step]["val_accuracy"] for lines in seeds),
        )
        for step in sorted(shared)
    ]


def styles(board: Board) -> dict[str, dict[str, Any]]:
    """Returns colour and dashes of every row's label, the same in all figures of a board."""
    labels = sorted({row.label for table in board.tables for row in table.rows})
    styles: dict[str, dict[str, Any]] = {}
    for i, label in enumerate(label for label in labels if label != "softmax"):
        dashes = DASHES[i // len(COLOURS) % len(DASHES)]
        styles[label] = {"color": COLOURS[i % len(COLOURS)], "linestyle": dashes, "label": label}
    styles["softmax"] = {"color": "black", "linestyle": "-", "label": "softmax"}
    for label in labels:
        styles[label]["linewidth"] = 1.4
    for summary in board.summary:  # its labels may tell a device too
        plain = next(iter(summary.cells.values())).label
        styles.setdefault(summary.label, styles[plain])
    return styles


def _mark_majority(line: Callable[..., Any], table: TaskTable) -> None:
    if "majority class" in table.rules:
        line(table.rules["majority class"], color="#888888", linewidth=1, linestyle=(0, (1, 2)))


def _measured(board: Board) -> str:
    """Returns what times were measured on."""
    rows = [row for table in board.tables for row in table.rows if row.accuracy is not None]
    return "; times on " + " and ".join(sorted({row.conditions for row in rows}))


def _title(figure: Figure, title: str, legend: str) -> None:
    figure.suptitle(f"{title}\n{legend}", fontsize=10)


def _panels(count: int, lines: int) -> tuple[Figure, list[Axes]]:
    """Returns a figure with ``count`` panels that have room for so many lines of text."""
    columns = min(count, PANELS)
    rows = math.ceil(count / columns)
    size = (max(7.5, 4.6 * columns), (1.1 + 0.2 * max(lines, 8)) * rows + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def _legend(figure: Figure, axes: list[Axes]) -> None:
    found = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(
        [found[label] for label in sorted(found)],
        sorted(found),
        loc="outside lower center",
        ncols=min(6, len(found)),
        fontsize=8,
        frameon=False,
    )


def _name(axis: Axes, shown: list[Circle], renderer: RendererAgg) -> None:
    """Writes names beside circles, moved up or down until they do not cover one another."""
    frame = axis.get_window_extent(renderer)
    largest = max(circle.peak_bytes for circle in shown)
    taken: list[Any] = []
    for circle in sorted(shown, key=lambda circle: (circle.accuracy, circle.label)):
        radius = math.sqrt(LARGEST * circle.peak_bytes / largest / math.pi) + 2
        for trial in range(NAME_TRIALS):
            side = 1 if trial % 4 < 2 else -1
            rise = 7 * (trial // 4) * (1 if trial % 2 else -1)
            text = axis.annotate(
                circle.label,
                (circle.speed, circle.accuracy),
                xytext=(side * radius, rise),
                textcoords="offset points",
                fontsize=7,
                va="center",
                ha="left" if side > 0 else "right",
                arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "#888888"}
                if abs(rise) > radius
                else None,
            )
            text.set_in_layout(False)
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)  # of the name alone, without the arrow
            inside = (
                frame.x0 <= box.x0
                and box.x1 <= frame.x1
                and frame.y0 <= box.y0
                and box.y1 <= frame.y1
            )
            if inside and not any(box.overlaps(other) for other in taken):
                break
            if trial < NAME_TRIALS - 1:
                text.remove()
        taken.append(box)


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG whose bytes depend on nothing but the drawing and matplotlib's version."""
    write_atomically(
        path,
        lambda file: figure.savefig(file, format="png", dpi=140, metadata={"Software": None}),
    )
