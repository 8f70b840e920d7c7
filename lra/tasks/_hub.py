"""Data sets of parquet files, in a local folder or on the Hugging Face hub, read by `datasets`.

Local files and those of the hub are streamed by the same call, one file after the other: nothing is
copied into another cache, and whatever is wrong is told with its file and row.
"""

import contextlib
import glob
import logging
import re
import shlex
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lra.tasks._splits import Examples

_SETS = ("train", "test")
_DEPTHS = ("*.parquet", "*/*.parquet", "*/*/*.parquet")  # below may be a hundred thousand texts
_TIMEOUT = 10  # seconds, when the hub is asked for a revision
_BATCH = 1_000  # rows
_SWITCHED_OFF = ("HF_UPDATE_DOWNLOAD_COUNTS", "TORCH_AVAILABLE")  # of datasets.config


@dataclass(frozen=True)
class DataSet:
    """A training and a test set, whose rows have a content and a label.

    Attributes:
        title: Its name in messages.
        folder: Where it is in ``data_dir``.
        hub_id: Its name on the hub.
        column: The column of contents; that of labels is ``label``.
        kind: What contents are: strings, or encoded images, as bytes or as a struct with bytes.
        num_classes: Labels are integers from 0 up to but not including this.
        instead: What else a task takes, for the message that there are no parquet files.
    """

    title: str
    folder: str
    hub_id: str
    column: str
    kind: Literal["text", "image"]
    num_classes: int
    instead: str = ""

    def local_files(self, data_dir: Path) -> dict[str, list[Path]]:
        """Returns the parquet files of each set in ``data_dir``, sorted; there may be none."""
        folder = data_dir / self.folder
        names = [
            path.relative_to(folder).as_posix()
            for depth in _DEPTHS
            for path in folder.glob(depth)
            if path.is_file()
        ]
        return {name: [folder / file for file in _of_set(name, names)] for name in _SETS}

    def source_files(self, data_dir: Path, revision: str | None) -> dict[str, Path]:
        """Returns by their names the local files that ``open`` takes with the same arguments."""
        if revision is not None:
            return {}
        paths = [path for files in self.local_files(data_dir).values() for path in files]
        return {path.relative_to(data_dir).as_posix(): path for path in paths}

    def origin(self, data_dir: Path, revision: str | None) -> str:
        """Returns one line on what ``open`` would take, without asking the hub."""
        if revision is not None:
            return f"{self.hub_id} on the hub at {revision}"
        if any(self.local_files(data_dir).values()):
            return f"parquet files in {data_dir / self.folder}"
        return (
            f"{data_dir / self.folder} has no parquet files, so {self.hub_id} on the hub is asked; "
            f"to have them there: {self._command(data_dir)}"
        )

    def open(self, data_dir: Path, revision: str | None) -> "Opened":
        """Finds the files of both sets; no content is read.

        Args:
            data_dir: Where ``folder`` is looked for.
            revision: Commit, tag or branch of the hub to read, whatever there is in ``data_dir``.
                None: what there is in ``data_dir``, or else the main branch of the hub.

        Raises:
            ValueError: If the data set is in neither place, or one of its sets is not.
        """
        local = self.local_files(data_dir)
        if revision is None and any(local.values()):
            where = str(data_dir / self.folder)
            source = f"local parquet files with the columns of {self.hub_id}"
            files = {name: [str(path) for path in paths] for name, paths in local.items()}
        else:
            commit, names = self._ask_hub(data_dir, revision)
            where = f"hf://datasets/{self.hub_id}@{commit}"
            source = f"{self.hub_id} at {commit}"
            files = {name: [f"{where}/{file}" for file in _of_set(name, names)] for name in _SETS}
        command = self._command(data_dir)
        if missing := [name for name in _SETS if not files[name]]:
            raise ValueError(
                f"{where} has no parquet file of the split {' and '.join(missing)}, such as "
                f"{missing[0]}-00000-of-00001.parquet. Get all files: {command}"
            )
        return Opened(self, files, source, command)

    def _ask_hub(self, data_dir: Path, revision: str | None) -> tuple[str, list[str]]:
        """Returns the commit of a revision, and the names of its files."""
        try:
            with _quiet():
                from huggingface_hub import HfApi

                info = HfApi().dataset_info(self.hub_id, revision=revision, timeout=_TIMEOUT)
        except Exception as error:  # of another package, of the network, of the hub
            failure = f"cannot be had: {reason_of(error)}. "
            if revision is None:
                message = (
                    f"{data_dir / self.folder} has no {self.title} data, that is parquet files of "
                    f"the splits {' and '.join(_SETS)} with the columns {self.column} and label"
                    f"{self.instead}; and {self.hub_id} on the hub {failure}Where the hub can be "
                    f"reached, run: {self._command(data_dir)}; or set data_dir=FOLDER to the "
                    f"folder that has {self.folder}/."
                )
            else:
                message = (
                    f"{self.hub_id} on the hub at task.revision={revision} {failure}Leave the "
                    f"revision out to read {data_dir / self.folder}; what fills it is: "
                    f"{self._command(data_dir)}"
                )
            raise ValueError(message) from error
        return str(info.sha), [file.rfilename for file in info.siblings or ()]

    def _command(self, data_dir: Path) -> str:
        """Returns what to type to get the files."""
        folder = shlex.quote(str(data_dir / self.folder))
        return f"hf download {self.hub_id} --repo-type dataset --local-dir {folder}"


@dataclass(frozen=True)
class Opened:
    """Files of a data set that are there.

    Attributes:
        data: The data set.
        files: Paths or addresses of the files of each set.
        source: One line on where they are from.
        command: What to type to get them again.
    """

    data: DataSet
    files: Mapping[str, list[str]]
    source: str
    command: str

    def read(
        self,
        name: str,
        convert: Callable[[bytes | None], bytes],
        progress: Callable[[int], object],
    ) -> Examples:
        """Reads a whole set.

        Args:
            name: ``train`` or ``test``.
            convert: Returns what to keep of a content, which is None where it is missing; raises
                ValueError with the reason if it cannot be used.
            progress: Called with numbers of rows done.

        Raises:
            ValueError: At the first file or row that is broken: file, split, row and reason.
        """
        contents, labels = [], []
        for file in self.files[name]:
            place = f"{file}, split {name}"
            for row, (content, label) in enumerate(self._rows(file, place)):
                try:
                    contents.append(convert(content))
                    labels.append(self._class(label))
                except ValueError as error:
                    raise self._broken(f"{place}, row {row}", str(error)) from None
                progress(1)
        return Examples.of(contents, labels)

    def _rows(self, file: str, place: str) -> Iterator[tuple[bytes | None, int | None]]:
        """Yields the contents and labels of a file; messages begin with ``place``."""
        try:
            with _quiet(), tempfile.TemporaryDirectory() as locks:
                from datasets import load_dataset

                stream = load_dataset(
                    "parquet",
                    data_files=[glob.escape(file)],
                    split="train",  # what `datasets` calls all files where none is named
                    streaming=True,
                    cache_dir=locks,
                ).with_format("arrow")
        except Exception as error:  # of other packages, about the file or the network
            raise self._broken(place, f"cannot be read: {reason_of(error)}") from error
        self._check_columns(place, stream.features)
        tables = stream.iter(batch_size=_BATCH)
        rows = 0
        while True:
            try:
                with _quiet():
                    table = next(tables, None)
            except Exception as error:
                reason = f"cannot be read: {reason_of(error)}"
                raise self._broken(f"{place}, row {rows} or later", reason) from error
            if table is None:
                return
            rows += len(table)
            contents, labels = table.column(self.data.column), table.column("label")
            yield from zip(_as_bytes(contents), labels.to_pylist(), strict=True)

    def _check_columns(self, place: str, features: Any) -> None:
        """Refuses a file without the columns of the data set, by names and types."""
        import pyarrow as pa

        types = {field.name: field.type for field in features.arrow_schema} if features else {}
        content, label = types.get(self.data.column), types.get("label")
        if self.data.kind == "text":
            needed = "strings"
            good = content is not None and (
                pa.types.is_string(content) or pa.types.is_large_string(content)
            )
        else:
            needed = "encoded images, binary or struct<bytes: binary>"
            inner = content
            if content is not None and pa.types.is_struct(content):
                fields = {field.name: field.type for field in content}
                inner = fields.get("bytes")
            good = inner is not None and (
                pa.types.is_binary(inner) or pa.types.is_large_binary(inner)
            )
        if not good or label is None or not pa.types.is_integer(label):
            there = ", ".join(f"{name} ({kind})" for name, kind in types.items()) or "none"
            reason = (
                f"the columns are {there}; there must be {self.data.column} ({needed}) and label "
                f"(integers)"
            )
            raise self._broken(place, reason)

    def _class(self, label: int | None) -> int:
        if label is None or not 0 <= label < self.data.num_classes:
            given = "missing" if label is None else label
            raise ValueError(
                f"the label is {given}, not an integer from 0 to {self.data.num_classes - 1}"
            )
        return label

    def _broken(self, place: str, reason: str) -> ValueError:
        return ValueError(f"{place}: {reason}. Get the files again: {self.command}")


def _of_set(name: str, files: Iterable[str]) -> list[str]:
    """Returns the parquet files of a set: its name begins that of the file or of a folder."""
    begins = re.compile(rf"(?:^|/){name}(?![A-Za-z])")
    return sorted(file for file in files if file.endswith(".parquet") and begins.search(file))


def _as_bytes(column: Any) -> list[bytes | None]:
    """Returns the values of an Arrow column of strings, of bytes, or of structs with bytes."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_struct(column.type):
        column = pc.struct_field(column, "bytes")
    return column.cast(pa.binary()).to_pylist()


def reason_of(error: Exception) -> str:
    """Returns what an error of another package says, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(". ")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps `datasets` and what it uses from printing, and from two things nobody asked for.

    They are a request over the network that counts every use, even of local files, and the import
    of torch, which takes two seconds.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            from datasets import config

            settings = {name: getattr(config, name) for name in _SWITCHED_OFF}
            try:
                for name in settings:
                    setattr(config, name, False)
                yield
            finally:
                for name, value in settings.items():
                    setattr(config, name, value)
    finally:
        logging.disable(disabled)
