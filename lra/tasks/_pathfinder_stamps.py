"""What Pathfinder images are put together from: their geometry, and all stamps by orientation.

A snake is a row of short strokes, its paddles. A paddle has one of finitely many orientations: a
whole number of degrees for the first, the direction of a pixel on a small circle for the others.
All that depends on the orientation alone is tabulated here, once for a geometry.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

Difficulty = Literal["easy", "intermediate", "hard"]


@dataclass(frozen=True)
class Geometry:
    """Parameters of a set of images; lengths are in pixels.

    Attributes:
        window: Side of the square image.
        padding: Width of a border that no snake may enter.
        seed_distance: From the beginning of one target snake to that of the other.
        marker_radius: Of the discs at the two marked ends.
        contour_length: Paddles of a target snake.
        paddle_length: From the middle of one end of a paddle to that of the other.
        paddle_thickness: Of the stroke.
        margins: Free space around a paddle. An image has one of these, uniformly.
        continuity: The larger, the straighter the snakes.
        distractor_length: Paddles of a distractor snake.
        distractors: Distractor snakes that are tried; those that find no room are left out.
        snake_contrast: Brightness of a snake, where a marker's is 1.
        paddle_contrast: Factor of the brightness of the target snakes' paddles. Distractors do
            without, so that they are the brighter ones where this is below 1.
        antialias: Strokes and discs are drawn this many times larger, then reduced.
    """

    window: int
    padding: int
    seed_distance: int
    marker_radius: float
    contour_length: int
    paddle_length: int
    paddle_thickness: float
    margins: tuple[int, ...]
    continuity: float
    distractor_length: int
    distractors: int
    snake_contrast: float
    paddle_contrast: float
    antialias: int

    @property
    def reach(self) -> int:
        """How far a stamp extends from its middle, with the largest margin."""
        return self.paddle_length + math.ceil(self.paddle_thickness) + max(self.margins)


_CONTOUR_LENGTHS = {"easy": 6, "intermediate": 9, "hard": 14}

_HARD = {
    32: Geometry(
        window=32,
        padding=1,
        seed_distance=7,
        marker_radius=1.5,
        contour_length=14,
        paddle_length=2,
        paddle_thickness=0.5,
        margins=(1,),
        continuity=1.0,
        distractor_length=4,
        distractors=5,
        snake_contrast=2.0,
        paddle_contrast=0.75,
        antialias=2,
    ),
    128: Geometry(
        window=128,
        padding=1,
        seed_distance=20,
        marker_radius=3,
        contour_length=14,
        paddle_length=5,
        paddle_thickness=1.5,
        margins=(2, 3),
        continuity=1.8,
        distractor_length=4,
        distractors=8,
        snake_contrast=0.9,
        paddle_contrast=1.0,
        antialias=2,
    ),
}


def geometry(window: Literal[32, 128], difficulty: Difficulty = "hard") -> Geometry:
    """Returns the geometry of the Long Range Arena's images of this size and difficulty."""
    if window not in _HARD or difficulty not in _CONTOUR_LENGTHS:
        raise ValueError(
            f"no Pathfinder images of window={window!r}, difficulty={difficulty!r}; there are "
            f"windows {', '.join(map(str, _HARD))} and {', '.join(_CONTOUR_LENGTHS)}"
        )
    # Whether the easier official sets have just as many distractors is not known.
    length = _CONTOUR_LENGTHS[difficulty]
    return replace(_HARD[window], contour_length=length, distractor_length=length // 3)


def circle(angles: Sequence[float], radius: float) -> np.ndarray:
    """Returns the (y, x) at these angles from the origin, float64 of shape (n, 2).

    It is as inexact as the machine's sine: at half a turn y is not quite 0. That is part of the
    task, as the ceiling of such a y is 1 near the upper and left borders, where adding it to a
    coordinate does not swallow it.
    """
    # Not numpy's functions, whose last bit depends on the processor.
    return np.array([(radius * math.sin(angle), radius * math.cos(angle)) for angle in angles])


def opposite(angles: np.ndarray) -> np.ndarray:
    """Returns the angles turned by half a turn, within -pi and pi."""
    return np.where(angles > 0, angles - math.pi, angles + math.pi)


def disc(radius: float) -> np.ndarray:
    """Returns the (y, x) of all pixels at most this far from the origin, int64, shape (n, 2)."""
    side = np.arange(-math.floor(radius), math.floor(radius) + 1)
    offsets = np.stack(np.meshgrid(side, side, indexing="ij"), axis=-1).reshape(-1, 2)
    return offsets[(offsets**2).sum(axis=1) <= radius**2]


def dilate(image: np.ndarray, offsets: Iterable[tuple[int, int]]) -> np.ndarray:
    """Returns the largest value of an image at (y, x) + offset, by (y, x); outside it is 0."""
    reach = int(np.abs(np.asarray(offsets)).max())
    padded = np.pad(image, reach)
    height, width = image.shape
    dilated = np.zeros_like(image)
    for y, x in offsets:
        shifted = padded[reach + y : reach + y + height, reach + x : reach + x + width]
        np.maximum(dilated, shifted, out=dilated)
    return dilated


def reduce(image: np.ndarray, side: int) -> np.ndarray:
    """Returns an 8-bit image scaled to side x side pixels, with the small lobes of Lanczos."""
    small = Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS)
    return np.asarray(small)


def stamp(geometry: Geometry, margin: int, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Draws one paddle from the middle of a patch in the direction of an angle.

    Returns:
        The paddle's ink and its mask, which is what it keeps free of other paddles: uint8, both
        of side 2 * (paddle_length + ceil(paddle_thickness) + margin) + 1.
    """
    scale = geometry.antialias
    reach = geometry.paddle_length + math.ceil(geometry.paddle_thickness) + margin
    middle = scale * reach
    canvas = Image.new("L", (2 * middle + 1, 2 * middle + 1))
    y, x = np.ceil(middle + circle([angle], scale * geometry.paddle_length)[0])
    width = round(scale * geometry.paddle_thickness)
    ImageDraw.Draw(canvas).line([(middle, middle), (int(x), int(y))], fill=255, width=width)
    line = np.asarray(canvas)
    side = 2 * reach + 1
    return reduce(line, side), reduce(dilate(line, disc(scale * margin)), side)


def marker(geometry: Geometry, side: int, y: int, x: int) -> np.ndarray:
    """Draws a marker at (y, x) of an empty image; uint8 of shape (side, side)."""
    scale = geometry.antialias
    rows, columns = np.ogrid[: scale * side, : scale * side]
    distance = (rows - scale * y) ** 2 + (columns - scale * x) ** 2
    inside = distance <= (scale * geometry.marker_radius) ** 2
    return reduce(np.where(inside, np.uint8(255), np.uint8(0)), side)


class Tables(NamedTuple):
    """What drawing needs to know: the geometry's numbers, and all that can be tabulated.

    Orientations are numbered through: for each margin in turn the 360 whole degrees of a first
    paddle, then the directions that a later paddle can have. Patches are centred.

    Attributes:
        window: Side of the image.
        padding: Width of the border that is always taken.
        contour_length: Paddles of a target.
        distractor_length: Paddles of a distractor.
        distractors: How many are tried.
        target_contrast: Brightness of the targets' ink.
        distractor_contrast: Brightness of the distractors' ink.
        margins: (margins,)
        ranges: (margins, 3): number of the first degree, of the first direction, and the end.
        spans: (margins, largest margin + 1): half-width of each row of a disc, from the middle
            row on; -1 where there is none.
        ink: (orientations, side, side), uint8.
        mask: (orientations, side, side), uint8.
        ahead: (orientations, 2): from a snake's pivot to the next one.
        place: (orientations, 2): from that pivot to the middle of the paddle's stamp.
        weights: (orientations, directions): how readily each direction follows an orientation.
        head: (orientations, 2): from a first paddle's middle to its head.
        behind: (orientations, 2): from there to the first pivot.
        feelers: (orientations, side, side), bool: around a first paddle's middle: must be free.
        blind: (orientations,), bool: whether no snake can begin this way.
        tails: (orientations, 4): where the first target can begin: first and last row, then
            column; nowhere if a last one is before the first.
        around: (360, 2): from the beginning of the first target to that of the second.
        markers: (places, places, side, side), uint8: a marker by its distance from the borders,
            which change the lobes; the middle one serves all that are far from them.
    """

    window: int
    padding: int
    contour_length: int
    distractor_length: int
    distractors: int
    target_contrast: float
    distractor_contrast: float
    margins: np.ndarray
    ranges: np.ndarray
    spans: np.ndarray
    ink: np.ndarray
    mask: np.ndarray
    ahead: np.ndarray
    place: np.ndarray
    weights: np.ndarray
    head: np.ndarray
    behind: np.ndarray
    feelers: np.ndarray
    blind: np.ndarray
    tails: np.ndarray
    around: np.ndarray
    markers: np.ndarray


def directions(geometry: Geometry, margin: int) -> np.ndarray:
    """Returns the steps from a pivot to the pixels where the next paddle can end.

    They are those of a circle that is sampled about once a pixel; int64 of shape (n, 2), sorted.
    """
    radius = geometry.paddle_length + margin
    angles = np.radians(np.arange(0, 360, 360 / (2 * math.pi * radius)))
    return np.unique(np.floor(circle(angles, radius)).astype(np.int64), axis=0)


def turn_weights(geometry: Geometry, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Returns how readily a snake turns from one angle to another, (before, after), up to 1."""
    turn = np.abs(after - before[:, None])
    turn = np.minimum(turn, 2 * math.pi - turn)
    # Rounded, so that "not at all" is 0 and that all processors agree.
    return np.cos(np.minimum(geometry.continuity * turn, math.pi / 2)).round(12) ** 2


def feelers(geometry: Geometry, margin: int, mask: np.ndarray) -> np.ndarray:
    """Returns the pixels around a first paddle's middle that must be free, from its mask.

    They are the full-valued part of the mask, one pixel further down and to the right than it is
    drawn, in a window of side 2 * (paddle_length + margin) + 1; bool.
    """
    side = 2 * (geometry.paddle_length + margin) + 1
    window = np.zeros((side, side), dtype=bool)
    skipped = side // 2 + 1 - len(mask) // 2  # negative where the mask is larger than the window
    inside = mask[max(0, -skipped) : side - skipped, max(0, -skipped) : side - skipped] == 255
    start = max(0, skipped)
    window[start : start + len(inside), start : start + len(inside)] = inside
    return window


def is_blind(feelers: np.ndarray) -> bool:
    """Whether feelers would see nothing of an image from some place in it.

    It happens at the lower and right borders, to feelers that all point there. The original then
    finds no place at all for a snake, as its images tell: in those of 32 pixels only 30 of the 360
    degrees are left for the first paddles of the first target and of distractors, of which few are
    placed. In those of 128 pixels 6 degrees are lost at one of the two margins.
    """
    image = np.ones((2 * len(feelers), 2 * len(feelers)), dtype=np.uint8)
    return not dilate(image, np.argwhere(feelers) - len(feelers) // 2).all()


@cache
def tables(geometry: Geometry) -> Tables:
    """Tabulates all stamps of a geometry, which takes a fraction of a second."""
    per_margin = [_orientations(geometry, margin) for margin in geometry.margins]
    sizes = np.array([len(columns["ink"]) for columns in per_margin])
    ends = np.cumsum(sizes)
    arrays = {name: _stack([columns[name] for columns in per_margin]) for name in per_margin[0]}
    arrays |= {
        "margins": np.array(geometry.margins),
        "ranges": np.stack([ends - sizes, ends - sizes + 360, ends], axis=-1),
        "spans": np.array([_span(margin, max(geometry.margins)) for margin in geometry.margins]),
        "around": circle(np.radians(np.arange(360)), geometry.seed_distance),
        "markers": _markers(geometry),
    }
    for array in arrays.values():
        array.flags.writeable = False  # they are shared
    return Tables(
        window=geometry.window,
        padding=geometry.padding,
        contour_length=geometry.contour_length,
        distractor_length=geometry.distractor_length,
        distractors=geometry.distractors,
        target_contrast=geometry.snake_contrast * geometry.paddle_contrast,
        distractor_contrast=geometry.snake_contrast,
        **arrays,
    )


def _orientations(geometry: Geometry, margin: int) -> dict[str, np.ndarray]:
    """Returns the tables that have a row for each orientation."""
    length = geometry.paddle_length
    degrees = np.radians(np.arange(-180, 180))
    places = directions(geometry, margin)
    onward = np.array([math.atan2(y, x) for y, x in places])
    angles = np.concatenate([degrees, onward])
    # A paddle is drawn from its far end back to the pivot; only the first is drawn onward.
    stamps = [stamp(geometry, margin, angle) for angle in [*degrees, *opposite(onward)]]
    felt = [feelers(geometry, margin, mask) for _, mask in stamps]
    return {
        "ink": np.stack([ink for ink, _ in stamps]),
        "mask": np.stack([mask for _, mask in stamps]),
        "ahead": circle(angles, length + 2 * margin),
        "place": np.concatenate([np.zeros((len(degrees), 2), dtype=np.int64), places]),
        "weights": turn_weights(geometry, angles, onward),
        "head": circle(angles, length),
        "behind": circle(opposite(angles), length + margin),
        "feelers": np.stack(felt),
        "blind": np.array([is_blind(patch) for patch in felt]),
        "tails": np.array([_tails(geometry, patch) for patch in felt]),
    }


def _tails(geometry: Geometry, feelers: np.ndarray) -> tuple[int, int, int, int]:
    """Returns the first and last row and column from where feelers stay in the middle."""
    offsets = np.argwhere(feelers) - len(feelers) // 2
    border = 2 * geometry.seed_distance
    first = border - offsets.min(axis=0)
    last = geometry.window - border - 1 - offsets.max(axis=0)
    return first[0], last[0], first[1], last[1]


def _stack(columns: list[np.ndarray]) -> np.ndarray:
    """Puts tables below each other; patches and rows of weights grow to the largest with 0."""
    shape = np.max([column.shape[1:] for column in columns], axis=0)
    padded = []
    for column in columns:
        missing = shape - column.shape[1:]
        before = missing // 2 if column.ndim == 3 else np.zeros_like(missing)
        padded.append(np.pad(column, [(0, 0), *zip(before, missing - before, strict=True)]))
    return np.concatenate(padded)


def _span(radius: int, rows: int) -> list[int]:
    """Returns the half-widths of a disc's rows, from the middle one to that of number ``rows``."""
    return [math.isqrt(radius**2 - y**2) if y <= radius else -1 for y in range(rows + 1)]


def _markers(geometry: Geometry) -> np.ndarray:
    """Cuts markers out of an image just large enough to have all kinds of places."""
    reach = math.ceil(geometry.marker_radius) + 3  # three is the reach of Lanczos
    places = 4 * reach + 1
    side = 2 * reach + 1
    cut = np.zeros((places, places, side, side), dtype=np.uint8)
    for y in range(places):
        for x in range(places):
            whole = np.pad(marker(geometry, places, y, x), reach)
            cut[y, x] = whole[y : y + side, x : x + side]
    return cut
