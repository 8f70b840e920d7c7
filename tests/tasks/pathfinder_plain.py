"""Pathfinder images by the definition, read literally: slow, with whole images for everything.

Only the stamps are the project's own; they have tests of their own.
"""

import math
from functools import cache

import numpy as np
from PIL import Image

from lra.tasks._pathfinder_stamps import disc, stamp


class Stream:
    """The random numbers of an image, in Python's integers."""

    def __init__(self, seed, index):
        z = self.mix((seed + 0x9E3779B97F4A7C15) % 2**64) ^ index
        self.state = []
        for _ in range(4):
            z = (z + 0x9E3779B97F4A7C15) % 2**64
            self.state.append(self.mix(z))

    @staticmethod
    def mix(z):
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    def next(self):
        def rotated(x, k):
            return (x << k | x >> 64 - k) % 2**64

        s0, s1, s2, s3 = self.state
        result = (rotated((s0 + s3) % 2**64, 23) + s0) % 2**64
        s2, s3 = s2 ^ s0, s3 ^ s1
        self.state = [s0 ^ s3, s1 ^ s2, s2 ^ (s1 << 17) % 2**64, rotated(s3, 45)]
        return result

    def uniform(self):
        return (self.next() >> 12) / 2**52

    def below(self, n):
        return (self.next() >> 32) * n >> 32

    def angle(self):
        return math.radians(self.below(360) - 180)


def move(point, angle, distance):
    return (
        math.ceil(point[0] + distance * math.sin(angle)),
        math.ceil(point[1] + distance * math.cos(angle)),
    )


def flipped(angle):
    return angle - math.pi if angle > 0 else angle + math.pi


def plain_dilate(image, offsets):
    """The largest value at the offsets, minus infinity where all are outside."""
    far = max(max(abs(y), abs(x)) for y, x in offsets)
    padded = np.pad(image.astype(float), far, constant_values=-np.inf)
    height, width = image.shape
    shifted = [padded[far + y :, far + x :][:height, :width] for y, x in offsets]
    return np.max(shifted, axis=0)


def paste(size, patch, point):
    """An image of zeros with a patch around a point, clipped."""
    reach = len(patch) // 2
    padded = np.zeros((size + 2 * reach, size + 2 * reach))
    y, x = point
    padded[y : y + len(patch), x : x + len(patch)] = patch
    return padded[reach : reach + size, reach : reach + size]


@cache
def plain_stamp(one, margin, angle):
    return [patch / 255 for patch in stamp(one, margin, angle)]


@cache
def plain_feelers(one, margin, angle):
    reach = one.paddle_length + margin
    _, mask = plain_stamp(one, margin, angle)
    kernel = paste(2 * reach + 1, mask, (reach + 1, reach + 1)) == 1
    return frozenset((y - reach, x - reach) for y, x in np.argwhere(kernel).tolist())


def plain_free(one, margin, angle, occupied):
    """Where a first paddle can be, or None if its feelers would see nothing from some place."""
    forbidden = plain_dilate(occupied, plain_feelers(one, margin, angle))
    return None if (forbidden == -np.inf).any() else forbidden == 0


def plain_choice(free, stream):
    if free is None:
        return None
    for _ in range(32):
        place = divmod(stream.below(free.size), len(free))
        if free[place]:
            return place
    found = None
    for seen, place in enumerate(np.argwhere(free).tolist(), start=1):
        if stream.below(seen) == 0:
            found = tuple(place)
    return found


def plain_choice_in_box(free, stream):
    if free is None or not free.any():
        return None
    rows, columns = np.nonzero(free)
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert height * width == len(rows)
    return int(rows.min()) + stream.below(int(height)), int(columns.min()) + stream.below(
        int(width)
    )


class PlainSnake:
    """A snake that has its first paddle, if it is ``inside`` the image."""

    def __init__(self, one, margin, tail, angle):
        self.one, self.margin, self.angle = one, margin, angle
        head = move(tail, angle, one.paddle_length)
        self.pivot = move(head, flipped(angle), one.paddle_length + margin)
        places = [*tail, *head, *self.pivot]
        self.inside = min(places) >= 0 and max(places) < one.window
        self.tips = [tail]
        if self.inside:
            ink, self.mask = (paste(one.window, p, tail) for p in plain_stamp(one, margin, angle))
            self.inks = [ink]

    def extend(self, taken, stream):
        """Adds a paddle; returns what is then taken, or None."""
        one, margin = self.one, self.margin
        pivot = move(self.pivot, self.angle, one.paddle_length + 2 * margin)
        near = plain_dilate(taken, disc(margin))
        radius = one.paddle_length + margin
        around = np.radians(np.arange(0, 360, 360 / (2 * math.pi * radius)))
        points = [
            (pivot[0] + radius * math.sin(a), pivot[1] + radius * math.cos(a)) for a in around
        ]
        inside = [(int(y), int(x)) for y, x in points if min(y, x) >= 0 and max(y, x) < one.window]
        weights, angles, ends = [], [], sorted(set(inside))
        for y, x in ends:
            angles.append(math.atan2(y - pivot[0], x - pivot[1]))
            turn = abs(angles[-1] - self.angle)
            turn = min(turn, 2 * math.pi - turn)
            weight = math.cos(min(one.continuity * turn, math.pi / 2)) ** 2
            weights.append(weight * (1 - near[y, x]))
        if sum(weights) < 1e-4:
            return None
        chances = np.cumsum(weights)
        for _ in range(3):
            index = int(np.argmax(chances > stream.uniform() * chances[-1]))
            ink, mask = plain_stamp(one, margin, flipped(angles[index]))
            new = paste(one.window, mask, ends[index])
            if (taken + new).max() < 1.8 - 1e-9:
                taken = np.maximum(taken, self.mask)
                self.inks.append(paste(one.window, ink, ends[index]))
                self.mask, self.pivot, self.angle = new, pivot, angles[index]
                self.tips.append(ends[index])
                return taken
        return None


def plain_pair(one, margin, stream):
    """One trial: both targets and what they take, or None."""
    border = 2 * one.seed_distance
    band = np.ones((one.window, one.window), dtype=bool)
    band[border:-border, border:-border] = False
    for _ in range(3):
        angle = stream.angle()
        tail = plain_choice_in_box(plain_free(one, margin, angle, band), stream)
        if tail is None:
            return None
        first = PlainSnake(one, margin, tail, angle)
        if first.inside:
            break
    else:
        return None
    for _ in range(3):
        angle, around = stream.angle(), math.radians(stream.below(360))
        tail = (
            round(first.tips[0][0] + one.seed_distance * math.sin(around)),
            round(first.tips[0][1] + one.seed_distance * math.cos(around)),
        )
        second = PlainSnake(one, margin, tail, angle)
        if second.inside:
            break
    else:
        return None
    taken = np.ones((one.window, one.window))
    taken[one.padding : -one.padding, one.padding : -one.padding] = 0
    for _ in range(one.contour_length - 1):
        for snake in (first, second):
            taken = snake.extend(taken, stream)
            if taken is None:
                return None
    return first, second, np.maximum(taken, second.mask)


def plain_distractor(one, margin, taken, stream):
    """One attempt: a distractor and what is then taken, or None."""
    if (taken <= 0.3).mean() < 0.01:
        return None
    for _ in range(3):
        angle = stream.angle()
        tail = plain_choice(plain_free(one, margin, angle, taken > 0.3), stream)
        if tail is None:
            return None
        snake = PlainSnake(one, margin, tail, angle)
        if snake.inside:
            break
    else:
        return None
    for _ in range(one.distractor_length - 1):
        taken = snake.extend(taken, stream)
        if taken is None:
            return None
    return snake, np.maximum(taken, snake.mask)


def plain_disc(one, point):
    """A marker, drawn into an image of twice the size and reduced."""
    y, x = np.ogrid[: 2 * one.window, : 2 * one.window]
    inside = (y - 2 * point[0]) ** 2 + (x - 2 * point[1]) ** 2 <= (2 * one.marker_radius) ** 2
    large = Image.fromarray(np.where(inside, 255, 0).astype(np.uint8))
    return np.asarray(large.resize((one.window, one.window), Image.Resampling.LANCZOS)) / 255


def plain_image(one, seed, index):
    """An image before rounding, its label, markers and trials, as the definition reads."""
    stream = Stream(seed, index)
    label, margin = stream.below(2), one.margins[stream.below(len(one.margins))]
    trials, pair = 0, None
    while pair is None:
        trials += 1
        pair = plain_pair(one, margin, stream)
    *targets, taken = pair
    contrast = one.snake_contrast * one.paddle_contrast
    shapes = [contrast * ink for target in targets for ink in target.inks]
    for _ in range(one.distractors):
        for _ in range(5):
            drawn = plain_distractor(one, margin, taken, stream)
            if drawn is not None:
                snake, taken = drawn
                shapes += [one.snake_contrast * ink for ink in snake.inks]
                break
    first = stream.below(2)
    marks = [targets[first].tips[0], targets[first if label else 1 - first].tips[-1]]
    shapes += [plain_disc(one, mark) for mark in marks]
    image = np.max(shapes, axis=0).astype(np.float32).astype(float)
    scaled = 255 * (image - image.min()) / (image.max() - image.min())
    return scaled, label, marks, trials
