"""Pathfinder images: two curved dashed lines, two marked ends; are they the ends of one line?

The task is Linsley et al. 2018 (arXiv 1805.08315) with the parameters of the Long Range Arena, Tay
et al. 2021 (arXiv 2011.04006): 32 x 32 pixels, and 128 x 128, known as Path-X.

An image has two target snakes, as many distractors as find room of those that are tried, and two
markers: discs at the beginning of one target and at the end of the same or the other one. Where
the snakes go is decided first; only then are pixels drawn.
"""

from typing import NamedTuple

import numpy as np

from lra.tasks._pathfinder_markers import best_threshold, marker_distances, threshold_accuracy
from lra.tasks._pathfinder_paint import paint
from lra.tasks._pathfinder_snakes import plan
from lra.tasks._pathfinder_stamps import Geometry, geometry, tables

__all__ = [
    "Drawing",
    "Geometry",
    "best_threshold",
    "draw",
    "generate",
    "geometry",
    "marker_distances",
    "threshold_accuracy",
]


class Drawing(NamedTuple):
    """Images and how they came about; all arrays have a row for each.

    Attributes:
        images: uint8 of shape (n, window, window).
        labels: uint8 of shape (n,): whether both markers belong to one snake.
        marks: int64 of shape (n, 2, 2): (y, x) of both markers.
        marked: int64 of shape (n, 2): the target, 0 or 1, at whose beginning the first marker is,
            and that at whose end the second is.
        strokes: int64 of shape (n, most strokes, 4): owner, y, x and orientation (its number in
            the tables) of each paddle. Owners 0 and 1 are the targets, others are distractors;
            -1 fills the rows that are not used.
        margins: int64 of shape (n,): number of the margin, in the geometry's.
        trials: int64 of shape (n,): pairs of targets that were tried.
        peaks: float64 of shape (n,): the largest brightness, which becomes 255.
    """

    images: np.ndarray
    labels: np.ndarray
    marks: np.ndarray
    marked: np.ndarray
    strokes: np.ndarray
    margins: np.ndarray
    trials: np.ndarray
    peaks: np.ndarray


def draw(geometry: Geometry, *, seed: int, first: int, count: int) -> Drawing:
    """Draws images and says how; the arguments are those of ``generate``."""
    assert 0 <= seed < 2**63, seed
    assert first >= 0 <= count, (first, count)
    table = tables(geometry)
    targets = 2 * geometry.contour_length
    rows = targets + geometry.distractors * geometry.distractor_length
    out = Drawing(
        images=np.empty((count, geometry.window, geometry.window), dtype=np.uint8),
        labels=np.empty(count, dtype=np.uint8),
        marks=np.empty((count, 2, 2), dtype=np.int64),
        marked=np.empty((count, 2), dtype=np.int64),
        strokes=np.empty((count, rows, 4), dtype=np.int64),
        margins=np.empty(count, dtype=np.int64),
        trials=np.empty(count, dtype=np.int64),
        peaks=np.empty(count),
    )
    plan(table, int(seed), int(first), out.labels, out.margins, out.trials, out.strokes, out.marked)
    start, end = out.marked.T
    images = np.arange(count)
    out.marks[:, 0] = out.strokes[images, start, 1:3]
    out.marks[:, 1] = out.strokes[images, targets - 2 + end, 1:3]
    paint(table, out.strokes, out.marks, out.images, out.peaks)
    return out


def generate(
    geometry: Geometry, *, seed: int, first: int, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws images ``first``, ``first + 1``, ... of an endless sequence.

    Image i is a function of the geometry, the seed and i, so that any number of threads and
    processes can share the work without changing it.

    Args:
        geometry: Of the images.
        seed: Names the sequence, 0 to 2**63 - 1.
        first: Number of the first image to draw.
        count: How many.

    Returns:
        The images, uint8 of shape (count, window, window); the labels, uint8 of shape (count,), 1
        where both markers belong to one snake; the (y, x) of both markers, int64 of shape
        (count, 2, 2).
    """
    drawing = draw(geometry, seed=seed, first=first, count=count)
    return drawing.images, drawing.labels, drawing.marks
