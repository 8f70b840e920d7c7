"""The figure of `lra maps`: a row for each run, a column for each layer and head."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from lra.report.figures import save

COLOURS = "RdBu_r"
BAND = 0.5
"""Per cent of the cells that may lie beyond either end of the scale."""

WIDEST = 16.0
"""Weights below even attention by more than that do not widen the scale."""

TICKS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16, 32, 64)
SIDE, STEP, GAP, BAR = 1.45, 1.68, 0.25, 0.08
LEFT, TOP, BOTTOM = 0.6, 0.72, 0.5
"""Inches: a matrix and the distance to the next, between blocks, a colour bar; the margins."""


@dataclass(frozen=True)
class Panels:
    """The matrices of a run, (cells, cells) each, in multiples of even attention.

    Attributes:
        name: What the run is called.
        heads: What each matrix is of.
        matrices: Mean attention.
        exact: Attention by the kernel that it estimates; None if it estimates none.
        errors: How far each matrix is from what it estimates.
        reweighting: What re-weights similarities by position, from 0 to 1; None if nothing.
    """

    name: str
    heads: Sequence[str]
    matrices: Sequence[np.ndarray]
    exact: Sequence[np.ndarray] | None
    errors: Sequence[float]
    reweighting: np.ndarray | None


def draw(path: Path, title: str, runs: Sequence[Panels]) -> None:
    """Draws all runs on one logarithmic scale, white where attention is even."""
    with rc_context({"text.parse_math": False}):  # a name with two dollar signs is no formula
        save(_figure(title, runs), path)


@dataclass(frozen=True)
class _Row:
    """A row of the figure: its name, its matrices, a line under each, and what re-weights."""

    name: str
    matrices: Sequence[np.ndarray]
    below: Sequence[str]
    reweighting: np.ndarray | None = None


def _rows(runs: Sequence[Panels]) -> list[_Row]:
    rows = []
    for run in runs:
        below = [f"error {error:.2f}" for error in run.errors]
        rows.append(_Row(run.name, run.matrices, below, run.reweighting))
        if run.exact is not None:
            rows.append(_Row(f"{run.name},\nexact kernel", run.exact, []))
    return rows


def _figure(title: str, runs: Sequence[Panels]) -> Figure:
    rows = _rows(runs)
    columns = max(len(row.matrices) for row in rows)
    reweighted = any(row.reweighting is not None for row in rows)
    width = LEFT + columns * STEP + reweighted * (STEP + GAP) + GAP
    height = TOP + len(rows) * STEP + BOTTOM
    figure = Figure(figsize=(width, height))

    def axes(x: float, y: float, across: float = SIDE, down: float = SIDE) -> Axes:
        """Returns axes whose upper left corner is at (x, y) inches."""
        return figure.add_axes((x / width, 1 - (y + down) / height, across / width, down / height))

    norm = _norm([matrix for row in rows for matrix in row.matrices])
    longest = max(runs, key=lambda run: len(run.heads))
    for i, row in enumerate(rows):
        y = TOP + i * STEP
        for j, matrix in enumerate(row.matrices):
            axis = axes(LEFT + j * STEP, y)
            drawn = _show(axis, np.maximum(matrix, norm.vmin), cmap=COLOURS, norm=norm)
            if j == 0:
                axis.set_ylabel(row.name, fontsize=9)
            if i == 0:
                axis.set_title(longest.heads[j], fontsize=8, pad=3)
            if row.below:
                axis.set_xlabel(row.below[j], fontsize=7.5, labelpad=2)
        if row.reweighting is not None:
            x = LEFT + columns * STEP + GAP
            axis = axes(x, y)
            shade = _show(axis, row.reweighting, cmap="viridis", vmin=0, vmax=1)
            axis.set_title("its re-weighting", fontsize=8, pad=3)
            place = axes(x, y + SIDE + 0.06, down=BAR)
            _bar(figure, shade, place, [0, 0.5, 1])
    place = axes(LEFT, TOP + len(rows) * STEP + 0.05, columns * STEP - STEP + SIDE, BAR)
    ticks = [t for t in TICKS if norm.vmin <= t <= norm.vmax]
    bar = _bar(figure, drawn, place, ticks, extend="both", extendfrac=0.02)
    bar.set_label("weight of a key, in multiples of even attention", fontsize=8)
    figure.suptitle(
        f"{title}\nqueries downwards, keys to the right, both by relative position",
        fontsize=9,
        y=1 - 0.08 / height,
        va="top",
    )
    return figure


def _bar(figure: Figure, drawn: Any, place: Axes, ticks: Sequence[float], **more: Any) -> Any:
    bar = figure.colorbar(drawn, cax=place, orientation="horizontal", ticks=ticks, **more)
    bar.ax.minorticks_off()
    bar.ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    bar.ax.tick_params(labelsize=7)
    return bar


def _norm(matrices: Sequence[np.ndarray]) -> LogNorm:
    """Returns a scale that is symmetric about 1 and that holds nearly all of the cells."""
    cells = np.concatenate([matrix.ravel() for matrix in matrices])
    low, high = np.percentile(cells, [BAND, 100 - BAND])
    reach = max(high, 1 / max(low, 1 / WIDEST), 1.1)
    return LogNorm(1 / reach, reach)


def _show(axis: Axes, matrix: np.ndarray, **scale: Any) -> Any:
    axis.set_xticks([])
    axis.set_yticks([])
    return axis.imshow(matrix, interpolation="nearest", **scale)
