"""Citations: how pairs are made from links, and which documents and links are refused."""

from collections import Counter
from itertools import combinations, permutations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lra.cli import main
from lra.tasks._citations import make_pairs, split_documents
from lra.tasks.base import SPLITS
from lra.tasks.citations import Citations

HEADER = "citing\tcited"
deterministic = settings(derandomize=True, deadline=None, max_examples=100)


def graphs(most_documents, most_links):
    """Returns a strategy for lists of links among documents, each once."""
    return st.integers(2, most_documents).flatmap(
        lambda count: st.lists(
            st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)).filter(
                lambda link: link[0] != link[1]
            ),
            min_size=1,
            max_size=most_links,
            unique=True,
        )
    )


def paired(links, seed=0, others=()):
    """Returns the positive and the negative pairs of links, beside others, as lists of tuples."""
    known = np.array(sorted([*links, *others]))
    made = make_pairs(np.array(sorted(links)), known, np.random.default_rng(seed))
    return [[tuple(pair) for pair in pairs.tolist()] for pairs in made]


def forbidden(links):
    """Returns the pairs that are links in one direction or the other."""
    return {*links, *((cited, citing) for citing, cited in links)}


# Pairs of a split


@deterministic
@given(graphs(30, 60), st.integers(0, 9))
def test_negatives_are_as_many_as_positives_and_no_link_no_self_pair_and_no_duplicate(links, seed):
    positives, negatives = paired(links, seed)
    assert len(positives) == len(negatives)
    assert {*positives} <= {*links}
    assert len({*positives}) == len(positives)
    assert len({*negatives}) == len(negatives)
    assert not {*negatives} & forbidden(links)
    assert all(citing != cited for citing, cited in negatives)


@deterministic
@given(graphs(30, 60), st.integers(0, 9))
def test_every_document_is_as_often_on_each_side_of_negatives_as_of_positives(links, seed):
    positives, negatives = paired(links, seed)
    for side in (0, 1):
        assert Counter(p[side] for p in positives) == Counter(n[side] for n in negatives)


@deterministic
@given(graphs(30, 60).filter(lambda links: len(links) > 1), st.integers(0, 9), st.data())
def test_pairs_of_some_links_are_none_of_the_others_and_have_the_same_documents(links, seed, data):
    some = links[: data.draw(st.integers(1, len(links) - 1))]
    positives, negatives = paired(some, seed, links[len(some) :])
    assert {*positives} <= {*some}
    assert len({*negatives}) == len(negatives) == len(positives)
    assert not {*negatives} & forbidden(links)
    for side in (0, 1):
        assert Counter(p[side] for p in positives) == Counter(n[side] for n in negatives)


@deterministic
@given(graphs(30, 60), st.integers(0, 9))
def test_the_same_seed_makes_the_same_pairs(links, seed):
    assert paired(links, seed) == paired(links, seed)


def test_another_seed_makes_other_negatives_of_the_same_positives():
    links = [(i, (i + k) % 50) for i in range(50) for k in (1, 2)]
    (positives, negatives), (same, others) = paired(links, 0), paired(links, 1)
    assert positives == same == sorted(links)
    assert len({*negatives} & {*others}) < 20


def most_positives(links):
    """Returns how many links can be positives at most, by trying all choices."""
    for count in range(len(links), 0, -1):
        for kept in combinations(links, count):
            for cited in permutations([link[1] for link in kept]):
                pairs = {(link[0], v) for link, v in zip(kept, cited, strict=True)}
                if len(pairs) == count and not any(
                    u == v or (u, v) in forbidden(links) for u, v in pairs
                ):
                    return count
    return 0


@deterministic
@given(graphs(6, 5))
@example([(0, 1), (0, 2), (1, 3), (4, 2)])
def test_as_few_links_as_possible_are_left_out_whatever_is_drawn(links):
    found = {len(paired(links, seed)[0]) for seed in range(25)}
    assert found == {most_positives(links)}


def test_a_document_that_most_others_cite_is_in_as_many_negatives():
    hub = [(i, 0) for i in range(1, 176)]  # the rest of 400 must be its negatives
    rng = np.random.default_rng(0)
    others = {(int(u), int(v)) for u, v in rng.integers(1, 400, (1_500, 2)) if u != v}
    positives, negatives = paired([*hub, *others])
    assert len(positives) == len(hub) + len(others)
    assert sum(cited == 0 for _, cited in negatives) == 175


def test_where_exchanges_of_two_do_not_suffice_longer_ones_do():
    """A document is cited by 30 of 60 others: negatives are with all of the other 30."""
    links = [(i, 0) for i in range(1, 31)] + [(i, i - 30) for i in range(31, 61)]
    for seed in range(20):
        positives, negatives = paired(links, seed)
        assert len(positives) == 60
        assert {citing for citing, cited in negatives if cited == 0} == {*range(31, 61)}


@pytest.mark.parametrize(
    "links",
    [
        pytest.param([(0, i) for i in range(1, 200)], id="one cites everything"),
        pytest.param([(i, 0) for i in range(1, 200)], id="everything cites one"),
        pytest.param([(0, 1)], id="one link"),
        pytest.param([(0, 1), (1, 0)], id="each other"),
        pytest.param([(i, j) for i in range(9) for j in range(i)], id="all linked"),
    ],
)
def test_where_nothing_is_without_a_link_there_are_no_pairs(links):
    assert paired(links) == [[], []]


@deterministic
@given(st.integers(0, 500), st.integers(0, 9))
def test_each_document_is_in_one_of_three_splits_of_60_20_and_20_percent(count, seed):
    splits = split_documents(count, seed)
    assert tuple(splits) == SPLITS
    np.testing.assert_array_equal(sum(inside.astype(int) for inside in splits.values()), 1)
    for inside, share in zip(splits.values(), (0.6, 0.2, 0.2), strict=True):
        assert abs(inside.sum() - share * count) < 1


def test_another_seed_splits_otherwise():
    assert (split_documents(100, 0)["train"] != split_documents(100, 1)["train"]).any()
    assert split_documents(100, 0)["train"].tolist() != [True] * 60 + [False] * 40


# From files to splits


COUNT = 120
IDS = [f"P{i:03}" for i in range(COUNT)]
TEXTS = {key: f"This is paper {key}. " + "ä" * i for i, key in enumerate(IDS)}
LINKS = [(IDS[i], IDS[(i + step) % COUNT]) for i in range(COUNT) for step in (1, 7, 19, 31)]


def lines(links, end="\n"):
    return "".join(f"{line}{end}" for line in [HEADER, *map("\t".join, links)]).encode()


def table(texts=TEXTS, **more):
    return pa.table({"id": list(texts), "text": list(texts.values()), **more})


def put(folder, papers=None, citations=None):
    """Writes both files, with the good documents and links where no others are given."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table() if papers is None else papers, folder / "papers.parquet")
    (folder / "citations.tsv").write_bytes(lines(LINKS) if citations is None else citations)
    return folder


def make(folder, **options):
    config = Citations.Config(**options)
    return Citations(config, data_dir=folder / "data", cache_dir=folder / "cache")


def examples(split):
    """Returns the ids of both documents and the label of each example."""
    named = {text.encode(): key for key, text in TEXTS.items()}
    return [
        (*(named[(split[i, side] - np.uint8(1)).tobytes()] for side in (0, 1)), int(label))
        for i, label in enumerate(split.labels)
    ]


def kept(task):
    """Returns the names in the cache folder, locks apart."""
    return sorted(path.name for path in task.cache_dir.iterdir() if path.suffix != ".lock")


def refused(task):
    """Returns the message with which a build ends, of which nothing is left."""
    with pytest.raises(ValueError, match=r".") as error:
        task.prepare()
    assert kept(task) == []
    return str(error.value)


@pytest.fixture
def task(tmp_path):
    put(tmp_path / "data" / "aan")
    return make(tmp_path)


def test_the_positives_of_a_split_are_the_links_within_it(task, capsys):
    splits = task.prepare().splits
    for split in splits.values():
        pairs = examples(split)
        documents = {key for *pair, _ in pairs for key in pair}
        positives = {(first, second) for first, second, label in pairs if label == 1}
        assert positives == {link for link in LINKS if {*link} <= documents}
        assert 2 * len(positives) == len(pairs) > 0
        assert (split.tokens.dtype, split.labels.dtype) == (np.uint8, np.uint8)
        assert split.lengths.shape == (len(pairs), 2)
    assert capsys.readouterr().err == ""


def test_no_document_is_in_two_splits_and_each_is_as_often_in_both_classes(task):
    seen = set()
    for split in task.prepare().splits.values():
        pairs = examples(split)
        for side in (0, 1):
            positive, negative = (Counter(p[side] for p in pairs if p[2] == c) for c in (1, 0))
            assert positive == negative
        documents = {key for *pair, _ in pairs for key in pair}
        assert not documents & seen
        seen |= documents
        assert not {(p[0], p[1]) for p in pairs if p[2] == 0} & forbidden(LINKS)


def test_a_rule_that_learns_nothing_is_right_in_half_and_the_source_is_told(task):
    manifest = task.prepare().manifest
    assert manifest["baselines"] == {"majority class": 0.5}
    assert manifest["source"] == "120 documents with 480 citation links"


def test_examples_of_both_classes_are_mixed(task):
    labels = task.prepare().splits["train"].labels
    assert 0.35 < labels[: len(labels) // 2].mean() < 0.65


def test_data_depends_neither_on_the_order_of_documents_and_links_nor_on_repetition(task, tmp_path):
    rng = np.random.default_rng(0)
    links = [LINKS[i] for i in rng.permutation(len(LINKS))]
    more = [*links[:5], *links, (IDS[3], IDS[3])]  # five links twice, and one to itself
    papers = table().take(rng.permutation(COUNT)).append_column("year", pa.array(range(COUNT)))
    put(tmp_path / "other" / "data" / "citations", papers, lines(more, "\r\n"))
    other = make(tmp_path / "other").prepare().manifest
    assert other["hash"] == task.prepare().manifest["hash"]


def test_another_seed_makes_another_split(task, tmp_path):
    train = [examples(make(tmp_path, split_seed=s).prepare().splits["train"]) for s in (0, 1)]
    assert {*train[0]} != {*train[1]}


def test_a_smaller_number_has_fewer_of_the_same_positives_and_their_documents(task, tmp_path):
    whole = {name: {*examples(split)} for name, split in task.prepare().splits.items()}
    smaller = make(tmp_path, num_train=20, num_val=12, num_test=8).prepare().splits
    small = make(tmp_path, num_train=10, num_val=8, num_test=8).prepare().splits
    for name, counts in {"train": (10, 20), "val": (8, 12), "test": (8, 8)}.items():
        few, more = examples(small[name]), examples(smaller[name])
        assert (len(few), len(more)) == counts
        linked = [{p for p in pairs if p[2]} for pairs in (few, more, whole[name])]
        assert linked[0] <= linked[1] <= linked[2]
        for pairs in (few, more):
            assert sum(label for *_, label in pairs) == len(pairs) // 2
            assert not {(p[0], p[1]) for p in pairs if not p[2]} & forbidden(LINKS)
            for side in (0, 1):
                positive, negative = (Counter(p[side] for p in pairs if p[2] == c) for c in (1, 0))
                assert positive == negative


def test_texts_are_cut_to_the_first_bytes_even_within_a_character(tmp_path):
    put(tmp_path / "data" / "aan")
    task = make(tmp_path, max_length=22)  # the first is "This is paper P000. "
    split = task.prepare().splits["train"]
    texts = {(split[i, side] - np.uint8(1)).tobytes() for i in range(9) for side in (0, 1)}
    assert texts <= {text.encode()[:22] for text in TEXTS.values()}
    assert split.lengths.max() == task.max_len == 22
    assert Citations.Config().max_length == 4_000


def test_links_that_are_left_out_are_told_in_one_line(tmp_path, capsys):
    """In the training split one document cites all others, which cite nothing but one of them."""
    inside = np.flatnonzero(split_documents(COUNT, 0)["train"]).tolist()
    first, *others = (IDS[i] for i in inside)
    links = [link for link in LINKS if not {*link} & {IDS[i] for i in inside}]
    links += [(first, other) for other in others] + [*zip(others[1:], others[:-1], strict=True)]
    put(tmp_path / "data" / "aan", citations=lines(links))
    split = make(tmp_path).prepare().splits["train"]
    out = 2 * len(others) - 1 - split.labels.sum()
    assert out > 0
    assert capsys.readouterr().err.splitlines() == [
        f"Citations: {out} of 141 links of the train split are left out, as there are too few "
        "pairs without a link for their documents."
    ]


def test_splits_without_pairs_or_with_fewer_than_asked_for_are_refused_together(tmp_path):
    inside = split_documents(COUNT, 0)["val"]
    links = [link for link in LINKS if not any(inside[IDS.index(key)] for key in link)]
    put(tmp_path / "data" / "aan", citations=lines(links))
    found = make(tmp_path, num_train=1_000, num_test=8)
    lines_of = refused(found).splitlines()
    assert len(lines_of) == 2
    assert lines_of[0].endswith(
        "pairs, fewer than task.num_train=1000. Set it lower, or to null for all."
    )
    assert lines_of[1].startswith("The val split has no links of which pairs can be made.")


# Where the files are


@pytest.mark.parametrize("layout", ["aan", "citations"])
def test_the_files_are_found_in_either_folder(tmp_path, layout):
    folder = put(tmp_path / "data" / layout)
    task = make(tmp_path)
    assert task.source_files() == {
        "papers": folder / "papers.parquet",
        "citations": folder / "citations.tsv",
    }
    assert len(task.prepare().splits["train"]) > 0


def test_pairs_of_the_retrieval_task_in_one_folder_do_not_hide_the_other(tmp_path):
    (tmp_path / "data" / "aan").mkdir(parents=True)
    (tmp_path / "data" / "aan" / "new_aan_pairs.train.tsv").touch()
    folder = put(tmp_path / "data" / "citations")
    assert make(tmp_path).source_files()["papers"].parent == folder


@pytest.mark.parametrize("missing", ["papers.parquet", "citations.tsv"])
def test_a_file_missing_beside_the_other_is_named_and_not_taken_from_elsewhere(task, missing):
    put(task.data_dir / "citations")
    (task.data_dir / "aan" / missing).unlink()
    message = refused(task)
    assert message.startswith(f"{task.data_dir / 'aan'} should contain papers.parquet (columns id")
    assert f"there is no {missing}. Put it there, or set data_dir=FOLDER." in message


def test_where_there_are_no_files_the_folders_and_their_content_are_told(tmp_path):
    message = refused(make(tmp_path))
    for part in [
        str(tmp_path / "data" / "aan"),
        str(tmp_path / "data" / "citations"),
        "papers.parquet (columns id and text)",
        "citations.tsv (a header, citing<TAB>cited, and a row of two ids for each link)",
        "set data_dir=FOLDER",
    ]:
        assert part in message
    assert "\n" not in message


def test_files_that_have_changed_are_read_again(task, capsys):
    task.prepare()
    put(task.data_dir / "aan", citations=lines(LINKS[:-1]))
    assert task.prepare().manifest["source"] == "120 documents with 479 citation links"
    assert "data is rebuilt" in capsys.readouterr().err


# Documents and links that are refused


def without(column):
    return table().drop_columns([column])


def bad_text(text):
    return pa.table({"id": IDS[:3], "text": ["a", "b", text]})


def not_utf8():
    """Returns documents whose second text is no UTF-8, which Arrow does not check."""
    texts = pa.array([b"a", b"c\xf5"])
    return pa.table({"id": IDS[:2], "text": pa.Array.from_buffers(pa.string(), 2, texts.buffers())})


BAD_PAPERS = {
    "no ids": (without("id"), "there is no column 'id'; the columns are 'text'"),
    "no texts": (without("text"), "there is no column 'text'; the columns are 'id'"),
    "ids twice": (
        bad_text("c").append_column("id", pa.array(["x", "y", "z"])),
        "there is more than one column 'id'",
    ),
    "no columns": (pa.table({}), "there is no column 'id'; the columns are none"),
    "ids that are numbers": (
        pa.table({"id": [1, 2], "text": ["a", "b"]}),
        "the column 'id' is of type int64, not string",
    ),
    "texts that are bytes": (
        pa.table({"id": ["1"], "text": [b"a"]}),
        "the column 'text' is of type binary, not string",
    ),
    "no document": (table().slice(0, 0), "there is no document"),
    "empty text": (bad_text(""), "the document of index 2, id 'P002': a document without text"),
    "missing text": (bad_text(None), "the document of index 2, id 'P002': a document without text"),
    "blank text": (bad_text(" \n\t"), "the document of index 2, id 'P002': a document without"),
    "text that is not UTF-8": (
        not_utf8(),
        "the document of index 1, id 'P001': a document has the byte 0xf5 at its byte 1",
    ),
    "id twice": (
        pa.table({"id": ["x", "y", "x"], "text": ["a", "b", "c"]}),
        "the document of index 2, id 'x': another document before it has the same id",
    ),
    "empty id": (
        pa.table({"id": ["x", ""], "text": ["a", "b"]}),
        "the document of index 1, id '': a document without id",
    ),
    "missing id": (
        pa.table({"id": ["x", None], "text": ["a", "b"]}),
        "the document of index 1, id None: a document without id",
    ),
}


@pytest.mark.parametrize(("papers", "reason"), BAD_PAPERS.values(), ids=BAD_PAPERS.keys())
def test_bad_documents_are_refused_with_file_index_and_reason(tmp_path, papers, reason):
    path = put(tmp_path / "data" / "aan", papers) / "papers.parquet"
    message = refused(make(tmp_path))
    assert message.startswith(f"{path}: {reason}")
    assert message.endswith(". Mend the file or get it again.")
    assert "\n" not in message


@pytest.mark.parametrize("part", [0, 0.001, 0.5, 0.99])
def test_a_truncated_file_of_documents_is_refused(task, part):
    path = task.data_dir / "aan" / "papers.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    message = refused(task)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    path.write_bytes(whole)
    assert len(task.prepare().splits["train"]) > 0


def test_documents_of_several_batches_are_counted_through(tmp_path):
    texts = {f"{i:04}": "x" for i in range(1_500)} | {"last": ""}
    put(tmp_path / "data" / "aan", table(texts))
    assert "the document of index 1500, id 'last': a document without text" in refused(
        make(tmp_path)
    )


LINE = f"{IDS[0]}\t{IDS[1]}"
BAD_LINKS = {
    "no byte": (b"", rf"line 1: the file ends here, without any header {HEADER!r}"),
    "header alone": (lines([]), "line 2: the file ends here, without any link"),
    "no header": (f"{LINE}\n".encode(), f"line 1: the header is {LINE!r}, not {HEADER!r}"),
    "one column": (f"{HEADER}\n{LINE}\nP001\n".encode(), "line 3: the row has 1 columns, not 2"),
    "three columns": (f"{HEADER}\n{LINE}\tP001".encode(), "line 2: the row has 3 columns, not 2"),
    "spaces": (f"{HEADER}\nP000 P001".encode(), "line 2: the row has 1 columns, not 2"),
    "empty row": (f"{HEADER}\n{LINE}\n\n".encode(), "line 3: the row is empty"),
    "unknown citing document": (
        f"{HEADER}\n{LINE}\nP999\tP001\n".encode(),
        "line 3: no document has the id of the citing side, 'P999'",
    ),
    "unknown cited document": (
        f"{HEADER}\n{LINE}\nP001\tp002\n".encode(),
        "line 3: no document has the id of the cited side, 'p002'",
    ),
    "row cut short": (
        f"{HEADER}\n{LINE}\nP001\tP0".encode(),
        "line 3: no document has the id of the cited side, 'P0'",
    ),
    "not UTF-8": (f"{HEADER}\n{LINE}\n".encode() + b"P\xff", "line 3: it is not UTF-8"),
    "links to itself alone": (
        f"{HEADER}\nP001\tP001\n".encode(),
        "line 3: the file ends here, without any link but of a document to itself",
    ),
}


@pytest.mark.parametrize(("whole", "reason"), BAD_LINKS.values(), ids=BAD_LINKS.keys())
def test_bad_links_are_refused_with_file_line_and_reason(tmp_path, whole, reason):
    path = put(tmp_path / "data" / "aan", citations=whole) / "citations.tsv"
    message = refused(make(tmp_path))
    assert message.startswith(f"{path}, {reason}")
    assert message.endswith(". Mend the file or get it again.")
    assert "\n" not in message


def test_a_link_file_once_mended_is_read(task):
    path = task.data_dir / "aan" / "citations.tsv"
    path.write_bytes(b"")
    refused(task)
    path.write_bytes(lines(LINKS))
    assert len(task.prepare().splits["test"]) > 0
    assert kept(task) == [task.folder.name]


# Options and the command line


@pytest.mark.parametrize("count", [0, 1, 7, -2])
@pytest.mark.parametrize("name", ["num_train", "num_val", "num_test"])
def test_a_number_of_examples_that_cannot_be_balanced_is_refused(name, count):
    with pytest.raises(ValueError, match=rf"must be even and at least 2, .* not .*{count}"):
        Citations.Config(**{name: count})


@pytest.mark.parametrize("option", [{"max_length": 0}, {"split_seed": -1}])
def test_a_length_of_nothing_and_a_negative_seed_are_refused(option):
    with pytest.raises(ValueError, match="max_length must be at least 1, and split_seed"):
        Citations.Config(**option)


def test_no_option_is_without_effect_on_the_data():
    assert Citations.sources == frozenset()


def data(tmp_path, capsys):
    overrides = [f"data_dir={tmp_path / 'data'}", f"cache_dir={tmp_path / 'cache'}"]
    with pytest.raises(SystemExit) as end:
        main(["data", "task=citations", *overrides])
    return end.value.code, capsys.readouterr()


def test_lra_data_prepares_the_files(task, tmp_path, capsys):
    code, captured = data(tmp_path, capsys)
    assert (code, captured.out) == (0, f"citations: ready in {task.folder}\n")


def test_lra_data_tells_in_one_line_that_there_is_nothing(tmp_path, capsys):
    code, captured = data(tmp_path, capsys)
    assert (code, captured.out) == (2, "")
    [line] = captured.err.splitlines()
    assert line.startswith("lra: Documents with citation links are in neither of the folders ")
