"""The official ListOps files: where they are found, how they are read, and which are refused."""

import re
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lra.cli import main
from lra.compose import load
from lra.tasks._listops import decode, encode
from lra.tasks._listops_files import FILES, find_files, read_files
from lra.tasks._listops_generator import generate
from lra.tasks.base import SPLITS
from lra.tasks.listops import ListOps

HEADER = "Source\tTarget"
ROWS = [
    "7\t7",
    "( ( ( [MAX 2 ) 9 ) ] )\t9",
    "( ( ( [SM ( ( ( ( [MIN 4 ) 7 ) 8 ) ] ) ) 9 ) ] )\t3",
]
deterministic = settings(derandomize=True, deadline=None, max_examples=60)

trees = st.recursive(
    st.sampled_from("0123456789"),
    lambda inner: st.builds(
        lambda operator, arguments: " ".join([operator, *arguments, "]"]),
        st.sampled_from(["[MIN", "[MAX", "[MED", "[SM"]),
        st.lists(inner, min_size=1, max_size=10),
    ),
    max_leaves=20,
)
examples = st.lists(st.tuples(trees, st.integers(0, 9)), min_size=1, max_size=5)


def binary(expression):
    """Writes an expression as the release does: every token joins what is left of it to a pair."""
    waiting = []  # what has been read of each open operator
    for word in expression.split():
        piece = word
        if word.startswith("["):
            waiting.append(word)
            continue
        if word == "]":
            piece = f"( {waiting.pop()} ] )"
        if not waiting:
            return piece
        waiting[-1] = f"( {waiting[-1]} {piece} )"
    raise AssertionError(f"not a whole expression: {expression}")


def content(rows, end="\r\n"):
    return "".join(line + end for line in [HEADER, *rows]).encode()


def put(folder, **contents):
    """Writes the three files, with the three good rows where no other content is given."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, file in FILES.items():
        (folder / file).write_bytes(contents.get(name, content(ROWS)))
    return folder


def make(folder, **options):
    config = ListOps.Config(source="official", **options)
    return ListOps(config, data_dir=folder / "data", cache_dir=folder / "cache")


@pytest.fixture
def task(tmp_path):
    put(tmp_path / "data" / "listops")
    return make(tmp_path)


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """Returns a function that reads one file of a given content."""
    path = tmp_path_factory.mktemp("one") / "basic_train.tsv"

    def read_content(content):
        path.write_bytes(content)
        return read_files({"train": path}, max_tokens=1_999)["train"]

    return read_content


def sources(split):
    return [decode(split[i]) for i in range(len(split))]


def told(captured):
    """Returns the lines on standard error, apart from progress bars and the line on few rows."""
    usual = ("ListOps files:", "This is not the published ListOps data set:")
    return [
        line
        for line in captured.err.splitlines()
        if line and not any(text in line for text in usual)
    ]


# What is read


def test_the_writer_of_these_tests_writes_as_the_release_does():
    assert binary("[MAX 2 9 ]") == "( ( ( [MAX 2 ) 9 ) ] )"
    written = [row.split("\t")[0] for row in ROWS]
    assert [binary(decode(encode(source))) for source in written] == written


@deterministic
@given(trees)
def test_the_written_tree_is_binary_with_the_tokens_as_leaves(tree):
    words = binary(tree).split()
    assert words.count("(") == words.count(")") == len(tree.split()) - 1
    assert [word for word in words if word not in "()"] == tree.split()


def test_rows_become_tokens_without_parentheses_and_labels(task, capsys):
    split = task.prepare().splits["train"]
    assert sources(split) == ["7", "[MAX 2 9 ]", "[SM [MIN 4 7 8 ] 9 ]"]
    assert split.labels.tolist() == [7, 9, 3]
    assert (split.tokens.dtype, split.labels.dtype) == (np.uint8, np.uint8)
    assert told(capsys.readouterr()) == []


def test_every_split_has_a_file_of_its_own_and_as_many_rows_as_the_file(tmp_path):
    put(tmp_path / "data" / "listops", val=content(ROWS[:1]), test=content(ROWS[1:]))
    splits = make(tmp_path).prepare().splits
    assert {name: split.labels.tolist() for name, split in splits.items()} == {
        "train": [7, 9, 3],
        "val": [7],
        "test": [9, 3],
    }


def test_standard_expressions_are_read_as_they_were_written(read, capsys):
    tokens, offsets, labels = generate(
        30, min_length=500, max_length=2000, max_depth=10, max_args=10, seed=0
    )
    expressions = [decode(piece) for piece in np.split(tokens, offsets[1:-1])]
    rows = [f"{binary(e)}\t{label}" for e, label in zip(expressions, labels, strict=True)]
    split = read(content(rows))
    assert split.tokens.dtype == tokens.dtype
    assert sources(split) == expressions
    assert split.lengths.tolist() == np.diff(offsets).tolist()
    np.testing.assert_array_equal(split.labels, labels, strict=True)
    assert told(capsys.readouterr()) == []


@deterministic
@given(examples, st.sampled_from(["\r\n", "\n"]), st.booleans())
def test_any_expressions_and_labels_are_read_as_they_were_written(read, written, end, ended):
    whole = content([f"{binary(e)}\t{label}" for e, label in written], end)
    split = read(whole if ended else whole.removesuffix(end.encode()))
    assert sources(split) == [expression for expression, _ in written]
    assert split.labels.tolist() == [label for _, label in written]


def test_the_longest_row_has_1999_tokens(read):
    longest = f"[MAX {'1 ' * 1_997}]"
    assert read(content([f"{binary(longest)}\t1"])).lengths.tolist() == [1_999]
    with pytest.raises(ValueError, match=r"line 2: the row has 2,000 tokens; at most 1,999 "):
        read(content([f"{binary(longest.replace('1', '1 1', 1))}\t1"]))


def test_the_longest_example_is_the_same_for_both_sources(task):
    assert task.max_len == ListOps.Config().max_length - 1 == 1_999


def test_rules_that_learn_nothing_are_scored_on_the_official_test_set(task):
    assert task.prepare().manifest["baselines"] == {
        "majority class": pytest.approx(1 / 3),
        "root operator only": pytest.approx(2 / 3),  # not for SM, which is 3 and typically 5
        "evaluation cut at depth 1": pytest.approx(2 / 3),  # SM of MIN, typically 0, and 9
        "evaluation cut at depth 2": 1.0,
        "evaluation cut at depth 3": 1.0,
    }


def test_labels_that_are_not_the_value_are_kept_counted_and_told_in_one_line(tmp_path, capsys):
    wrong = content([ROWS[0], "( ( ( [MAX 2 ) 9 ) ] )\t2", "4\t0"])
    folder = put(tmp_path / "data" / "listops", val=wrong, test=content(["1\t3"]))
    splits = make(tmp_path).prepare().splits
    assert splits["val"].labels.tolist() == [7, 2, 0]
    assert splits["test"].labels.tolist() == [3]
    [line] = told(capsys.readouterr())
    assert line == (
        "ListOps labels that are not the value of their expression are kept as released: 3 of 7; "
        f"the first is {folder / 'basic_val.tsv'}, line 3: given 2, computed 9."
    )


def test_the_progress_bar_counts_the_bytes_of_all_files(task, capsys):
    task.prepare()
    total = 3 * len(content(ROWS))
    assert f"100%|██████████| {total}/{total} [" in capsys.readouterr().err


# Where the files are


LAYOUTS = [
    "listops",
    "listops-1000",
    "lra_release/listops-1000",
    "lra_release/lra_release/listops-1000",
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_files_are_found_where_the_archive_or_a_user_puts_them(tmp_path, layout):
    folder = put(tmp_path / layout)
    assert find_files(tmp_path) == {name: folder / f"basic_{name}.tsv" for name in SPLITS}


def test_of_several_folders_with_files_the_first_is_taken(tmp_path):
    for layout in reversed(LAYOUTS):
        folder = put(tmp_path / layout)
        assert find_files(tmp_path)["val"] == folder / "basic_val.tsv"


@pytest.mark.parametrize("missing", [["train"], ["val"], ["test"], ["train", "test"]])
def test_files_missing_beside_others_are_named_and_not_taken_from_elsewhere(tmp_path, missing):
    put(tmp_path / "lra_release/lra_release/listops-1000")
    folder = put(tmp_path / "listops")
    for name in missing:
        (folder / FILES[name]).unlink()
    with pytest.raises(ValueError, match="data_dir=FOLDER") as error:
        find_files(tmp_path)
    named = [name for name in SPLITS if FILES[name] in str(error.value)]
    assert named == missing
    assert str(folder) in str(error.value)


def test_where_there_are_no_files_all_folders_tried_and_the_way_out_are_told(tmp_path):
    with pytest.raises(ValueError, match=r"data_dir=FOLDER") as error:
        make(tmp_path).prepare()
    for part in [
        *FILES.values(),
        *(str(tmp_path / "data" / layout) for layout in LAYOUTS),
        "Unpack the Long Range Arena release",
    ]:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


# Rows and files that are refused


BAD_ROWS = {
    "empty row": (b"", "the row is empty"),
    "no tab": (b"( ( ( [MAX 2 ) 9", r"no tab and no label, only '\( \( \( \[MAX 2 \) 9'"),
    "nothing after the tab": (b"7\t", "the label is '', not an integer from 0 to 9"),
    "three columns": (b"7\t7\t7", "has 3 columns, not 2"),
    "empty source": (b"\t7", "empty ListOps expression: ''"),
    "parentheses alone": (b"( ( ) )\t7", "empty ListOps expression"),
    "unknown operator": (
        b"( ( ( [FIRST 2 ) 9 ) ] )\t2",
        r"unknown ListOps token '\[FIRST' at position 0 .* allowed: 0 1 .* \[SM \]",
    ),
    "number of two digits": (b"12\t2", "unknown ListOps token '12' at position 0"),
    "padding": (b"<pad>\t0", "unknown ListOps token '<pad>'"),
    "no space": (b"( ( ( [MAX2 ) 9 ) ] )\t9", r"unknown ListOps token '\[MAX2'"),
    "glued parenthesis": (b"(7 )\t7", r"unknown ListOps token '\(7'"),
    "other white space": (b"( ( ( [MAX\xc2\xa02 ) 9 ) ] )\t9", "unknown ListOps token"),
    "NUL byte": (b"( ( ( [MAX \x00 ) 9 ) ] )\t9", r"unknown ListOps token '\\x00' at position 1"),
    "quotes": (b'"7"\t7', "unknown ListOps token '\"7\"'"),
    "label of text": (b"7\tseven", "the label is 'seven', not an integer from 0 to 9"),
    "label 10": (b"7\t10", "the label is '10', not"),
    "label -1": (b"7\t-1", "the label is '-1', not"),
    "label 7.0": (b"7\t7.0", "the label is '7.0', not"),
    "label with a space": (b"7\t 7", "the label is ' 7', not"),
    "label of another script": ("7\t٧".encode(), "the label is '٧', not"),
    "carriage return in the label": (b"7\t7\r\r", r"the label is '7(\\r)+', not"),
    "parenthesis left open": (b"( ( ( ( [MAX 2 ) 9 ) ] )\t9", r"ends with 1 parentheses \( open"),
    "parenthesis never opened": (b"( ( [MAX 2 ) 9 ) ] )\t9", r"\) at character 19 closes nothing"),
    "parentheses in wrong order": (b") 7 (\t7", r"\) at character 0 closes nothing"),
    "operator left open": (b"( ( [MAX 2 ) 9 )\t9", "at token 3: ends with 1 operators open"),
    "nothing to close": (b"( 7 ] )\t7", "at token 1: the expression is already complete"),
    "nothing but ]": (b"]\t7", "at token 0: ] closes nothing"),
    "operator without arguments": (b"( [SM ] )\t0", r"at token 1: \[SM has no arguments"),
    "two expressions": (b"( 7 7 )\t7", "at token 1: the expression is already complete"),
    "not UTF-8": (b"( 7 \xff )\t7", r"byte 24 of the file is not UTF-8"),
    "label that is not UTF-8": (b"7\t\xff", r"byte 22 of the file is not UTF-8"),
}


@pytest.mark.parametrize("end", ["\r\n", "\n"])
@pytest.mark.parametrize(("row", "reason"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_bad_row_is_refused_with_file_line_and_reason(tmp_path, row, reason, end):
    before, after = content(ROWS[:1], end), content(ROWS[1:], end).removeprefix(content([], end))
    path = tmp_path / "basic_val.tsv"
    path.write_bytes(before + row + end.encode() + after)
    if end == "\n" and "byte" in reason:  # the two lines before it are one byte shorter each
        reason = re.sub(r"\d+", lambda offset: str(int(offset[0]) - 2), reason, count=1)
    with pytest.raises(ValueError, match=reason) as error:
        read_files({"val": path}, max_tokens=1_999)
    assert str(error.value).startswith(f"{path}, line 3: ")
    assert "Unpack the file from lra_release again." in str(error.value)


def test_where_a_row_is_bad_nothing_is_told_of_wrong_labels(tmp_path, capsys):
    put(tmp_path / "data" / "listops", train=content(["7\t1"]), test=content(["7\tx"]))
    with pytest.raises(ValueError, match=r"basic_test\.tsv, line 2: the label is 'x'"):
        make(tmp_path).prepare()
    assert told(capsys.readouterr()) == []


@pytest.mark.parametrize("long", ["7" * 100_000, "7\t" + "7" * 100_000, "( " * 100_000])
def test_a_message_quotes_only_the_beginning_and_the_end_of_a_long_text(read, long):
    with pytest.raises(ValueError, match=r"line 2: .*\.\.\.") as error:
        read(content([long]))
    assert len(str(error.value)) < 400


BAD_FILES = {
    "no byte": (b"", "line 1: the file ends here, without any header 'Source"),
    "no row": (content([]), "line 2: the file ends here, without any row"),
    "no header": (b"7\t7\r\n", r"line 1: the header is '7\\t7', not 'Source\\tTarget'"),
    "other header": (b"Source,Target\n7\t7\n", "line 1: the header is 'Source,Target', not"),
    "byte order mark": (b"\xef\xbb\xbf" + content(ROWS), r"line 1: the header is '\\ufeffSource"),
    "empty first line": (b"\n" + content(ROWS), "line 1: the header is '', not"),
    "compressed": (b"\x1f\x8b\x08\x00", "line 1: byte 1 of the file is not UTF-8"),
    "empty last line": (content([*ROWS, ""]), "line 5: the row is empty"),
}


@pytest.mark.parametrize(("whole", "reason"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_file_without_header_or_rows_is_refused(read, whole, reason):
    with pytest.raises(ValueError, match=rf"basic_train\.tsv, {reason}"):
        read(whole)


@deterministic
@given(st.data())
def test_a_file_cut_anywhere_is_refused_unless_the_last_row_is_whole(read, data):
    whole = content(ROWS)
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    lines = cut.decode().splitlines()
    if len(lines) > 1 and lines[-1] in ROWS:
        assert read(cut).labels.tolist() == [7, 9, 3][: len(lines) - 1]
    else:
        number = len(lines) + (lines in ([], [HEADER]))  # there, the next line is missing
        with pytest.raises(ValueError, match=rf"basic_train\.tsv, line {number}: "):
            read(cut)


@deterministic
@given(examples, st.data())
def test_a_row_that_lacks_any_one_parenthesis_is_refused(read, written, data):
    rows = [f"{binary(e)}\t{label}" for e, label in written] + ROWS[1:]
    places = [(i, j) for i, row in enumerate(rows) for j, char in enumerate(row) if char in "()"]
    i, j = data.draw(st.sampled_from(places))
    rows[i] = rows[i][:j] + rows[i][j + 1 :]
    with pytest.raises(ValueError, match=rf"line {i + 2}: .*parenthes[ie]s"):
        read(content(rows))


@deterministic
@given(st.data(), st.binary(min_size=1, max_size=3))
def test_bytes_that_belong_to_no_token_are_refused_wherever_they_are(read, data, strange):
    known = b"0123456789[]()MINAXEDS \t\r\n"
    strange = bytes(byte for byte in strange if byte not in known) or b"\x00"
    line = data.draw(st.integers(0, 3))
    lines = content(ROWS).split(b"\r\n")
    place = data.draw(st.integers(0, len(lines[line])))
    lines[line] = lines[line][:place] + strange + lines[line][place:]
    with pytest.raises(ValueError, match=rf"basic_train\.tsv, line {line + 1}: "):
        read(b"\r\n".join(lines))


# The cache


def kept(task):
    return sorted(path.name for path in task.cache_dir.iterdir())


@pytest.mark.parametrize("name", SPLITS)
def test_a_broken_file_leaves_nothing_but_a_lock_and_once_mended_the_data_is_there(task, name):
    path = task.data_dir / "listops" / FILES[name]
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 4: the label is ''")):
        task.prepare()
    assert kept(task) == [f"{task.folder.name}.lock"]
    assert task.state()[0] == "missing"
    path.write_bytes(whole)
    assert task.prepare().splits[name].labels.tolist() == [7, 9, 3]
    assert kept(task) == [task.folder.name, f"{task.folder.name}.lock"]


def test_once_prepared_the_files_are_no_longer_needed(task):
    task.prepare()
    shutil.rmtree(task.data_dir)
    assert task.prepare().splits["test"].labels.tolist() == [7, 9, 3]


def test_other_files_than_before_are_read_again(task, capsys):
    task.prepare()
    path = put(task.data_dir / "listops", train=content([*ROWS, "5\t5"])) / "basic_train.tsv"
    assert task.state() == ("damaged", f"{path} has 103 bytes, not 98")
    assert len(task.prepare().splits["train"]) == 4
    assert "data is rebuilt" in capsys.readouterr().err


def test_other_files_of_the_same_size_are_noticed_where_contents_are_compared(task):
    task.prepare()
    path = put(task.data_dir / "listops", val=content([*ROWS[:2], ROWS[2][:-1] + "4"]))
    assert task.state()[0] == "found"
    state, reason = task.state(hashes="all")
    assert (state, reason) == (
        "damaged",
        f"{path / 'basic_val.tsv'} has not the content that it had then",
    )


def test_other_numbers_of_rows_than_released_are_told(task, capsys):
    task.prepare()
    [line] = [line for line in capsys.readouterr().err.splitlines() if "not the published" in line]
    assert "train has 3 examples, not 96,000, val has 3 examples, not 2,000" in line


def test_a_folder_in_the_place_of_a_file_is_a_missing_file(task):
    path = task.data_dir / "listops" / "basic_val.tsv"
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=r"but no basic_val.tsv"):
        task.prepare()


def test_official_and_generated_data_are_kept_apart(task):
    generated = ListOps(ListOps.Config(), data_dir=task.data_dir, cache_dir=task.cache_dir)
    assert generated.fingerprint != task.fingerprint


# Options and the command line


CHANGED = {
    "num_train": 1,
    "num_val": 1,
    "num_test": 1,
    "min_length": 20,
    "max_length": 200,
    "max_depth": 5,
    "max_args": 5,
    "data_seed": 1,
}


def test_all_options_of_the_generator_that_are_set_are_refused_at_once():
    with pytest.raises(ValueError, match="protocol=nystrom") as error:
        ListOps.Config(source="official", **CHANGED)
    for name, value in CHANGED.items():
        assert f"{name}={value}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", CHANGED)
def test_any_option_of_the_generator_is_refused_and_no_other_named(name):
    with pytest.raises(ValueError, match=f"there is {name}={CHANGED[name]}. Leave"):
        ListOps.Config(source="official", **{name: CHANGED[name]})


def test_a_protocol_that_sets_options_of_the_generator_is_refused_for_official_data():
    with pytest.raises(ValueError, match=r"^task: source=official .*max_length=200.*=nystrom\.$"):
        load(["protocol=quick", "task.source=official"])


def test_an_unknown_source_is_refused():
    with pytest.raises(ValueError, match=r"task\.source: .*'offical'.* Allowed: generated, offi"):
        load(["task.source=offical"])


@pytest.fixture
def data(tmp_path, capsys):
    """Runs ``lra data`` on the official files of the test's folder."""

    def run():
        overrides = [f"data_dir={tmp_path / 'data'}", f"cache_dir={tmp_path / 'cache'}"]
        with pytest.raises(SystemExit) as end:
            main(["data", "task=listops", "task.source=official", *overrides])
        return end.value.code, capsys.readouterr()

    return run


def test_lra_data_prepares_the_official_files(task, data):
    code, captured = data()
    assert (code, captured.out) == (0, f"listops: ready in {task.folder}\n")
    assert task.state(hashes="all")[0] == "found"


def test_lra_data_tells_a_bad_row_in_one_line(task, data):
    path = task.data_dir / "listops" / "basic_test.tsv"
    path.write_bytes(content(["7"]))
    code, captured = data()
    assert (code, captured.out) == (2, "")
    [line] = told(captured)
    assert line.startswith(f"lra: {path}, line 2: the row has no tab")


def test_lra_data_tells_that_there_are_no_files_in_one_line(tmp_path, data):
    code, captured = data()
    assert (code, captured.out) == (2, "")
    [line] = told(captured)
    assert line.startswith("lra: The official ListOps files, basic_train.tsv, ")
