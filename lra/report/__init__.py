"""Records to tables and figures: `lra report` rebuilds them from the run folders' small files.

Imports neither torch nor hydra, and gives the same bytes for the same files.
"""

from collections.abc import Sequence
from pathlib import Path

from lra.files import write_text
from lra.report import pages
from lra.report.leaderboard import Board
from lra.report.store import read


def write(runs: Sequence[Path], out: Path) -> list[Path]:
    """Writes the leaderboard and the figures of every protocol, and prints the leaderboards.

    Tables of what `lra bench` has left in ``out`` are written again, and from both the page of the
    seed papers' claims.

    Args:
        runs: Folders of runs, one's own and others'; every ``record.json`` below them is read.
        out: The folder to write to: ``leaderboard-<protocol>.{md,csv,tex}``,
            ``curves-<protocol>.png``, ``seeds-<protocol>.png`` and ``tradeoff-<protocol>.png``,
            ``leaderboard.html`` of all protocols and ``claims.md``.

    Returns:
        The CSV files.

    Raises:
        ValueError: If there is no such folder, or no record to report.
    """
    found = read(runs)
    if not found:
        raise ValueError(
            f"There is no record below {', '.join(map(str, runs))}: train first (lra train), or "
            f"name the folders of your runs with --runs."
        )
    # matplotlib, which lra compare does not need
    from lra.report import claims, efficiency, figures, html

    names = sorted({run.record.protocol for run in found})
    boards = [Board([run for run in found if run.record.protocol == name]) for name in names]
    tables = []
    for board in boards:
        path = out / f"leaderboard-{board.protocol}"
        markdown = pages.markdown(board)
        write_text(path.with_suffix(".md"), markdown)
        tables.append(path.with_suffix(".csv"))
        write_text(tables[-1], pages.csv(board))
        write_text(path.with_suffix(".tex"), pages.tex(board))
        drawn = figures.write(board, out)
        print(f"{markdown}\nwritten to {path}.md, .csv and .tex; {', '.join(map(str, drawn))}")
    write_text(out / "leaderboard.html", html.page(boards))
    print(f"all of it to look into: {out / 'leaderboard.html'}")
    stores = sorted(out.glob("efficiency-*.jsonl"))
    for path in stores:
        efficiency.write(path)
    claims.write(boards, stores, out)
    return tables
