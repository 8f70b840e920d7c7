"""`lra compare`: a paired bootstrap of two settings on the same test examples."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lra.report.leaderboard import Board, Row
from lra.report.store import Run, predictions, read
from lra.report.table import Table, signed
from lra.typed import unknown

SAMPLES = 10_000


@dataclass(frozen=True)
class Comparison:
    """How much more accurate B is than A, in percentage points.

    Attributes:
        task: Name of the task, or of their average.
        n: Test examples.
        seeds: Seeds of A and of B.
        a: Accuracy of A, per cent, mean over seeds.
        b: Accuracy of B.
        low: Lower end of the 95 % interval of b - a.
        high: Upper end.
        p: Two-sided p-value of no difference.
    """

    task: str
    n: int
    seeds: tuple[int, int]
    a: float
    b: float
    low: float
    high: float
    p: float


def compare(a: str, b: str, runs: Sequence[Path], protocol: str | None = None) -> int:
    """Compares two settings task by task and over all tasks, and prints the result.

    Args:
        a: A row's name, as the leaderboard tells it, or a folder of runs of one setting.
        b: The other one.
        runs: Folders of runs to find rows in.
        protocol: Compare in this protocol; None for each that has both.

    Returns:
        0.

    Raises:
        ValueError: If there is no such row, or no task that both have finished on the same data.
    """
    boards = {side: _boards(name, runs, protocol) for side, name in (("a", a), ("b", b))}
    shared = [key for key in boards["a"] if key in boards["b"]]
    if not shared:
        raise ValueError(
            f"{a} and {b} have no finished runs of one protocol on the same test examples: "
            f"nothing can be paired."
        )
    for name in dict.fromkeys(key[0] for key in shared):
        tasks = [key for key in shared if key[0] == name]
        pairs = [(key[1], boards["a"][key], boards["b"][key]) for key in tasks]
        print(_table(f"protocol {name}: B = {b} against A = {a}", bootstrap(pairs)).markdown())
        print()
    print(
        f"B − A in percentage points: 95 % interval and two-sided p-value of {SAMPLES:,} paired "
        f"bootstrap samples\nof the test examples, and of the seeds where both have several. With "
        f"one seed, the interval tells\nof these trained models and not of training again."
    )
    return 0


def bootstrap(pairs: Sequence[tuple[str, list[Run], list[Run]]]) -> list[Comparison]:
    """Returns the comparison of each task, and of their mean where there are several.

    Examples are drawn with replacement, the same for A and B; seeds of A and of B are drawn with
    replacement on their own, where both sides have more than one (Efron & Tibshirani 1993,
    chapters 13 and 16). The p-value is that of the differences about their mean. Samples of
    examples are drawn as counts of the distinct patterns of right and wrong answers, which is the
    same draw and cheap.

    Args:
        pairs: Task, finished runs of A and finished runs of B.

    Raises:
        ValueError: If predictions are missing, or of other examples.
    """
    found, differences = [], []
    for task, runs_a, runs_b in pairs:
        right = [_right(runs) for runs in (runs_a, runs_b)]
        if right[0].shape[1] != right[1].shape[1]:
            raise ValueError(f"{runs_a[0].folder} and {runs_b[0].folder} have other test examples.")
        seeds = len(right[0]), len(right[1])
        n = right[0].shape[1]
        rng = np.random.default_rng(0)
        patterns, counts = np.unique(np.concatenate(right), axis=1, return_counts=True)
        # (samples, seeds of A and B): the accuracy of every model on every sample of examples.
        sampled = rng.multinomial(n, counts / n, size=SAMPLES) @ patterns.T / n
        means = []
        for part in (sampled[:, : seeds[0]], sampled[:, seeds[0] :]):
            if min(seeds) > 1:
                drawn = rng.integers(part.shape[1], size=part.shape)
                part = np.take_along_axis(part, drawn, axis=1)
            means.append(part.mean(1))
        a, b = (100 * float(r.mean()) for r in right)
        difference = 100 * (means[1] - means[0])
        differences.append(difference)
        found.append(Comparison(task, n, seeds, a, b, *_interval(difference, b - a)))
    if len(found) > 1:
        a, b = (float(np.mean([getattr(c, side) for c in found])) for side in "ab")
        overall = np.mean(differences, axis=0)
        seeds = min(c.seeds[0] for c in found), min(c.seeds[1] for c in found)
        n = sum(c.n for c in found)
        title = f"average of {len(found)}"
        found.append(Comparison(title, n, seeds, a, b, *_interval(overall, b - a)))
    return found


def _interval(samples: np.ndarray, observed: float) -> tuple[float, float, float]:
    """Returns the ends of the 95 % percentile interval, and the p-value."""
    low, high = np.percentile(samples, [2.5, 97.5])
    # Rounding must not decide whether an equal difference counts.
    beyond = np.abs(samples - observed) >= abs(observed) - 1e-9
    return float(low), float(high), float((1 + beyond.sum()) / (1 + len(samples)))


def _right(runs: Sequence[Run]) -> np.ndarray:
    """Returns which examples each run answered right, (runs, n)."""
    answers = []
    for run in runs:
        predicted, labels = predictions(run.folder)
        answers.append(predicted == labels)
    if len({len(right) for right in answers}) > 1:
        raise ValueError(f"{runs[0].folder} and its other seeds have other test examples.")
    return np.stack(answers)


def _boards(
    name: str, runs: Sequence[Path], protocol: str | None
) -> dict[tuple[str, str, int, str], list[Run]]:
    """Returns the finished runs of a row by protocol, task, version and data."""
    folder = Path(name)
    found = read([folder] if folder.is_dir() else runs)
    names: set[str] = set()
    rows: dict[tuple[str, str, int, str], list[Row]] = {}
    for one in sorted({run.record.protocol for run in found}):
        if protocol not in (None, one):
            continue
        board = Board([run for run in found if run.record.protocol == one])
        for table in board.tables:
            for row in table.rows:
                names.add(row.label)
                if row.seeds and (folder.is_dir() or row.label == name):
                    key = (one, table.task, table.version, table.data)
                    rows.setdefault(key, []).append(row)
    if not rows:
        if not folder.is_dir() and name not in names:
            raise ValueError(unknown("row", name, names))
        raise ValueError(f"{name} has no finished run in {', '.join(map(str, runs))}.")
    for key, several in rows.items():
        if len(several) > 1:
            told = ", ".join(f"{row.label} ({row.conditions})" for row in several)
            raise ValueError(f"{name} is more than one setting on {key[1]}: {told}. Name a folder.")
    return {
        key: [run for run in row.runs if run.record.status == "ok"] for key, [row] in rows.items()
    }


def _table(heading: str, comparisons: Sequence[Comparison]) -> Table:
    headers = ["task", "n", "seeds A, B", "A %", "B %", "B − A", "95 % interval", "p"]
    rows = [
        [
            c.task,
            f"{c.n:,}",
            f"{c.seeds[0]}, {c.seeds[1]}",
            f"{c.a:.2f}",
            f"{c.b:.2f}",
            signed(c.b - c.a),
            f"{signed(c.low)} to {signed(c.high)}",
            f"{c.p:.4f}" if c.p > 1e-4 else "< 0.0002",
        ]
        for c in comparisons
    ]
    return Table(heading, headers, rows)
