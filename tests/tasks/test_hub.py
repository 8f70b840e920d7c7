"""Data sets of parquet files: found locally or on the hub, read row by row, refused if broken."""

import logging
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import COMMIT, datasets, serve

from lra.tasks._hub import DataSet

ROOT = Path(__file__).parents[2]
NOTES = DataSet(
    title="Notes",
    folder="notes",
    hub_id="someone/notes",
    column="text",
    kind="text",
    num_classes=3,
)
PICTURES = DataSet(
    title="Pictures",
    folder="pictures",
    hub_id="someone/pictures",
    column="img",
    kind="image",
    num_classes=2,
)
NAMES = ("train", "test")
TEXTS, LABELS = ["one", "two", "three", "four"], [0, 1, 2, 0]
COMMAND = "hf download someone/notes --repo-type dataset --local-dir "


def table(texts=TEXTS, labels=LABELS, text_type=None, label_type=None, **more):
    return pa.table(
        {"text": pa.array(texts, text_type), "label": pa.array(labels, label_type), **more}
    )


def put(path, content=None, **options):
    """Writes a parquet file: the four notes, or another table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table() if content is None else content, path, **options)
    return path


def put_both(folder, **options):
    put(folder / "train-00000-of-00001.parquet", **options)
    put(folder / "test-00000-of-00001.parquet", table(["five", "six"], [2, 1]))


def keep(content):
    if content is None:
        raise ValueError("nothing there")
    return content


def read(data_dir, name="train", convert=keep, data=NOTES, revision=None):
    return data.open(data_dir, revision).read(name, convert, lambda rows: None)


def pairs(examples):
    return list(zip(examples.contents, examples.labels.tolist(), strict=True))


def refused(data_dir, **options):
    with pytest.raises(ValueError, match=r"^.") as error:
        read(data_dir, **options)
    message = str(error.value)
    assert "\n" not in message
    return message


IN_ORDER = [(b"four", 0), (b"one", 0), (b"three", 2), (b"two", 1)]


@pytest.fixture
def no_network(monkeypatch):
    """Lets any attempt at the network fail, and notes it."""
    attempts = []

    def refuse(*where, **_):
        attempts.append(where)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return attempts


# Local files


@pytest.mark.parametrize("begin", ["{}-00000-of-00001", "{}", "data/{}-00000", "plain/{}/0000"])
def test_files_are_found_by_the_names_that_the_hub_gives_them(tmp_path, begin):
    paths = {name: [put(tmp_path / "notes" / f"{begin.format(name)}.parquet")] for name in NAMES}
    assert NOTES.local_files(tmp_path) == paths
    assert pairs(read(tmp_path)) == IN_ORDER


def test_other_splits_and_other_files_are_no_part_of_it(tmp_path):
    put_both(tmp_path / "notes")
    for other in ("unsupervised-0.parquet", "training.parquet", "a/b/c/train.parquet", "train.csv"):
        put(tmp_path / "notes" / other)
    (tmp_path / "notes" / "train.parquet").mkdir()
    assert NOTES.source_files(tmp_path, revision=None) == {
        f"notes/{name}-00000-of-00001.parquet": tmp_path
        / "notes"
        / f"{name}-00000-of-00001.parquet"
        for name in NAMES
    }


def test_data_of_a_revision_of_the_hub_has_no_local_source(tmp_path):
    put_both(tmp_path / "notes")
    assert NOTES.source_files(tmp_path, revision=COMMIT) == {}


def test_rows_of_all_files_and_of_all_their_parts_are_read(tmp_path):
    texts = [f"note {i:04}" for i in range(2_500)]
    labels = [i % 3 for i in range(2_500)]
    folder = tmp_path / "notes"
    put_both(folder)
    put(folder / "train-00000-of-00001.parquet", table(texts[1_000:], labels[1_000:]))
    for first, size in ((0, 300), (300, 700)):  # row groups of 7 rows
        part = table(texts[first : first + size], labels[first : first + size])
        put(folder / f"train-{first}.parquet", part, row_group_size=7)
    assert pairs(read(tmp_path)) == [
        (text.encode(), label) for text, label in zip(texts, labels, strict=True)
    ]
    assert pairs(read(tmp_path, "test")) == [(b"five", 2), (b"six", 1)]


@pytest.mark.parametrize("text_type", [pa.string(), pa.large_string()])
@pytest.mark.parametrize("label_type", [pa.int64(), pa.int8(), pa.uint16()])
def test_types_that_mean_the_same_are_read_the_same(tmp_path, text_type, label_type):
    put_both(tmp_path / "notes", content=table(text_type=text_type, label_type=label_type))
    examples = read(tmp_path)
    assert pairs(examples) == IN_ORDER
    assert examples.labels.dtype == np.uint8


def test_files_that_datasets_writes_and_columns_beyond_those_needed_are_read(tmp_path):
    features = datasets.Features(
        {
            "id": datasets.Value("int64"),
            "label": datasets.ClassLabel(names=["a", "b", "c"]),
            "text": datasets.Value("string"),
        }
    )
    rows = datasets.Dataset.from_dict(
        {"id": [1, 2, 3, 4], "label": LABELS, "text": TEXTS}, features
    )
    put_both(tmp_path / "notes")
    rows.to_parquet(str(tmp_path / "notes" / "train-00000-of-00001.parquet"))
    assert pairs(read(tmp_path)) == IN_ORDER


@pytest.mark.parametrize(
    "column",
    [
        pa.array([{"bytes": b"\x89PNG", "path": "a.png"}]),
        pa.array([{"path": None, "bytes": b"\x89PNG", "more": 1}]),
        pa.array([b"\x89PNG"]),
        pa.array([b"\x89PNG"], pa.large_binary()),
    ],
    ids=["struct", "other struct", "binary", "large binary"],
)
def test_encoded_images_are_bytes_or_in_a_struct(tmp_path, column):
    for name in NAMES:
        put(tmp_path / "pictures" / f"{name}.parquet", pa.table({"img": column, "label": [1]}))
    assert pairs(read(tmp_path, data=PICTURES)) == [(b"\x89PNG", 1)]


def test_encoded_images_that_datasets_wrote_are_not_decoded(tmp_path):
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    for name in NAMES:
        rows = {"img": [{"bytes": b"no image", "path": None}], "label": [0]}
        path = tmp_path / "pictures" / f"{name}.parquet"
        path.parent.mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features).to_parquet(str(path))
    assert pairs(read(tmp_path, data=PICTURES)) == [(b"no image", 0)]


def test_a_folder_whose_name_looks_like_a_pattern_is_taken_by_its_name(tmp_path):
    put_both(tmp_path / "of [a-c] * ? {x}" / "notes")
    put_both(tmp_path / "of a * ? {x}" / "notes", content=table(["other"], [0]))
    assert pairs(read(tmp_path / "of [a-c] * ? {x}")) == IN_ORDER


def test_local_data_is_read_without_network_and_leaves_nothing_behind(
    tmp_path, no_network, monkeypatch, capfd
):
    put_both(tmp_path / "data" / "notes")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    opened = NOTES.open(tmp_path / "data", revision=None)
    assert opened.source == "local parquet files with the columns of someone/notes"
    assert len(opened.read("train", keep, lambda rows: None)) == 4
    assert no_network == []
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "hub").exists()
    assert list((tmp_path / "temporary").iterdir()) == []
    assert datasets.config.HF_UPDATE_DOWNLOAD_COUNTS is True
    assert logging.root.manager.disable == logging.NOTSET


def test_local_data_is_read_in_offline_mode_without_torch_or_a_word(tmp_path):
    put_both(tmp_path / "notes")
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from lra.tasks._hub import DataSet\n"
        "data = DataSet('Notes', 'notes', 'someone/notes', 'text', 'text', 3)\n"
        "assert 'datasets' not in sys.modules\n"
        "opened = data.open(Path(sys.argv[1]), None)\n"
        "print(opened.read('train', bytes, lambda rows: None).contents, 'torch' in sys.modules)\n"
        "sys.stdout.flush()\n"
        "os._exit(0)"  # threads of pyarrow may abort a busy machine's interpreter at its exit
    )
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout == "[b'four', b'one', b'three', b'two'] False\n"
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_progress_counts_rows(tmp_path):
    put_both(tmp_path / "notes")
    done = []
    NOTES.open(tmp_path, None).read("train", keep, done.append)
    assert sum(done) == 4


# Broken local files: each is named


def test_a_set_without_files_is_refused_and_not_taken_from_the_hub(tmp_path, no_network):
    put(tmp_path / "notes" / "train.parquet")
    message = refused(tmp_path)
    assert message == (
        f"{tmp_path / 'notes'} has no parquet file of the split test, such as "
        f"test-00000-of-00001.parquet. Get all files: {COMMAND}{tmp_path / 'notes'}"
    )
    assert no_network == []


def cut(content):
    return content[: len(content) // 2]


def overwritten(content):
    return content[:40] + bytes(100) + content[140:]


@pytest.mark.parametrize(
    ("damage", "where", "reason"),
    [
        pytest.param(cut, "", "ArrowInvalid: Parquet magic bytes not found in footer", id="cut"),
        pytest.param(lambda c: c[:-1], "", "ArrowInvalid: Parquet magic bytes", id="a byte short"),
        pytest.param(lambda c: b"", "", "ArrowInvalid: Parquet file size is 0 bytes", id="empty"),
        pytest.param(lambda c: b"text,label\nx,0\n" * 99, "", "ArrowInvalid", id="no parquet"),
        pytest.param(overwritten, ", row 0 or later", "", id="zeros in it"),
    ],
)
def test_a_file_that_is_no_parquet_or_cut_short_is_named(tmp_path, capfd, damage, where, reason):
    put_both(tmp_path / "notes")
    path = put(tmp_path / "notes" / "train-1.parquet", table(["note"] * 2_000, [1] * 2_000))
    path.write_bytes(damage(path.read_bytes()))
    message = refused(tmp_path)
    assert message.startswith(f"{path}, split train{where}: cannot be read: {reason}")
    assert message.endswith(f". Get the files again: {COMMAND}{tmp_path / 'notes'}")
    assert capfd.readouterr() == ("", "")


NOT_NEEDED = {
    "other names": (
        pa.table({"review": TEXTS, "sentiment": LABELS}),
        "review (string), sentiment (int64)",
    ),
    "no label": (pa.table({"text": TEXTS}), "text (string)"),
    "no text": (pa.table({"label": LABELS}), "label (int64)"),
    "labels of text": (table(labels=["0", "1", "2", "0"]), "text (string), label (string)"),
    "labels with fractions": (table(labels=[0.0] * 4), "text (string), label (double)"),
    "labels true or false": (table(labels=[True] * 4), "text (string), label (bool)"),
    "texts of numbers": (table(texts=[1, 2, 3, 4]), "text (int64), label (int64)"),
    "texts of bytes": (table(texts=[b"a"] * 4), "text (binary), label (int64)"),
    "lists of texts": (table(texts=[["a"]] * 4), "text (list<"),
}


@pytest.mark.parametrize(("content", "there"), NOT_NEEDED.values(), ids=NOT_NEEDED.keys())
def test_other_columns_are_refused_with_what_is_there_and_what_is_needed(tmp_path, content, there):
    put_both(tmp_path / "notes")
    path = put(tmp_path / "notes" / "train-1.parquet", content)
    message = refused(tmp_path)
    assert message.startswith(f"{path}, split train: the columns are {there}")
    assert "; there must be text (strings) and label (integers). Get the files again" in message


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    put_both(tmp_path / "notes")
    put(tmp_path / "notes" / "train-1.parquet", table().append_column("text", pa.array(TEXTS)))
    assert "train-1.parquet" in refused(tmp_path)


@pytest.mark.parametrize(
    ("column", "there"),
    [
        (pa.array(["a.png"]), "img (string)"),
        (pa.array([{"path": "a.png"}]), "img (struct<path: string>)"),
        (pa.array([{"bytes": "text"}]), "img (struct<bytes: string>)"),
        (pa.array([[1, 2, 3]]), "img (list<"),
    ],
)
def test_images_of_another_type_are_refused(tmp_path, column, there):
    for name in NAMES:
        put(tmp_path / "pictures" / f"{name}.parquet", pa.table({"img": column, "label": [1]}))
    message = refused(tmp_path, data=PICTURES)
    assert f"the columns are {there}" in message
    assert "must be img (encoded images, binary or struct<bytes: binary>) and label" in message


@pytest.mark.parametrize(
    ("label", "given"), [(3, "3"), (-1, "-1"), (2**40, "1099511627776"), (None, "missing")]
)
@pytest.mark.parametrize("named", [False, True], ids=["integers", "class labels"])
def test_a_label_out_of_range_or_missing_is_named_with_its_row(tmp_path, label, given, named):
    content = table(["note"] * 1_500, [1] * 1_234 + [label] + [1] * 265, label_type=pa.int64())
    if named:
        features = datasets.Features(
            {
                "text": datasets.Value("string"),
                "label": datasets.ClassLabel(names=["a", "b", "c"]),
            }
        )
        content = content.replace_schema_metadata(features.arrow_schema.metadata)
    put_both(tmp_path / "notes")
    path = put(tmp_path / "notes" / "train-1.parquet", content)
    assert refused(tmp_path).startswith(
        f"{path}, split train, row 1234: the label is {given}, not an integer from 0 to 2. "
    )


def test_a_content_that_cannot_be_used_is_named_with_its_row_and_reason(tmp_path):
    put_both(tmp_path / "notes")
    path = put(tmp_path / "notes" / "test-1.parquet", table(["a", "b", None, "d"]))
    assert refused(tmp_path, name="test").startswith(
        f"{path}, split test, row 2: nothing there. Get the files again: "
    )


# The hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that has the notes; a list of what it is asked."""
    put_both(tmp_path / "hub" / "plain_text")
    put(tmp_path / "hub" / "plain_text" / "unsupervised-00000-of-00001.parquet")
    return serve(monkeypatch, "someone/notes", tmp_path / "hub")


@pytest.mark.parametrize("revision", [None, "main", "v1.0", COMMIT])
def test_the_commit_of_the_revision_is_what_is_loaded_and_recorded(tmp_path, hub, revision):
    opened = NOTES.open(tmp_path, revision)
    assert pairs(opened.read("train", keep, lambda rows: None)) == IN_ORDER
    assert opened.source == f"someone/notes at {COMMIT}"
    address = f"hf://datasets/someone/notes@{COMMIT}/plain_text/train-00000-of-00001.parquet"
    assert hub == [("someone/notes", revision), address]


def test_local_data_comes_first_unless_a_revision_is_given(tmp_path, hub):
    put_both(tmp_path / "notes", content=table(["local"], [0]))
    assert pairs(read(tmp_path)) == [(b"local", 0)]
    assert hub == []
    assert pairs(read(tmp_path, revision="main")) == IN_ORDER
    assert hub[0] == ("someone/notes", "main")


def test_a_broken_file_of_the_hub_is_named_by_its_address(tmp_path, hub):
    put(tmp_path / "hub" / "plain_text" / "train-1.parquet", table(labels=[0, 0, 7, 0]))
    address = f"hf://datasets/someone/notes@{COMMIT}/plain_text/train-1.parquet"
    assert refused(tmp_path) == (
        f"{address}, split train, row 2: the label is 7, not an integer from 0 to 2. Get the "
        f"files again: {COMMAND}{tmp_path / 'notes'}"
    )


def test_a_revision_without_files_of_a_set_is_refused(tmp_path, hub):
    for path in (tmp_path / "hub").rglob("t*.parquet"):
        path.unlink()
    assert refused(tmp_path).startswith(
        f"hf://datasets/someone/notes@{COMMIT} has no parquet file of the split train and test, "
    )


def answer(monkeypatch, error):
    def dataset_info(self, *_, **__):
        logging.getLogger("huggingface_hub").error("noise")
        warnings.warn("noise", stacklevel=1)
        raise error

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)


NO_NETWORK = OSError("[Errno -2] Name or service\n\n  not known")


def test_without_data_and_network_one_message_tells_all(tmp_path, monkeypatch, capfd):
    answer(monkeypatch, NO_NETWORK)
    assert refused(tmp_path) == (
        f"{tmp_path / 'notes'} has no Notes data, that is parquet files of the splits train and "
        f"test with the columns text and label; and someone/notes on the hub cannot be had: "
        f"OSError: [Errno -2] Name or service not known. Where the hub can be reached, run: "
        f"{COMMAND}{tmp_path / 'notes'}; or set data_dir=FOLDER to the folder that has notes/."
    )
    assert capfd.readouterr() == ("", "")


def test_a_revision_that_cannot_be_had_is_told_with_the_way_to_local_data(tmp_path, monkeypatch):
    put_both(tmp_path / "notes")
    answer(monkeypatch, NO_NETWORK)
    assert refused(tmp_path, revision="v2") == (
        f"someone/notes on the hub at task.revision=v2 cannot be had: OSError: [Errno -2] Name or "
        f"service not known. Leave the revision out to read {tmp_path / 'notes'}; what fills it "
        f"is: {COMMAND}{tmp_path / 'notes'}"
    )


def test_a_folder_with_spaces_is_quoted_in_the_command(tmp_path, monkeypatch):
    answer(monkeypatch, NO_NETWORK)
    assert f"run: {COMMAND}'{tmp_path}/my data/notes';" in refused(tmp_path / "my data")


def test_offline_mode_is_the_reason_that_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refused(tmp_path)
    assert "cannot be had: OfflineModeIsEnabled: " in message
    assert COMMAND in message
