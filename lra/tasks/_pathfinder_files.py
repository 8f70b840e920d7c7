"""The official Pathfinder images of the Long Range Arena release: where and what they are.

A difficulty has a folder with ``imgs/<batch>/sample_<n>.png`` and ``metadata/<batch>.npy``. The
latter are plain text, whatever their suffix says: a line an image, such as
``imgs/0 sample_0.png 0 0 1.0 6 2 2 0.5 1 1``: folder, file, running number, label (1 if the two
markers are on one snake), and seven settings of the generator.
"""

import io
import struct
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as excerpt

import numpy as np
from PIL import Image
from tqdm import tqdm

RELEASED = 200_000
"""Images of one size and difficulty."""

_FOLDERS = {
    "easy": "curv_baseline",
    "intermediate": "curv_contour_length_9",
    "hard": "curv_contour_length_14",
}
_FIELDS = 11
_AGAIN = "Unpack it from lra_release again."
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_END = b"IEND\xaeB`\x82"
_HEADER = struct.Struct(">16xIIBB")  # width, height, bits a channel, colour type (0: one channel)


@dataclass(frozen=True)
class Listed:
    """The images that the metadata files of a folder list, in their order.

    Attributes:
        folder: The folder of the difficulty.
        images: Path of each image below it.
        labels: Class of each image, uint8.
        files: The metadata files, by number.
        ends: How many images each file and those before it list.
    """

    folder: Path
    images: list[str]
    labels: np.ndarray
    files: list[Path]
    ends: np.ndarray

    def where(self, index: int) -> str:
        """Returns the file and line that list image ``index``."""
        file = int(np.searchsorted(self.ends, index, side="right"))
        first = self.ends[file - 1] if file else 0
        return f"{self.files[file]}, line {index - first + 1}"


def find_folder(data_dir: Path, window: int, difficulty: str) -> Path:
    """Returns the folder of the official images of one size and difficulty.

    Args:
        data_dir: Where data sets are.
        window: Side of the images in pixels.
        difficulty: ``easy``, ``intermediate`` or ``hard``.

    Raises:
        ValueError: If there is none, or a part of it is missing: what, and where.
    """
    size, name = f"pathfinder{window}", _FOLDERS[difficulty]
    # The innermost first: the archive holds a second pathfinder128 one level up, on which a
    # network that learns the other sizes stays at chance (google-research/long-range-arena #38).
    parents = ("lra_release/lra_release", "lra_release", "pathfinder", ".")
    folders = [data_dir / parent / size / name for parent in parents]
    for folder in folders:
        if not folder.is_dir():
            continue
        for part in ("metadata", "imgs"):
            if not (folder / part).is_dir():
                raise ValueError(
                    f"{folder} has no folder {part}. Unpack all of it from lra_release, or set "
                    f"data_dir=FOLDER."
                )
        return folder
    raise ValueError(
        f"The official Pathfinder images of {window} x {window} pixels, difficulty {difficulty} "
        f"(a folder {name} with imgs/ and metadata/), are in none of the folders "
        f"{', '.join(map(str, folders))}. Unpack the Long Range Arena release (lra_release) in "
        f"{data_dir}, or set data_dir=FOLDER to where it is unpacked, or leave out "
        f"task.source=official: then images are generated."
    )


def metadata_files(folder: Path) -> list[Path]:
    """Returns the metadata files of a difficulty's folder by number.

    Raises:
        ValueError: If there is none, or one has a name that is no number.
    """
    files = sorted((folder / "metadata").glob("*.npy"))
    for file in files:
        if not (file.stem.isascii() and file.stem.isdecimal()):
            raise ValueError(
                f"{file} is no metadata file of the release: those are called by a number, as "
                f"0.npy. Remove it."
            )
    if not files:
        raise ValueError(
            f"{folder / 'metadata'} holds no metadata file, as 0.npy. Unpack it from lra_release "
            f"again, or set data_dir=FOLDER."
        )
    return sorted(files, key=lambda file: int(file.stem))


def read_metadata(folder: Path) -> Listed:
    """Reads all metadata files of a difficulty's folder, by number and line by line.

    Raises:
        ValueError: At the first line that is broken: file, line and reason.
    """
    images: list[str] = []
    labels = bytearray()
    ends = []
    files = metadata_files(folder)
    for file in files:
        for image, label in _read_lines(file):
            images.append(image)
            labels.append(label)
        ends.append(len(images))
    return Listed(folder, images, np.frombuffer(labels, np.uint8), files, np.array(ends))


def _read_lines(file: Path) -> list[tuple[str, int]]:
    """Returns the image and the label of every line of a metadata file."""
    read = []
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}. {_AGAIN}") from None
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            read.append(_read_line(line))
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}. {_AGAIN}") from None
    if not read:
        raise ValueError(f"{file} is empty. {_AGAIN}")
    return read


def _read_line(line: bytes) -> tuple[str, int]:
    """Returns the path of the image below the difficulty's folder, and the label."""
    try:
        fields = line.decode().split()
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} of the line is not UTF-8") from None
    if len(fields) != _FIELDS:
        raise ValueError(f"{excerpt(line.decode())} has {len(fields)} fields, not {_FIELDS}")
    folder, file, _, label = fields[:4]
    if label not in ("0", "1"):
        raise ValueError(f"the label, field 4, is {excerpt(label)}, not 0 or 1")
    return f"{folder}/{file}", int(label)


def read_images(
    listed: Listed, pieces: Iterable[np.ndarray], window: int, about: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Reads images piece by piece, with a progress bar.

    The release has an image file without a single byte. Such a file is left out; one line on
    standard error tells how many there were.

    Args:
        listed: What there is.
        pieces: Indices of the images of each piece.
        window: Side of the images in pixels.
        about: What these images are, for the bar and the line.

    Yields:
        The pixels of a piece, (n, window, window) uint8, and the labels, (n,) uint8.

    Raises:
        ValueError: At the first image that is missing or broken: file and reason.
    """
    pieces = list(pieces)
    empty: list[Path] = []
    with tqdm(total=sum(map(len, pieces)), desc=about, unit="", unit_scale=True) as bar:
        for piece in pieces:
            pixels = np.empty((len(piece), window, window), np.uint8)
            found = np.ones(len(piece), bool)
            for row, index in enumerate(piece.tolist()):
                path = listed.folder / listed.images[index]
                try:
                    content = path.read_bytes()
                    found[row] = bool(content)
                    if content:
                        pixels[row] = _decode(content, window)
                    else:
                        empty.append(path)
                except FileNotFoundError:
                    raise ValueError(
                        f"{path} does not exist, but is listed in {listed.where(index)}. {_AGAIN}"
                    ) from None
                except (OSError, ValueError) as error:
                    reason = error.strerror if isinstance(error, OSError) else error
                    raise ValueError(f"{path}: {reason}. {_AGAIN}") from None
                bar.update()
            yield pixels[found], listed.labels[piece][found]
    if empty:
        print(f"{about}: {len(empty)} left out as empty files; first {empty[0]}.", file=sys.stderr)


def _decode(content: bytes, window: int) -> np.ndarray:
    """Returns the pixels of a PNG, (window, window) uint8."""
    if len(content) < _HEADER.size or not content.startswith(_SIGNATURE):
        raise ValueError(f"its {len(content):,} bytes are no PNG image")
    width, height, depth, colour = _HEADER.unpack_from(content)
    if (width, height, depth, colour) != (window, window, 8, 0):
        raise ValueError(
            f"the image has {width} x {height} pixels of {depth} bits, colour type {colour}, not "
            f"{window} x {window} of 8 bits, one channel (colour type 0)"
        )
    if not content.endswith(_END):  # some cuts are no error to Pillow
        raise ValueError(f"the image is cut short: its {len(content):,} bytes have no end mark")
    try:
        pixels = Image.open(io.BytesIO(content), formats=["PNG"]).tobytes()
        Image.open(io.BytesIO(content), formats=["PNG"]).verify()  # check sums, only now
    except Exception as error:  # Pillow's, of many kinds, where a chunk is damaged
        raise ValueError(f"the image is damaged: {excerpt(str(error))}") from None
    return np.frombuffer(pixels, np.uint8).reshape(window, window)
