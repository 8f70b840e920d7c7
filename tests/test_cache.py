"""The cache of prepared data: built once, found again, and never half there."""

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lra.tasks import base
from lra.tasks.base import SPLITS, Built, Split, Task

TESTS = Path(__file__).parent


class Tiny(Task):
    """Three small splits; every build is noted in ``data_dir``."""

    @dataclass(frozen=True)
    class Config:
        """Number of training examples, and a seed."""

        size: int = 5
        seed: int = 0

    name = "tiny"
    version = 3
    num_classes = 4
    vocab_size = 300
    dtype = np.uint16

    @property
    def max_len(self):
        return 9

    def build(self):
        self.data_dir.mkdir(exist_ok=True)
        with (self.data_dir / "builds").open("a") as file:
            file.write(f"{os.getpid()}\n")
        rng = np.random.default_rng(self.config.seed)
        splits = {
            name: ragged(
                [rng.integers(1, 300, rng.integers(1, 10)) for _ in range(count)],
                rng.integers(0, 4, count),
                self.dtype,
            )
            for name, count in zip(SPLITS, (self.config.size, 3, 2), strict=True)
        }
        return self.built(splits)

    def built(self, splits):
        return Built({name: [split] for name, split in splits.items()}, "made up", self.rules)

    def rules(self, splits):
        return {"number of tokens": float(np.mean(splits["test"].lengths % 4 == 1))}


class Given(Tiny):
    """The splits that a test hands over."""

    def build(self):
        super().build()
        return self.built(self.given)


class InPieces(Tiny):
    """The pieces that a test hands over, of every split the same."""

    def build(self):
        return Built(dict.fromkeys(SPLITS, self.given), "made up")


class BrokenLate(Tiny):
    """Finds its source broken after one piece is written."""

    def build(self):
        def pieces():
            yield ragged([[1]], [0])
            raise ValueError("line 9 of source.tsv is broken")

        return Built({name: pieces() for name in SPLITS}, "made up")


class KilledEarly(Tiny):
    """Dies before any file is written."""

    def build(self):
        super().build()
        os.kill(os.getpid(), signal.SIGKILL)


class Failing(Tiny):
    def build(self):
        super().build()
        raise ValueError("line 7 of source.tsv is broken")


class Unreadable(Tiny):
    """Has a source that may not be read."""

    def build(self):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/source/listops.tsv")


class FailingLate(Tiny):
    def rules(self, splits):
        raise KeyError("label")


def ragged(sequences, labels, dtype=np.uint16):
    return Split.of(
        np.concatenate([np.empty(0, dtype), *(np.asarray(s, dtype) for s in sequences)]),
        np.cumsum([0, *map(len, sequences)], dtype=np.int64),
        np.asarray(labels, np.uint8),
    )


def make(folder, cls=Tiny, **options):
    return cls(cls.Config(**options), data_dir=folder / "data", cache_dir=folder / "cache")


@pytest.fixture
def task(tmp_path):
    return make(tmp_path)


def builds(task):
    path = task.data_dir / "builds"
    return len(path.read_text().splitlines()) if path.exists() else 0


def left(task):
    """Returns the names in the cache folder, locks apart."""
    if not task.cache_dir.is_dir():
        return []
    return sorted(path.name for path in task.cache_dir.iterdir() if path.suffix != ".lock")


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, split in expected.items():
        assert found[name].tokens.dtype == split.tokens.dtype
        np.testing.assert_array_equal(found[name].lengths, split.lengths, strict=True)
        np.testing.assert_array_equal(found[name].labels, split.labels, strict=True)
        for index in np.ndindex(split.lengths.shape):
            np.testing.assert_array_equal(found[name][index], split[index], strict=True)


def whole(task):
    """Returns what a task builds in one piece a split."""
    return {name: piece for name, [piece] in task.build().splits.items()}


def in_processes(code, *arguments, count=1):
    """Runs code that sees this module in fresh processes at once; returns them when ended."""
    paths = [str(TESTS.parent), str(TESTS)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", f"import sys\nfrom test_cache import *\n{code}", *arguments],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(count)
    ]
    return [(process, *process.communicate(timeout=60)) for process in processes]


# Splits


def test_a_split_gives_its_sequences_lengths_and_number():
    split = ragged([[1, 2, 3], [], [4]], [0, 1, 2])
    assert len(split) == 3
    assert [split[i].tolist() for i in range(3)] == [[1, 2, 3], [], [4]]
    assert split.lengths.tolist() == [3, 0, 1]


def test_a_piece_of_a_split_is_a_split():
    split = ragged([[1, 2, 3], [], [4], [5, 6]], [0, 1, 2, 3])
    piece = split.take(1, 4)
    assert_same({"": piece}, {"": ragged([[], [4], [5, 6]], [1, 2, 3])})
    assert_same({"": split.take(0, 4)}, {"": split})
    assert len(split.take(2, 2)) == 0


# Built once and found again


def test_data_is_built_once_and_then_opened(task, tmp_path):
    assert task.state() == ("missing", f"no folder {task.folder}")
    first = task.prepare()
    again = make(tmp_path).prepare()
    assert builds(task) == 1
    assert again.manifest == first.manifest
    assert_same(again.splits, first.splits)
    assert task.state(hashes="all") == ("found", str(task.folder))


def test_what_is_opened_is_what_was_built(task):
    assert_same(task.prepare().splits, whole(task))


def test_what_is_opened_is_the_file_itself_and_cannot_be_written_to(task):
    split = task.prepare().splits["train"]
    assert split.tokens.nbytes == (task.folder / "train.arrow").stat().st_size
    assert not split.tokens.flags.writeable


sequences = st.lists(st.lists(st.integers(0, 255), max_size=5), min_size=1, max_size=6)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    st.tuples(sequences, sequences, sequences),
    st.sampled_from([np.uint8, np.uint16, np.uint32]),
    st.integers(0, 3),
)
def test_any_ragged_splits_are_opened_as_they_were_built(tmp_path_factory, parts, dtype, label):
    task = make(tmp_path_factory.mktemp("any"), Given)
    task.given = {
        name: ragged(part, [(label + i) % 4 for i in range(len(part))], dtype)
        for name, part in zip(SPLITS, parts, strict=True)
    }
    assert_same(task.prepare().splits, task.given)


def test_pieces_of_one_split_are_stored_as_splits_of_their_own(tmp_path):
    task = make(tmp_path, Given)
    whole = ragged([[1], [2, 3], [4, 5, 6], [], [7]], [0, 1, 2, 3, 0])
    task.given = {"train": whole.take(0, 2), "val": whole.take(2, 4), "test": whole.take(4, 5)}
    splits = task.prepare().splits
    assert_same(splits, task.given)


pairs = st.lists(
    st.tuples(st.lists(st.integers(0, 255), max_size=5), st.lists(st.integers(0, 255), max_size=5)),
    max_size=4,
)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    st.lists(pairs, min_size=1, max_size=4).filter(any),
    st.sampled_from([np.uint8, np.uint16, np.uint32]),
)
def test_pieces_and_pairs_are_opened_as_one_split(tmp_path_factory, pieces, dtype):
    task = make(tmp_path_factory.mktemp("any"), InPieces)
    task.given = [
        ragged([s for pair in piece for s in pair], [i % 4 for i in range(len(piece))], dtype)
        if piece
        else Split(np.empty(0, dtype), *np.empty((2, 0, 2), np.int64), np.empty(0, np.uint8))
        for piece in pieces
    ]
    together = [pair for piece in pieces for pair in piece]
    split = task.prepare().splits["val"]
    assert split.lengths.shape == split.starts.shape == (len(together), 2)
    assert [(split[i, 0].tolist(), split[i, 1].tolist()) for i in range(len(together))] == together
    assert split.labels.tolist() == [i % 4 for piece in pieces for i in range(len(piece))]


def test_a_table_is_a_split_whose_rows_have_one_length():
    split = Split.of_table(np.arange(6, dtype=np.uint8).reshape(3, 2), np.zeros(3, np.uint8))
    assert [split[i].tolist() for i in range(3)] == [[0, 1], [2, 3], [4, 5]]


def test_a_build_that_breaks_after_some_pieces_leaves_nothing_and_its_message_stands(tmp_path):
    task = make(tmp_path, BrokenLate)
    with pytest.raises(ValueError, match=r"^line 9 of source\.tsv is broken$"):
        task.prepare()
    assert left(task) == []


def test_parts_that_a_build_left_are_there_until_one_ends(tmp_path):
    class Parted(Tiny):
        def build(self):
            self.parts.mkdir(exist_ok=True)
            with (self.parts / "0").open("a") as file:
                file.write("x")
            if (self.parts / "0").read_text() == "x":
                raise ValueError("interrupted")
            return super().build()

    task = make(tmp_path, Parted)
    with pytest.raises(ValueError, match="interrupted"):
        task.prepare()
    assert left(task) == [task.parts.name]
    task.prepare()
    assert left(task) == [task.folder.name]


@pytest.mark.filterwarnings("ignore")  # of other packages, when datasets is imported
def test_the_files_are_those_that_datasets_opens(task):
    from datasets import Dataset

    splits = task.prepare().splits
    for name in SPLITS:
        opened = Dataset.from_file(str(task.folder / f"{name}.arrow"))
        assert opened.column_names == ["tokens", "label"]
        split = splits[name]
        assert opened[:]["tokens"] == [split[i].tolist() for i in range(len(split))]
        assert opened[:]["label"] == split.labels.tolist()


def test_every_option_and_the_version_have_a_folder_of_their_own(tmp_path):
    class Newer(Tiny):
        version = 4

    tasks = [make(tmp_path), make(tmp_path, size=6), make(tmp_path, seed=1), make(tmp_path, Newer)]
    assert len({task.folder for task in tasks}) == 4
    assert len({task.fingerprint for task in tasks}) == 4
    for task in tasks:
        task.prepare()
    assert [builds(task) for task in tasks] == [4] * 4
    assert len(left(tasks[0])) == 4


def test_the_folder_depends_on_the_options_and_not_on_where_the_source_is(task, tmp_path):
    elsewhere = Tiny(Tiny.Config(), data_dir=tmp_path / "elsewhere", cache_dir=tmp_path / "cache")
    assert elsewhere.folder == task.folder


def test_the_manifest_holds_sizes_baselines_and_hashes(tmp_path):
    task = make(tmp_path, Given)
    task.given = {
        "train": ragged([[1, 2], [3], [4, 5, 6]], [2, 2, 0]),
        "val": ragged([[1]], [0]),
        "test": ragged([[1], [2], [3, 4], [5]], [0, 0, 0, 2]),
    }
    manifest = task.prepare().manifest
    assert manifest["splits"]["train"] == {
        "examples": 3,
        "tokens": 6,
        "longest": 3,
        "classes": [1, 0, 2, 0],
    }
    # Class 2 is the most frequent in training; what it scores on the test set counts.
    assert manifest["baselines"] == {"majority class": 0.25, "number of tokens": 0.75}
    assert manifest["source"] == "made up"
    assert manifest["options"] == {"size": 5, "seed": 0}
    assert (manifest["task"], manifest["version"]) == ("tiny", 3)
    assert manifest == json.loads((task.folder / "manifest.json").read_text())


def test_the_datas_hash_is_the_same_for_the_same_data_and_no_other(tmp_path):
    hashes = [
        make(tmp_path / str(i), seed=seed).prepare().manifest["hash"]
        for i, seed in enumerate((0, 0, 1))
    ]
    assert hashes[0] == hashes[1] != hashes[2]


# Damage


def overwrite(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-1])


def rewrite(change):
    """Changes something in the manifest."""

    def damage(folder):
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return damage


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        pytest.param(cut("train.arrow"), "train.arrow", id="cut file"),
        pytest.param(overwrite("val.arrow", b""), "val.arrow", id="empty file"),
        pytest.param(lambda f: (f / "test.arrow").unlink(), "test.arrow", id="missing file"),
        pytest.param(
            lambda f: (f / "manifest.json").unlink(), "manifest.json", id="missing manifest"
        ),
        pytest.param(cut("manifest.json"), "manifest.json", id="cut manifest"),
        pytest.param(overwrite("manifest.json", b""), "manifest.json", id="empty manifest"),
        pytest.param(overwrite("manifest.json", b"\xff\x00"), "manifest.json", id="no text"),
        pytest.param(overwrite("manifest.json", b"[]"), "manifest.json", id="no object"),
        pytest.param(overwrite("manifest.json", b"{}"), "manifest.json", id="no files"),
        pytest.param(
            overwrite("manifest.json", b'{"files": {}}'), "manifest.json", id="no file listed"
        ),
        pytest.param(
            overwrite("manifest.json", b'{"files": []}'), "manifest.json", id="list of files"
        ),
        pytest.param(
            overwrite("manifest.json", b'{"files": {"train.arrow": 1}}'),
            "manifest.json",
            id="files without sizes",
        ),
        pytest.param(rewrite(lambda m: m.update(sources=[])), "manifest.json", id="sources"),
        pytest.param(rewrite(lambda m: m.pop("baselines")), "manifest.json", id="no baselines"),
        pytest.param(rewrite(lambda m: m.update(hash="0" * 16)), "manifest.json", id="other hash"),
        pytest.param(
            rewrite(lambda m: m["splits"].update(val=1)), "manifest.json", id="a split of numbers"
        ),
        pytest.param(overwrite("manifest.json", b"[" * 100_000), "manifest.json", id="too deep"),
    ],
)
def test_damaged_data_is_rebuilt_with_one_line_that_says_why(task, capsys, damage, named):
    # What is open is a map of the file, so nothing of it is kept across the damage.
    manifest = task.prepare().manifest
    damage(task.folder)
    state, reason = task.state()
    assert state == "damaged"
    assert str(task.folder / named) in reason
    capsys.readouterr()
    again = task.prepare()
    [line] = capsys.readouterr().err.splitlines()
    assert "tiny" in line
    assert str(task.folder / named) in line
    assert builds(task) == 2
    assert again.manifest == manifest
    assert_same(again.splits, whole(task))
    assert task.state(hashes="all")[0] == "found"


class Sourced(Tiny):
    """Is made from the files that are in ``data_dir``, if there are any."""

    def source_files(self):
        return {path.name: path for path in sorted(self.data_dir.glob("*.tsv"))}


def test_data_stays_where_its_source_can_no_longer_be_read(tmp_path):
    task = make(tmp_path, Sourced)
    task.data_dir.mkdir()
    source = task.data_dir / "a.tsv"
    source.write_text("1")
    expected = task.prepare()
    source.write_text("cut")

    class Broken(Sourced):
        def build(self):
            raise ValueError("a.tsv is broken")

    with pytest.raises(ValueError, match=r"a\.tsv is broken"):
        make(tmp_path, Broken).prepare()
    source.write_text("1")
    assert task.state(hashes="all")[0] == "found"
    assert_same(task.prepare().splits, expected.splits)
    assert builds(task) == 1


def test_splits_and_manifest_are_of_one_build_though_another_process_builds_meanwhile(
    tmp_path, monkeypatch
):
    task, other = make(tmp_path, Given), make(tmp_path, Given)
    splits = {name: ragged([[1]], [0]) for name in SPLITS}
    task.given, other.given = splits, splits | {"val": ragged([[1], [2]], [0, 1])}
    task.prepare()
    opened = []
    real = base._open

    def open_late(folder):
        if not opened:
            opened.append(True)
            other._build_folder()
        return real(folder)

    monkeypatch.setattr(base, "_open", open_late)
    prepared = task.prepare()
    assert prepared.manifest["splits"]["val"]["examples"] == len(prepared.splits["val"]) == 2


def test_data_is_made_again_where_files_that_it_was_made_from_are_others_now(tmp_path):
    task = make(tmp_path, Sourced)
    task.data_dir.mkdir()
    (task.data_dir / "a.tsv").write_text("1")
    task.prepare()
    assert task.state() == ("found", str(task.folder))
    (task.data_dir / "a.tsv").write_text("22")
    state, reason = task.state()
    assert state == "damaged"
    assert "a.tsv has 2 bytes, not 1" in reason
    task.prepare()
    (task.data_dir / "b.tsv").write_text("3")
    assert task.state() == ("damaged", "its source files have changed: b.tsv")
    for name in "cdef":
        (task.data_dir / f"{name}.tsv").write_text("3")
    reason = "its source files have changed: b.tsv, c.tsv, d.tsv and 2 more"
    assert task.state() == ("damaged", reason)
    task.prepare()
    assert builds(task) == 3


def test_files_that_are_no_longer_there_or_were_not_used_are_not_asked_for(tmp_path):
    task = make(tmp_path, Sourced)
    task.prepare()
    (task.data_dir / "a.tsv").write_text("1")  # the data came from elsewhere
    assert task.state()[0] == "found"
    task.folder.rename(tmp_path / "kept")
    task.prepare()
    (task.data_dir / "a.tsv").unlink()
    assert task.state()[0] == "found"


def test_a_sound_build_says_nothing_on_standard_error(task, capsys):
    task.prepare()
    task.prepare()
    assert capsys.readouterr().err == ""


def test_a_changed_byte_is_noticed_where_hashes_are_compared(task):
    task.prepare()
    path = task.folder / "test.arrow"
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    state, reason = task.state(hashes="all")
    assert state == "damaged"
    assert str(path) in reason


@pytest.mark.parametrize(
    ("place", "hashes"),
    [
        pytest.param(-20, "splits", id="a label"),
        pytest.param(None, "none", id="all of it, so that it cannot be opened"),
    ],
)
def test_contents_that_have_changed_are_made_again(task, capsys, place, hashes):
    task.prepare()
    path = task.folder / "test.arrow"
    content = bytearray(path.read_bytes())
    for index in range(len(content)) if place is None else [place]:
        content[index] ^= 1
    path.write_bytes(content)
    again = task.prepare(hashes)
    [line] = capsys.readouterr().err.splitlines()
    assert str(path) in line
    assert_same(again.splits, whole(task))


# Builds that fail


@pytest.mark.parametrize(
    ("cls", "error"), [(Failing, "line 7 of source.tsv is broken"), (FailingLate, "label")]
)
def test_a_build_that_raises_leaves_nothing_and_its_message_stands(tmp_path, cls, error):
    task = make(tmp_path, cls)
    with pytest.raises((ValueError, KeyError), match=error):
        task.prepare()
    assert left(task) == []
    assert task.state()[0] == "missing"
    assert len(make(tmp_path).prepare().splits["val"]) == 3


def test_a_source_that_may_not_be_read_is_not_blamed_on_the_cache(tmp_path):
    task = make(tmp_path, Unreadable)
    with pytest.raises((ValueError, PermissionError), match=r"/source/listops\.tsv") as error:
        task.prepare()
    assert "cache_dir" not in str(error.value)
    assert left(task) == []


KILLED_WHILE_WRITING = """
real, written = os.fsync, []

def fsync(file):
    written.append(file)
    if len(written) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    real(file)

os.fsync = fsync
make(Path(sys.argv[1])).prepare()
"""


@pytest.mark.parametrize(
    ("code", "files"),
    [
        pytest.param("make(Path(sys.argv[1]), KilledEarly).prepare()", 0, id="before any file"),
        pytest.param(KILLED_WHILE_WRITING, 2, id="in the second file"),
        pytest.param(KILLED_WHILE_WRITING, 4, id="in the manifest, the last file"),
    ],
)
def test_a_killed_build_leaves_nothing_taken_for_data_and_the_next_call_builds(
    tmp_path, code, files
):
    [(process, _, errors)] = in_processes(code, str(tmp_path), str(files))
    assert process.returncode == -signal.SIGKILL, errors
    task = make(tmp_path)
    assert task.state()[0] == "missing"
    assert len(task.prepare().splits["val"]) == 3
    assert left(task) == [task.folder.name]
    assert builds(task) == 2
    assert task.state(hashes="all")[0] == "found"


def test_four_processes_at_once_build_once_and_read_the_same(tmp_path):
    code = (
        "import time\n"
        "class Slow(Tiny):\n"
        "    def build(self):\n"
        "        time.sleep(0.3)\n"
        "        return super().build()\n"
        "prepared = make(Path(sys.argv[1]), Slow).prepare()\n"
        "print(prepared.manifest['hash'], prepared.splits['train'].tokens.sum())\n"
    )
    ended = in_processes(code, str(tmp_path), count=4)
    assert [(process.returncode, errors) for process, _, errors in ended] == [(0, "")] * 4
    assert len({output for _, output, _ in ended}) == 1
    task = make(tmp_path)
    assert builds(task) == 1
    assert left(task) == [task.folder.name]


def test_who_waits_for_a_build_that_is_killed_builds_itself(tmp_path):
    code = (
        "import time\n"
        "class KilledLater(Tiny):\n"
        "    def build(self):\n"
        "        splits = super().build()\n"
        "        time.sleep(0.3)\n"
        "        if builds(self) == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return splits\n"
        "make(Path(sys.argv[1]), KilledLater).prepare()\n"
    )
    ended = in_processes(code, str(tmp_path), count=2)
    assert sorted(process.returncode for process, _, _ in ended) == [-signal.SIGKILL, 0]
    task = make(tmp_path)
    assert builds(task) == 2
    assert task.state(hashes="all")[0] == "found"
    assert left(task) == [task.folder.name]


# Places that cannot be written to


@pytest.fixture
def full_disk(monkeypatch):
    """Lets the disk be full when files are written whose name holds a given part."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    real = Path.open

    def fill(part):
        def opened(self, mode="r", *arguments, **options):
            full = part in self.name and "w" in mode
            return real(Path("/dev/full") if full else self, mode, *arguments, **options)

        monkeypatch.setattr(Path, "open", opened)

    return fill


@pytest.mark.parametrize("part", ["train.arrow", "test.arrow", "manifest.json"])
def test_a_full_disk_is_one_message_that_names_cache_dir_and_leaves_nothing(task, full_disk, part):
    full_disk(part)
    with pytest.raises(ValueError, match="cache_dir=") as error:
        task.prepare()
    assert str(task.cache_dir) in str(error.value)
    assert os.strerror(errno.ENOSPC) in str(error.value)
    assert left(task) == []
    assert task.state()[0] == "missing"


def test_a_disk_that_was_full_and_has_room_again_is_built_on(task, full_disk, monkeypatch):
    full_disk("val.arrow")
    with pytest.raises(ValueError, match="cache_dir="):
        task.prepare()
    monkeypatch.undo()
    assert len(task.prepare().splits["val"]) == 3


def refused(task):
    """Returns the message that a folder which cannot be made or written to gives."""
    with pytest.raises(ValueError, match="cache_dir=") as error:
        task.prepare()
    assert builds(task) == 0
    return str(error.value)


@pytest.mark.parametrize("number", ["EROFS", "EACCES", "EPERM", "EDQUOT"])
def test_a_folder_that_may_not_be_written_to_is_one_message_before_any_work(
    task, monkeypatch, number
):
    def mkdir(self, *_, **__):
        raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)), str(self))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert str(task.cache_dir) in refused(task)


def test_a_cache_dir_below_a_file_is_one_message_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "cache"
    task = Tiny(Tiny.Config(), data_dir=tmp_path / "data", cache_dir=below)
    assert str(below) in refused(task)


def test_a_cache_dir_that_is_a_file_is_one_message_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    task = Tiny(Tiny.Config(), data_dir=tmp_path / "data", cache_dir=tmp_path / "file")
    assert str(tmp_path / "file") in refused(task)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to read-only folders")
def test_a_read_only_cache_dir_is_one_message_before_any_work(task):
    task.cache_dir.mkdir()
    task.cache_dir.chmod(0o500)
    try:
        assert str(task.cache_dir) in refused(task)
    finally:
        task.cache_dir.chmod(0o700)


def test_a_whole_cache_that_may_not_be_written_to_is_read(task, monkeypatch):
    expected = task.prepare()

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr("lra.tasks.base.locked", refuse)
    assert_same(task.prepare().splits, expected.splits)
