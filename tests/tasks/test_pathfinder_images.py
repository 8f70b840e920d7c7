"""Pathfinder images: how they are made, what can be told from them, and how they are distributed.

Figures called "published" were measured on images of the original program, 2,500 of 32 pixels and
180 of 128; ours are to agree with them to within four standard errors of the difference.
"""

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from pathfinder_plain import move, plain_dilate, plain_feelers, plain_image
from PIL import Image, ImageDraw

from lra.tasks._compiled import entry
from lra.tasks._pathfinder import (
    best_threshold,
    draw,
    generate,
    geometry,
    marker_distances,
    threshold_accuracy,
)
from lra.tasks._pathfinder_markers import find_markers
from lra.tasks._pathfinder_snakes import _mix, _next
from lra.tasks._pathfinder_stamps import (
    circle,
    dilate,
    directions,
    disc,
    feelers,
    is_blind,
    stamp,
    tables,
    turn_weights,
)

PUBLISHED_N = {32: 2_500, 128: 180}
SIZES = [32, 128]


@pytest.fixture(scope="module")
def drawings():
    """Images of both sizes, and how they were made."""
    counts = {32: 4_000, 128: 600}
    return {n: draw(geometry(n), seed=0, first=0, count=counts[n]) for n in SIZES}


@pytest.fixture(scope="module", params=SIZES)
def size(request):
    return request.param


@pytest.fixture(scope="module")
def drawing(drawings, size):
    return drawings[size]


# The generator's promises


def test_the_arrays_fit_together(size):
    images, labels, marks = generate(geometry(size), seed=1, first=5, count=3)
    assert (images.shape, images.dtype) == ((3, size, size), np.uint8)
    assert (labels.shape, labels.dtype) == ((3,), np.uint8)
    assert (marks.shape, marks.dtype) == ((3, 2, 2), np.int64)
    assert set(labels) <= {0, 1}
    assert marks.min() >= 0
    assert marks.max() < size


def test_an_image_depends_on_the_seed_and_its_number_alone(size):
    drawn = {"geometry": geometry(size), "seed": 3}
    whole = generate(**drawn, first=0, count=10)
    with ThreadPoolExecutor(2) as pool:
        parts = pool.map(lambda part: generate(**drawn, first=part[0], count=part[1]), SHARES)
    for all_at_once, joined in zip(whole, zip(*parts, strict=True), strict=True):
        assert np.array_equal(all_at_once, np.concatenate(joined))

    images, _, _ = whole
    assert len({image.tobytes() for image in images}) == 10
    others, _, _ = generate(geometry(size), seed=4, first=0, count=10)
    assert not {image.tobytes() for image in images} & {image.tobytes() for image in others}


SHARES = [(0, 4), (4, 0), (4, 6)]


@pytest.mark.parametrize(("size", "digest"), [(32, "65564c9cb97f376b"), (128, "9dc42ee1832ae1e2")])
def test_images_never_change(drawings, size, digest):
    arrays = (drawings[size].images, drawings[size].labels, drawings[size].marks)
    digested = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
    assert digested[:16] == digest


def test_large_seeds_and_numbers_are_fine():
    last = {"seed": 2**63 - 1, "first": 2**62}
    images, _, _ = generate(geometry(32), **last, count=1)
    assert images.max() == 255


@pytest.mark.parametrize(("difficulty", "length"), [("easy", 6), ("intermediate", 9), ("hard", 14)])
def test_the_difficulties_differ_in_the_length_of_snakes(size, difficulty, length):
    one = draw(geometry(size, difficulty), seed=0, first=0, count=40)
    owners = one.strokes[:, :, 0]
    assert ((owners == 0).sum(axis=1) == length).all()
    assert ((owners == 1).sum(axis=1) == length).all()
    distractors = np.array([np.bincount(row[row >= 2], minlength=2)[2:] for row in owners], object)
    assert set(np.concatenate(distractors)) == {length // 3}
    assert (one.images.max(axis=(1, 2)) == 255).all()
    assert (one.images.min(axis=(1, 2)) == 0).all()


@pytest.mark.parametrize(("size", "difficulty"), [(64, "hard"), (32, "harder")])
def test_an_unknown_geometry_is_refused_with_those_there_are(size, difficulty):
    with pytest.raises(ValueError, match=r"windows 32, 128 and easy, intermediate, hard"):
        geometry(size, difficulty)


def test_what_is_compiled_is_kept_only_where_it_can_be():
    names = {}
    exec("def double(x):\n    return 2 * x", names)  # has no file, hence no folder to be kept in
    assert entry(names["double"])(21) == 42


# Labels


def snakes_pixels(size, drawing, index):
    """The pixels of each target's ink, drawn anew, as two sets."""
    table = tables(geometry(size))
    pixels = [set(), set()]
    for owner, y, x, turn in drawing.strokes[index]:
        if owner in (0, 1):
            corner = np.array([y, x]) - len(table.ink[turn]) // 2
            pixels[owner] |= set(map(tuple, (corner + np.argwhere(table.ink[turn] >= 64)).tolist()))
    return pixels


def test_the_label_is_1_if_and_only_if_both_markers_are_on_one_snake(size, drawing):
    targets = 2 * geometry(size).contour_length
    same = drawing.marked[:, 0] == drawing.marked[:, 1]
    assert np.array_equal(drawing.labels == 1, same)
    ends = drawing.strokes[:, [0, 1, targets - 2, targets - 1], :3]
    assert (ends[:, :, 0] == [0, 1, 0, 1]).all()
    for index, (first, last) in enumerate(drawing.marked):
        assert np.array_equal(drawing.marks[index], ends[index, [first, 2 + last], 1:])

    elsewhere = 0
    for index in range(300):
        pixels = snakes_pixels(size, drawing, index)
        first, last = ({tuple(mark)} for mark in drawing.marks[index].tolist())
        on_first, on_last = ([bool(mark & snake) for snake in pixels] for mark in (first, last))
        assert on_first[drawing.marked[index, 0]]
        assert on_last[drawing.marked[index, 1]]
        on_one_snake = any(both == (True, True) for both in zip(on_first, on_last, strict=True))
        # A marker may be where the other snake crosses; else the pixels alone tell the label.
        if on_first.count(True) == on_last.count(True) == 1:
            assert on_one_snake == drawing.labels[index]
        else:
            elsewhere += 1
    assert elsewhere < 60


def test_the_paddles_of_a_snake_follow_each_other(size, drawing):
    one = geometry(size)
    furthest = 2 * (one.paddle_length + 2 * max(one.margins)) + 2
    owners, places = drawing.strokes[..., 0], drawing.strokes[..., 1:3]
    for owner in (0, 1):
        snake = places[owners == owner].reshape(len(places), one.contour_length, 2)
        steps = np.hypot(*np.moveaxis(np.diff(snake, axis=1), -1, 0))
        assert steps.min() >= 1
        assert steps.max() <= furthest


# Primitives, against their definitions


def test_random_numbers_are_those_of_their_inventors():
    gamma, seed = 0x9E3779B97F4A7C15, 1234567
    states = [np.uint64((seed + step * gamma) % 2**64) for step in (1, 2, 3)]
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [int(_mix(state)) for state in states] == known

    state = np.arange(1, 5, dtype=np.uint64)
    known = [41943041, 58720359, 3588806011781223, 3591011842654386, 9228616714210784205]
    assert [int(_next(state)) for _ in known] == known


def test_steps_are_rounded_up_even_from_what_should_be_0():
    half_a_turn = circle([math.pi], 4)[0]
    assert half_a_turn.tolist() == [4 * math.sin(math.pi), -4]
    assert np.ceil(0 + half_a_turn[0]) == 1
    assert np.ceil(20 + half_a_turn[0]) == 20


def test_a_disc_is_what_is_not_further_than_its_radius():
    assert sorted(map(tuple, disc(1).tolist())) == [(-1, 0), (0, -1), (0, 0), (0, 1), (1, 0)]
    assert [len(disc(radius)) for radius in (0, 1.5, 2, 3, 4, 6)] == [1, 9, 13, 29, 49, 113]


def test_dilation_takes_the_largest_value_at_the_offsets():
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (9, 11), dtype=np.uint8)
    offsets = [(0, 0), (1, 2), (-3, 1), (2, -2)]
    slow = np.zeros_like(image)
    for y, x in np.ndindex(image.shape):
        seen = [(y + i, x + j) for i, j in offsets if 0 <= y + i < 9 and 0 <= x + j < 11]
        slow[y, x] = max(image[place] for place in seen)
    assert np.array_equal(dilate(image, offsets), slow)


@pytest.mark.parametrize(
    ("size", "margin", "side", "canvas", "width", "radius"),
    [(32, 1, 9, 17, 1, 2), (128, 2, 19, 37, 3, 4), (128, 3, 21, 41, 3, 6)],
)
def test_a_stamp_is_drawn_large_and_reduced(size, margin, side, canvas, width, radius):
    one = geometry(size)
    for degrees in range(-180, 180, 15):
        angle = math.radians(degrees)
        middle = canvas // 2
        y, x = move((middle, middle), angle, 2 * one.paddle_length)
        large = Image.new("L", (canvas, canvas))
        ImageDraw.Draw(large).line([(middle, middle), (x, y)], fill=255, width=width)
        near = np.zeros((canvas, canvas), dtype=np.uint8)
        for i, j in np.argwhere(np.asarray(large) > 0):
            for k, n in np.ndindex(near.shape):
                if (k - i) ** 2 + (n - j) ** 2 <= radius**2:
                    near[k, n] = 255
        lanczos = Image.Resampling.LANCZOS
        expected = [image.resize((side, side), lanczos) for image in (large, Image.fromarray(near))]
        for ours, slow in zip(stamp(one, margin, angle), expected, strict=True):
            assert np.array_equal(ours, np.asarray(slow))


def test_published_brightness_of_ink():
    peaks = [stamp(geometry(32), 1, math.radians(a))[0].max() / 255 for a in (0, 45, 90)]
    assert (round(min(peaks), 2), round(max(peaks), 2)) == (0.46, 0.58)


def test_a_paddle_can_go_to_every_pixel_around():
    around = directions(geometry(32), 1)
    assert len(around) == 18
    assert len(np.unique(around, axis=0)) == 18
    assert np.hypot(*around.T).max() < 3 + 2**0.5


def test_straight_on_is_likeliest():
    one = geometry(128)
    before, after = np.radians([170.0, 0.0]), np.radians([170.0, -170.0, 120.0, 119.0])
    weights = turn_weights(one, before, after)
    slow = [math.cos(1.8 * math.radians(turn)) ** 2 for turn in (0, 20)]
    assert weights[0] == pytest.approx([*slow, 0, 0], abs=1e-9)
    assert weights[1] == pytest.approx([0, 0, 0, 0])


@pytest.mark.parametrize("size", SIZES)
def test_first_paddles_are_tabulated_as_the_definition_says(size):
    one = geometry(size)
    table = tables(one)
    middle = np.ones((size, size), dtype=np.uint8)
    border = 2 * one.seed_distance
    middle[border:-border, border:-border] = 0
    for (start, _, _), margin in zip(table.ranges, one.margins, strict=True):
        for number in range(0, 360, 1 if size == 32 else 45):
            felt = plain_feelers(one, margin, math.radians(number - 180))
            _, mask = stamp(one, margin, math.radians(number - 180))
            patch = feelers(one, margin, mask)
            assert set(map(tuple, np.argwhere(patch) - len(patch) // 2)) == felt
            forbidden = plain_dilate(middle, felt)
            blind = bool((forbidden == -np.inf).any())
            assert (is_blind(patch), table.blind[start + number]) == (blind, blind)
            if not blind:
                first_row, last_row, first, last = table.tails[start + number]
                box = np.ones((size, size))
                box[first_row : last_row + 1, first : last + 1] = 0
                assert np.array_equal(forbidden, box)


def test_few_first_paddles_are_possible_in_small_images():
    possible = np.flatnonzero(~tables(geometry(32)).blind[:360]) - 180
    assert possible.tolist() == list(range(-150, -120))
    large = tables(geometry(128))
    assert [large.blind[start : start + 360].sum() for start, _, _ in large.ranges] == [6, 0]


# The whole, against a plain version that reads like the definition


def test_images_are_those_of_the_plain_version(size, drawing):
    one = geometry(size)
    for kind in range(len(one.margins)):
        # Those that took the fewest trials, as the plain version is slow.
        of_kind = np.flatnonzero(drawing.margins == kind)
        quick = of_kind[np.argsort(drawing.trials[of_kind])][: 60 if size == 32 else 6]
        for index in quick.tolist():
            scaled, label, marks, trials = plain_image(one, 0, index)
            assert (label, trials) == (drawing.labels[index], drawing.trials[index])
            assert np.array_equal(marks, drawing.marks[index])
            assert np.array_equal(drawing.images[index], np.floor(scaled + 0.5))


# Markers


def right(images, marks, one):
    found = find_markers(images, one)
    return (found == marks).all(axis=(1, 2)) | (found[:, ::-1] == marks).all(axis=(1, 2))


def test_markers_are_found_in_all_images(size, drawing):
    one = geometry(size)
    assert right(drawing.images, drawing.marks, one).all()
    distances = np.hypot(*(drawing.marks[:, 0] - drawing.marks[:, 1]).T)
    assert np.array_equal(marker_distances(drawing.images, one), distances)
    for difficulty in ("easy", "intermediate"):
        one = geometry(size, difficulty)
        images, _, marks = generate(one, seed=0, first=0, count=200)
        assert right(images, marks, one).all()


def test_markers_are_found_where_they_overlap(drawings):
    marks = drawings[32].marks
    near = np.abs(marks[:, 0] - marks[:, 1]).max(axis=1) <= 2
    assert near.sum() >= 5
    assert right(drawings[32].images[near], marks[near], geometry(32)).all()


def test_no_images_have_no_distances():
    assert marker_distances(np.zeros((0, 32, 32), np.uint8), geometry(32)).shape == (0,)


def slow_accuracy(distances, labels):
    thresholds = [-math.inf, *distances, math.inf]
    return max(
        max(np.mean((distances > t) == labels), np.mean((distances < t) == labels))
        for t in thresholds
    )


def test_the_best_threshold_is_the_best_of_all():
    random = np.random.default_rng(0)
    for n in (1, 2, 3, 5, 20, 50):
        for labels in (random.integers(0, 2, n), np.zeros(n, int), np.ones(n, int)):
            distances = random.integers(0, 9, n) / 2
            rule = best_threshold(distances, labels)
            accuracy = threshold_accuracy(distances, labels, *rule)
            assert accuracy == pytest.approx(slow_accuracy(distances, labels))


def test_a_threshold_is_fitted_on_one_set_and_applied_to_another():
    rule = best_threshold(np.array([1.0, 2.0, 5.0, 6.0]), np.array([1, 1, 0, 0]))
    assert rule == (3.5, -1)
    assert threshold_accuracy(np.array([3.0, 3.0, 4.0]), np.array([1, 0, 0]), *rule) == 2 / 3


# Statistics of the standard images


def brightness(drawing, rows=slice(None), columns=slice(None)):
    return drawing.images[:, rows, columns].mean(axis=(1, 2))


def fraction(condition):
    return condition.mean(axis=(1, 2))


def bright_pixels(drawing):
    return (drawing.images >= 64).sum(axis=(1, 2))


def distractors(drawing):
    return np.maximum(drawing.strokes[:, :, 0].max(axis=1) - 1, 0)


def squares(drawing):
    return (drawing.images.astype(float) ** 2).mean(axis=(1, 2))


def distances(drawing, label):
    apart = np.hypot(*(drawing.marks[:, 0] - drawing.marks[:, 1]).T)
    return apart[drawing.labels == label]


# For each statistic: its values by image; the published means of 32 and 128 pixels; half of the
# last published digit.
STATISTICS = {
    "trials": (lambda d: d.trials, (329, 282), 0.5),
    "brightness": (brightness, (20.13, 7.96), 0.005),
    "fraction of 0": (lambda d: fraction(d.images == 0), (0.659, 0.863), 0.0005),
    "fraction up to 8": (lambda d: fraction(d.images <= 8), (0.840, 0.937), 0.0005),
    "fraction from 128": (lambda d: fraction(d.images >= 128), (0.085, 0.030), 0.0005),
    "fraction of 255": (lambda d: fraction(d.images == 255), (0.0022, 0.0007), 0.00005),
    "pixels from 64": (bright_pixels, (128.3, 675.8), 0.05),
    "brightest before scaling": (lambda d: d.peaks, (1.066, 1.0), 0.0005),
    "distractors": (distractors, (1.14, 7.81), 0.005),
    "distance, label 0": (lambda d: distances(d, 0), (12.9, 77.3), 0.05),
    "distance, label 1": (lambda d: distances(d, 1), (13.5, 77.8), 0.05),
    "top rows": (lambda d: brightness(d, rows=slice(4)), (16.1, 3.7), 0.05),
    "bottom rows": (lambda d: brightness(d, rows=slice(-4, None)), (10.5, 1.1), 0.05),
    "left columns": (lambda d: brightness(d, columns=slice(4)), (15.4, 3.6), 0.05),
    "right columns": (lambda d: brightness(d, columns=slice(-4, None)), (10.5, 1.0), 0.05),
}


def standard_error(values, size, share=1.0):
    """Of the difference of two means, ours of values and the published one of as many spread."""
    return values.std() * (1 / len(values) + 1 / (PUBLISHED_N[size] * share)) ** 0.5


@pytest.mark.parametrize("name", STATISTICS)
def test_published_means(size, drawing, name):
    values_of, published, rounding = STATISTICS[name]
    values = values_of(drawing)
    error = standard_error(values, size, share=len(values) / len(drawing.images))
    assert values.mean() == pytest.approx(published[SIZES.index(size)], abs=4 * error + rounding)


@pytest.mark.parametrize(("size", "mean", "deviation"), [(32, 20.13, 51.0), (128, 7.96, 35.8)])
def test_published_deviation_of_pixels(drawings, size, mean, deviation):
    values = squares(drawings[size])
    rounding = 2 * (deviation * 0.05 + mean * 0.005)
    expected = deviation**2 + mean**2
    assert values.mean() == pytest.approx(expected, abs=4 * standard_error(values, size) + rounding)


@pytest.mark.parametrize(("size", "deviation"), [(32, 12.6), (128, 28.2)])
def test_published_deviation_of_the_number_of_bright_pixels(drawings, size, deviation):
    values = bright_pixels(drawings[size])
    error = standard_error(values, size) / 2**0.5
    assert values.std() == pytest.approx(deviation, abs=4 * error + 0.05)


@pytest.mark.parametrize(
    ("size", "quantiles"), [(32, (28, 78, 133, 165, 221)), (128, (21, 55, 137, 195, 229))]
)
def test_published_quantiles_of_pixels_that_are_not_dark(drawings, size, quantiles):
    images = drawings[size].images
    counts = (images >= 16).sum(axis=(1, 2))
    for share, value in zip((0.05, 0.25, 0.5, 0.75, 0.95), quantiles, strict=True):
        # Pixels have few values: the share is between those up to the value, without and with it.
        below = ((images >= 16) & (images < value)).sum(axis=(1, 2)) / counts
        up_to = ((images >= 16) & (images <= value)).sum(axis=(1, 2)) / counts
        assert below.mean() < share + 4 * standard_error(below, size)
        assert up_to.mean() > share - 4 * standard_error(up_to, size)


@pytest.mark.parametrize(
    ("size", "histogram"),
    [
        (32, {0: 0.26, 1: 0.42, 2: 0.25, 3: 0.06, 4: 0.01}),
        (128, {6: 0.0, 7: 0.19, 8: 0.81}),
    ],
)
def test_published_numbers_of_distractors(drawings, size, histogram):
    for number, share in histogram.items():
        values = distractors(drawings[size]) == number
        error = standard_error(values, size)
        assert values.mean() == pytest.approx(share, abs=4 * error + 0.005)


def test_published_range_of_the_brightest_value_before_scaling(drawings):
    peaks = drawings[32].peaks
    assert (round(peaks.min(), 3), round(peaks.max(), 3)) == (1, 1.153)
    assert set(drawings[128].peaks) == {1}


def test_published_places_of_the_first_marker(drawings):
    marks = drawings[32].marks[:, 0]
    places, counts = np.unique(marks, axis=0, return_counts=True)
    top = np.argsort(counts)[-6:]
    published = {(15, 16), (16, 15), (15, 15), (16, 16), (14, 15), (14, 16)}
    assert set(map(tuple, places[top].tolist())) == published
    error = standard_error((marks == (15, 15)).all(axis=1), 32)
    for share in counts[top] / len(marks):
        assert 0.06 - 4 * error < share < 0.08 + 4 * error


@pytest.mark.parametrize(("size", "published"), [(32, 0.545), (128, 0.53)])
def test_published_accuracy_of_a_distance_threshold(drawings, size, published):
    labels = drawings[size].labels
    apart = marker_distances(drawings[size].images, geometry(size))
    accuracy = threshold_accuracy(apart, labels, *best_threshold(apart, labels))
    error = (0.25 / len(labels) + 0.25 / PUBLISHED_N[size]) ** 0.5
    assert accuracy == pytest.approx(published, abs=4 * error + 0.005)


def test_labels_and_margins_are_fair(size, drawing):
    n = len(drawing.labels)
    assert drawing.labels.mean() == pytest.approx(0.5, abs=4 * (0.25 / n) ** 0.5)
    for margin in range(count := len(geometry(size).margins)):
        share = (drawing.margins == margin).mean()
        assert share == pytest.approx(1 / count, abs=4 * (0.25 / n) ** 0.5)
    first = drawing.marked[:, 0]
    assert first.mean() == pytest.approx(0.5, abs=4 * (0.25 / n) ** 0.5)
