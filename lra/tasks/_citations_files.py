"""A folder of documents with citation links: where its two files are and what they hold.

``papers.parquet`` has the columns ``id`` and ``text``; ``citations.tsv`` has a header and a row a
link, ``citing<TAB>cited``, of these ids.
"""

from pathlib import Path
from reprlib import repr as excerpt
from typing import Any

import numpy as np

from lra.tasks._official import first_with_any
from lra.tasks._pairs import check_text

FILES = {"papers": "papers.parquet", "citations": "citations.tsv"}

_FOLDERS = ("aan", "citations")
_HEADER = "citing\tcited"
_BATCH = 512  # documents, whose whole texts are in memory at once


def find_files(data_dir: Path) -> dict[str, Path]:
    """Returns both files, from the first folder that has any of them.

    Raises:
        ValueError: If no folder has any, or that folder not both: what was looked for, and where.
    """
    content = (
        f"{FILES['papers']} (columns id and text) and {FILES['citations']} (a header, "
        f"citing<TAB>cited, and a row of two ids for each link)"
    )
    folders = [data_dir / folder for folder in _FOLDERS]
    paths, missing = first_with_any(folders, FILES)
    if missing:
        raise ValueError(
            f"{paths['papers'].parent} should contain {content}, but there is no {missing[0]}. "
            f"Put it there, or set data_dir=FOLDER."
        )
    if paths:
        return paths
    raise ValueError(
        f"Documents with citation links are in neither of the folders "
        f"{' and '.join(map(str, folders))}, which should contain {content}. Put the two files "
        f"there, or set data_dir=FOLDER."
    )


def read_papers(path: Path, max_length: int) -> dict[str, bytes]:
    """Returns the first ``max_length`` bytes of each document by its id, in the order of the ids.

    Raises:
        ValueError: If this is no whole Parquet file with these columns, or a document has no text
            or not an id of its own: file, index of the document and reason.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts: dict[str, bytes] = {}
    try:
        with pq.ParquetFile(path) as file:
            _check_columns(file.schema_arrow)
            for batch in file.iter_batches(_BATCH, columns=["id", "text"]):
                ids = batch["id"].to_pylist()
                contents = batch["text"].cast(pa.large_binary()).to_pylist()
                for key, content in zip(ids, contents, strict=True):
                    try:
                        _check_paper(key, content, texts)
                    except ValueError as error:
                        raise ValueError(
                            f"the document of index {len(texts)}, id {excerpt(key)}: {error}"
                        ) from None
                    texts[key] = content[:max_length]
            if not texts:
                raise ValueError("there is no document")
    except (ValueError, OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"{path}: {reason}. Mend the file or get it again.") from error
    return dict(sorted(texts.items()))


def _check_columns(schema: Any) -> None:
    import pyarrow as pa

    for name in ("id", "text"):
        if name not in schema.names:
            there = ", ".join(map(repr, schema.names)) or "none"
            raise ValueError(f"there is no column {name!r}; the columns are {there}")
        if schema.names.count(name) > 1:
            raise ValueError(f"there is more than one column {name!r}")
        kind = schema.field(name).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise ValueError(f"the column {name!r} is of type {kind}, not string")


def _check_paper(key: str | None, content: bytes | None, texts: dict[str, bytes]) -> None:
    if not key:
        raise ValueError("a document without id")
    if key in texts:
        raise ValueError("another document before it has the same id")
    check_text(content if content and content.strip() else b"")


def read_links(path: Path, ids: dict[str, int]) -> np.ndarray:
    """Returns the links of a file, each once, without those of a document to itself.

    Args:
        path: The file.
        ids: Index of each document by its id.

    Returns:
        Rows (citing, cited) of indices, sorted, int64 of shape (links, 2).

    Raises:
        ValueError: At the first line that is broken or names an unknown document: file, line and
            reason; or where no link is left.
    """
    links = set()
    number = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                text = line.removesuffix(b"\n").removesuffix(b"\r").decode()
                if number > 1:
                    links.add(_read_link(text, ids))
                elif text != _HEADER:
                    raise ValueError(f"the header is {excerpt(text)}, not {_HEADER!r}")
        if not any(citing != cited for citing, cited in links):
            missing = f"any header {_HEADER!r}" if not number else "any link"
            missing += " but of a document to itself" * bool(links)
            number += 1
            raise ValueError(f"the file ends here, without {missing}")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise ValueError(
            f"{path}, line {number}: {reason}. Mend the file or get it again."
        ) from None
    kept = sorted((citing, cited) for citing, cited in links if citing != cited)
    return np.array(kept, dtype=np.int64)


def _read_link(text: str, ids: dict[str, int]) -> tuple[int, int]:
    if not text:
        raise ValueError("the row is empty")
    row = text.split("\t")
    if len(row) != 2:
        raise ValueError(f"the row has {len(row)} columns, not 2: citing and cited")
    for side, key in zip(("citing", "cited"), row, strict=True):
        if key not in ids:
            raise ValueError(f"no document has the id of the {side} side, {excerpt(key)}")
    return ids[row[0]], ids[row[1]]
