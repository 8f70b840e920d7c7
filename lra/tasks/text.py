"""Text: the opinion of an IMDb review, from its bytes, two classes (Maas et al. 2011).

The Large Movie Review data set with the settings of the Long Range Arena (Tay et al. 2021): a token
is a byte of the UTF-8 text, plus one. The 50,000 reviews without a label are not used.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from lra.tasks import register_task
from lra.tasks._hub import DataSet
from lra.tasks._splits import Examples, check_choice, choose, tell_other_sizes
from lra.tasks.base import Built, Split, Task

_SIZES = {"train": 25_000, "test": 25_000}
_IMDB = DataSet(
    title="IMDb",
    folder="imdb",
    hub_id="stanfordnlp/imdb",
    column="text",
    kind="text",
    num_classes=2,
    instead=", and no folder aclImdb in it or beside it",
)
_CLASSES = ("neg", "pos")  # label 0 and 1


@register_task("text")
class Text(Task):
    """IMDb reviews as bytes: from parquet files, the original folder aclImdb, or the hub."""

    @dataclass(frozen=True)
    class Config:
        """Options of Text.

        Attributes:
            max_length: Tokens of a review beyond this many are cut off.
            validation: ``tenth``: a tenth of the training set, which is not trained on; or
                ``legacy``: the test set, as in the original arena.
            split_seed: Seed of the choice of examples for validation and of subsets.
            num_train: Training examples; null for all.
            num_val: Validation examples; null for all.
            num_test: Test examples; null for all.
            revision: Commit, tag or branch of the hub's data set, which is then read from there;
                null for the data in ``data_dir``, or the hub's newest where there is none.
        """

        max_length: int = 4_000
        validation: Literal["tenth", "legacy"] = "tenth"
        split_seed: int = 0
        num_train: int | None = None
        num_val: int | None = None
        num_test: int | None = None
        revision: str | None = None

        def __post_init__(self) -> None:
            wanted = (self.num_train, self.num_val, self.num_test)
            problems = check_choice(self.split_seed, wanted)
            if self.max_length < 1:
                problems.append(f"max_length must be at least 1, not {self.max_length}.")
            if problems:
                raise ValueError("\n".join(problems))

    name = "text"
    version = 1
    sources = frozenset({"revision"})
    num_classes = len(_CLASSES)
    vocab_size = 257  # a byte of 256, plus one; 0 is padding

    @property
    def max_len(self) -> int:
        """The number of tokens at which reviews are cut."""
        return self.config.max_length

    @property
    def validation_is_test(self) -> bool:
        """Whether validation is legacy."""
        return self.config.validation == "legacy"

    def source_files(self) -> dict[str, Path]:
        """Returns the parquet files; not those of aclImdb, which are too many to look at."""
        return _IMDB.source_files(self.data_dir, self.config.revision)

    def locate(self) -> None:
        """Looks for the reviews."""
        if self._folder() is None:
            _IMDB.open(self.data_dir, self.config.revision)

    def origin(self) -> str:
        """Returns where the reviews would be read from."""
        folder = self._folder()
        return _IMDB.origin(self.data_dir, self.config.revision) if folder is None else str(folder)

    def build(self) -> Built:
        """Reads all reviews, chooses those of each split, and cuts them to ``max_length``."""
        config = self.config
        wanted = {"train": config.num_train, "val": config.num_val, "test": config.num_test}
        sets, source = self._read()
        places = choose(
            len(sets["train"]), len(sets["test"]), wanted, config.split_seed, config.validation
        )
        val = sets["test" if self.validation_is_test else "train"]
        chosen = {"train": sets["train"], "val": val, "test": sets["test"]}
        splits = {
            name: [_split(examples, places[name], config.max_length)]
            for name, examples in chosen.items()
        }
        return Built(splits, source)

    def _folder(self) -> Path | None:
        """Returns aclImdb, where that is what is to be read."""
        if self.config.revision is not None or any(_IMDB.local_files(self.data_dir).values()):
            return None
        return _find_folder(self.data_dir)

    def _read(self) -> tuple[dict[str, Examples], str]:
        """Returns the training and the test set, and one line on where they are from."""
        folder = self._folder()
        opened = _IMDB.open(self.data_dir, self.config.revision) if folder is None else None
        sets = {}
        total = sum(_SIZES.values())
        with tqdm(total=total, desc="IMDb reviews", unit="", unit_scale=True) as bar:
            for name in _SIZES:
                if opened is not None:
                    sets[name] = opened.read(name, _document, bar.update)
                else:
                    sets[name] = _read_folder(folder / name, bar.update)
        tell_other_sizes("IMDb", {name: len(examples) for name, examples in sets.items()}, _SIZES)
        return sets, "the original folder aclImdb" if opened is None else opened.source


def _split(examples: Examples, places: np.ndarray, max_length: int) -> Split:
    """Returns the examples at ``places`` as tokens, uint8: UTF-8 has no byte above 0xF4."""
    texts = [examples.contents[place][:max_length] for place in places]
    tokens = np.frombuffer(b"".join(texts), dtype=np.uint8) + np.uint8(1)
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    return Split.of(tokens, offsets, examples.labels[places])


def _document(text: bytes | None) -> bytes:
    """Returns a text that can be an example.

    Raises:
        ValueError: If it is empty, missing or not UTF-8.
    """
    if not text:
        raise ValueError("document without text")
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} of the text is not UTF-8") from None
    return text


def _find_folder(data_dir: Path) -> Path | None:
    """Returns the original folder of the data set, if it is there.

    Raises:
        ValueError: If it is there, but without reviews of some class.
    """
    for folder in (data_dir / "aclImdb", data_dir / "imdb" / "aclImdb"):
        if folder.is_dir():
            classes = [folder / name / label for name in _SIZES for label in _CLASSES]
            missing = [str(path) for path in classes if next(path.glob("*.txt"), None) is None]
            if missing:
                raise ValueError(
                    f"There are no reviews (*.txt) in {', '.join(missing)}. Unpack the original "
                    f"archive, aclImdb_v1.tar.gz, in {folder.parent} again."
                )
            return folder
    return None


def _read_folder(folder: Path, progress: Callable[[int], object]) -> Examples:
    """Reads the reviews of one set of the original folder, a file each.

    Raises:
        ValueError: At the first file that is no text: file and reason.
    """
    contents, labels = [], []
    for label, path in _files(folder):
        try:
            contents.append(_document(path.read_bytes()))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ValueError(
                f"{path}: {reason}. Unpack the original archive, aclImdb_v1.tar.gz, again."
            ) from None
        labels.append(label)
        progress(1)
    return Examples.of(contents, labels)


def _files(folder: Path) -> Iterator[tuple[int, Path]]:
    for label, name in enumerate(_CLASSES):
        for path in sorted((folder / name).glob("*.txt")):
            yield label, path
