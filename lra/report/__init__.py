"""Records to tables: `lra report` rebuilds every table from the run folders' small files alone.

Imports neither torch nor hydra, and gives the same bytes for the same records.
"""

import sys
from pathlib import Path

from lra import record
from lra.files import write_text
from lra.record import Record
from lra.report.leaderboard import Leaderboard


def write(runs: Path, out: Path) -> int:
    """Writes ``leaderboard-<protocol>.md`` and ``.csv`` for every protocol, and prints them.

    Args:
        runs: The folder of runs; every ``record.json`` below it is read.
        out: The folder to write to.

    Returns:
        0.

    Raises:
        ValueError: If there is no record to report.
    """
    records = read(runs)
    if not records:
        raise ValueError(
            f"There is no record below {runs}: train first (lra train), or name the "
            f"folder of your runs with --runs."
        )
    for protocol in sorted({r.protocol for r in records}):
        board = Leaderboard([r for r in records if r.protocol == protocol])
        path = out / f"leaderboard-{protocol}"
        markdown = board.markdown()
        write_text(path.with_suffix(".md"), markdown)
        write_text(path.with_suffix(".csv"), board.csv())
        print(f"{markdown}\nwritten to {path}.md and {path}.csv")
    return 0


def read(runs: Path) -> list[Record]:
    """Returns the records below ``runs`` in the order of their folders.

    A file that is no record is named on standard error and left out. Of several records of the
    same run, as copies of a folder have, the latest counts.
    """
    found: dict[tuple[str, str, int], Record] = {}
    for path in sorted(runs.rglob("record.json")):
        try:
            loaded = record.load(path.parent)
        except ValueError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        if loaded is None:
            continue
        run = (loaded.protocol, loaded.hash, loaded.seed)
        if run not in found or found[run].started < loaded.started:
            found[run] = loaded
    return list(found.values())
