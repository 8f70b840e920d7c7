"""The task contract: what a task declares, and how its prepared splits are stored and found."""

import abc
import contextlib
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from lra.files import canonical_json, file_hash, locked, short_hash, write_text

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Split:
    """Ragged token sequences with labels.

    Attributes:
        tokens: Token ids of all sequences one after the other, (total,) unsigned.
        offsets: Sequence i is ``tokens[offsets[i]:offsets[i + 1]]``, (examples + 1,) int64.
        labels: Class of each example, (examples,) uint8.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each example."""
        return np.diff(self.offsets)

    def take(self, first: int, last: int) -> "Split":
        """Returns examples ``first`` up to but not including ``last``."""
        start, stop = self.offsets[first], self.offsets[last]
        return Split(
            self.tokens[start:stop], self.offsets[first : last + 1] - start, self.labels[first:last]
        )


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

    @abc.abstractmethod
    def build(self) -> dict[str, Split]:
        """Makes the splits from their source.

        Raises:
            ValueError: If the source is missing or broken: what, where, and what to type.
        """

    @abc.abstractmethod
    def baselines(self, splits: Mapping[str, Split]) -> dict[str, float]:
        """Returns test accuracies (fractions) of rules that learn nothing, by name."""

    def source_files(self) -> dict[str, Path]:
        """Returns the files that splits are made from, by split, as far as they are there now.

        If they are no longer those that prepared data was made from, it is made again.
        """
        return {}

    @property
    def fingerprint(self) -> str:
        """Hash of all that determines the data; known without the data."""
        options = dataclasses.asdict(self.config)
        return short_hash({"task": self.name, "version": self.version, "options": options}, 12)

    @property
    def folder(self) -> Path:
        """Where the prepared splits are, or will be."""
        return self.cache_dir / f"{self.name}-v{self.version}-{self.fingerprint}"

    def prepare(self, hashes: bool = False) -> Prepared:
        """Opens the prepared splits, building them first where they are missing or damaged.

        Safe when several processes call it at once: one builds, the others wait for it. A build
        that dies leaves nothing that would be taken for data.

        Args:
            hashes: Look for damage in contents too, not only in sizes.

        Raises:
            ValueError: If the source is missing or broken, or the disk is full.
        """
        state, reason = self.state(hashes)
        if state != "found":
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
        manifest = json.loads((self.folder / "manifest.json").read_text())
        splits = {name: _read(self.folder / f"{name}.arrow") for name in SPLITS}
        return Prepared(splits, manifest)

    def state(self, hashes: bool = False) -> tuple[Literal["found", "missing", "damaged"], str]:
        """Tells whether prepared splits are there and whole.

        Args:
            hashes: Compare contents too, not only sizes.

        Returns:
            The state, and the reason for it.
        """
        path = self.folder / "manifest.json"
        if not self.folder.exists():
            return "missing", f"no folder {self.folder}"
        try:
            manifest = json.loads(path.read_text())
            expected = [
                (self.folder / f"{name}.arrow", manifest["files"][f"{name}.arrow"])
                for name in SPLITS
            ]
            sources = self.source_files().items()
            expected += [(file, manifest["sources"][name]) for name, file in sources]
            expected = [(file, known["bytes"], known["sha256"]) for file, known in expected]
        except (OSError, ValueError, KeyError, TypeError):
            return "damaged", f"{path} cannot be read"
        for file, size, sha256 in expected:
            found = file.stat().st_size if file.is_file() else -1
            if found != size:
                return "damaged", f"{file} has {found} bytes, not {size}"
            if hashes and file_hash(file) != sha256:
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
            shutil.rmtree(self.folder, ignore_errors=True)
            temporary = self.cache_dir / f"{self.folder.name}.tmp-{os.getpid()}"
            temporary.mkdir()
        try:
            splits = self.build()
            baselines = self.baselines(splits)
            with self._writing():
                for name in SPLITS:
                    _write(temporary / f"{name}.arrow", splits[name])
                manifest = self._manifest(splits, baselines, temporary)
                write_text(temporary / "manifest.json", json.dumps(manifest, indent=1))
                os.replace(temporary, self.folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _manifest(
        self, splits: Mapping[str, Split], baselines: Mapping[str, float], folder: Path
    ) -> dict[str, Any]:
        files = {f"{name}.arrow": _size_and_hash(folder / f"{name}.arrow") for name in SPLITS}
        sizes = {
            name: {
                "examples": len(split),
                "tokens": len(split.tokens),
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
                **baselines,
            },
            "files": files,
            "sources": {name: _size_and_hash(file) for name, file in self.source_files().items()},
            "hash": short_hash({name: file["sha256"] for name, file in files.items()}, 16),
        }


def _size_and_hash(file: Path) -> dict[str, Any]:
    """Returns what tells a file from others."""
    return {"bytes": file.stat().st_size, "sha256": file_hash(file)}


def _write(path: Path, split: Split) -> None:
    """Writes a split as one Arrow record batch with the columns tokens and label."""
    import pyarrow as pa

    tokens = pa.LargeListArray.from_arrays(pa.array(split.offsets), pa.array(split.tokens))
    batch = pa.record_batch({"tokens": tokens, "label": pa.array(split.labels)})
    with path.open("wb") as file:
        with pa.ipc.new_stream(file, batch.schema) as writer:
            writer.write_batch(batch)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> Split:
    """Opens a split as memory-mapped arrays."""
    import pyarrow as pa

    batch = pa.ipc.open_stream(pa.memory_map(str(path))).read_next_batch()
    tokens = batch.column("tokens")
    return Split(
        tokens.values.to_numpy(zero_copy_only=True),
        tokens.offsets.to_numpy(zero_copy_only=True),
        batch.column("label").to_numpy(zero_copy_only=True),
    )
