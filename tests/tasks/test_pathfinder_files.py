"""The official Pathfinder images: where they are found, how they are read, which are refused."""

import io
import re
import shutil
import struct
import zlib
from itertools import chain

import numpy as np
import pytest
from PIL import Image

from lra.cli import main
from lra.tasks import build_task
from lra.tasks._pathfinder import generate
from lra.tasks._pathfinder_files import find_folder, metadata_files, read_images, read_metadata
from lra.tasks._pathfinder_stamps import geometry
from lra.tasks.base import SPLITS

QUOTED = b"imgs/0 sample_0.png 0 0 1.0 6 2 2 0.5 1 1"  # a line of the release
FOLDERS = {
    "hard": "curv_contour_length_14",
    "intermediate": "curv_contour_length_9",
    "easy": "curv_baseline",
}


def image(index, window=32):
    """Returns an image that no other index has: a few strokes on black."""
    rng = np.random.default_rng((index, window))
    pixels = np.zeros((window, window), np.uint8)
    pixels[rng.integers(0, window, 6)] = rng.integers(1, 256, window)
    return pixels


def label(index):
    return index * 7 // 3 % 2


def png(pixels, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", **options)
    return buffer.getvalue()


def line(batch, number, index, end="\n"):
    return f"imgs/{batch} sample_{number}.png {number} {label(index)} 1.0 14 4 2 0.5 1 1{end}"


def put(data_dir, layout="pathfinder32", name="curv_contour_length_14", sizes=(20, 12, 8)):
    """Writes the images 0, 1, ... as the release does, in batches of the given sizes."""
    folder = data_dir / layout / name
    window = int(re.search(r"\d+$", layout)[0])
    (folder / "metadata").mkdir(parents=True)
    index = 0
    for batch, size in enumerate(sizes):
        (folder / "imgs" / str(batch)).mkdir(parents=True)
        lines = ""
        for number in range(size):
            path = folder / "imgs" / str(batch) / f"sample_{number}.png"
            path.write_bytes(png(image(index, window)))
            lines += line(batch, number, index)
            index += 1
        (folder / "metadata" / f"{batch}.npy").write_text(lines)
    return folder


def make(tmp_path, name="pathfinder", **options):
    folders = {"data_dir": tmp_path / "data", "cache_dir": tmp_path / "cache"}
    return build_task(name, {"source": "official"} | options, **folders)


@pytest.fixture
def folder(tmp_path):
    return put(tmp_path / "data")


@pytest.fixture
def task(tmp_path, folder):
    return make(tmp_path)


def told(captured):
    """Returns the lines on standard error, apart from progress bars and the one on few images."""
    usual = ("%|", "These are not the released")
    return [
        text
        for text in captured.err.replace("\r", "\n").splitlines()
        if text and not any(part in text for part in usual)
    ]


def indices(splits, window=32):
    """Returns the index of every image in splits, by the image alone."""
    known = {image(index, window).tobytes(): index for index in range(40)}
    return {name: [known[s[i].tobytes()] for i in range(len(s))] for name, s in splits.items()}


def kept(task):
    return sorted(path.name for path in task.cache_dir.iterdir())


# What is read


def test_a_line_of_the_release_is_read(tmp_path):
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "0.npy").write_bytes(QUOTED + b"\n")
    listed = read_metadata(tmp_path)
    assert listed.images == ["imgs/0/sample_0.png"]
    assert listed.labels.tolist() == [0]


def test_images_are_listed_by_the_number_of_the_metadata_file_and_then_by_line(tmp_path):
    folder = put(tmp_path, sizes=[2] * 11)
    listed = read_metadata(folder)
    assert listed.images == [f"imgs/{b}/sample_{n}.png" for b in range(11) for n in range(2)]
    assert listed.labels.tolist() == [label(i) for i in range(22)]
    assert listed.labels.dtype == np.uint8
    assert [listed.where(i) for i in (0, 1, 2, 21)] == [
        f"{folder / 'metadata' / '0.npy'}, line 1",
        f"{folder / 'metadata' / '0.npy'}, line 2",
        f"{folder / 'metadata' / '1.npy'}, line 1",
        f"{folder / 'metadata' / '10.npy'}, line 2",
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_last_line_may_lack_its_end(folder, end):
    path = folder / "metadata" / "0.npy"
    path.write_bytes(b"".join(line(0, i, i, end).encode() for i in range(3)).rstrip())
    assert read_metadata(folder).labels[:3].tolist() == [label(i) for i in range(3)]


@pytest.mark.parametrize(("name", "window"), [("pathfinder", 32), ("pathx", 128)])
def test_every_image_is_in_one_split_with_its_label_and_pixels_row_by_row(tmp_path, name, window):
    put(tmp_path / "data", f"pathfinder{window}")
    task = make(tmp_path, name)
    splits = task.prepare().splits
    found = indices(splits, window)
    assert [len(found[name]) for name in SPLITS] == [32, 4, 4]
    assert sorted(chain(*found.values())) == list(range(40))
    for split in SPLITS:
        assert splits[split].labels.tolist() == [label(i) for i in found[split]]
        assert set(splits[split].lengths) == {window**2} == {task.max_len}
        assert splits[split].tokens.dtype == np.uint8


def test_the_splits_are_a_random_choice_that_the_seed_determines(tmp_path, task):
    found = indices(task.prepare().splits)
    assert found["test"] != list(range(36, 40))
    assert all(part == sorted(part) for part in found.values())  # as files, so read forwards
    again = make(tmp_path / "again", split_seed=0)
    shutil.copytree(task.data_dir, again.data_dir)
    assert again.prepare().manifest["hash"] == task.prepare().manifest["hash"]
    other = make(tmp_path, split_seed=1)
    assert indices(other.prepare().splits)["test"] != found["test"]


def test_fewer_examples_are_some_of_those_of_the_whole_splits(tmp_path, task):
    found = indices(task.prepare().splits)
    fewer = indices(make(tmp_path, num_train=20, num_val=1, num_test=3).prepare().splits)
    assert [len(fewer[name]) for name in SPLITS] == [20, 1, 3]
    assert fewer["train"] not in (found["train"][:20], found["train"][-20:])
    assert all(set(fewer[name]) <= set(found[name]) for name in SPLITS)


def test_what_is_read_does_not_depend_on_the_folder_it_is_in(tmp_path, task):
    elsewhere = make(tmp_path / "elsewhere")
    put(elsewhere.data_dir, "lra_release/lra_release/pathfinder32")
    assert elsewhere.prepare().manifest["hash"] == task.prepare().manifest["hash"]


def test_images_are_read_piece_by_piece(task, monkeypatch):
    whole = indices(task.prepare().splits)
    monkeypatch.setattr(type(task), "piece", 5)
    built = task.build()
    pieces = {name: list(built.splits[name]) for name in SPLITS}
    assert [len(piece) for piece in pieces["train"]] == [5] * 6 + [2]
    for name in SPLITS:
        found = [indices({"": piece})[""] for piece in pieces[name]]
        assert list(chain(*found)) == whole[name]


def test_images_can_be_made_smaller(tmp_path, folder):
    task = make(tmp_path, downscale=4)
    small = {
        ((image(i).reshape(8, 4, 8, 4).sum((1, 3), np.int64) + 8) // 16).tobytes(): label(i)
        for i in range(40)
    }
    split = task.prepare().splits["train"]
    assert task.max_len == set(split.lengths).pop() == 64
    for i in range(len(split)):
        tokens = split[i].astype(np.int64)
        assert small[tokens.tobytes()] == split.labels[i]


def test_generated_images_are_read_from_files_as_they_were_drawn(tmp_path, folder):
    images, _, marks = generate(geometry(32, "hard"), seed=0, first=0, count=40)
    for path, pixels in zip(read_metadata(folder).images, images, strict=True):
        (folder / path).write_bytes(png(pixels))
    pieces = list(make(tmp_path)._official()[0]["train"])
    assert len(pieces) == 1
    known = {pixels.tobytes(): index for index, pixels in enumerate(images)}
    drawn = [known[tokens.tobytes()] for tokens in pieces[0].tokens]
    apart = np.hypot(*np.diff(marks[drawn], axis=1)[:, 0].T)
    np.testing.assert_allclose(pieces[0].distances, apart)


def test_the_source_is_told_in_the_manifest(task):
    manifest = task.prepare().manifest
    assert manifest["source"] == (
        "files of the Long Range Arena release: pathfinder32/curv_contour_length_14"
    )
    assert sorted(manifest["sources"]) == ["0.npy", "1.npy", "2.npy"]
    assert set(manifest["baselines"]) == {"majority class", "marker distance threshold"}


def test_another_number_of_images_than_released_is_told(task, folder, capsys):
    task.prepare()
    text = f"These are not the released Pathfinder images: {folder} lists 40, not 200,000."
    assert text in capsys.readouterr().err.splitlines()


def test_fewer_images_than_three_splits_take_are_refused(tmp_path):
    folder = put(tmp_path / "data", sizes=[9])
    with pytest.raises(ValueError, match=re.escape(f"{folder} lists 9 images; three splits")):
        make(tmp_path).prepare()


def test_every_split_has_a_progress_bar(task, capsys):
    task.prepare()
    captured = capsys.readouterr().err
    for name, count in (("train", "32.0"), ("val", "4.00"), ("test", "4.00")):
        assert f"Pathfinder {name} images: 100%|██████████| {count}/{count} [" in captured


# An empty file


def test_an_image_without_a_byte_is_left_out_and_told_in_one_line(tmp_path, folder, capsys):
    path = folder / "imgs" / "1" / "sample_3.png"
    path.write_bytes(b"")
    found = indices(make(tmp_path).prepare().splits)
    assert sorted(chain(*found.values())) == [i for i in range(40) if i != 23]
    [text] = told(capsys.readouterr())
    assert text == f"Pathfinder train images: 1 left out as empty files; first {path}."


def test_a_piece_of_nothing_but_empty_files_is_left_out(folder, capsys):
    for number in range(3):
        (folder / "imgs" / "0" / f"sample_{number}.png").write_bytes(b"")
    listed = read_metadata(folder)
    read = list(read_images(listed, [np.arange(3), np.arange(3, 5)], 32, "Images"))
    assert [len(pixels) for pixels, _ in read] == [0, 2]
    np.testing.assert_array_equal(read[1][0], [image(3), image(4)])
    assert read[1][1].tolist() == [label(3), label(4)]
    assert "Images: 3 left out as empty files" in capsys.readouterr().err


# Where the files are

LAYOUTS = [
    "lra_release/lra_release/pathfinder{}",
    "lra_release/pathfinder{}",
    "pathfinder/pathfinder{}",
    "pathfinder{}",
]


@pytest.mark.parametrize("window", [32, 128])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_is_found_where_the_archive_or_a_user_puts_it(tmp_path, layout, window):
    folder = put(tmp_path, layout.format(window), sizes=[1])
    assert find_folder(tmp_path, window, "hard") == folder
    with pytest.raises(ValueError, match="are in none of the folders"):
        find_folder(tmp_path, 160 - window, "hard")


@pytest.mark.parametrize("difficulty", FOLDERS)
def test_every_difficulty_has_its_folder(tmp_path, difficulty):
    folders = {d: put(tmp_path, name=name, sizes=[1]) for d, name in FOLDERS.items()}
    assert find_folder(tmp_path, 32, difficulty) == folders[difficulty]


@pytest.mark.parametrize("unpacked", [".", "lra_release"])
def test_of_two_folders_of_the_archive_the_inner_one_is_taken(tmp_path, unpacked):
    outer, inner = "lra_release/pathfinder128", "lra_release/lra_release/pathfinder128"
    put(tmp_path, outer, sizes=[1])
    folder = put(tmp_path, inner, sizes=[1])
    assert find_folder(tmp_path / unpacked, 128, "hard") == folder


def test_where_there_is_no_folder_all_that_were_tried_and_the_ways_out_are_told(tmp_path):
    with pytest.raises(ValueError, match="data_dir=FOLDER") as error:
        make(tmp_path, "pathx", difficulty="easy").prepare()
    for part in [
        "128 x 128 pixels, difficulty easy",
        *(str(tmp_path / "data" / layout.format(128) / "curv_baseline") for layout in LAYOUTS),
        "with imgs/ and metadata/",
        "Unpack the Long Range Arena release",
        "leave out task.source=official",
    ]:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["imgs", "metadata"])
def test_half_a_folder_is_refused_and_the_missing_half_named(tmp_path, folder, part):
    shutil.rmtree(folder / part)
    with pytest.raises(ValueError, match=re.escape(f"{folder} has no folder {part}. Unpack")):
        make(tmp_path).prepare()


def test_a_folder_without_metadata_files_is_refused(folder):
    for path in (folder / "metadata").iterdir():
        path.rename(path.with_suffix(".txt"))
    with pytest.raises(ValueError, match=r"metadata holds no metadata file, as 0\.npy"):
        read_metadata(folder)


@pytest.mark.parametrize("name", ["all.npy", "._0.npy", "-1.npy", "1.5.npy", "٣.npy"])
def test_a_metadata_file_that_is_called_by_no_number_is_refused(folder, name):
    path = folder / "metadata" / name
    path.write_bytes(QUOTED)
    with pytest.raises(ValueError, match=re.escape(f"{path} is no metadata file")):
        metadata_files(folder)


# Metadata that are refused

BAD_LINES = {
    "empty": (b"", "'' has 0 fields, not 11"),
    "cut": (QUOTED[:-2], "0.5 1' has 10 fields, not 11"),
    "two in one": (QUOTED + b" " + QUOTED, "has 22 fields, not 11"),
    "label 2": (QUOTED.replace(b" 0 1.0", b" 2 1.0"), "the label, field 4, is '2', not 0 or 1"),
    "label 1.0": (QUOTED.replace(b" 0 1.0", b" 1.0 1"), "the label, field 4, is '1.0', not 0 or 1"),
    "label -1": (QUOTED.replace(b" 0 1.0", b" -1 1"), "the label, field 4, is '-1', not 0 or 1"),
    "arabic label": ("a b 0 ١ 1 1 1 1 1 1 1".encode(), "the label, field 4, is '١', not 0 or 1"),
    "no text": (b"\x93NUMPY\x01\x00", "byte 0 of the line is not UTF-8"),
    "long": (b"x" * 9_999, "has 1 fields, not 11"),
}


@pytest.mark.parametrize(("row", "reason"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_broken_line_is_refused_with_file_line_and_reason(folder, row, reason):
    path = folder / "metadata" / "1.npy"
    path.write_bytes(QUOTED + b"\n" + row + b"\n" + QUOTED + b"\n")
    with pytest.raises(ValueError, match=re.escape(reason)) as error:
        read_metadata(folder)
    assert str(error.value).startswith(f"{path}, line 2: ")
    assert str(error.value).endswith("Unpack it from lra_release again.")
    assert len(str(error.value)) < 400


def test_an_empty_metadata_file_is_refused(folder):
    path = folder / "metadata" / "2.npy"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=re.escape(f"{path} is empty. Unpack it")):
        read_metadata(folder)


# Images that are refused


def gray(window, depth, colour, channels):
    """Returns a PNG of zeros of any depth and colour type."""

    def chunk(kind, data):
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", window, window, depth, colour, 0, 0, 0)
    row = b"\0" + bytes(window * depth * channels // 8)
    palette = chunk(b"PLTE", bytes(3)) if colour == 3 else b""
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            palette,
            chunk(b"IDAT", zlib.compress(row * window)),
            chunk(b"IEND", b""),
        ]
    )


def gif():
    buffer = io.BytesIO()
    Image.fromarray(image(0)).save(buffer, "GIF")
    return buffer.getvalue()


BAD_IMAGES = {
    "text": (b"not found", "its 9 bytes are no PNG image"),
    "signature alone": (b"\x89PNG\r\n\x1a\n", "its 8 bytes are no PNG image"),
    "GIF": (gif(), "bytes are no PNG image"),
    "cut": (png(image(0))[:-30], "the image is cut short: its "),
    "no pixels": (png(image(0))[:33] + png(image(0))[-12:], "the image is damaged: '"),
    "smaller": (png(image(0)[:, :31]), "the image has 31 x 32 pixels of 8 bits, colour type 0"),
    "larger": (png(image(0, 128)), "the image has 128 x 128 pixels of 8 bits, colour type 0"),
    "huge": (gray(2**31 - 1, 8, 0, 0), "the image has 2147483647 x 2147483647 pixels"),
    "16 bits": (gray(32, 16, 0, 1), "pixels of 16 bits, colour type 0, not 32 x 32 of 8 bits"),
    "4 bits": (gray(32, 4, 0, 1), "pixels of 4 bits, colour type 0, not 32 x 32 of 8 bits"),
    "1 bit": (gray(32, 1, 0, 1), "pixels of 1 bits, colour type 0, not 32 x 32 of 8 bits"),
    "colour": (gray(32, 8, 2, 3), "pixels of 8 bits, colour type 2, not 32 x 32 of 8 bits"),
    "palette": (gray(32, 8, 3, 1), "pixels of 8 bits, colour type 3, not 32 x 32 of 8 bits"),
    "transparent": (gray(32, 8, 4, 2), "pixels of 8 bits, colour type 4, not 32 x 32 of 8 bits"),
}


def test_the_writer_of_these_tests_writes_images(folder):
    path = folder / "imgs" / "0" / "sample_0.png"
    path.write_bytes(gray(32, 8, 0, 1))
    [(pixels, _)] = read_images(read_metadata(folder), [np.arange(2)], 32, "Images")
    np.testing.assert_array_equal(pixels, [np.zeros((32, 32)), image(1)])


@pytest.mark.parametrize(("content", "reason"), BAD_IMAGES.values(), ids=BAD_IMAGES.keys())
def test_a_broken_image_is_refused_with_file_and_reason(tmp_path, folder, content, reason):
    path = folder / "imgs" / "0" / "sample_5.png"
    path.write_bytes(content)
    task = make(tmp_path)
    with pytest.raises(ValueError, match=re.escape(reason)) as error:
        task.prepare()
    assert str(error.value).startswith(f"{path}: ")
    assert str(error.value).endswith("Unpack it from lra_release again.")
    assert "\n" not in str(error.value)
    assert kept(task) == [f"{task.folder.name}.lock"]


def test_an_image_cut_anywhere_is_refused(read):
    content = png(image(0))
    np.testing.assert_array_equal(read(content), image(0))
    for length in range(1, len(content)):
        with pytest.raises(ValueError, match=r"sample_0\.png: its .* bytes are no|is cut short"):
            read(content[:length])


def test_an_image_with_a_changed_byte_is_refused_in_words_or_read_as_an_image(read):
    content = png(image(0))
    refused = 0
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        try:
            assert read(bytes(changed)).shape == (32, 32)
        except ValueError as error:
            refused += "sample_0.png: " in str(error)
    assert refused > 0.9 * len(content)


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """Returns a function that reads one image of a given content."""
    folder = put(tmp_path_factory.mktemp("one"), sizes=[1])
    listed = read_metadata(folder)

    def read_content(content):
        (folder / listed.images[0]).write_bytes(content)
        [(pixels, _)] = read_images(listed, [np.arange(1)], 32, "Images")
        return pixels[0]

    return read_content


@pytest.mark.parametrize("file", ["imgs/1/sample_7.png", "metadata/1.npy"])
def test_a_folder_in_the_place_of_a_file_is_told_by_name(tmp_path, folder, file):
    path = folder / file
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: Is a directory\\."):
        make(tmp_path).prepare()


def test_a_missing_image_is_told_with_the_line_that_lists_it(tmp_path, folder):
    path = folder / "imgs" / "1" / "sample_7.png"
    path.unlink()
    where = re.escape(f"is listed in {folder / 'metadata' / '1.npy'}, line 8. Unpack it")
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} does not exist, but {where}"):
        make(tmp_path).prepare()


# The cache


def test_a_broken_image_once_mended_is_read(task, folder):
    path = folder / "imgs" / "2" / "sample_7.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        task.prepare()
    assert task.state()[0] == "missing"
    path.write_bytes(whole)
    assert len(task.prepare().splits["train"]) == 32
    assert kept(task) == [task.folder.name, f"{task.folder.name}.lock"]


def test_once_prepared_the_files_are_no_longer_needed(task):
    task.prepare()
    shutil.rmtree(task.data_dir)
    assert len(task.prepare().splits["test"]) == 4


def test_other_metadata_than_before_are_read_again(task, folder, capsys):
    task.prepare()
    path = folder / "metadata" / "2.npy"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert task.state()[0] == "damaged"
    assert len(task.prepare().splits["train"]) == 31
    assert "data is rebuilt" in capsys.readouterr().err


def test_to_open_prepared_data_no_image_is_looked_at(task, folder):
    task.prepare()
    assert set(task.source_files()) == {"0.npy", "1.npy", "2.npy"}
    shutil.rmtree(folder / "imgs" / "0")
    assert task.state(hashes="all")[0] == "found"


# The command line


@pytest.fixture
def data(tmp_path, capsys):
    """Runs ``lra data`` on the official images of the test's folder."""

    def run(task):
        overrides = [f"data_dir={tmp_path / 'data'}", f"cache_dir={tmp_path / 'cache'}"]
        with pytest.raises(SystemExit) as end:
            main(["data", f"task={task}", "task.source=official", *overrides])
        return end.value.code, capsys.readouterr()

    return run


def test_lra_data_prepares_the_official_images(task, data):
    code, captured = data("pathfinder")
    assert (code, captured.out) == (0, f"pathfinder: ready in {task.folder}\n")


def test_lra_data_tells_a_bad_line_in_one_line(folder, data):
    path = folder / "metadata" / "0.npy"
    path.write_bytes(QUOTED[:20])
    code, captured = data("pathfinder")
    assert (code, captured.out) == (2, "")
    [text] = told(captured)
    assert text.startswith(f"lra: {path}, line 1: 'imgs/0 sample_0.png ' has 2 fields")


def test_lra_data_tells_that_there_are_no_images_in_one_line(data):
    code, captured = data("pathx")
    assert (code, captured.out) == (2, "")
    [text] = told(captured)
    assert text.startswith("lra: The official Pathfinder images of 128 x 128 pixels")
