"""Pathfinder: do the two marked ends belong to one dashed curve? 32 x 32 pixels, two classes.

Images of two long curves among short ones, with two round markers, are a task of Linsley et al.
2018 (arXiv 1805.08315); Tay et al. 2021 (arXiv 2011.04006) made it one of the Long Range Arena: a
token is the grey value of a pixel, row by row. They are generated here or read from its files.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from lra.tasks import register_task
from lra.tasks._images import downscaled
from lra.tasks._official import origin
from lra.tasks._parts import Arrays, Parts, cut, in_threads
from lra.tasks._pathfinder_files import (
    RELEASED,
    find_folder,
    metadata_files,
    read_images,
    read_metadata,
)
from lra.tasks._pathfinder_markers import best_threshold, marker_distances, threshold_accuracy
from lra.tasks._pathfinder_stamps import Difficulty, Geometry, geometry
from lra.tasks.base import SPLITS, Built, Split, Task

RULE_EXAMPLES = 20_000
"""Training examples that the distance threshold is fitted on, at most."""


class Piece(NamedTuple):
    """Examples of a split.

    Attributes:
        tokens: Grey values row by row, (n, max_len) uint8.
        labels: 1 if the markers are on one curve, (n,) uint8.
        distances: Between the markers, in pixels of the image before ``downscale``, (n,) float.
    """

    tokens: np.ndarray
    labels: np.ndarray
    distances: np.ndarray


@register_task("pathfinder")
class Pathfinder(Task):
    """Pathfinder images of 32 x 32 pixels: generated, or those of the release."""

    @dataclass(frozen=True)
    class Config:
        """Options of Pathfinder and Path-X.

        Attributes:
            source: ``generated``; or ``official``: the images of the Long Range Arena release,
                found in ``data_dir``, of which 80, 10 and 10 % are the splits.
            difficulty: ``hard`` is that of the arena: curves of 14 dashes; ``intermediate`` has 9,
                ``easy`` 6.
            num_train: Training examples; of the official images, a choice if fewer than there are.
            num_val: Validation examples, likewise.
            num_test: Test examples, likewise.
            data_seed: Seed of the generator.
            split_seed: Seed of the choice of splits from the official images.
            downscale: Side of the squares of pixels whose mean is one token, halves rounded up: a
                larger one makes shorter examples.
        """

        source: Literal["generated", "official"] = "generated"
        difficulty: Difficulty = "hard"
        num_train: int = 160_000
        num_val: int = 20_000
        num_test: int = 20_000
        data_seed: int = 0
        split_seed: int = 0
        downscale: Literal[1, 2, 4, 8, 16] = 1

        def __post_init__(self) -> None:
            problems = []
            for name in ("num_train", "num_val", "num_test"):
                value, released = getattr(self, name), getattr(type(self), name)
                if value < 1:
                    problems.append(f"{name} must be at least 1, not {value}.")
                elif value > released and self.source == "official":
                    problems.append(
                        f"{name}={value} is more than the {released} images that source=official "
                        f"has for it."
                    )
            for name, source in (("data_seed", "generated"), ("split_seed", "official")):
                value = getattr(self, name)
                if not 0 <= value < 2**63:
                    problems.append(f"{name} must be from 0 to 2**63 - 1, not {value}.")
                elif value and self.source != source:
                    problems.append(
                        f"{name}={value} has an effect with source={source} only, not with "
                        f"source={self.source}. Leave it out."
                    )
            if problems:
                raise ValueError("\n".join(problems))

    name = "pathfinder"
    version = 1
    sources = frozenset({"source"})
    num_classes = 2
    vocab_size = 256

    title: ClassVar[str] = "Pathfinder"
    window: ClassVar[int] = 32
    """Side of an image in pixels."""
    piece: ClassVar[int] = 16_384
    """Images of a piece of a split: what is in memory at once, and the data's hash depends on."""
    part: ClassVar[int] = 2_048
    """Images that an interrupted build loses at most, for each thread: a second of work."""
    step: ClassVar[int] = 512
    """Images between two looks whether to stop: a tenth of a second."""

    @property
    def max_len(self) -> int:
        """The number of tokens of every example."""
        return (self.window // self.config.downscale) ** 2

    def source_files(self) -> dict[str, Path]:
        """Returns the official metadata files by name; nothing where they are not asked for.

        Images are not among them: there are too many to look at each time.
        """
        if self.config.source == "generated":
            return {}
        try:
            return {file.name: file for file in metadata_files(self._official_folder())}
        except ValueError:
            return {}

    def locate(self) -> None:
        """Looks for the official images, where they are to be read."""
        if self.config.source == "official":
            self._official_folder()

    def origin(self) -> str:
        """Returns what a build would do, and where official images are."""
        return origin(self.config.source, self._official_folder)

    def build(self) -> Built:
        """Reads the official images, or generates those that no earlier build left."""
        if self.config.source == "official":
            pieces, source = self._official()
        else:
            pieces, source = self._generated(), f"generated, data_seed {self.config.data_seed}"
        distances: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}

        def splits(name: str) -> Iterator[Split]:
            for tokens, labels, its_distances in pieces[name]:
                distances[name].append(its_distances)
                yield Split.of_table(tokens, labels)

        def rules(opened: Mapping[str, Split]) -> dict[str, float]:
            together = {name: np.concatenate(distances[name]) for name in SPLITS}
            return _rules(together, {name: split.labels for name, split in opened.items()})

        return Built({name: splits(name) for name in SPLITS}, source, rules)

    @cached_property
    def _geometry(self) -> Geometry:
        return geometry(self.window, self.config.difficulty)

    def _examples(self, images: np.ndarray, labels: np.ndarray) -> Piece:
        """Returns images (n, window, window) uint8 as examples."""
        tokens = downscaled(images, self.config.downscale).reshape(len(images), -1)
        return Piece(tokens, labels, marker_distances(images, self._geometry))

    def _generated(self) -> dict[str, Iterable[Piece]]:
        """Returns the pieces of each split, once all their parts are in files."""
        config = self.config
        ends = np.cumsum((0, config.num_train, config.num_val, config.num_test)).tolist()
        pieces = {
            name: [cut(piece, self.part) for piece in cut(range(*ends[i : i + 2]), self.piece)]
            for i, name in enumerate(SPLITS)
        }
        parts = Parts(self.parts, f"{self.name} {self.version} {self.fingerprint}")
        self._generate(parts, [part for name in SPLITS for piece in pieces[name] for part in piece])

        def joined(piece: list[range]) -> Piece:
            each = [parts.read(part) for part in piece]
            return Piece(*(np.concatenate([one[name] for one in each]) for name in Piece._fields))

        return {name: map(joined, pieces[name]) for name in SPLITS}

    def _generate(self, parts: Parts, wanted: list[range]) -> None:
        """Makes the parts that are not there yet."""
        from lra.tasks._pathfinder import generate  # late: it loads numba

        def compute(step: range) -> Arrays:
            images, labels, _ = generate(
                self._geometry, seed=self.config.data_seed, first=step.start, count=len(step)
            )
            return self._examples(images, labels)._asdict()

        def finish(part: range, arrays: Arrays) -> None:
            with self._writing():
                parts.write(part, arrays)

        generate(self._geometry, seed=0, first=0, count=0)  # prepares what all threads share, once
        missing = [part for part in wanted if not parts.has(part)]
        total = sum(map(len, wanted))
        with tqdm(
            total=total,
            initial=total - sum(map(len, missing)),
            desc=f"{self.title} images",
            unit="",
            unit_scale=True,
        ) as bar:
            in_threads(missing, self.step, compute, finish, bar.update)

    def _official_folder(self) -> Path:
        return find_folder(self.data_dir, self.window, self.config.difficulty)

    def _official(self) -> tuple[dict[str, Iterable[Piece]], str]:
        """Returns the pieces of each split of the official images, and where they are from."""
        folder = self._official_folder()
        listed = read_metadata(folder)
        count = len(listed.images)
        if count != RELEASED:
            print(
                f"These are not the released {self.title} images: {folder} lists {count:,}, not "
                f"{RELEASED:,}.",
                file=sys.stderr,
            )
        if count < 10:
            raise ValueError(f"{folder} lists {count} images; three splits take at least 10.")
        order = np.random.default_rng((self.config.split_seed, 80)).permutation(count)
        ends = (0, count * 8 // 10, count * 9 // 10, count)
        numbers = (self.config.num_train, self.config.num_val, self.config.num_test)

        def pieces(name: str, chosen: np.ndarray) -> Iterator[Piece]:
            # Within a split the order does not matter; that of the files is the fastest to read.
            chosen = np.sort(chosen)
            cuts = np.split(chosen, range(self.piece, len(chosen), self.piece))
            about = f"{self.title} {name} images"
            for images, labels in read_images(listed, cuts, self.window, about):
                yield self._examples(images, labels)

        splits = {
            name: pieces(name, order[ends[i] : ends[i + 1]][: numbers[i]])
            for i, name in enumerate(SPLITS)
        }
        place = folder.relative_to(self.data_dir)
        return splits, f"files of the Long Range Arena release: {place}"


def _rules(
    distances: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Scores the best single threshold on the distance between the markers, fitted in training."""
    seen = slice(RULE_EXAMPLES)
    rule = best_threshold(distances["train"][seen], labels["train"][seen])
    return {
        "marker distance threshold": threshold_accuracy(distances["test"], labels["test"], *rule)
    }
