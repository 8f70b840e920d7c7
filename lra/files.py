"""Files that are whole or not there: atomic writes, locks and content hashes."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

DEEPEST = 50
"""Levels of nested lists and objects in JSON."""


class Busy(ValueError):
    """Another process holds the lock."""


def write_atomically(
    path: Path, write: Callable[[BinaryIO], object], previous: Path | None = None
) -> None:
    """Writes ``path`` so that it is the old file or the new one, whenever the process dies.

    Args:
        path: The file.
        write: Called with the open file.
        previous: Where the old file goes; a process that dies in between leaves it there alone.

    Raises:
        OSError: If the disk is full or the folder is not writable; ``path`` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            path.replace(previous)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if disk_is_full(error):  # told by the system without a name, or by torch in its own words
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def disk_is_full(error: BaseException | None) -> bool:
    """Tells whether a full disk, or a quota that is used up, is behind an error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def full_disk(error: OSError) -> str:
    """Returns what to say of a full disk."""
    return (
        f"the disk is full: {error.filename or error}. Nothing that was written is lost: make "
        f"space and give the same command again."
    )


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` to ``path`` atomically; bytes of no text, as names have some, as escapes."""
    write_atomically(path, lambda file: file.write(text.encode(errors="backslashreplace")))


@contextlib.contextmanager
def locked(path: Path, wait: bool) -> Iterator[None]:
    """Holds an exclusive lock on ``path``; the system releases it however the process ends.

    Raises:
        Busy: If ``wait`` is false and another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        # `is_locked` of another process holds a lock for a moment; it is not to keep us out.
        for again in (True, True, True, False):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                break
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                if not again:
                    raise Busy(f"{path} is locked by another process.") from None
                time.sleep(0.02)
        yield


def is_locked(path: Path) -> bool:
    """Tells whether a process holds the lock on ``path``; writes nothing.

    A process on another machine may hold it all the same, where a shared folder keeps no locks.
    """
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EAGAIN, errno.EACCES) and path.exists()
    return False


def parsed(text: str | bytes) -> Any:
    """Returns what JSON of a damaged or foreign file says.

    Raises:
        ValueError: If it is no JSON or no Unicode, or nested more deeply than all that is written
            here.
    """
    try:
        value = json.loads(text if isinstance(text, str) else text.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"its byte {error.start} is not UTF-8") from None
    except RecursionError:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep") from None
    level = [value]
    for _ in range(DEEPEST):
        inside = [v.values() if isinstance(v, dict) else v for v in level if _holds_others(v)]
        level = [inner for values in inside for inner in values]
        if not level:
            break
    else:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("it has half a surrogate pair, which is no character") from None
    return value


def _holds_others(value: Any) -> bool:
    return isinstance(value, dict | list)


def user_path(setting: str) -> Path:
    """Returns a path, with the home folder that a ``~`` at its begin stands for.

    Raises:
        ValueError: If there is no such home folder.
    """
    try:
        return Path(setting).expanduser()
    except RuntimeError:
        raise ValueError(f"{setting} begins with the home folder of nobody here.") from None


def canonical_json(value: Any) -> str:
    """Returns JSON that is equal for equal values: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def short_hash(value: Any, digits: int = 8) -> str:
    """Returns the first hexadecimal digits of the SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:digits]


def file_hash(path: Path) -> str:
    """Returns the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
