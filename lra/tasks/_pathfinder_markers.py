"""What can be told from the two markers of a Pathfinder image alone, without following a line."""

import numpy as np

from lra.tasks._pathfinder_stamps import Geometry, marker

_PIXELS = 2**20  # looked at together, which bounds the memory


def find_markers(images: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Finds the two markers of each image, generated or official.

    Args:
        images: uint8 of shape (n, window, window).
        geometry: That of the images; only the radius of the markers matters.

    Returns:
        (y, x) of both markers, int64 of shape (n, 2, 2), the brighter one first.
    """
    step = max(1, _PIXELS // images[0].size) if len(images) else 1
    found = [_find(images[i : i + step], geometry) for i in range(0, len(images), step)]
    return np.concatenate(found) if found else np.zeros((0, 2, 2), dtype=np.int64)


def _find(images: np.ndarray, geometry: Geometry) -> np.ndarray:
    count, height, width = images.shape
    reach = int(np.ceil(geometry.marker_radius)) + 1
    ideal = marker(geometry, 2 * reach + 1, reach, reach)
    # How bright a whole marker would have to be for its darkest part to look as it does. Nothing
    # but a marker is bright in all of a marker's pixels.
    padded = np.pad(images, ((0, 0), (reach, reach), (reach, reach)))
    level = np.full(images.shape, np.inf, dtype=np.float32)
    for y, x in np.argwhere(ideal >= 128):
        part = padded[:, y : y + height, x : x + width] * np.float32(255 / ideal[y, x])
        np.minimum(level, part, out=level)

    level = level.reshape(count, -1)
    rows = np.arange(count)
    first = level.argmax(axis=1)
    level[rows, first] = -1
    pixels = np.stack([first, level.argmax(axis=1)], axis=1)
    return np.stack(np.divmod(pixels, width), axis=-1)


def marker_distances(images: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Measures the distance in pixels between the markers of each image, float64 of shape (n,).

    Args:
        images: uint8 of shape (n, window, window), generated or official.
        geometry: That of the images; only the radius of the markers matters.
    """
    apart = np.diff(find_markers(images, geometry), axis=1)[:, 0]
    return np.hypot(apart[:, 0], apart[:, 1])


def best_threshold(distances: np.ndarray, labels: np.ndarray) -> tuple[float, int]:
    """Fits the rule that tells labels from distances by a single threshold.

    Args:
        distances: float of shape (n,), n at least 1.
        labels: 0 or 1, of shape (n,).

    Returns:
        The threshold, halfway between two distances, and a sign: the label is 1 where
        ``sign * (distance - threshold)`` is positive. Of equally good ones it is the smallest
        threshold, then the sign 1. Where it is best to give all the same label, the threshold is
        an infinity.
    """
    values, which = np.unique(distances, return_inverse=True)
    weights = np.bincount(which, np.where(labels == 1, 1.0, -1.0), len(values))
    thresholds = np.concatenate([[-np.inf], (values[1:] + values[:-1]) / 2, [np.inf]])
    # Positives minus negatives above each threshold; the best sign 1 has most, sign -1 fewest.
    above = np.concatenate([np.cumsum(weights[::-1])[::-1], [0.0]])
    total = above[0]
    best_above, best_below = int(above.argmax()), int(above.argmin())
    if above[best_above] >= total - above[best_below]:
        return float(thresholds[best_above]), 1
    return float(thresholds[best_below]), -1


def threshold_accuracy(
    distances: np.ndarray, labels: np.ndarray, threshold: float, sign: int
) -> float:
    """Returns the fraction of labels that the rule of ``best_threshold`` gets right."""
    return float(((sign * (distances - threshold) > 0) == (labels == 1)).mean())
