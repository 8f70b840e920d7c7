"""The pixels of Pathfinder images, from where paddles and markers are."""

import numpy as np

from lra.tasks._compiled import compiled, entry
from lra.tasks._pathfinder_stamps import Tables


@compiled
def _ink(canvas: np.ndarray, stamp: np.ndarray, contrast: float, y: int, x: int) -> None:
    """Draws a stamp in the middle of which is (y, x), by the maximum, as far as it is inside."""
    window, side, reach = len(canvas), len(stamp), len(stamp) // 2
    for i in range(max(0, reach - y), min(side, window + reach - y)):
        for j in range(max(0, reach - x), min(side, window + reach - x)):
            # Single precision decides how halves are rounded in the end: as in the original.
            value = np.float64(np.float32(stamp[i, j] / 255 * contrast))
            here = y + i - reach, x + j - reach
            canvas[here] = max(canvas[here], value)


@compiled
def _marker_place(position: int, window: int, places: int) -> int:
    """Returns the row or column of the table of markers."""
    return min(position, places // 2) + max(0, position - (window - 1 - places // 2))


@compiled
def _paint(
    tables: Tables, strokes: np.ndarray, marks: np.ndarray, canvas: np.ndarray, image: np.ndarray
) -> float:
    """Draws strokes and markers and scales to 0 .. 255; returns what was the largest value."""
    window, places = tables.window, len(tables.markers)
    for y in range(window):
        for x in range(window):
            canvas[y, x] = 0
    for row in range(len(strokes)):
        if strokes[row, 0] < 0:
            break
        contrast = tables.target_contrast if strokes[row, 0] < 2 else tables.distractor_contrast
        _ink(canvas, tables.ink[strokes[row, 3]], contrast, strokes[row, 1], strokes[row, 2])
    for i in range(2):
        y, x = marks[i, 0], marks[i, 1]
        row, column = _marker_place(y, window, places), _marker_place(x, window, places)
        _ink(canvas, tables.markers[row, column], 1.0, y, x)

    least = most = canvas[0, 0]
    for y in range(window):
        for x in range(window):
            least, most = min(least, canvas[y, x]), max(most, canvas[y, x])
    scale = 255 / (most - least)
    for y in range(window):
        for x in range(window):
            image[y, x] = np.uint8((canvas[y, x] - least) * scale + 0.5)
    return most


@entry
def paint(
    tables: Tables, strokes: np.ndarray, marks: np.ndarray, images: np.ndarray, peaks: np.ndarray
) -> None:
    """Paints images.

    Args:
        tables: Of the geometry.
        strokes: (n, most strokes, 4): owner, y, x and orientation of each paddle. Owners 0 and 1
            are targets, others are distractors; -1 ends the list.
        marks: (n, 2, 2): (y, x) of both markers.
        images: uint8 of shape (n, window, window), set here.
        peaks: (n,): the largest brightness before scaling, set here.
    """
    canvas = np.empty((tables.window, tables.window))
    for n in range(len(images)):
        peaks[n] = _paint(tables, strokes[n], marks[n], canvas, images[n])
