"""The official ListOps files of the Long Range Arena release: where they are and what they hold.

Python's csv writer made them: a header, then one row an example, ``Source<TAB>Target``. A source is
the expression as a binary tree, ``( ( ( [MAX 2 ) 9 ) ] )`` for ``[MAX 2 9 ]``; a target its value.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from reprlib import repr as excerpt

import numpy as np
from tqdm import tqdm

from lra.tasks._listops import encode, evaluate
from lra.tasks._official import first_with_any
from lra.tasks.base import SPLITS, Split

FILES = {name: f"basic_{name}.tsv" for name in SPLITS}

_FOLDERS = (
    "listops",
    "listops-1000",
    "lra_release/listops-1000",
    "lra_release/lra_release/listops-1000",  # where the archive's own folders put them
)
_HEADER = "Source\tTarget"


def find_files(data_dir: Path) -> dict[str, Path]:
    """Returns the file of each split, all from the first folder that has any of them.

    Raises:
        ValueError: If no folder has any, or that folder not all: what was looked for, and where.
    """
    folders = [data_dir / folder for folder in _FOLDERS]
    paths, missing = first_with_any(folders, FILES)
    if missing:
        raise ValueError(
            f"{paths['train'].parent} has some of the official ListOps files, but no "
            f"{' and no '.join(missing)}. Put all three there, from lra_release, or set "
            f"data_dir=FOLDER."
        )
    if paths:
        return paths
    raise ValueError(
        f"The official ListOps files, {', '.join(FILES.values())}, are in none of the folders "
        f"{', '.join(map(str, folders))}. Unpack the Long Range Arena release (lra_release) in "
        f"{data_dir}, or set data_dir=FOLDER to where it is unpacked."
    )


def read_files(paths: Mapping[str, Path], max_tokens: int) -> dict[str, Split]:
    """Reads and checks every row of the files.

    A label that is not the value of its expression is kept, as it was released; one line on
    standard error tells how many there are.

    Args:
        paths: The file of each split.
        max_tokens: A row with more tokens, parentheses not counted, is refused.

    Returns:
        The splits by name: tokens without parentheses, uint8, and labels as released.

    Raises:
        ValueError: At the first row that is broken: file, line and reason.
    """
    splits, differing, first = {}, 0, ""
    total = sum(path.stat().st_size for path in paths.values())
    with tqdm(total=total, desc="ListOps files", unit="B", unit_scale=True) as bar:
        for name, path in paths.items():
            split, values = _read_file(path, max_tokens, bar.update)
            wrong = np.flatnonzero(split.labels != values)
            if wrong.size and not differing:
                row = wrong[0]
                first = f"{path}, line {row + 2}: given {split.labels[row]}, computed {values[row]}"
            differing += wrong.size
            splits[name] = split
    if differing:
        print(
            f"ListOps labels that are not the value of their expression are kept as released: "
            f"{differing:,} of {sum(map(len, splits.values())):,}; the first is {first}.",
            file=sys.stderr,
        )
    return splits


def _read_file(
    path: Path, max_tokens: int, progress: Callable[[int], object]
) -> tuple[Split, np.ndarray]:
    """Returns what a file holds, and the values of its expressions, uint8 of shape (examples,)."""
    tokens, labels, values, lengths = bytearray(), bytearray(), bytearray(), [0]
    number = start = 0  # the line's number, from 1, and its first byte
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                text = line.removesuffix(b"\n").removesuffix(b"\r").decode()
                if number > 1:
                    row, label = _read_row(text, max_tokens)
                    tokens += row.data
                    lengths.append(len(row))
                    labels.append(label)
                    values.append(evaluate(row))
                elif text != _HEADER:
                    raise ValueError(f"the header is {excerpt(text)}, not {_HEADER!r}")
                start += len(line)
                progress(len(line))
        if not labels:
            number += 1
            missing = "row" if start else f"header {_HEADER!r}"
            raise ValueError(f"the file ends here, without any {missing}")
    except ValueError as error:
        reason = str(error)
        if isinstance(error, UnicodeDecodeError):
            reason = f"byte {start + error.start} of the file is not UTF-8"
        raise ValueError(
            f"{path}, line {number}: {reason}. Unpack the file from lra_release again."
        ) from None
    arrays = [np.frombuffer(column, dtype=np.uint8) for column in (tokens, labels, values)]
    return Split.of(arrays[0], np.cumsum(lengths, dtype=np.int64), arrays[1]), arrays[2]


def _read_row(text: str, max_tokens: int) -> tuple[np.ndarray, int]:
    """Returns the tokens, uint8 of shape (length,), and the label of one row."""
    if not text:
        raise ValueError("the row is empty")
    source, *rest = text.split("\t")
    if not rest:
        raise ValueError(f"the row has no tab and no label, only {excerpt(text)}: it is cut short")
    if len(rest) > 1:
        raise ValueError(f"the row has {len(rest) + 1} columns, not 2: Source and Target")
    [label] = rest
    if len(label) != 1 or label not in "0123456789":
        raise ValueError(f"the label is {excerpt(label)}, not an integer from 0 to 9")
    tokens = encode(source)
    if len(tokens) > max_tokens:
        raise ValueError(f"the row has {len(tokens):,} tokens; at most {max_tokens:,} are allowed")
    _check_parentheses(source)
    return tokens, int(label)


def _check_parentheses(source: str) -> None:
    characters = np.frombuffer(source.encode(), dtype=np.uint8)
    steps = (characters == ord("(")).astype(np.int8) - (characters == ord(")"))
    depth = np.cumsum(steps, dtype=np.int64)
    if depth.min() < 0:
        raise ValueError(f"the parenthesis ) at character {np.argmax(depth < 0)} closes nothing")
    if depth[-1]:
        raise ValueError(f"the row ends with {depth[-1]} parentheses ( open")
