"""Text: reviews as bytes, the same data from three sources, its splits, and what is refused."""

import random
import shutil
from dataclasses import fields

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import COMMIT, serve

from lra.listing import option_meanings
from lra.tasks.base import SPLITS
from lra.tasks.text import Text

CLASSES = {"neg": 0, "pos": 1}


def reviews(name, count):
    """Returns as many reviews of each class, among them some with the same text."""
    rows = [(f"{name} {i}: {'é' * (i % 7)} <br /> GOOD", i % 2) for i in range(2 * count)]
    rows[0] = ("the same", 0)
    rows[1] = ("the same", 1)
    rows[2] = rows[4] = ("twice", 0)
    return rows


TRAIN, TEST = reviews("train", 30), reviews("test", 10)


def put_parquet(folder, train=TRAIN, test=TEST, **more):
    """Writes a parquet file a split, with the hub's columns and names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in {"train": train, "test": test, **more}.items():
        texts, labels = zip(*rows, strict=True)
        table = pa.table({"text": pa.array(texts, pa.string()), "label": list(labels)})
        pq.write_table(table, folder / f"{name}-00000-of-00001.parquet")


def put_folder(folder, train=TRAIN, test=TEST):
    """Writes a file a review, with the names of the original archive: number_rating.txt."""
    for name, rows in {"train": train, "test": test}.items():
        for label in CLASSES:
            (folder / name / label).mkdir(parents=True, exist_ok=True)
        (folder / name / "urls_pos.txt").write_text("http://example.org\n")
        for i, (text, label) in enumerate(rows):
            path = folder / name / ("pos" if label else "neg") / f"{i}_{9 if label else 2}.txt"
            path.write_bytes(text.encode())
    (folder / "train" / "unsup").mkdir()
    (folder / "train" / "unsup" / "0_0.txt").write_text("no label")
    return folder


def make(folder, **options):
    return Text(Text.Config(**options), data_dir=folder / "data", cache_dir=folder / "cache")


def examples(split):
    return [(split[i].tobytes(), int(split.labels[i])) for i in range(len(split))]


def encoded(rows):
    return sorted((bytes(b + 1 for b in text.encode()), label) for text, label in rows)


def refused(task):
    """Returns the one message, after a look at what is left of the build."""
    with pytest.raises(ValueError, match=r"^.") as error:
        task.prepare()
    assert not [path for path in task.cache_dir.iterdir() if path.suffix != ".lock"]
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def task(tmp_path):
    put_parquet(tmp_path / "data" / "imdb")
    return make(tmp_path)


# Tokens


def test_a_token_is_a_byte_plus_one(tmp_path):
    rows = [("Ab é\n", 1), ("\x00\U0010ffff", 0), ("a" * 5_000, 1)]
    put_parquet(tmp_path / "data" / "imdb", train=rows + TRAIN, test=rows)
    split = make(tmp_path).prepare().splits["test"]
    assert split.tokens.dtype == np.uint8
    assert split[0].tolist() == [1, 0xF4 + 1, 0x8F + 1, 0xBF + 1, 0xBF + 1]  # the largest of all
    assert split[1].tolist() == [66, 99, 33, 0xC3 + 1, 0xA9 + 1, 11]
    assert split[2].tolist() == [98] * 4_000
    assert split.labels.tolist() == [0, 1, 1]


def test_nothing_is_lower_cased_or_added_and_every_review_is_there(task):
    splits = task.prepare().splits
    assert examples(splits["test"]) == encoded(TEST)
    assert sorted(examples(splits["train"]) + examples(splits["val"])) == encoded(TRAIN)


@pytest.mark.parametrize("max_length", [1, 11, 4_096])
def test_reviews_are_cut_after_max_length_bytes(tmp_path, max_length):
    put_parquet(tmp_path / "data" / "imdb")
    task = make(tmp_path, max_length=max_length)
    assert task.max_len == max_length
    expected = [(text[:max_length], label) for text, label in encoded(TEST)]
    assert examples(task.prepare().splits["test"]) == expected


def test_vocabulary_and_classes_are_those_of_the_arena(task):
    assert (task.vocab_size, task.num_classes, task.chance, task.dual) == (257, 2, 0.5, False)
    assert task.max_len == 4_000


# Splits


def test_a_seeded_tenth_of_the_training_set_is_for_validation(tmp_path):
    put_parquet(tmp_path / "data" / "imdb")
    chosen = []
    for seed in (0, 1):
        task = make(tmp_path, split_seed=seed)
        splits = task.prepare().splits
        assert [len(splits[name]) for name in SPLITS] == [54, 6, 20]
        assert not task.validation_is_test
        chosen.append(examples(splits["val"]))
    assert chosen[0] != chosen[1]


def test_legacy_validation_is_the_test_set_and_the_task_says_so(tmp_path):
    put_parquet(tmp_path / "data" / "imdb")
    task = make(tmp_path, validation="legacy")
    splits = task.prepare().splits
    assert task.validation_is_test
    assert examples(splits["val"]) == examples(splits["test"]) == encoded(TEST)
    assert examples(splits["train"]) == encoded(TRAIN)


@pytest.mark.parametrize("validation", ["tenth", "legacy"])
def test_a_small_protocol_takes_a_subset_of_each_split(tmp_path, validation):
    put_parquet(tmp_path / "data" / "imdb")
    whole = make(tmp_path, validation=validation).prepare().splits
    options = {"num_train": 20, "num_val": 5, "num_test": 7, "validation": validation}
    splits = make(tmp_path, **options).prepare().splits
    for name, count in zip(SPLITS, (20, 5, 7), strict=True):
        assert len(splits[name]) == count
        assert set(examples(splits[name])) <= set(examples(whole[name]))


def test_more_examples_than_there_are_cannot_be_asked_for(tmp_path):
    put_parquet(tmp_path / "data" / "imdb")
    message = refused(make(tmp_path, num_test=21))
    assert message == "num_test=21, but there are only 20 examples."


def test_wrong_options_are_told_all_at_once():
    with pytest.raises(ValueError, match="max_length") as error:
        Text.Config(max_length=0, num_val=0, split_seed=-3)
    assert len(str(error.value).splitlines()) == 3


def test_what_makes_a_task_another_one_and_what_does_not(tmp_path):
    assert make(tmp_path).sources == {"revision"}
    folders = {
        make(tmp_path, **options).folder
        for options in ({}, {"max_length": 1_000}, {"validation": "legacy"}, {"num_train": 5})
    }
    assert len(folders) == 4


def test_every_option_has_a_meaning():
    assert [*option_meanings(Text.Config)] == [field.name for field in fields(Text.Config)]


def test_the_majority_rule_is_scored(task):
    assert task.prepare().manifest["baselines"] == {"majority class": 0.5}


# Sources


def test_all_sources_give_the_same_data(tmp_path, monkeypatch):
    put_parquet(tmp_path / "a" / "data" / "imdb", unsupervised=[("none", -1)])
    shuffled = random.Random(0).sample(TRAIN, len(TRAIN))
    put_parquet(tmp_path / "b" / "data" / "imdb" / "plain_text", train=shuffled[:9])
    rest = tmp_path / "b" / "data" / "imdb" / "train" / "0001.parquet"
    rest.parent.mkdir()
    texts, labels = zip(*shuffled[9:], strict=True)
    pq.write_table(pa.table({"label": list(labels), "text": list(texts)}), rest)
    put_folder(tmp_path / "c" / "data" / "aclImdb")
    put_folder(tmp_path / "d" / "data" / "imdb" / "aclImdb")
    put_parquet(tmp_path / "hub" / "plain_text", train=TRAIN[::-1], unsupervised=[("none", -1)])
    asked = serve(monkeypatch, "stanfordnlp/imdb", tmp_path / "hub")
    local = [make(tmp_path / name).prepare().manifest for name in "abcd"]
    assert asked == []
    manifests = [*local, make(tmp_path / "e").prepare().manifest]
    assert len({manifest["hash"] for manifest in manifests}) == 1
    assert asked[0] == ("stanfordnlp/imdb", None)
    parquet = "local parquet files with the columns of stanfordnlp/imdb"
    assert [manifest["source"] for manifest in manifests] == [
        parquet,
        parquet,
        "the original folder aclImdb",
        "the original folder aclImdb",
        f"stanfordnlp/imdb at {COMMIT}",
    ]


def test_a_given_revision_is_read_from_the_hub_whatever_else_there_is(tmp_path, monkeypatch):
    put_parquet(tmp_path / "data" / "imdb", test=[("local", 0)])
    put_folder(tmp_path / "data" / "aclImdb", test=[("local", 0), ("local", 1)])
    put_parquet(tmp_path / "hub")
    asked = serve(monkeypatch, "stanfordnlp/imdb", tmp_path / "hub")
    task = make(tmp_path, revision="v1")
    prepared = task.prepare()
    assert asked[0] == ("stanfordnlp/imdb", "v1")
    assert examples(prepared.splits["test"]) == encoded(TEST)
    assert prepared.manifest["source"] == f"stanfordnlp/imdb at {COMMIT}"
    assert task.source_files() == {}


@pytest.mark.parametrize("place", ["aclImdb", "imdb/aclImdb"])
def test_of_both_parquet_files_are_read_and_not_the_original_folder(tmp_path, place):
    put_folder(tmp_path / "data" / place, test=[("folder", 0), ("folder", 1)])
    put_parquet(tmp_path / "data" / "imdb")
    assert examples(make(tmp_path).prepare().splits["test"]) == encoded(TEST)


def test_data_is_made_again_when_its_parquet_files_have_changed(task, capsys):
    first = task.prepare().manifest
    file = task.data_dir / "imdb" / "test-00000-of-00001.parquet"
    assert first["sources"].keys() == {
        "imdb/train-00000-of-00001.parquet",
        "imdb/test-00000-of-00001.parquet",
    }
    put_parquet(file.parent, test=TEST[:-4])
    assert len(task.prepare().splits["test"]) == 16
    assert f"Prepared text data is rebuilt: {file} has " in capsys.readouterr().err


def test_prepared_data_is_used_when_its_source_is_gone(task):
    task.prepare()
    shutil.rmtree(task.data_dir)
    assert task.state(hashes="all")[0] == "found"
    assert len(task.prepare().splits["test"]) == 20


def test_other_sizes_than_those_of_imdb_are_told(task, capsys):
    task.prepare()
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == (
        "This is not the published IMDb data set: train has 60 examples, not 25,000, test has 20 "
        "examples, not 25,000."
    )


def test_without_any_source_the_message_names_all_three(tmp_path, monkeypatch):
    def dataset_info(self, *_, **__):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    folder = tmp_path / "data" / "imdb"
    assert refused(make(tmp_path)) == (
        f"{folder} has no IMDb data, that is parquet files of the splits train and test with the "
        f"columns text and label, and no folder aclImdb in it or beside it; and stanfordnlp/imdb "
        f"on the hub cannot be had: OSError: no network. Where the hub can be reached, run: "
        f"hf download stanfordnlp/imdb --repo-type dataset --local-dir {folder}; or set "
        f"data_dir=FOLDER to the folder that has imdb/."
    )


# Reviews that are refused


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "document without text"),
        (None, "document without text"),
        (b"ab\xffc", "byte 2 of the text is not UTF-8"),
    ],
)
def test_a_row_without_text_is_named(tmp_path, text, reason):
    folder = tmp_path / "data" / "imdb"
    put_parquet(folder)
    texts = [text.encode() for text, _ in TEST]
    texts[13] = text.encode() if isinstance(text, str) else text
    table = pa.table({"text": pa.array(texts).view(pa.string()), "label": [1] * 20})
    file = folder / "test-00000-of-00001.parquet"
    pq.write_table(table, file)
    assert refused(make(tmp_path)).startswith(f"{file}, split test, row 13: {reason}. Get the ")


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "document without text"), (b"na\xefve", "byte 2 of the text is not UTF-8")],
)
def test_a_file_without_text_is_named(tmp_path, content, reason):
    folder = put_folder(tmp_path / "data" / "aclImdb")
    file = folder / "test" / "pos" / "13_9.txt"
    file.write_bytes(content)
    assert refused(make(tmp_path)) == (
        f"{file}: {reason}. Unpack the original archive, aclImdb_v1.tar.gz, again."
    )


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    folder = put_folder(tmp_path / "data" / "aclImdb")
    (folder / "train" / "neg" / "7_1.txt").mkdir()
    assert refused(make(tmp_path)).startswith(
        f"{folder / 'train' / 'neg' / '7_1.txt'}: Is a directory. "
    )


def test_folders_without_reviews_are_named_all_at_once(tmp_path):
    folder = put_folder(tmp_path / "data" / "aclImdb")
    shutil.rmtree(folder / "test" / "pos")
    for file in (folder / "train" / "neg").iterdir():
        file.unlink()
    assert refused(make(tmp_path)) == (
        f"There are no reviews (*.txt) in {folder / 'train' / 'neg'}, {folder / 'test' / 'pos'}. "
        f"Unpack the original archive, aclImdb_v1.tar.gz, in {folder.parent} again."
    )
