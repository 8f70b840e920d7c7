"""The tasks pathfinder and pathx: splits of generated images, and builds that are interrupted.

Most tests put a generator in the place of the real one that costs nothing and can be watched.
"""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from lra.compose import load
from lra.tasks import _pathfinder, build_task, pathfinder
from lra.tasks._images import downscaled
from lra.tasks._parts import Parts, cut, in_threads
from lra.tasks._pathfinder_stamps import geometry
from lra.tasks.base import SPLITS

TESTS = Path(__file__).parent
SIZES = {"num_train": 20, "num_val": 6, "num_test": 5}
RULE = "marker distance threshold"
TOTAL = sum(SIZES.values())
PARTS = ["0-4", "4-8", "8-12", "12-16", "16-20", "20-24", "24-26", "26-30", "30-31"]


class Generator:
    """Stands in for the generator; image ``index`` depends on the seed and ``index`` alone.

    Args:
        before: Called before each image with its index.
    """

    def __init__(self, before=lambda index: None):
        self.before = before
        self.drawn = []

    def generate(self, geometry, *, seed, first, count):
        indices = range(first, first + count)
        for index in indices:
            self.before(index)
        self.drawn += indices
        images = np.array([picture(index, seed, geometry.window) for index in indices])
        return images, np.array([label(i) for i in indices], np.uint8), np.zeros((count, 2, 2), int)

    def marker_distances(self, images, geometry):
        return images[:, 0, 0].astype(float)

    def install(self, monkeypatch):
        monkeypatch.setattr(_pathfinder, "generate", self.generate)
        monkeypatch.setattr(pathfinder, "marker_distances", self.marker_distances)
        return self


def picture(index, seed=0, window=32):
    steps = np.arange(window * window, dtype=np.int64) * (index % 7 + 3)
    return ((steps + index + 100 * seed) % 256).astype(np.uint8).reshape(window, window)


def label(index):
    return index * index // 3 % 2


def make(folder, name="pathfinder", **options):
    """Makes a task of 31 examples in parts of 4, drawn by twos, and pieces of 8."""
    folders = {"data_dir": folder / "data", "cache_dir": folder / "cache"}
    task = build_task(name, SIZES | options, **folders)
    task.piece, task.part, task.step = 8, 4, 2
    return task


@pytest.fixture
def generator(monkeypatch):
    """The stand-in, with one thread, so that parts are made in their order."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    return Generator().install(monkeypatch)


@pytest.fixture
def task(tmp_path, generator):
    return make(tmp_path)


@pytest.fixture
def expected(tmp_path, generator):
    """The hash of the data of a task that is made in one go."""
    data_hash = make(tmp_path / "uninterrupted").prepare().manifest["hash"]
    generator.drawn.clear()
    return data_hash


def kept(task):
    """Returns the names in the cache folder, the lock apart."""
    return sorted(path.name for path in task.cache_dir.iterdir() if path.suffix != ".lock")


def parts(task):
    """Returns the names of the parts that a build left, in order."""
    return sorted((path.stem for path in task.parts.glob("[0-9]*.part")), key=PARTS.index)


def drawn_of(names):
    """Returns the indices of the images of parts."""
    return sorted(chain(*(range(*map(int, name.split("-"))) for name in names)))


# Examples


@pytest.mark.parametrize(("name", "window"), [("pathfinder", 32), ("pathx", 128)])
def test_the_splits_are_the_images_of_one_stream_one_after_the_other(
    tmp_path, generator, name, window
):
    task = make(tmp_path, name, data_seed=1)
    splits = task.prepare().splits
    index = 0
    for split, count in zip(SPLITS, SIZES.values(), strict=True):
        assert len(splits[split]) == count
        for i in range(count):
            np.testing.assert_array_equal(
                splits[split][i], picture(index, 1, window).reshape(-1), strict=True
            )
            assert splits[split].labels[i] == label(index)
            index += 1
    assert set(splits["train"].lengths) == {task.max_len} == {window * window}
    assert sorted(generator.drawn) == list(range(TOTAL))


@pytest.mark.parametrize("name", ["pathfinder", "pathx"])
def test_a_task_has_two_classes_and_a_token_for_every_grey_value(tmp_path, name):
    task = make(tmp_path, name)
    assert (task.num_classes, task.vocab_size, task.chance) == (2, 256, 0.5)


def test_the_standard_tasks_are_those_of_the_arena(tmp_path):
    for name, tokens in (("pathfinder", 1_024), ("pathx", 16_384)):
        task = build_task(name, {}, data_dir=tmp_path, cache_dir=tmp_path)
        config = task.config
        assert (config.num_train, config.num_val, config.num_test) == (160_000, 20_000, 20_000)
        assert (config.source, config.difficulty, task.max_len) == ("generated", "hard", tokens)
        assert task.piece * task.window**2 == 2**24  # bytes in memory


@pytest.mark.parametrize("side", [2, 4, 8, 16])
def test_the_mean_of_a_square_of_pixels_becomes_one_token_with_halves_rounded_up(
    tmp_path, generator, side
):
    task = make(tmp_path, downscale=side)
    split = task.prepare().splits["val"]
    count = 32 // side
    assert task.max_len == split.lengths[0] == count * count
    image = picture(SIZES["num_train"]).astype(int).tolist()
    for row in range(count):
        for column in range(count):
            square = [
                image[row * side + y][column * side + x] for y in range(side) for x in range(side)
            ]
            mean, rest = divmod(sum(square), side * side)
            assert split[0][row * count + column] == mean + (2 * rest >= side * side)


def test_means_of_the_brightest_and_of_half_values_do_not_overflow():
    images = np.full((1, 32, 32), 255, np.uint8)
    images[0, :2, :2] = [[0, 0], [1, 1]]
    assert downscaled(images, 16)[0, 1].tolist() == [255, 255]
    assert downscaled(images, 2)[0, 0, :2].tolist() == [1, 255]


def test_the_manifest_tells_how_the_images_were_made(task):
    manifest = task.prepare().manifest
    assert manifest["source"] == "generated, data_seed 0"
    assert manifest["options"]["difficulty"] == "hard"
    assert manifest["sources"] == {}


def test_prepared_data_is_opened_without_drawing_again(task, generator):
    manifest = task.prepare().manifest
    generator.drawn.clear()
    assert task.prepare().manifest == manifest
    assert generator.drawn == []


def test_compiled_code_is_only_loaded_where_images_are_made():
    code = "import sys, lra.tasks.pathfinder, lra.tasks.pathx; print('numba' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(TESTS.parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


# The same data however it is made


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("part", "step"), [(1, 1), (3, 2), (8, 8), (100, 7)])
def test_the_data_does_not_depend_on_threads_parts_and_steps(
    task, expected, monkeypatch, threads, part, step
):
    monkeypatch.setattr(os, "cpu_count", lambda: threads)
    task.part, task.step = part, step
    assert task.prepare().manifest["hash"] == expected


def test_other_options_make_other_data(tmp_path, generator):
    hashes = [
        make(tmp_path, **options).prepare().manifest["hash"]
        for options in ({}, {"data_seed": 1}, {"downscale": 2}, {"num_val": 7})
    ]
    assert len(set(hashes)) == 4


# Builds that are interrupted


class Stop(Exception):
    pass


def stopped_at(task, generator, index):
    """Lets a build end with an error before an image; returns the parts that it left."""

    def before(i):
        if i == index:
            raise Stop

    generator.before = before
    with pytest.raises(Stop):
        task.prepare()
    generator.before = lambda index: None
    generator.drawn.clear()
    return parts(task)


def test_an_interrupted_build_goes_on_from_its_finished_parts(task, generator, expected):
    assert stopped_at(task, generator, 14) == PARTS[:3]
    assert task.state()[0] == "missing"
    assert task.prepare().manifest["hash"] == expected
    assert sorted(generator.drawn) == drawn_of(PARTS[3:])
    assert kept(task) == [task.folder.name]


def test_after_an_error_the_other_threads_end_before_the_next_step(task, generator, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    both = threading.Barrier(2)
    failed = threading.Event()

    def before(index):
        if index in (0, 4):
            both.wait(10)  # now there is one thread in each of the first two parts
        if index == 1:
            failed.set()
            raise Stop
        if index == 5:
            failed.wait(10)
            time.sleep(0.1)

    generator.before = before
    with pytest.raises(Stop):
        task.prepare()
    assert not set(generator.drawn) & {0, 1, 2, 3, 6, 7}


DAMAGE = {
    "cut": lambda content: content[:-1],
    "cut within the hash": lambda content: content[:10],
    "empty": lambda content: b"",
    "a changed byte": lambda content: content[:90] + bytes([content[90] ^ 1]) + content[91:],
    "one more byte": lambda content: content + b"\0",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_part_is_made_again_and_no_other(task, generator, expected, damage):
    assert stopped_at(task, generator, 30) == PARTS[:-1]
    path = task.parts / "8-12.part"
    path.write_bytes(damage(path.read_bytes()))
    assert task.prepare().manifest["hash"] == expected
    assert sorted(generator.drawn) == drawn_of(["8-12", "30-31"])


def test_a_part_of_other_images_is_made_again(tmp_path, task, generator, expected):
    other = make(tmp_path, data_seed=1)
    stopped_at(other, generator, 30)
    stopped_at(task, generator, 30)
    content = (task.parts / "4-8.part").read_bytes()
    (task.parts / "0-4.part").write_bytes(content)
    (task.parts / "8-12.part").write_bytes((other.parts / "8-12.part").read_bytes())
    assert task.prepare().manifest["hash"] == expected
    assert sorted(generator.drawn) == drawn_of(["0-4", "8-12", "30-31"])


def test_a_part_that_is_lost_between_two_looks_is_told(task, monkeypatch):
    real = in_threads

    def losing(*arguments):
        real(*arguments)
        (task.parts / "20-24.part").unlink()

    monkeypatch.setattr(pathfinder, "in_threads", losing)
    with pytest.raises(ValueError, match=r"20-24\.part was lost or damaged just now\. Run this"):
        task.prepare()
    assert kept(task) == [task.parts.name]


def process(code, *arguments):
    """Starts code that sees this module, with one core, in a fresh process."""
    paths = [str(TESTS.parents[1]), str(TESTS)]
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, signal, sys, time\nfrom pathlib import Path\n"
            "from test_pathfinder import Generator, make, pytest\n"
            f"patch = pytest.MonkeyPatch()\nos.cpu_count = lambda: 1\n{code}",
            *map(str, arguments),
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


KILLED = """
def before(index):
    if index == 13:
        os.kill(os.getpid(), signal.SIGKILL)

Generator(before).install(patch)
make(Path(sys.argv[1])).prepare()
"""


def test_a_killed_build_goes_on_from_its_finished_parts(task, tmp_path, generator, expected):
    killed = process(KILLED, tmp_path)
    _, errors = killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL, errors
    assert parts(task) == PARTS[:3]
    assert task.state()[0] == "missing"
    assert task.prepare().manifest["hash"] == expected
    assert sorted(generator.drawn) == drawn_of(PARTS[3:])
    assert kept(task) == [task.folder.name]


SLOW = """
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell has sent behind
Generator(lambda index: time.sleep(index > 4 and 0.05)).install(patch)
try:
    make(Path(sys.argv[1]), num_train=10_000).prepare()
finally:
    print("told")
"""


def test_ctrl_c_ends_at_once_and_keeps_the_finished_parts(tmp_path, generator):
    task = make(tmp_path, num_train=10_000)
    interrupted = process(SLOW, tmp_path)
    path = task.parts / "0-4.part"
    for _ in range(600):
        if path.exists():
            break
        time.sleep(0.05)
    interrupted.send_signal(signal.SIGINT)
    since = time.monotonic()
    output, errors = interrupted.communicate(timeout=60)
    assert time.monotonic() - since < 5  # there are some 500 seconds of work left
    assert (interrupted.returncode, output) == (-signal.SIGINT, "told\n"), errors
    assert path.exists()
    assert kept(task) == [task.parts.name]


# Places that cannot be written to


def test_a_full_disk_is_one_message_and_keeps_the_finished_parts(
    task, generator, expected, monkeypatch
):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    real, written = Path.open, []

    def opened(self, mode="r", *arguments, **options):
        if ".part." not in self.name or "w" not in mode:
            return real(self, mode, *arguments, **options)
        written.append(self)
        place = self if len(written) <= 3 else Path("/dev/full")
        return real(place, mode, *arguments, **options)

    with monkeypatch.context() as full:
        full.setattr(Path, "open", opened)
        with pytest.raises(ValueError, match="cache_dir=") as error:
            task.prepare()
    assert str(task.cache_dir) in str(error.value)
    assert os.strerror(errno.ENOSPC) in str(error.value)
    assert "\n" not in str(error.value)
    assert kept(task) == [task.parts.name]
    assert parts(task) == PARTS[:3]
    generator.drawn.clear()
    assert task.prepare().manifest["hash"] == expected
    assert sorted(generator.drawn) == drawn_of(PARTS[3:])


# Progress


def test_the_bar_counts_images_and_begins_with_those_that_are_there(task, generator, capsys):
    stopped_at(task, generator, 14)
    captured = capsys.readouterr().err
    assert "Pathfinder images:   0%|          | 0.00/31.0 [" in captured
    task.prepare()
    captured = capsys.readouterr().err
    assert "Pathfinder images:  39%|███▊      | 12.0/31.0 [" in captured
    assert "Pathfinder images: 100%|██████████| 31.0/31.0 [" in captured


def test_progress_is_counted_step_by_step_and_never_twice_at_once(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    steps, whole, busy = [], {}, threading.Lock()

    def progress(count):
        assert busy.acquire(blocking=False)
        time.sleep(0.001)
        steps.append(count)
        busy.release()

    def compute(step):
        return {"square": np.array(step) ** 2}

    in_threads(cut(range(50), 10), 4, compute, whole.__setitem__, progress)
    assert sorted(steps) == [2] * 5 + [4] * 10
    assert {part: arrays["square"].tolist() for part, arrays in whole.items()} == {
        part: [i * i for i in part] for part in cut(range(50), 10)
    }


def test_parts_are_read_as_they_were_written(tmp_path):
    kept = Parts(tmp_path / "parts", "these")
    arrays = {"tokens": np.arange(6, dtype=np.uint8).reshape(2, 3), "distances": np.ones(2)}
    assert not kept.has(range(4, 6))
    kept.write(range(4, 6), arrays)
    assert kept.has(range(4, 6))
    read = kept.read(range(4, 6))
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array, strict=True)
    assert not kept.has(range(4, 7))
    assert not Parts(tmp_path / "parts", "others").has(range(4, 6))


# The rule that learns nothing


def rule(distances, labels):
    """Scores the rule on training, validation and test examples of given distances and labels."""
    named = [dict(zip(SPLITS, map(np.array, given), strict=True)) for given in (distances, labels)]
    return pathfinder._rules(*named)[RULE]


def test_a_threshold_on_the_distance_is_fitted_in_training_and_scored_on_the_test_set():
    train, val, test = [5.0, 9, 7, 11], [0.0], [4.0, 8.5, 30, 7.5, 2]
    assert rule([train, val, test], [[0, 1, 0, 1], [1], [0, 1, 1, 0, 1]]) == 4 / 5
    assert rule([train, val, test], [[1, 0, 1, 0], [0], [0, 1, 1, 0, 1]]) == 1 / 5


def test_only_the_first_training_examples_count(monkeypatch):
    monkeypatch.setattr(pathfinder, "RULE_EXAMPLES", 4)
    train, labels = [5.0, 9, 7, 11] * 10, [0, 1, 0, 1] + [1, 0, 1, 0] * 9
    assert rule([train, [0.0], [1.0, 12]], [labels, [0], [0, 1]]) == 1


def test_distances_are_those_of_the_images_before_they_are_made_smaller(tmp_path, generator):
    hashes, rules = set(), set()
    for interrupted in (False, True):
        for side in (1, 16):
            task = make(tmp_path / str(interrupted), downscale=side)
            if interrupted:
                stopped_at(task, generator, 30)
            manifest = task.prepare().manifest
            hashes.add(manifest["hash"])
            rules.add(manifest["baselines"][RULE])
    assert (len(hashes), len(rules)) == (2, 1)
    # The stand-in's distance of image i is i, which says little of its label.
    indices, ends = np.arange(TOTAL, dtype=float), np.cumsum([*SIZES.values()])[:-1]
    labels = np.array([label(i) for i in range(TOTAL)])
    assert rules == {rule(np.split(indices, ends), np.split(labels, ends))}


# The real generator


@pytest.mark.parametrize(
    ("name", "difficulty", "window"),
    [("pathfinder", "hard", 32), ("pathfinder", "easy", 32), ("pathx", "intermediate", 128)],
)
def test_generated_images_are_those_of_the_generator(tmp_path, name, difficulty, window):
    task = make(tmp_path, name, difficulty=difficulty, data_seed=3)
    prepared = task.prepare()
    images, labels, _ = _pathfinder.generate(
        geometry(window, difficulty), seed=3, first=0, count=TOTAL
    )
    ends = np.cumsum([0, *SIZES.values()])
    for split, first, last in zip(SPLITS, ends[:-1], ends[1:], strict=True):
        found = prepared.splits[split]
        assert found.labels.tolist() == labels[first:last].tolist()
        for i in range(last - first):
            np.testing.assert_array_equal(found[i], images[first + i].reshape(-1), strict=True)
    assert prepared.manifest["baselines"].keys() == {"majority class", RULE}


# Options


REFUSED = {
    "no training": ({"num_train": 0}, "num_train must be at least 1, not 0."),
    "no validation": ({"num_val": -1}, "num_val must be at least 1, not -1."),
    "no test": ({"num_test": 0}, "num_test must be at least 1, not 0."),
    "negative seed": ({"data_seed": -1}, "data_seed must be from 0 to 2**63 - 1, not -1."),
    "large seed": (
        {"source": "official", "split_seed": 2**63},
        "split_seed must be from 0 to 2**63 - 1, not 9223372036854775808.",
    ),
    "seed of the other source": (
        {"split_seed": 3},
        "split_seed=3 has an effect with source=official only, not with source=generated. Leave "
        "it out.",
    ),
    "seed of the generator": (
        {"source": "official", "data_seed": 3},
        "data_seed=3 has an effect with source=generated only, not with source=official. Leave "
        "it out.",
    ),
    "more than released": (
        {"source": "official", "num_test": 20_001},
        "num_test=20001 is more than the 20000 images that source=official has for it.",
    ),
}


@pytest.mark.parametrize("name", ["pathfinder", "pathx"])
@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_options_without_sense_are_refused(tmp_path, name, options, message):
    with pytest.raises(ValueError, match="task: ") as error:
        build_task(name, options, data_dir=tmp_path, cache_dir=tmp_path)
    assert str(error.value) == f"task: {message}"


def test_all_options_that_are_wrong_are_told_at_once(tmp_path):
    options = {"source": "official", "num_val": 0, "num_train": 10**6, "data_seed": 1}
    with pytest.raises(ValueError, match="num_val") as error:
        build_task("pathx", options, data_dir=tmp_path, cache_dir=tmp_path)
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("option", "allowed"),
    [
        ("source=offical", "generated, official"),
        ("difficulty=medium", "easy, hard, intermediate"),
        ("downscale=3", "1, 16, 2, 4, 8"),
        ("downscale=32", "1, 16, 2, 4, 8"),
    ],
)
def test_a_value_that_is_not_allowed_is_told_with_those_that_are(option, allowed):
    with pytest.raises(ValueError, match=f"Allowed: {allowed}"):
        load(["task=pathfinder", f"task.{option}"])


def test_the_source_is_no_departure_from_a_protocol():
    assert load(["task=pathfinder", "task.source=official"]).modified == {}
