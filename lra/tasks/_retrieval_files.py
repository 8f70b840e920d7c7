"""The document pairs of the Long Range Arena release: where its files are and what they hold.

A row is label, id of the first document, id of the second, first text, second text, with tabs
between. There is no header, and quote characters are characters like any other.
"""

import contextlib
import io
import logging
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from reprlib import repr as excerpt
from typing import Any, BinaryIO

from tqdm import tqdm

from lra.tasks._hub import reason_of
from lra.tasks._official import first_with_any
from lra.tasks._pairs import check_text

FILES = {
    "train": "new_aan_pairs.train.tsv",
    "val": "new_aan_pairs.eval.tsv",
    "test": "new_aan_pairs.test.tsv",
}
RELEASED_ROWS = {"train": 147_086, "val": 18_090, "test": 17_437}
"""Rows of the released files, as the Nyströmformer and S4 code bases state them."""

HUB_ID = "OpenNLPLab/lra"
HUB_REVISION = "6cb133c44f406da743661488df9e977b87d98775"

_FOLDERS = (
    "aan",
    "lra_release/tsv_data",
    "lra_release/lra_release/tsv_data",  # where the archive's own folders put them
    "tsv_data",
    "data/aan",  # where a download from the hub puts them
)
_COLUMNS = "label, id1, id2, text1, text2"
_LABELS = {b"0": 0, b"1": 1, b"0.0": 0, b"1.0": 1}
_MAX_LINE = 64 << 20
_LOCAL_BUFFER = 1 << 20
_HUB_BUFFER = 16 << 20  # bytes a request


@dataclass(frozen=True)
class PairFile:
    """A file of pairs, on disk or on the hub.

    Attributes:
        name: How messages call it.
        size: Its bytes.
        open: Opens it for buffered reading.
        advice: What to do where it cannot be read.
    """

    name: str
    size: int
    open: Callable[[], AbstractContextManager[BinaryIO]]
    advice: str


def how_to_get(data_dir: Path) -> str:
    """Returns what to type to have the files in a folder where they are found."""
    return (
        f"This gets the files (11 GB): hf download {HUB_ID} --repo-type dataset --revision "
        f"{HUB_REVISION} --include 'data/aan/*' --local-dir {shlex.quote(str(data_dir))}"
    )


def find_files(data_dir: Path) -> dict[str, Path]:
    """Returns the file of each split, all from the first folder that has any; or none.

    Raises:
        ValueError: If that folder has not all of them: which are missing.
    """
    paths, missing = first_with_any(_folders(data_dir), FILES)
    if missing:
        raise ValueError(
            f"{paths['train'].parent} has some of the Retrieval files, but no "
            f"{' and no '.join(missing)}. Put all three there, or set data_dir=FOLDER. "
            f"{how_to_get(data_dir)}"
        )
    return paths


def _folders(data_dir: Path) -> list[Path]:
    return [data_dir / folder for folder in _FOLDERS]


def local_files(paths: dict[str, Path]) -> dict[str, PairFile]:
    """Returns files on disk, by split."""
    return {
        name: PairFile(
            name=str(path),
            size=path.stat().st_size,
            open=partial(path.open, "rb", _LOCAL_BUFFER),
            advice="Get the file again.",
        )
        for name, path in paths.items()
    }


def hub_files(revision: str | None, data_dir: Path) -> tuple[dict[str, PairFile], str]:
    """Returns the hub's files, by split, and the commit they are of; their contents are not read.

    Args:
        revision: Commit, branch or tag; None for the known commit, where no files are on disk.
        data_dir: Where files were or could be looked for, for the message.

    Raises:
        ValueError: If the hub cannot be reached or has them not: what was tried, why it failed, and
            what to type.
    """
    from huggingface_hub import HfApi, HfFileSystem

    commit = revision or HUB_REVISION
    try:
        with _quiet():
            if not re.fullmatch("[0-9a-f]{40}", commit):
                commit = HfApi().dataset_info(HUB_ID, revision=commit, timeout=10).sha
            system = HfFileSystem()
            paths = {
                name: f"datasets/{HUB_ID}@{commit}/data/aan/{file}" for name, file in FILES.items()
            }
            files = {
                name: PairFile(
                    name=path,
                    size=system.info(path)["size"],
                    open=partial(_open_hub, system, path),
                    advice=f"Try again, or have the files on disk. {how_to_get(data_dir)}",
                )
                for name, path in paths.items()
            }
    except Exception as error:  # whatever the network's libraries raise
        failure = (
            f"the hub data set {HUB_ID} at revision {commit} cannot be read: {reason_of(error)}."
        )
        if revision is not None:
            raise ValueError(
                f"{failure[0].upper()}{failure[1:]} Check the connection and task.revision, or "
                f"leave task.revision out for files in data_dir={data_dir}. {how_to_get(data_dir)}"
            ) from error
        raise ValueError(
            f"The Retrieval files, {', '.join(FILES.values())}, are in none of the folders "
            f"{', '.join(map(str, _folders(data_dir)))}, and {failure} Unpack the Long Range Arena "
            f"release (lra_release) in {data_dir}, or set data_dir=FOLDER to where it is unpacked. "
            f"{how_to_get(data_dir)}"
        ) from error
    return files, commit


@contextlib.contextmanager
def _open_hub(system: Any, path: str) -> Iterator[BinaryIO]:
    """Opens a file on the hub; a full buffer is one request, which the library tries repeatedly."""
    with _quiet(), system.open(path, "rb", cache_type="none") as blocks:
        yield io.BufferedReader(blocks, _HUB_BUFFER)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the hub's library from telling of every attempt."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def read_pairs(
    split: str, file: PairFile, max_length: int, limit: int | None
) -> Iterator[tuple[bytes, bytes, int]]:
    """Reads rows one by one, in the file's order; no more than a row is in memory.

    Where a file is read to its end and has not as many rows as the released one, one line on
    standard error tells it: a download may be cut short.

    Args:
        split: Whose file it is.
        file: The file.
        max_length: Bytes kept of each text; those behind are not looked at.
        limit: Number of rows, the first ones; None for all.

    Yields:
        Both texts, at least one byte and at most ``max_length`` each, and the label.

    Raises:
        ValueError: At the first row that is broken: file, line and reason.
    """
    number = 0
    unit, total = ("B", file.size) if limit is None else (" rows", limit)
    with (
        contextlib.closing(_lines(file)) as lines,
        tqdm(total=total, desc=f"Retrieval {split}", unit=unit, unit_scale=True) as bar,
    ):
        for number, line in enumerate(lines, start=1):
            try:
                row = _read_row(line, max_length)
            except ValueError as error:
                raise _broken(file, number, str(error)) from None
            bar.update(len(line) if limit is None else 1)
            yield row
            if number == limit:
                return
    if not number:
        raise _broken(file, 1, "the file ends here, without any row")
    if limit is not None:
        raise ValueError(
            f"{file.name} has {number:,} rows, fewer than task.num_{split}={limit}. Set it lower, "
            f"or to null for all."
        )
    if number != (released := RELEASED_ROWS[split]):
        print(
            f"{file.name} is not the released file: it has {number:,} rows, not {released:,}.",
            file=sys.stderr,
        )


def _broken(file: PairFile, line: int, reason: str) -> ValueError:
    return ValueError(f"{file.name}, line {line}: {reason}. {file.advice}")


def _lines(file: PairFile) -> Iterator[bytes]:
    """Yields the lines of a file; one that is too long is cut, so that it never is in memory."""
    done = 0
    try:
        with file.open() as opened:
            while line := opened.readline(_MAX_LINE + 1):
                done += len(line)
                yield line
    except Exception as error:  # whatever the network's libraries raise
        raise ValueError(
            f"{file.name} cannot be read after {done:,} of {file.size:,} bytes: "
            f"{reason_of(error)}. {file.advice}"
        ) from error
    if done != file.size:
        raise ValueError(
            f"{file.name} ends after {done:,} of {file.size:,} bytes: the connection was cut, or "
            f"the file was changed meanwhile. {file.advice}"
        )


def _read_row(line: bytes, max_length: int) -> tuple[bytes, bytes, int]:
    """Returns the two texts, cut, and the label of one row."""
    if len(line) > _MAX_LINE:
        raise ValueError(f"the row does not end within {_MAX_LINE >> 20} MB")
    end = len(line) - (2 if line.endswith(b"\r\n") else line.endswith(b"\n"))
    if not end:
        raise ValueError("the row is empty")
    if (columns := line.count(b"\t") + 1) != 5:
        cut = "" if line.endswith(b"\n") else ": the file is cut short"
        raise ValueError(f"the row has {columns:,} columns, not 5 ({_COLUMNS}){cut}")
    # Tabs are looked for in place: to split the row would copy texts of which little is kept.
    tabs = [-1]
    for _ in range(4):
        tabs.append(line.find(b"\t", tabs[-1] + 1))
    label = line[: tabs[1]]
    if label not in _LABELS:
        shown = excerpt(label.decode(errors="backslashreplace"))
        raise ValueError(f"the label is {shown}, not one of 0, 1, 0.0, 1.0")
    first = line[tabs[3] + 1 : min(tabs[4], tabs[3] + 1 + max_length)]
    second = line[tabs[4] + 1 : min(end, tabs[4] + 1 + max_length)]
    for column, text in (("text1", first), ("text2", second)):
        try:
            check_text(text)
        except ValueError as error:
            raise ValueError(f"{column}: {error}") from None
    return first, second, _LABELS[label]
