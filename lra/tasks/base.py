"""The task contract: what a task declares, and how its prepared splits are stored and found."""

import abc
import contextlib
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from lra.files import canonical_json, file_hash, locked, parsed, short_hash, write_text
from lra.tasks._arrow import Split, read_split, record_batch
from lra.typed import check_known

SPLITS = ("train", "val", "test")

Hashes = Literal["none", "splits", "all"]
"""What is compared with its hash: nothing, prepared splits, or their source files too."""


@dataclass(frozen=True)
class Built:
    """What a task makes from its source.

    Attributes:
        splits: By name, each in one or more pieces of as many bytes as memory may hold at once;
            they are asked for once, in the order of ``SPLITS``.
        source: One line on where the data is from, such as a data set's name and revision.
        rules: Returns test accuracies (fractions) of rules that learn nothing, by name, beside the
            majority class; called with the opened splits after all pieces.
    """

    splits: Mapping[str, Iterable[Split]]
    source: str
    rules: Callable[[Mapping[str, Split]], dict[str, float]] = lambda splits: {}


@dataclass(frozen=True)
class Prepared:
    """A task's splits, opened from the cache, and their manifest.

    Attributes:
        splits: The splits by name, memory-mapped.
        manifest: Sizes, hashes and non-learned baselines, as ``Task.prepare`` wrote them.
    """

    splits: Mapping[str, Split]
    manifest: Mapping[str, Any]


class Task(abc.ABC):
    """Base class of every task.

    Args:
        config: The task's options, an instance of its ``Config``.
        data_dir: Where data sets are looked for first.
        cache_dir: Where prepared splits are kept.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    sources: ClassVar[frozenset[str]] = frozenset()
    """Options that choose where the same task's data is from: no departure from a protocol."""
    dual: ClassVar[bool] = False
    num_classes: ClassVar[int]
    vocab_size: ClassVar[int]
    Config: ClassVar[type]

    def __init__(self, config: Any, *, data_dir: Path, cache_dir: Path) -> None:
        self.config = config
        self.data_dir = data_dir
        self.cache_dir = cache_dir

    @property
    @abc.abstractmethod
    def max_len(self) -> int:
        """The largest number of tokens of an example."""

    @property
    def chance(self) -> float:
        """Accuracy of a uniform guess, a fraction."""
        return 1 / self.num_classes

    @property
    def validation_is_test(self) -> bool:
        """Whether the test split stands in for the validation split; the record says so."""
        return False

    @abc.abstractmethod
    def build(self) -> Built:
        """Makes the splits from their source.

        Raises:
            ValueError: If the source is missing or broken: what, where, and what to type.
        """

    def source_files(self) -> dict[str, Path]:
        """Returns the files that splits are made from, by split, as far as they are there now.

        If they are no longer those that prepared data was made from, it is made again.
        """
        return {}

    def locate(self) -> None:  # noqa: B027
        """Looks for the source, whose content is not read; the hub is asked where it would be read.

        Raises:
            ValueError: If a build could not begin now: what was looked for, and what to type.
        """

    def origin(self) -> str:
        """Returns one line on what a build would read now, and on what else is there to read."""
        return "it is generated"

    @property
    def fingerprint(self) -> str:
        """Hash of all that determines the data; known without the data."""
        options = dataclasses.asdict(self.config)
        return short_hash({"task": self.name, "version": self.version, "options": options}, 12)

    @property
    def folder(self) -> Path:
        """Where the prepared splits are, or will be."""
        return self.cache_dir / f"{self.name}-v{self.version}-{self.fingerprint}"

    @property
    def parts(self) -> Path:
        """Where a build may leave finished work, for the next one to go on from."""
        return self.folder.with_name(self.folder.name + ".parts")

    def prepare(self, hashes: Hashes = "none") -> Prepared:
        """Opens the prepared splits, building them first where they are missing or damaged.

        Safe when several processes call it at once: one builds, the others wait for it. A build
        that dies leaves nothing that would be taken for data.

        Args:
            hashes: Where to look for damage in contents too, not only in sizes.

        Raises:
            ValueError: If the source is missing or broken, or the disk is full.
        """
        while True:
            self._ensure(hashes)
            with contextlib.suppress(FileNotFoundError):
                manifest = self.manifest()
                try:
                    splits = _open(self.folder)
                except Exception:  # whatever another package says of a damaged file
                    if hashes != "none":
                        raise
                    hashes = "splits"
                    continue
                if manifest == self.manifest():
                    return Prepared(splits, manifest)
            # Another process has just made them anew, from another source.

    def manifest(self) -> dict[str, Any]:
        """Returns what is written beside prepared splits, which must be there.

        Raises:
            ValueError: If it is damaged.
            OSError: If it cannot be read.
        """
        manifest = parsed((self.folder / "manifest.json").read_bytes())
        if not isinstance(manifest, dict):
            raise ValueError("it is no JSON object")
        check_known(_Manifest, manifest, "")
        files = manifest["files"]
        if files.keys() != {f"{name}.arrow" for name in SPLITS}:
            raise ValueError("it has other files than one for each split")
        if manifest["hash"] != _hash_of(files):
            raise ValueError("its hash is not that of its files")
        return manifest

    def _ensure(self, hashes: Hashes) -> None:
        """Builds the prepared splits unless they are there and whole."""
        state, reason = self.state(hashes)
        if state == "found":
            return
        lock = self.folder.with_suffix(".lock")
        with self._writing():
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            lock.touch()
        with locked(lock, wait=True):
            state, reason = self.state(hashes)
            if state == "damaged":
                print(f"Prepared {self.name} data is rebuilt: {reason}.", file=sys.stderr)
            if state != "found":
                self._build_folder()

    def state(self, hashes: Hashes = "none") -> tuple[Literal["found", "missing", "damaged"], str]:
        """Tells whether prepared splits are there and whole.

        Args:
            hashes: Whose contents are compared too, not only their sizes.

        Returns:
            The state, and the reason for it.
        """
        path = self.folder / "manifest.json"
        if not self.folder.exists():
            return "missing", f"no folder {self.folder}"
        try:
            manifest = self.manifest()
            expected = [
                (self.folder / f"{name}.arrow", manifest["files"][f"{name}.arrow"])
                for name in SPLITS
            ]
            known, sources = manifest["sources"], self.source_files()
            if known and sources and known.keys() != sources.keys():
                other = sorted(known.keys() ^ sources.keys())
                more = f" and {len(other) - 3:,} more" if len(other) > 3 else ""
                return "damaged", f"its source files have changed: {', '.join(other[:3])}{more}"
            # None are known of data that came from elsewhere than files.
            of_sources = [(file, known[name]) for name, file in sources.items() if known]
        except (OSError, ValueError):
            return "damaged", f"{path} cannot be read, or lacks something"
        compared = {"none": [], "splits": expected, "all": expected + of_sources}[hashes]
        for file, its in expected + of_sources:
            found = file.stat().st_size if file.is_file() else -1
            if found != its["bytes"]:
                return "damaged", f"{file} has {found} bytes, not {its['bytes']}"
            if (file, its) in compared and file_hash(file) != its["sha256"]:
                return "damaged", f"{file} has not the content that it had then"
        return "found", str(self.folder)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns a place that cannot be written to into one message."""
        try:
            yield
        except OSError as error:
            raise ValueError(
                f"Prepared {self.name} data cannot be written to {self.cache_dir}: "
                f"{error.strerror}. Make room there or set cache_dir=FOLDER."
            ) from error

    def _build_folder(self) -> None:
        """Builds beside the final folder and renames; the caller holds the lock."""
        with self._writing():
            for stale in self.cache_dir.glob(f"{self.folder.name}.tmp-*"):
                shutil.rmtree(stale)
            temporary = self.cache_dir / f"{self.folder.name}.tmp-{os.getpid()}"
            temporary.mkdir()
        try:
            built = self.build()
            for name in SPLITS:
                self._write(temporary / f"{name}.arrow", built.splits[name])
            manifest = self._manifest(built, temporary)
            with self._writing():
                write_text(temporary / "manifest.json", json.dumps(manifest, indent=1))
                # Not before: if a source cannot be read now, what was made of it stays.
                shutil.rmtree(self.folder, ignore_errors=True)
                os.replace(temporary, self.folder)
                shutil.rmtree(self.parts, ignore_errors=True)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _write(self, path: Path, pieces: Iterable[Split]) -> None:
        """Writes a split as an Arrow stream, one record batch a piece: columns tokens and label."""
        import pyarrow as pa

        writer = None
        with self._writing():
            file = path.open("wb")
        try:
            for piece in pieces:  # may read files; what they raise is not the cache's
                with self._writing():
                    batch = record_batch(piece)
                    writer = writer or pa.ipc.new_stream(file, batch.schema)
                    writer.write_batch(batch)
            assert writer is not None, f"{path.stem} has no pieces"
            with self._writing():
                writer.close()
                file.flush()
                os.fsync(file.fileno())
        finally:
            with self._writing():
                file.close()

    def _manifest(self, built: Built, folder: Path) -> dict[str, Any]:
        splits = _open(folder)
        files = {f"{name}.arrow": _size_and_hash(folder / f"{name}.arrow") for name in SPLITS}
        sizes = {
            name: {
                "examples": len(split),
                "tokens": int(split.lengths.sum()),
                "longest": int(split.lengths.max(initial=0)),
                "classes": np.bincount(split.labels, minlength=self.num_classes).tolist(),
            }
            for name, split in splits.items()
        }
        majority = int(np.argmax(sizes["train"]["classes"]))
        test_labels = splits["test"].labels
        return {
            "task": self.name,
            "version": self.version,
            "options": json.loads(canonical_json(dataclasses.asdict(self.config))),
            "splits": sizes,
            "baselines": {
                "majority class": float(np.mean(test_labels == majority)),
                **built.rules(splits),
            },
            "source": built.source,
            "files": files,
            "sources": {name: _size_and_hash(file) for name, file in self.source_files().items()},
            "hash": _hash_of(files),
        }


@dataclass(frozen=True)
class _File:
    """A file in a manifest."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class _Size:
    """A split's numbers in a manifest."""

    examples: int
    tokens: int
    longest: int
    classes: list[int]


@dataclass(frozen=True)
class _Manifest:
    """What a manifest must have."""

    splits: dict[str, _Size]
    baselines: dict[str, float]
    source: str
    files: dict[str, _File]
    sources: dict[str, _File]
    hash: str


def _hash_of(files: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the hash that names prepared data, from those of its files."""
    return short_hash({name: file["sha256"] for name, file in files.items()}, 16)


def _size_and_hash(file: Path) -> dict[str, Any]:
    """Returns what tells a file from others."""
    return {"bytes": file.stat().st_size, "sha256": file_hash(file)}


def _open(folder: Path) -> dict[str, Split]:
    """Opens the splits in a folder; their tokens are memory-mapped."""
    return {name: read_split(folder / f"{name}.arrow") for name in SPLITS}
