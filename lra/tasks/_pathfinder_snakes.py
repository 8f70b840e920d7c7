"""Where the paddles of Pathfinder's snakes go, by rejection sampling.

Two target snakes are drawn at once and thrown away together until all their paddles fit, which
takes some hundred trials an image; then come distractors, as far as there is room. What is kept is
written down as a list of strokes. The bookkeeping meanwhile is an 8-bit image of what is taken. It
has a border as wide as a stamp reaches, so that stamps need no clipping.

All that is compiled is in one file: numba looks for changes in the file of an entry point alone.
"""

import numpy as np

from lra.tasks._compiled import compiled, entry
from lra.tasks._pathfinder_stamps import Tables

# Random numbers: xoshiro256++ (Blackman & Vigna 2019), seeded by SplitMix64 (Steele et al. 2014)
# from the set's seed and the image's number. Both are arithmetic modulo 2**64, hence the unsigned
# constants: numba would turn a mixture with signed integers into floats.

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_U12, _U17, _U19, _U23, _U27, _U30, _U31, _U32, _U41, _U45 = (
    np.uint64(bits) for bits in (12, 17, 19, 23, 27, 30, 31, 32, 41, 45)
)


@compiled
def _mix(z: int) -> int:
    z = (z ^ (z >> _U30)) * _MIX_1
    z = (z ^ (z >> _U27)) * _MIX_2
    return z ^ (z >> _U31)


@compiled
def _start(random: np.ndarray, seed: int, index: int) -> None:
    """Begins the stream of random numbers of an image: sets its state, uint64 of shape (4,)."""
    z = _mix(np.uint64(seed) + _GAMMA) ^ np.uint64(index)
    for i in range(4):
        z += _GAMMA
        random[i] = _mix(z)


@compiled
def _next(random: np.ndarray) -> int:
    s0, s1, s2, s3 = random[0], random[1], random[2], random[3]
    total = s0 + s3
    result = ((total << _U23) | (total >> _U41)) + s0
    s2 ^= s0
    s3 ^= s1
    random[0], random[1] = s0 ^ s3, s1 ^ s2
    random[2], random[3] = s2 ^ (s1 << _U17), (s3 << _U45) | (s3 >> _U19)
    return result


@compiled
def _uniform(random: np.ndarray) -> float:
    """Returns a float in [0, 1); any positive float times it is smaller than that float."""
    return (_next(random) >> _U12) * 2.0**-52


@compiled
def _below(random: np.ndarray, n: int) -> int:
    """Returns an integer from 0 to n - 1, with probabilities right to n / 2**32."""
    return np.int64(((_next(random) >> _U32) * np.uint64(n)) >> _U32)


# A snake is its number, where it can go on, and its last paddle, which is not taken yet: the next
# one comes close to it.
_OWNER, _PIVOT_Y, _PIVOT_X, _LAST_Y, _LAST_X, _LAST = range(6)

_OCCUPIED = 77  # from 0.3 of full on

# Indices of the three inner loops are unsigned, which halves the time: negative ones, which would
# count from the end, need not be looked for.


@compiled
def _take(masks: np.ndarray, taken: np.ndarray, snake: np.ndarray) -> None:
    """Marks a snake's last paddle as taken."""
    stamp, y, x = masks[snake[_LAST]], np.uint64(snake[_LAST_Y]), np.uint64(snake[_LAST_X])
    for i in range(np.uint64(stamp.shape[0])):
        for j in range(np.uint64(stamp.shape[1])):
            taken[y + i, x + j] = max(taken[y + i, x + j], stamp[i, j])


@compiled
def _fits(taken: np.ndarray, stamp: np.ndarray, y: int, x: int) -> bool:
    """Whether nowhere what is taken and a paddle's mask together reach 1.8 times full."""
    y, x = np.uint64(y), np.uint64(x)
    for i in range(np.uint64(stamp.shape[0])):
        most = np.uint16(0)
        for j in range(np.uint64(stamp.shape[1])):
            both = np.uint16(np.uint16(taken[y + i, x + j]) + np.uint16(stamp[i, j]))
            most = max(most, both)
        if most >= 459:
            return False
    return True


@compiled
def _most_taken(taken: np.ndarray, y: int, x: int, span: np.ndarray) -> int:
    """Returns the largest value in a disc; (y, x) includes the border."""
    most = np.uint8(0)
    for i in range(1 - len(span), len(span)):
        row, reach = np.uint64(y + i), span[abs(i)]
        for column in range(np.uint64(x - reach), np.uint64(x + reach + 1)):
            most = max(most, taken[row, column])
    return np.int64(most)


@compiled
def _step(position: int, step: float) -> int:
    """Adds a step and rounds up: the images lean to the right and downwards."""
    return np.int64(np.ceil(position + step))


@compiled
def _extend(
    tables: Tables, kind: int, taken: np.ndarray, snake: np.ndarray, random: np.ndarray
) -> bool:
    """Adds a paddle to a snake, and takes the paddle before it; or returns False."""
    border = tables.mask.shape[1] // 2
    first, end = tables.ranges[kind, 1], tables.ranges[kind, 2]
    last = snake[_LAST]
    pivot_y = _step(snake[_PIVOT_Y], tables.ahead[last, 0])
    pivot_x = _step(snake[_PIVOT_X], tables.ahead[last, 1])

    total = 0.0
    sums = np.empty(end - first)
    for i in range(end - first):
        weight = tables.weights[last, i]
        if weight > 0:
            y = pivot_y + tables.place[first + i, 0]
            x = pivot_x + tables.place[first + i, 1]
            if 0 <= y < tables.window and 0 <= x < tables.window:
                most = _most_taken(taken, y + border, x + border, tables.spans[kind])
                total += weight * (255 - most)
        sums[i] = total
    if total < 255e-4:
        return False

    for _ in range(3):
        level = total * _uniform(random)
        new = first
        while sums[new - first] <= level:
            new += 1
        y = pivot_y + tables.place[new, 0]
        x = pivot_x + tables.place[new, 1]
        if _fits(taken, tables.mask[new], y, x):
            _take(tables.mask, taken, snake)
            snake[_PIVOT_Y], snake[_PIVOT_X] = pivot_y, pivot_x
            snake[_LAST_Y], snake[_LAST_X], snake[_LAST] = y, x, new
            return True
    return False


@compiled
def _begin(tables: Tables, snake: np.ndarray, turn: int, y: int, x: int) -> bool:
    """Begins a snake with a paddle from (y, x) on; returns whether it is in the image."""
    head_y, head_x = _step(y, tables.head[turn, 0]), _step(x, tables.head[turn, 1])
    pivot_y = _step(head_y, tables.behind[turn, 0])
    pivot_x = _step(head_x, tables.behind[turn, 1])
    snake[_PIVOT_Y], snake[_PIVOT_X] = pivot_y, pivot_x
    snake[_LAST_Y], snake[_LAST_X], snake[_LAST] = y, x, turn
    least = min(min(y, x), min(head_y, head_x), min(pivot_y, pivot_x))
    most = max(max(y, x), max(head_y, head_x), max(pivot_y, pivot_x))
    return least >= 0 and most < tables.window


@compiled
def _begin_targets(tables: Tables, kind: int, snakes: np.ndarray, random: np.ndarray) -> bool:
    """Begins the first target near the middle, the second at a distance, whatever is there."""
    begun = False
    for _ in range(3):
        turn = tables.ranges[kind, 0] + _below(random, 360)
        top, left = tables.tails[turn, 0], tables.tails[turn, 2]
        height = tables.tails[turn, 1] - top + 1
        width = tables.tails[turn, 3] - left + 1
        if tables.blind[turn] or height <= 0 or width <= 0:
            return False
        y, x = top + _below(random, height), left + _below(random, width)
        begun = _begin(tables, snakes[0], turn, y, x)
        if begun:
            break
    if not begun:
        return False
    for _ in range(3):
        turn = tables.ranges[kind, 0] + _below(random, 360)
        around = _below(random, 360)
        y = np.int64(np.rint(snakes[0, _LAST_Y] + tables.around[around, 0]))
        x = np.int64(np.rint(snakes[0, _LAST_X] + tables.around[around, 1]))
        if _begin(tables, snakes[1], turn, y, x):
            return True
    return False


@compiled
def _note(strokes: np.ndarray, row: int, snake: np.ndarray) -> None:
    strokes[row, 0] = snake[_OWNER]
    strokes[row, 1], strokes[row, 2] = snake[_LAST_Y], snake[_LAST_X]
    strokes[row, 3] = snake[_LAST]


@compiled
def _draw_targets(
    tables: Tables,
    kind: int,
    taken: np.ndarray,
    snakes: np.ndarray,
    strokes: np.ndarray,
    random: np.ndarray,
) -> int:
    """Tries pairs of targets until one succeeds; returns the number of trials.

    Args:
        tables: Of the geometry.
        kind: Number of the margin.
        taken: Set here.
        snakes: (2, 6), set here.
        strokes: Set here: the first rows are the targets' by turns.
        random: State.
    """
    border = tables.mask.shape[1] // 2
    inner = border + tables.padding
    count = 2 * tables.contour_length
    snakes[0, _OWNER], snakes[1, _OWNER] = 0, 1
    trials = 0
    while True:
        trials += 1
        if not _begin_targets(tables, kind, snakes, random):
            continue
        taken[:] = 0
        taken[border:-border, border:-border] = 255
        taken[inner:-inner, inner:-inner] = 0
        for row in range(2):
            _note(strokes, row, snakes[row])
        row = len(snakes)
        while row < count and _extend(tables, kind, taken, snakes[row % 2], random):
            _note(strokes, row, snakes[row % 2])
            row += 1
        if row == count:
            # The last paddle of the first target is never taken: distractors may cross it.
            _take(tables.mask, taken, snakes[1])
            return trials


@compiled
def _is_free(tables: Tables, taken: np.ndarray, turn: int, y: int, x: int) -> bool:
    """Whether none of a first paddle's feelers meets what is taken; outside, nothing is."""
    border = tables.mask.shape[1] // 2
    feelers = tables.feelers[turn]
    side, reach = len(feelers), len(feelers) // 2
    for i in range(max(0, reach - y), min(side, tables.window + reach - y)):
        for j in range(max(0, reach - x), min(side, tables.window + reach - x)):
            felt = taken[border + y + i - reach, border + x + j - reach]
            if feelers[i, j] and felt >= _OCCUPIED:
                return False
    return True


@compiled
def _find_free(tables: Tables, taken: np.ndarray, turn: int, random: np.ndarray) -> int:
    """Returns one of the free pixels, uniformly, as y * window + x; -1 if there is none."""
    window = tables.window
    for _ in range(32):  # mostly a guess will do
        pixel = _below(random, window * window)
        if _is_free(tables, taken, turn, pixel // window, pixel % window):
            return pixel
    found, seen = -1, 0
    for pixel in range(window * window):
        if _is_free(tables, taken, turn, pixel // window, pixel % window):
            seen += 1
            if _below(random, seen) == 0:
                found = pixel
    return found


@compiled
def _draw_distractor(
    tables: Tables,
    kind: int,
    taken: np.ndarray,
    snake: np.ndarray,
    strokes: np.ndarray,
    row: int,
    random: np.ndarray,
) -> bool:
    """Tries to draw a distractor; its strokes begin at a row."""
    begun = False
    for _ in range(3):
        turn = tables.ranges[kind, 0] + _below(random, 360)
        pixel = -1 if tables.blind[turn] else _find_free(tables, taken, turn, random)
        if pixel < 0:
            return False
        begun = _begin(tables, snake, turn, pixel // tables.window, pixel % tables.window)
        if begun:
            break
    if not begun:
        return False
    _note(strokes, row, snake)
    for i in range(1, tables.distractor_length):
        if not _extend(tables, kind, taken, snake, random):
            return False
        _note(strokes, row + i, snake)
    _take(tables.mask, taken, snake)
    return True


@compiled
def _copy(source: np.ndarray, target: np.ndarray) -> None:
    for i in range(source.shape[0]):
        for j in range(source.shape[1]):
            target[i, j] = source[i, j]


@compiled
def _is_full(taken: np.ndarray, border: int) -> bool:
    """Whether less than 1 % of the pixels is not taken."""
    room, end = 0, len(taken) - border
    for y in range(border, end):
        for x in range(border, end):
            room += taken[y, x] < _OCCUPIED
    return 100 * room < (end - border) ** 2


@compiled
def _draw_distractors(
    tables: Tables,
    kind: int,
    taken: np.ndarray,
    snake: np.ndarray,
    strokes: np.ndarray,
    random: np.ndarray,
) -> int:
    """Draws distractors where there is room; returns the number of all strokes."""
    before = np.empty_like(taken)
    row = 2 * tables.contour_length
    snake[_OWNER] = 2
    for _ in range(tables.distractors):
        if _is_full(taken, tables.mask.shape[1] // 2):
            break
        _copy(taken, before)
        for _ in range(5):
            if _draw_distractor(tables, kind, taken, snake, strokes, row, random):
                row += tables.distractor_length
                snake[_OWNER] += 1
                break
            _copy(before, taken)
    return row


@entry
def plan(
    tables: Tables,
    seed: int,
    first: int,
    labels: np.ndarray,
    margins: np.ndarray,
    trials: np.ndarray,
    strokes: np.ndarray,
    marked: np.ndarray,
) -> None:
    """Plans images from number ``first`` on; all arrays but the tables are set here.

    Args:
        tables: Of the geometry.
        seed: Names the sequence of images.
        first: Number of the first image.
        labels: (n,)
        margins: (n,): number of the margin.
        trials: (n,): pairs of targets that were tried.
        strokes: (n, most strokes, 4): owner, y, x and orientation of each paddle: the two targets'
            by turns, then those of each distractor; -1 where there is none.
        marked: (n, 2): the target at whose beginning there is a marker, and that at whose end.
    """
    side = tables.window + tables.mask.shape[1] - 1
    taken = np.empty((side, side), dtype=np.uint8)
    snakes = np.empty((2, 6), dtype=np.int64)
    random = np.empty(4, dtype=np.uint64)
    for n in range(len(labels)):
        _start(random, seed, first + n)
        label, kind = _below(random, 2), _below(random, len(tables.margins))
        trials[n] = _draw_targets(tables, kind, taken, snakes, strokes[n], random)
        rows = _draw_distractors(tables, kind, taken, snakes[0], strokes[n], random)
        for row in range(rows, strokes.shape[1]):
            for i in range(4):
                strokes[n, row, i] = -1
        start = _below(random, 2)
        labels[n], margins[n] = label, kind
        marked[n, 0], marked[n, 1] = start, start if label == 1 else 1 - start
