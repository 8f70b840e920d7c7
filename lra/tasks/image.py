"""Image: CIFAR-10 in grey, pixel after pixel, ten classes (Krizhevsky 2009).

With the settings of the Long Range Arena (Tay et al. 2021): a token is the grey value of a pixel, 0
to 255, and an image its 32 x 32 pixels row by row. Value 0 is black, and padding too.
"""

import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from lra.tasks import register_task
from lra.tasks._hub import DataSet
from lra.tasks._images import downscaled
from lra.tasks._splits import Examples, check_choice, choose, tell_other_sizes
from lra.tasks.base import Built, Split, Task

SIDE = 32  # pixels
_SIZES = {"train": 50_000, "test": 10_000}
_CIFAR = DataSet(
    title="CIFAR-10",
    folder="cifar10",
    hub_id="uoft-cs/cifar10",
    column="img",
    kind="image",
    num_classes=10,
)
_CHUNK = 1_000  # images at once, as many as take little memory in float32


@register_task("image")
class Image(Task):
    """CIFAR-10 images in grey, from parquet files or the hub."""

    @dataclass(frozen=True)
    class Config:
        """Options of Image.

        Attributes:
            gray: How a colour becomes grey: ``tensorflow``, as in the original arena, in
                Nyströmformer and in Skyformer; or ``pil``, as in S4.
            downscale: Each square of this many pixels a side becomes one pixel, their mean.
            split_seed: Seed of the choice of examples for validation and of subsets.
            num_train: Training examples; null for all but the tenth that is for validation.
            num_val: Validation examples; null for a tenth of the training set.
            num_test: Test examples; null for all.
            revision: Commit, tag or branch of the hub's data set, which is then read from there;
                null for the data in ``data_dir``, or the hub's newest where there is none.
        """

        gray: Literal["tensorflow", "pil"] = "tensorflow"
        downscale: int = 1
        split_seed: int = 0
        num_train: int | None = None
        num_val: int | None = None
        num_test: int | None = None
        revision: str | None = None

        def __post_init__(self) -> None:
            wanted = (self.num_train, self.num_val, self.num_test)
            problems = check_choice(self.split_seed, wanted)
            if self.downscale < 1 or SIDE % self.downscale:
                divisors = ", ".join(str(n) for n in range(1, SIDE + 1) if SIDE % n == 0)
                problems.append(f"downscale must be one of {divisors}, not {self.downscale}.")
            if problems:
                raise ValueError("\n".join(problems))

    name = "image"
    version = 1
    sources = frozenset({"revision"})
    num_classes = 10
    vocab_size = 256

    @property
    def max_len(self) -> int:
        """The number of pixels of every example."""
        return (SIDE // self.config.downscale) ** 2

    def source_files(self) -> dict[str, Path]:
        """Returns the parquet files that are there."""
        return _CIFAR.source_files(self.data_dir, self.config.revision)

    def locate(self) -> None:
        """Looks for the images."""
        _CIFAR.open(self.data_dir, self.config.revision)

    def origin(self) -> str:
        """Returns where the images would be read from."""
        return _CIFAR.origin(self.data_dir, self.config.revision)

    def build(self) -> Built:
        """Decodes all images, makes them grey, and chooses those of each split."""
        config = self.config
        opened = _CIFAR.open(self.data_dir, config.revision)
        tokens, labels = {}, {}
        total = sum(_SIZES.values())
        with tqdm(total=total, desc="CIFAR-10 images", unit="", unit_scale=True) as bar:
            for name in _SIZES:
                examples = opened.read(name, decode, bar.update)
                tokens[name] = self._tokens(examples)
                labels[name] = examples.labels
        sizes = {name: len(of_set) for name, of_set in labels.items()}
        tell_other_sizes("CIFAR-10", sizes, _SIZES)
        wanted = {"train": config.num_train, "val": config.num_val, "test": config.num_test}
        places = choose(sizes["train"], sizes["test"], wanted, config.split_seed)
        splits = {}
        for name, chosen in places.items():
            of_set = "test" if name == "test" else "train"
            splits[name] = [Split.of_table(tokens[of_set][chosen], labels[of_set][chosen])]
        return Built(splits, opened.source)

    def _tokens(self, examples: Examples) -> np.ndarray:
        """Returns the grey pixels of each image, uint8 of shape (examples, max_len)."""
        tokens = np.empty((len(examples), self.max_len), np.uint8)
        for first in range(0, len(examples), _CHUNK):
            rgb = np.frombuffer(b"".join(examples.contents[first : first + _CHUNK]), np.uint8)
            pixels = grey(rgb.reshape(-1, SIDE, SIDE, 3), self.config.gray)
            small = downscaled(pixels, self.config.downscale)
            tokens[first : first + _CHUNK] = small.reshape(len(small), -1)
        return tokens


def decode(data: bytes | None) -> bytes:
    """Returns the pixels of an encoded image, row by row, three bytes each: red, green, blue.

    Raises:
        ValueError: If it is no image, or not one of 32 x 32 pixels in RGB.
    """
    import PIL
    import PIL.Image

    if not data:
        raise ValueError("there is no image")
    try:
        with warnings.catch_warnings(action="ignore"), PIL.Image.open(io.BytesIO(data)) as image:
            form = (image.mode, *image.size)
            pixels = image.tobytes() if form == ("RGB", SIDE, SIDE) else b""
    except PIL.UnidentifiedImageError:
        raise ValueError(f"its {len(data):,} bytes are no image") from None
    except Exception as error:  # each format has its own
        raise ValueError(f"the image is broken: {type(error).__name__}: {error}") from None
    if not pixels:
        mode, width, height = form
        raise ValueError(
            f"the image is {width} x {height} pixels in mode {mode}, not {SIDE} x {SIDE} in RGB"
        )
    return pixels


def grey(rgb: np.ndarray, formula: Literal["tensorflow", "pil"]) -> np.ndarray:
    """Returns grey values of colours.

    Args:
        rgb: Red, green and blue, uint8 of shape (..., 3).
        formula: ``tensorflow``: RGB / 255 in float32, weighted by 0.2989, 0.5870 and 0.1140, times
            255.5, cut to an integer, as TensorFlow's rgb_to_grayscale does it; or ``pil``: weights
            19595, 38470 and 7471 of 65536, rounded to the nearest integer, as Pillow does it.

    Returns:
        Grey values, uint8 of shape (...).
    """
    if formula == "pil":
        red, green, blue = np.moveaxis(rgb.astype(np.uint32), -1, 0)
        return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).astype(np.uint8)
    red, green, blue = np.moveaxis(rgb.astype(np.float32) / np.float32(255), -1, 0)
    weighted = np.float32(0.2989) * red + np.float32(0.5870) * green + np.float32(0.1140) * blue
    return (weighted * np.float32(255.5)).astype(np.uint8)
