"""Files of a release: the folder that has them, and what is said of it."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path


def first_with_any(
    folders: Iterable[Path], files: Mapping[str, str]
) -> tuple[dict[str, Path], list[str]]:
    """Looks for files that belong together.

    Args:
        folders: Where to look, in this order.
        files: Their names, by what they are.

    Returns:
        The paths of all of them in the first folder that has any, and the names of those that it
        lacks; both empty if there is no such folder.
    """
    for folder in folders:
        paths = {key: folder / name for key, name in files.items()}
        missing = [path.name for path in paths.values() if not path.is_file()]
        if len(missing) < len(paths):
            return paths, missing
    return {}, []


def origin(source: str, find: Callable[[], Path]) -> str:
    """Returns one line on what a task with ``source=generated`` or ``official`` would read.

    Args:
        source: The option.
        find: Returns the folder of the official files; raises ValueError if there is none.
    """
    generated = "it is generated"
    try:
        folder = find()
    except ValueError as error:
        return generated if source == "generated" else str(error)
    if source == "official":
        return f"official files in {folder}"
    return f"{generated}; task.source=official reads the official files in {folder}"
