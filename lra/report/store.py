"""Records of folders of runs, and which of them can be believed."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lra import record
from lra.record import Record


@dataclass(frozen=True)
class Run:
    """A record and the folder it is in."""

    record: Record
    folder: Path


def read(folders: Iterable[Path]) -> list[Run]:
    """Returns the runs below ``folders``, by protocol, task, attention, identity and seed.

    Trials of a tuning are left out: what they led to is told by the tuned run. A file that is no
    record, or one that contradicts itself or its predictions, is named on standard error and left
    out. Of several records of one run, as copies of a folder have, the
    latest counts.
    """
    found: dict[tuple[str, str, str, str, int], Run] = {}
    for path in _records(folders):
        try:
            loaded = record.load(path.parent)
            if loaded is None:
                continue
            check(loaded, path.parent)
        except ValueError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        if loaded.trial_of is not None:
            continue
        key = (
            loaded.protocol,
            str(loaded.task["name"]),
            str(loaded.attention["name"]),
            loaded.hash,
            loaded.seed,
        )
        if key not in found or found[key].record.started < loaded.started:
            found[key] = Run(loaded, path.parent)
    return [found[key] for key in sorted(found)]


def check(loaded: Record, folder: Path) -> None:
    """Refuses a record that is not what a run wrote.

    Raises:
        ValueError: It names the file, and what contradicts what.
    """
    path = folder / "record.json"
    tested = loaded.test is not None or loaded.trial_of is not None
    if loaded.status == "ok" and not (tested and loaded.validation is not None):
        raise ValueError(f"{path} is of a finished run and has no score: was it edited?")
    loaded.check_identity(path)
    if loaded.test is not None and "majority class" not in loaded.task.get("baselines", {}):
        raise ValueError(f"{path} is of a tested run and has no majority class: was it edited?")
    if loaded.test is not None and (folder / "test_predictions.npy").is_file():
        predicted, labels = predictions(folder)
        right = float((predicted == labels).mean()) if len(labels) else 0.0
        if len(labels) != loaded.test.n or abs(right - loaded.test.accuracy) > 1e-9:
            raise ValueError(
                f"{path} tells a test accuracy of {loaded.test.accuracy:.2%} of {loaded.test.n:,}, "
                f"but test_predictions.npy has {right:.2%} of {len(labels):,}: was it edited?"
            )


def predictions(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns a run's predicted classes and the labels, (n,) each.

    Raises:
        ValueError: If there are none, or the file is damaged.
    """
    path = folder / "test_predictions.npy"
    try:
        with path.open("rb") as file:
            pair = np.load(file, allow_pickle=False)
        if not isinstance(pair, np.ndarray) or pair.ndim != 2 or len(pair) != 2:
            raise ValueError("it is no array of shape (2, n)")
        if pair.dtype != np.uint8:
            raise ValueError(f"it is of {pair.dtype}, not of bytes")
    except Exception as error:  # a damaged header can raise anything
        told = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
        raise ValueError(f"{path} cannot be read: {told}.") from None
    return pair[0], pair[1]


def _records(folders: Iterable[Path]) -> Iterator[Path]:
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(
                f"There is no folder {folder}: train first (lra train), or name the folders of "
                f"your runs with --runs."
            )
        yield from sorted(folder.rglob("record.json"))
