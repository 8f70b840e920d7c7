"""Retrieval: its files on disk and on the hub, which rows are refused, and how little is held."""

import io
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lra.cli import main
from lra.tasks import _pairs
from lra.tasks._retrieval_files import FILES, HUB_ID, HUB_REVISION, find_files
from lra.tasks.base import SPLITS
from lra.tasks.retrieval import Retrieval

ROOT = Path(__file__).parents[2]
ROWS = [
    b"1\tA1\tB1\tOne text.\tAnother text.",
    b"0\tA2\tB2\t\xc3\xa9t\xc3\xa9\t\xf4\x8f\xbf\xbf",
    b'1.0\tA3\tB3\t"quoted\t"',
    b"0.0\tA1\tB3\t 'x \" \r \x00\tz\\t",
]
PAIRS = [
    (b"One text.", b"Another text."),
    (b"\xc3\xa9t\xc3\xa9", b"\xf4\x8f\xbf\xbf"),
    (b'"quoted', b'"'),
    (b" 'x \" \r \x00", b"z\\t"),
]
LABELS = [1, 0, 1, 0]
LAYOUTS = [
    "aan",
    "lra_release/tsv_data",
    "lra_release/lra_release/tsv_data",
    "tsv_data",
    "data/aan",
]
deterministic = settings(derandomize=True, deadline=None, max_examples=60)


def content(rows, end=b"\n"):
    return b"".join(row + end for row in rows)


def put(folder, **contents):
    """Writes the three files, with the four good rows where no other content is given."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, file in FILES.items():
        (folder / file).write_bytes(contents.get(name, content(ROWS)))
    return folder


def make(folder, **options):
    config = Retrieval.Config(**options)
    return Retrieval(config, data_dir=folder / "data", cache_dir=folder / "cache")


def texts(split):
    """Returns the pairs of texts that a split's ids stand for."""
    return [
        tuple((split[i, side] - np.uint8(1)).tobytes() for side in (0, 1))
        for i in range(len(split))
    ]


def told(captured):
    """Returns the lines on standard error, apart from progress bars and the line on few rows."""
    usual = ("Retrieval train:", "Retrieval val:", "Retrieval test:")
    return [
        line
        for line in captured.err.replace("\r", "\n").splitlines()
        if line and not line.startswith(usual) and "is not the released file" not in line
    ]


def kept(task):
    """Returns the names in the cache folder, locks apart."""
    return sorted(path.name for path in task.cache_dir.iterdir() if path.suffix != ".lock")


def refused(task):
    """Returns the one-line message with which a build ends, of which nothing is left."""
    with pytest.raises(ValueError, match=r".") as error:
        task.prepare()
    assert kept(task) == []
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def task(tmp_path):
    put(tmp_path / "data" / "aan")
    return make(tmp_path)


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """Returns a function that reads a training file of a given content."""
    folder = put(tmp_path_factory.mktemp("one") / "data" / "aan")

    def read_content(whole, **options):
        put(folder, train=whole)
        [piece] = make(folder.parents[1], **options).build().splits["train"]
        return piece

    return read_content


# What is read


def test_rows_become_pairs_of_byte_ids_and_labels_in_the_order_of_the_file(task, capsys):
    prepared = task.prepare()
    for split in prepared.splits.values():
        assert texts(split) == PAIRS
        assert split.labels.tolist() == LABELS
        assert split.lengths.shape == (4, 2)
        assert (split.tokens.dtype, split.labels.dtype) == (np.uint8, np.uint8)
    assert prepared.splits["train"][1, 1].tolist() == [0xF5, 0x90, 0xC0, 0xC0]
    assert prepared.manifest["splits"]["val"]["classes"] == [2, 2]
    assert prepared.manifest["baselines"] == {"majority class": 0.5}
    assert prepared.manifest["source"] == "files of the Long Range Arena release"
    assert told(capsys.readouterr()) == []


def test_every_split_has_a_file_of_its_own(tmp_path):
    assert FILES["val"] == "new_aan_pairs.eval.tsv"
    put(tmp_path / "data" / "aan", val=content(ROWS[:1]), test=content(ROWS[1:3]))
    splits = make(tmp_path).prepare().splits
    assert {name: split.labels.tolist() for name, split in splits.items()} == {
        "train": [1, 0, 1, 0],
        "val": [1],
        "test": [0, 1],
    }


def test_texts_are_cut_to_the_first_bytes_even_within_a_character(tmp_path):
    put(tmp_path / "data" / "aan")
    task = make(tmp_path, max_length=3)
    assert texts(task.prepare().splits["test"]) == [(a[:3], b[:3]) for a, b in PAIRS]
    assert PAIRS[1][0][:3] == b"\xc3\xa9t"
    assert task.max_len == 3


def test_4000_bytes_are_kept_unless_asked_otherwise(read):
    long = b"x" * 4_001
    split = read(content([b"0\ta\tb\t" + long + b"\t" + long[:3_999]]))
    assert split.lengths.tolist() == [[4_000, 3_999]]
    assert Retrieval.Config().max_length == 4_000


characters = st.text(
    st.characters(codec="utf-8", exclude_characters="\t\n"), min_size=1, max_size=12
)


@deterministic
@given(
    st.lists(st.tuples(characters, characters, st.integers(0, 3)), min_size=1, max_size=6),
    st.sampled_from([b"\n", b"\r\n"]),
    st.booleans(),
    st.integers(1, 20),
)
def test_any_texts_are_read_as_they_were_written(read, written, end, ended, max_length):
    labels = [b"0", b"1", b"0.0", b"1.0"]
    rows = [
        b"\t".join([labels[label], b"a", b"b", first.encode(), second.encode() + b"."])
        for first, second, label in written
    ]
    whole = content(rows, end)
    split = read(whole if ended else whole.removesuffix(end), max_length=max_length)
    assert texts(split) == [
        (first.encode()[:max_length], (second.encode() + b".")[:max_length])
        for first, second, _ in written
    ]
    assert split.labels.tolist() == [label % 2 for _, _, label in written]


def test_data_is_the_same_in_however_many_pieces_it_is_written(task, tmp_path, monkeypatch):
    monkeypatch.setattr(_pairs, "PIECE_BYTES", 30)
    pieces = list(task.build().splits["train"])
    assert [len(piece) for piece in pieces] == [2, 2]
    assert [pair for piece in pieces for pair in texts(piece)] == PAIRS
    assert texts(task.prepare().splits["train"]) == PAIRS


def test_the_first_rows_are_the_subset_and_what_is_behind_them_is_not_read(tmp_path):
    broken = content([*ROWS, b"no row"])
    put(tmp_path / "data" / "aan", train=broken, val=broken, test=broken)
    splits = make(tmp_path, num_train=3, num_val=1, num_test=4).prepare().splits
    assert {name: texts(split) for name, split in splits.items()} == {
        "train": PAIRS[:3],
        "val": PAIRS[:1],
        "test": PAIRS,
    }


def test_more_rows_wanted_than_there_are_is_refused(tmp_path):
    path = put(tmp_path / "data" / "aan") / "new_aan_pairs.eval.tsv"
    assert refused(make(tmp_path, num_val=5)) == (
        f"{path} has 4 rows, fewer than task.num_val=5. Set it lower, or to null for all."
    )


def test_other_numbers_of_rows_than_released_are_told(task, capsys):
    task.prepare()
    path = task.data_dir / "aan" / "new_aan_pairs.test.tsv"
    line = f"{path} is not the released file: it has 4 rows, not 17,437."
    assert line in capsys.readouterr().err.splitlines()


def test_the_progress_bar_counts_the_bytes_of_a_file_or_the_rows_wanted(tmp_path, capsys):
    put(tmp_path / "data" / "aan")
    make(tmp_path, num_test=2).prepare()
    shown = capsys.readouterr().err
    total = f"{len(content(ROWS))}.0"
    assert f"Retrieval train: 100%|██████████| {total}/{total} [" in shown
    assert "Retrieval test: 100%|██████████| 2.00/2.00 [" in shown


# Where the files are


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_files_are_found_where_an_archive_a_download_or_a_user_puts_them(tmp_path, layout):
    folder = put(tmp_path / "data" / layout)
    assert make(tmp_path).source_files() == {name: folder / FILES[name] for name in SPLITS}


def test_of_several_folders_with_files_the_first_is_taken(tmp_path):
    for layout in reversed(LAYOUTS):
        folder = put(tmp_path / layout)
        assert find_files(tmp_path)["val"] == folder / FILES["val"]


def test_papers_and_citations_beside_them_or_alone_are_nothing_to_this_task(tmp_path):
    (tmp_path / "aan").mkdir()
    (tmp_path / "aan" / "papers.parquet").touch()
    assert find_files(tmp_path) == {}
    assert find_files(put(tmp_path / "tsv_data").parent)["test"].parent.name == "tsv_data"


@pytest.mark.parametrize("missing", [["train"], ["val"], ["test"], ["train", "test"]])
def test_files_missing_beside_others_are_named_and_not_taken_from_elsewhere(tmp_path, missing):
    put(tmp_path / "data" / "tsv_data")
    folder = put(tmp_path / "data" / "aan")
    for name in missing:
        (folder / FILES[name]).unlink()
    message = refused(make(tmp_path))
    assert [name for name in SPLITS if FILES[name] in message] == missing
    assert message.startswith(f"{folder} has some of the Retrieval files, but no ")
    assert f"hf download {HUB_ID} " in message


def test_other_files_than_before_are_read_again(task, capsys):
    task.prepare()
    put(task.data_dir / "aan", train=content(ROWS[:2]))
    assert task.state()[0] == "damaged"
    assert texts(task.prepare().splits["train"]) == PAIRS[:2]
    assert "data is rebuilt" in capsys.readouterr().err


# Rows and files that are refused


COLUMNS = r" columns, not 5 (label, id1, id2, text1, text2)"
BAD_ROWS = {
    "empty row": (b"", "the row is empty"),
    "four columns": (b"1\ta\tb\tc", f"the row has 4{COLUMNS}"),
    "six columns": (b"1\ta\tb\tc\td\te", f"the row has 6{COLUMNS}"),
    "spaces for tabs": (b"1 a b c d", f"the row has 1{COLUMNS}"),
    "label 2": (b"2\ta\tb\tc\td", "the label is '2', not one of 0, 1, 0.0, 1.0"),
    "label -1": (b"-1\ta\tb\tc\td", "the label is '-1', not one of"),
    "no label": (b"\ta\tb\tc\td", "the label is '', not one of"),
    "label of text": (b"label\tid1\tid2\ttext1\ttext2", "the label is 'label', not one of"),
    "label that is not UTF-8": (b"\xff\ta\tb\tc\td", r"the label is '\\xff', not one of"),
    "byte order mark": (b"\xef\xbb\xbf1\ta\tb\tc\td", r"the label is '\ufeff1', not one of"),
    "no first text": (b"1\ta\tb\t\td", "text1: a document without text"),
    "no second text": (b"1\ta\tb\tc\t", "text2: a document without text"),
    "first byte that UTF-8 has not": (
        b"1\ta\tb\tc\xf5\td",
        "text1: a document has the byte 0xf5 at its byte 1: it is not UTF-8",
    ),
    "last byte that UTF-8 has not": (
        b"1\ta\tb\tc\tno\xff",
        "text2: a document has the byte 0xff at its byte 2: it is not UTF-8",
    ),
}


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize(("row", "reason"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_bad_row_is_refused_with_file_line_and_reason(tmp_path, row, reason, end):
    whole = content([*ROWS[:2], row, *ROWS[2:]], end)
    path = put(tmp_path / "data" / "aan", val=whole) / FILES["val"]
    message = refused(make(tmp_path))
    assert message.startswith(f"{path}, line 3: {reason}")
    assert message.endswith(". Get the file again.")


def test_bytes_behind_the_kept_ones_are_not_looked_at(read):
    assert texts(read(b"1\ta\tb\tc\xff\td\xff\n", max_length=1)) == [(b"c", b"d")]


def test_a_message_quotes_only_the_beginning_and_the_end_of_a_long_label(read):
    with pytest.raises(ValueError, match=r"line 1: the label is '1111.*\.\.\.") as error:
        read(b"1" * 100_000 + b"\ta\tb\tc\td\n")
    assert len(str(error.value)) < 400


BAD_FILES = {
    "no byte": (b"", "line 1: the file ends here, without any row"),
    "cut in the last row": (content(ROWS)[:-7], f"line 4: the row has 4{COLUMNS}: the file is cut"),
    "cut before a text": (content(ROWS)[:-4], "line 4: text2: a document without text"),
    "cut in the first row": (b"1", f"line 1: the row has 1{COLUMNS}: the file is cut short"),
    "empty first line": (b"\n" + content(ROWS), "line 1: the row is empty"),
    "empty last line": (content([*ROWS, b""]), "line 5: the row is empty"),
    "compressed": (b"\x1f\x8b\x08\x00", f"line 1: the row has 1{COLUMNS}"),
}


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize(("whole", "reason"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_file_that_is_empty_cut_or_something_else_is_refused(tmp_path, name, whole, reason):
    path = put(tmp_path / "data" / "aan", **{name: whole}) / FILES[name]
    assert refused(make(tmp_path)).startswith(f"{path}, {reason}")


def test_a_row_that_is_too_long_is_refused(read, monkeypatch):
    monkeypatch.setattr("lra.tasks._retrieval_files._MAX_LINE", 1 << 20)
    long = b"1\ta\tb\tc\t" + b"d" * ((1 << 20) - 9)
    assert texts(read(long + b"\n", max_length=1)) == [(b"c", b"d")]
    with pytest.raises(ValueError, match=r"line 2: the row does not end within 1 MB\."):
        read(ROWS[0] + b"\n" + long + b"d" * (1 << 21))


def test_a_file_that_cannot_be_read_is_refused(task, monkeypatch):
    path = task.data_dir / "aan" / FILES["train"]
    real = Path.open

    def opened(self, *arguments):
        if self == path:
            raise PermissionError(13, "Permission denied")
        return real(self, *arguments)

    monkeypatch.setattr(Path, "open", opened)
    assert refused(task) == (
        f"{path} cannot be read after 0 of {path.stat().st_size} bytes: "
        f"PermissionError: [Errno 13] Permission denied. Get the file again."
    )


def test_a_file_that_loses_its_end_meanwhile_is_refused(task):
    rows = task.build().splits["train"]
    path = put(task.data_dir / "aan", train=content(ROWS[:2])) / FILES["train"]
    with pytest.raises(ValueError, match=r"the file was changed meanwhile") as error:
        list(rows)
    assert str(error.value).startswith(f"{path} ends after {path.stat().st_size} of ")


def test_a_broken_file_once_mended_is_read(task):
    put(task.data_dir / "aan", test=b"1\n")
    refused(task)
    put(task.data_dir / "aan")
    assert texts(task.prepare().splits["test"]) == PAIRS
    assert kept(task) == [task.folder.name]


# The hub


class Hub:
    """Stands for the hub's file system: files by their path, and what is asked of it."""

    def __init__(self, files):
        self.files = files
        self.asked = []

    def info(self, path):
        self.asked.append(path)
        if path not in self.files:
            raise FileNotFoundError(path)
        return {"size": len(self.files[path])}

    def open(self, path, mode, cache_type):
        assert (mode, cache_type) == ("rb", "none")
        return io.BytesIO(self.files[path])


class Cut(io.BytesIO):
    """A stream that breaks when its content has been read."""

    def readinto(self, buffer):
        if done := super().readinto(buffer):
            return done
        assert_quiet()
        raise ConnectionResetError(104, "Connection reset\nby peer")


class Endless(io.RawIOBase):
    """A stream of nothing but one letter, which fails if too much of it is read."""

    done = 0

    def readable(self):
        return True

    def readinto(self, buffer):
        buffer[:] = b"x" * len(buffer)
        self.done += len(buffer)
        assert self.done < 1 << 26
        return len(buffer)


LIBRARY = logging.getLogger("huggingface_hub")


def assert_quiet():
    """Asserts that the hub's library would not tell of the attempts that it repeats."""
    assert not LIBRARY.isEnabledFor(logging.WARNING)


@pytest.fixture
def hub(monkeypatch):
    """Lets the hub have the three files, each with the four good rows, at the known commit."""
    return serve(monkeypatch, HUB_REVISION)


def serve(monkeypatch, commit):
    paths = [f"datasets/{HUB_ID}@{commit}/data/aan/{file}" for file in FILES.values()]
    system = Hub(dict.fromkeys(paths, content(ROWS)))
    monkeypatch.setattr("huggingface_hub.HfFileSystem", lambda: system)
    monkeypatch.setattr("huggingface_hub.HfApi", None)  # not asked for a commit that is known
    return system


def test_without_local_files_those_of_the_hub_are_read_at_the_known_commit(tmp_path, hub):
    task = make(tmp_path)
    prepared = task.prepare()
    assert hub.asked == [
        f"datasets/OpenNLPLab/lra@6cb133c44f406da743661488df9e977b87d98775/data/aan/{file}"
        for file in (
            "new_aan_pairs.train.tsv",
            "new_aan_pairs.eval.tsv",
            "new_aan_pairs.test.tsv",
        )
    ]
    assert texts(prepared.splits["val"]) == PAIRS
    assert prepared.manifest["source"] == f"OpenNLPLab/lra at {HUB_REVISION}"
    assert task.state(hashes="all")[0] == "found"


def test_data_of_the_hub_and_of_local_files_are_the_same(task, tmp_path, hub):
    local = task.prepare().manifest
    assert hub.asked == []
    assert make(tmp_path / "elsewhere").prepare().manifest["hash"] == local["hash"]
    assert hub.asked != []


def test_a_revision_is_read_from_the_hub_whatever_local_files_there_are(tmp_path, monkeypatch):
    put(tmp_path / "data" / "aan", train=content(ROWS[:1]))
    commit, asked = "f" * 40, []
    serve(monkeypatch, commit)

    class Api:
        def dataset_info(self, name, *, revision, timeout):
            asked.append((name, revision))
            assert timeout <= 15
            return SimpleNamespace(sha=commit)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    task = make(tmp_path, revision="main")
    assert task.source_files() == {}
    prepared = task.prepare()
    assert asked == [("OpenNLPLab/lra", "main")]
    assert texts(prepared.splits["train"]) == PAIRS
    assert prepared.manifest["source"] == f"OpenNLPLab/lra at {commit}"


def test_a_commit_needs_not_be_resolved(tmp_path, monkeypatch):
    serve(monkeypatch, "a" * 40)
    prepared = make(tmp_path, revision="a" * 40).prepare()
    assert prepared.manifest["source"] == f"OpenNLPLab/lra at {'a' * 40}"


def no_hub(monkeypatch):
    def fail(*_, **__):
        assert_quiet()
        raise ConnectionError("Name or service\nnot known.")

    monkeypatch.setattr("huggingface_hub.HfFileSystem", fail)
    monkeypatch.setattr("huggingface_hub.HfApi", fail)


def test_where_there_are_no_files_and_no_hub_all_that_was_tried_is_told(
    tmp_path, monkeypatch, capsys
):
    no_hub(monkeypatch)
    message = refused(make(tmp_path))
    data = tmp_path / "data"
    for part in [
        *FILES.values(),
        *(str(data / layout) for layout in LAYOUTS),
        f"OpenNLPLab/lra at revision {HUB_REVISION} cannot be read: "
        "ConnectionError: Name or service not known. Unpack",
        "(lra_release)",
        "data_dir=FOLDER",
        f"hf download OpenNLPLab/lra --repo-type dataset --revision {HUB_REVISION} "
        f"--include 'data/aan/*' --local-dir {data}",
    ]:
        assert part in message
    assert told(capsys.readouterr()) == []


def test_a_revision_without_hub_is_told_with_the_way_to_local_files(tmp_path, monkeypatch):
    no_hub(monkeypatch)
    put(tmp_path / "data" / "aan")
    message = refused(make(tmp_path, revision="main"))
    assert message.startswith("The hub data set OpenNLPLab/lra at revision main cannot be read: ")
    assert "leave task.revision out" in message


def test_a_file_that_the_hub_has_not_is_told(tmp_path, hub):
    path = list(hub.files)[1]
    del hub.files[path]
    assert f"cannot be read: FileNotFoundError: {path}. Unpack" in refused(make(tmp_path))


def test_a_connection_that_breaks_is_one_message_and_nothing_is_left(tmp_path, hub, capsys):
    path = list(hub.files)[1]
    streams = {asked: io.BytesIO(whole) for asked, whole in hub.files.items()}
    streams[path] = Cut(content(ROWS[:2]))
    hub.open = lambda asked, *_, **__: streams[asked]
    message = refused(make(tmp_path))
    done, total = len(content(ROWS[:2])), len(content(ROWS))
    assert message.startswith(
        f"{path} cannot be read after {done} of {total} bytes: "
        "ConnectionResetError: [Errno 104] Connection reset by peer. Try again, or "
    )
    assert f"hf download {HUB_ID} " in message
    assert told(capsys.readouterr()) == []


def test_a_stream_that_ends_early_without_an_error_is_not_taken_for_the_whole(tmp_path, hub):
    path = list(hub.files)[2]
    hub.info = lambda asked: {"size": len(hub.files[asked]) + (asked == path)}
    total = len(content(ROWS))
    assert refused(make(tmp_path)).startswith(f"{path} ends after {total} of {total + 1} bytes: ")


def test_a_bad_row_on_the_hub_is_refused_like_one_on_disk(tmp_path, hub):
    path = next(iter(hub.files))
    hub.files[path] = content([*ROWS, b"7"])
    message = refused(make(tmp_path))
    assert message.startswith(f"{path}, line 5: the row has 1{COLUMNS}. Try again")


def test_the_library_tells_afterwards_what_it_told_before(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(LIBRARY, "level", logging.INFO)
    make(tmp_path).prepare()
    assert LIBRARY.level == logging.INFO


def test_an_endless_row_is_refused_and_not_swallowed(tmp_path, hub, monkeypatch):
    monkeypatch.setattr("lra.tasks._retrieval_files._MAX_LINE", 1 << 20)
    hub.open = lambda *_, **__: Endless()
    assert "train.tsv, line 1: the row does not end within 1 MB. Try" in refused(make(tmp_path))


# Memory


MEASURED = """
import resource, sys
from pathlib import Path
from lra.tasks.retrieval import Retrieval

def prepare(data):
    config = Retrieval.Config(max_length=1_000_000)
    Retrieval(config, data_dir=Path(data), cache_dir=Path(data) / "cache").prepare()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

small, large = map(prepare, sys.argv[1:])
print(large - small)
"""


def test_a_file_of_distinct_long_documents_is_read_in_a_part_of_its_size(tmp_path):
    """Even where whole texts are kept: 300 MB here; a small file read before sets the baseline."""
    put(tmp_path / "small" / "aan")
    folder = put(tmp_path / "large" / "aan")
    noise = np.random.default_rng(0).integers(33, 127, 300_000, dtype=np.uint8).tobytes()
    with (folder / FILES["train"]).open("wb") as file:
        for i in range(1_000):
            file.write(b"%d\ta\tb\t%d%b\t%b%d\n" % (i % 2, i, noise[:150_000], noise[150_000:], i))
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, tmp_path / "small", tmp_path / "large"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert int(done.stdout) < 160_000, done.stdout  # kB


# Options and the command line


@pytest.mark.parametrize("name", ["max_length", "num_train", "num_val", "num_test"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(ValueError, match="must be at least 1"):
        Retrieval.Config(**{name: 0})


def test_an_empty_revision_is_refused():
    with pytest.raises(ValueError, match="revision must be"):
        Retrieval.Config(revision="")


def test_a_revision_is_where_the_same_data_is_from_and_any_other_option_is_not():
    assert Retrieval.sources == {"revision"}


def data(tmp_path, capsys):
    overrides = [f"data_dir={tmp_path / 'data'}", f"cache_dir={tmp_path / 'cache'}"]
    with pytest.raises(SystemExit) as end:
        main(["data", "task=retrieval", *overrides])
    return end.value.code, capsys.readouterr()


def test_lra_data_prepares_the_files(task, tmp_path, capsys):
    code, captured = data(tmp_path, capsys)
    assert (code, captured.out) == (0, f"retrieval: ready in {task.folder}\n")


def test_lra_data_tells_a_bad_row_in_one_line(task, tmp_path, capsys):
    path = put(task.data_dir / "aan", train=b"7\n") / FILES["train"]
    code, captured = data(tmp_path, capsys)
    assert (code, captured.out) == (2, "")
    [line] = told(captured)
    assert line.startswith(f"lra: {path}, line 1: the row has 1 columns")


def test_lra_data_tells_in_one_line_that_there_is_nothing(tmp_path, capsys, monkeypatch):
    no_hub(monkeypatch)
    code, captured = data(tmp_path, capsys)
    assert (code, captured.out) == (2, "")
    [line] = told(captured)
    assert line.startswith("lra: The Retrieval files, new_aan_pairs.train.tsv, ")
