"""Image: grey pixels by both formulas, smaller images, splits, and what is refused."""

import io
import random
from dataclasses import fields

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import COMMIT, serve

from lra.listing import option_meanings
from lra.tasks._images import downscaled
from lra.tasks.base import SPLITS
from lra.tasks.image import Image, decode, grey

RNG = np.random.default_rng(0)
LEVELS = np.arange(256)


def picture(width=32, height=32, channels=3):
    return RNG.integers(0, 256, (height, width, channels), dtype=np.uint8)


def encode(pixels, mode="RGB", form="PNG", **options):
    file = io.BytesIO()
    image = PIL.Image.fromarray(pixels.squeeze())
    image.convert(mode).save(file, form, **options)
    return file.getvalue()


TRAIN = [(picture(), i % 10) for i in range(39)] + [(np.zeros((32, 32, 3), np.uint8), 3)]
TEST = [(picture(), i % 10) for i in range(10)]


def put(folder, train=TRAIN, test=TEST, form="PNG", **options):
    """Writes a parquet file a split; a picture is pixels, or bytes to write as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in {"train": train, "test": test}.items():
        images = [
            {
                "bytes": p if p is None or isinstance(p, bytes) else encode(p, "RGB", form),
                "path": None,
            }
            for p, _ in rows
        ]
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        table = pa.table({"img": pa.array(images, kind), "label": [label for _, label in rows]})
        pq.write_table(table, folder / f"{name}-00000-of-00001.parquet", **options)


def make(folder, **options):
    return Image(Image.Config(**options), data_dir=folder / "data", cache_dir=folder / "cache")


def refused(task):
    with pytest.raises(ValueError, match=r"^.") as error:
        task.prepare()
    assert not [path for path in task.cache_dir.iterdir() if path.suffix != ".lock"]
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def task(tmp_path):
    put(tmp_path / "data" / "cifar10")
    return make(tmp_path)


# Grey


def all_colours(step):
    """Yields planes of colours of one red each, (256, 256, 3) uint8: every blue, every green."""
    for red in range(0, 256, step):
        yield np.stack(np.broadcast_arrays(red, LEVELS[:, None], LEVELS), axis=-1).astype(np.uint8)


def test_pil_grey_is_that_of_pillow_for_every_colour():
    for colours in all_colours(step=1):
        expected = np.asarray(PIL.Image.fromarray(colours).convert("L"))
        np.testing.assert_array_equal(grey(colours, "pil"), expected, strict=True)


def test_pil_grey_of_single_colours():
    for red, green, blue in RNG.integers(0, 256, (500, 3)).tolist():
        expected = (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16
        assert int(grey(np.array([red, green, blue], np.uint8), "pil")) == expected


def single(value):
    """Rounds to float32; after one operation on float32 values in float64, that is exact."""
    return value.astype(np.float32).astype(np.float64)


def test_tensorflow_grey_is_the_formula_rounded_to_float32_after_each_operation():
    weights = single(np.array([0.2989, 0.5870, 0.1140]))
    for colours in all_colours(step=1):
        terms = single(weights * single(colours / 255.0))
        total = single(single(terms[..., 0] + terms[..., 1]) + terms[..., 2])
        expected = np.floor(single(total * 255.5)).astype(np.uint8)
        np.testing.assert_array_equal(grey(colours, "tensorflow"), expected, strict=True)


def test_tensorflow_grey_is_that_of_pil_or_one_less_for_a_quarter_of_colours():
    less = colours_seen = 0
    for colours in all_colours(step=5):
        difference = grey(colours, "pil").astype(int) - grey(colours, "tensorflow")
        assert ((difference == 0) | (difference == 1)).all()
        less += difference.sum()
        colours_seen += difference.size
    assert less / colours_seen == pytest.approx(0.26, abs=0.01)


@pytest.mark.parametrize("formula", ["tensorflow", "pil"])
def test_black_and_white_stay_black_and_white(formula):
    ends = np.array([[0, 0, 0], [255, 255, 255]], np.uint8)
    assert grey(ends, formula).tolist() == [0, 255]


@pytest.mark.parametrize("formula", ["tensorflow", "pil"])
def test_the_option_chooses_the_formula(tmp_path, formula):
    put(tmp_path / "data" / "cifar10")
    split = make(tmp_path, gray=formula).prepare().splits["test"]
    expected = sorted((p.tobytes(), grey(p, formula).reshape(-1).tolist(), y) for p, y in TEST)
    assert [split[i].tolist() for i in range(10)] == [tokens for _, tokens, _ in expected]
    assert split.labels.tolist() == [label for *_, label in expected]


def test_the_formulas_are_not_the_same_data(tmp_path):
    put(tmp_path / "data" / "cifar10")
    tasks = [make(tmp_path), make(tmp_path, gray="pil")]
    assert len({task.prepare().manifest["hash"] for task in tasks}) == 2


# Sequences


def test_pixels_follow_each_other_row_by_row(tmp_path):
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[2, 5] = 255  # third row, sixth column
    put(tmp_path / "data" / "cifar10", test=[(pixels, 0)])
    split = make(tmp_path).prepare().splits["test"]
    assert split.tokens.dtype == np.uint8
    assert split.lengths.tolist() == [1_024]
    assert np.flatnonzero(split[0]).tolist() == [2 * 32 + 5]


def test_vocabulary_and_classes_are_those_of_the_arena(task):
    assert (task.vocab_size, task.num_classes, task.max_len) == (256, 10, 1_024)
    assert (task.chance, task.dual, task.validation_is_test) == (0.1, False, False)


@pytest.mark.parametrize("factor", [1, 2, 4, 8, 16, 32])
def test_a_smaller_image_has_the_mean_of_each_square_halves_rounded_up(factor):
    images = RNG.integers(0, 256, (3, 32, 32), dtype=np.uint8)
    small = downscaled(images, factor)
    side = 32 // factor
    assert (small.shape, small.dtype) == ((3, side, side), np.uint8)
    for i, row, column in np.ndindex(3, side, side):
        rows = slice(row * factor, (row + 1) * factor)
        columns = slice(column * factor, (column + 1) * factor)
        mean = int(images[i, rows, columns].sum(dtype=int)) / factor**2
        assert small[i, row, column] == int(mean + 0.5)


def test_a_mean_of_a_half_is_rounded_up_and_white_stays_white():
    images = np.array([[[0, 0], [1, 1]], [[255, 255], [255, 254]], [[0, 0], [0, 1]]], np.uint8)
    assert downscaled(images, 2).reshape(-1).tolist() == [1, 255, 0]


def test_downscale_shortens_the_sequences(tmp_path):
    put(tmp_path / "data" / "cifar10")
    task = make(tmp_path, downscale=4)
    whole, small = make(tmp_path).prepare().splits["test"], task.prepare().splits["test"]
    assert task.max_len == 64
    expected = [downscaled(whole[i].reshape(1, 32, 32), 4).reshape(-1).tolist() for i in range(10)]
    assert [small[i].tolist() for i in range(10)] == expected


# Splits and sources


def test_a_seeded_tenth_of_the_training_set_is_for_validation(tmp_path):
    put(tmp_path / "data" / "cifar10")
    seen = []
    for seed in (0, 1):
        splits = make(tmp_path, split_seed=seed).prepare().splits
        assert [len(splits[name]) for name in SPLITS] == [36, 4, 10]
        both = [splits[name][i].tobytes() for name in SPLITS[:2] for i in range(len(splits[name]))]
        assert sorted(both) == sorted(grey(p, "tensorflow").tobytes() for p, _ in TRAIN)
        seen.append(splits["val"].labels.tolist())
    assert seen[0] != seen[1]


def test_a_small_protocol_takes_a_subset_of_each_split(tmp_path):
    put(tmp_path / "data" / "cifar10")
    splits = make(tmp_path, num_train=7, num_val=3, num_test=5).prepare().splits
    assert [len(splits[name]) for name in SPLITS] == [7, 3, 5]


def test_more_examples_than_there_are_cannot_be_asked_for(tmp_path):
    put(tmp_path / "data" / "cifar10")
    assert refused(make(tmp_path, num_val=5)) == "num_val=5, but there are only 4 examples."


def test_wrong_options_are_told_all_at_once():
    with pytest.raises(ValueError, match="downscale") as error:
        Image.Config(downscale=3, num_test=0, split_seed=-1)
    assert len(str(error.value).splitlines()) == 3
    assert "downscale must be one of 1, 2, 4, 8, 16, 32, not 3." in str(error.value)
    with pytest.raises(ValueError, match="not 0"):
        Image.Config(downscale=0)


def test_all_sources_orders_and_lossless_forms_give_the_same_data(tmp_path, monkeypatch):
    shuffled = random.Random(0).sample(TRAIN, len(TRAIN))
    put(tmp_path / "a" / "data" / "cifar10", form="PNG")
    put(tmp_path / "b" / "data" / "cifar10", train=shuffled, form="BMP", row_group_size=7)
    put(tmp_path / "hub" / "plain_text", train=TRAIN[::-1], test=TEST[::-1], form="TIFF")
    asked = serve(monkeypatch, "uoft-cs/cifar10", tmp_path / "hub")
    manifests = [make(tmp_path / name).prepare().manifest for name in "abc"]
    assert len({manifest["hash"] for manifest in manifests}) == 1
    assert asked[0] == ("uoft-cs/cifar10", None)
    assert [manifest["source"] for manifest in manifests] == [
        "local parquet files with the columns of uoft-cs/cifar10",
        "local parquet files with the columns of uoft-cs/cifar10",
        f"uoft-cs/cifar10 at {COMMIT}",
    ]


def test_webp_without_loss_gives_the_pixels_too():
    pixels = picture()
    assert decode(encode(pixels, form="WEBP", lossless=True)) == pixels.tobytes()


def test_a_given_revision_is_no_departure_and_has_no_local_source(task, tmp_path):
    assert task.sources == {"revision"}
    assert len(task.source_files()) == 2
    assert make(tmp_path, revision="main").source_files() == {}


def test_every_option_has_a_meaning():
    assert [*option_meanings(Image.Config)] == [field.name for field in fields(Image.Config)]


def test_the_majority_rule_is_scored(task):
    assert task.prepare().manifest["baselines"] == {"majority class": 0.1}


def test_progress_and_other_sizes_are_told(task, capsys):
    task.prepare()
    told = capsys.readouterr().err
    assert "CIFAR-10 images" in told
    assert "train has 40 examples, not 50,000, test has 10 examples, not 10,000." in told


# Rows that are refused


GOOD = encode(picture())
BAD_IMAGES = {
    "missing": (None, "there is no image"),
    "empty": (b"", "there is no image"),
    "text": (b"no image at all", "its 15 bytes are no image"),
    "cut short": (GOOD[:500], "the image is broken: "),
    "only a header": (GOOD[:60], "the image is broken: "),
    "changed": (GOOD[:200] + b"\x00" * 50 + GOOD[250:], "the image is broken: "),
    "too small": (
        encode(picture(28, 31)),
        "the image is 28 x 31 pixels in mode RGB, not 32 x 32 in RGB",
    ),
    "too large": (encode(picture(64, 64)), "the image is 64 x 64 pixels in mode RGB, not"),
    "grey": (encode(picture(), "L"), "the image is 32 x 32 pixels in mode L, not 32 x 32 in RGB"),
    "transparent": (encode(picture(), "RGBA"), "the image is 32 x 32 pixels in mode RGBA, not"),
    "palette": (encode(picture(), "P"), "the image is 32 x 32 pixels in mode P, not"),
}


@pytest.mark.parametrize(("data", "reason"), BAD_IMAGES.values(), ids=BAD_IMAGES.keys())
def test_a_row_without_a_good_image_is_named(tmp_path, data, reason):
    rows = [*TEST[:6], (data, 1), *TEST[6:]]
    put(tmp_path / "data" / "cifar10", test=rows)
    file = tmp_path / "data" / "cifar10" / "test-00000-of-00001.parquet"
    message = refused(make(tmp_path))
    assert message.startswith(f"{file}, split test, row 6: {reason}")
    assert "hf download uoft-cs/cifar10 --repo-type dataset --local-dir" in message


def test_a_huge_image_is_refused_by_its_header_without_a_word(capsys):
    header = io.BytesIO()
    PIL.Image.new("1", (11_000, 10_000)).save(header, "PNG")
    with pytest.raises(ValueError, match="11000 x 10000 pixels in mode 1"):
        decode(header.getvalue())
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("label", "given"), [(10, "10"), (-1, "-1"), (None, "missing")])
def test_a_row_with_a_label_out_of_range_is_named(tmp_path, label, given):
    put(tmp_path / "data" / "cifar10", train=[*TRAIN, (picture(), label)])
    file = tmp_path / "data" / "cifar10" / "train-00000-of-00001.parquet"
    assert refused(make(tmp_path)).startswith(
        f"{file}, split train, row 40: the label is {given}, not an integer from 0 to 9. "
    )


def test_without_data_and_network_the_message_tells_all(tmp_path, monkeypatch):
    def dataset_info(self, *_, **__):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    message = refused(make(tmp_path))
    for part in ("cifar10 has no CIFAR-10 data", "columns img and label", "OSError: no network"):
        assert part in message
    assert "hf download uoft-cs/cifar10 --repo-type dataset --local-dir" in message
