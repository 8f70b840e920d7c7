"""Text for the terminal and for records."""

import os
from collections.abc import Iterable, Sequence


def aligned(rows: Iterable[Sequence[str]]) -> str:
    """Returns rows of equally many cells as lines with aligned columns."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def shareable(text: str) -> str:
    """Returns ``text`` with the user's home folder, which has the user's name in it, as ``~``."""
    home = os.path.expanduser("~")  # as it is where nobody knows a home
    return text.replace(home, "~") if len(home) > 1 else text
