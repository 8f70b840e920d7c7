"""How a claim of a paper is judged by records and cells: differences, growth and multiples.

Each kind of claim finds where it is measured best, computes its figure with a 95 % interval, and is
judged by `RULES` alone. `lra.report.claims` has them.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from lra.cells import Measured
from lra.report.compare import bootstrap
from lra.report.leaderboard import NOT_LEARNED, Board, Row
from lra.report.panels import Panel
from lra.report.published_speed import published_ratio
from lra.report.scaling import exponent_interval
from lra.report.store import Run
from lra.report.table import CROSS, DASH, signed

HELD, REFUTED, OPEN, MISSING = "held", "did not hold", "not decided", "not measured"

TOLERANCE = 0.1
"""Exponents above what is claimed by no more count as equal: 7 % more for twice the length."""

VERDICTS = (HELD, REFUTED, OPEN, MISSING)

RULES = (
    "- **Verdicts.** A claim has *held* if the whole 95 % interval is on the side that is claimed: "
    "above 0 for differences of accuracy, above 1 for multiples of softmax's speed, below 1 for "
    f"those of its memory, and for growth as N^p below p + {TOLERANCE:g} (7 % more for twice the "
    "length). It *did not hold* if the whole interval is on the other side, and is *not decided* "
    "if the interval has both. It is *not measured* as long as runs of one of its tasks are "
    "missing; a figure is then that of the tasks that are there.",
    "- **Accuracy** is that of the claimed setting minus that of the other in percentage points, "
    "mean over tasks; the interval is of paired bootstrap samples of test examples, and of seeds "
    "where both have several. A task that neither has learned counts, with a difference that is "
    "noise; where there is no run of Retrieval, Citations takes its place. The protocol is the one "
    "with most of the tasks, and of equals that nearest to the papers' (google, skyformer, "
    "nystrom). `quick` has inputs of at most 256 tokens and about a minute of training: its "
    "verdicts are of that, and tell little of long inputs and of longer training.",
    "- **Speed, memory, growth.** Times are medians of steps, with an interval of their standard "
    "errors by quartiles; of generation, of its last steps. Memory is measured once and has no "
    "interval; whole batches come first. Growth is fitted by least squares of logarithms, with "
    "Student's t. GPUs come before CPUs, then the widest range of lengths, then the largest batch. "
    f"Softmax is torch's fused kernel, which needs memory N; the papers' needs N². {CROSS}: out of "
    "memory.",
)

ARENA = ("listops", "text", "retrieval", "image", "pathfinder")
TEXTS = ("listops", "text", "retrieval")
STAND_INS = {"retrieval": "citations"}
"""What is taken where there is no run of a task."""

PROTOCOLS = ("google", "skyformer", "nystrom")
"""The papers' own first; of protocols with equally many tasks the first is taken."""

SEEDS = "0,1,2"


@dataclass(frozen=True)
class Evidence:
    """All that claims are judged by: the boards of all protocols, and the panels of all cells."""

    boards: Sequence[Board]
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Finding:
    """What is known of a claim.

    Attributes:
        verdict: One of the four.
        ours: Our figure.
        interval: Its 95 % interval.
        place: What it was measured on.
        commands: What measures what is missing.
    """

    verdict: str = MISSING
    ours: str = DASH
    interval: str = DASH
    place: str = DASH
    commands: tuple[str, ...] = ()


@dataclass(frozen=True)
class Accuracy:
    """A setting is more accurate than others, on average over tasks.

    Attributes:
        text: The claim.
        source: Table of the paper.
        paper: The paper's figure.
        better: The row of the setting.
        others: Those of the others; it must beat the best of them.
        tasks: The tasks.
    """

    text: str
    source: str
    paper: str
    better: str
    others: tuple[str, ...]
    tasks: tuple[str, ...] = ARENA

    def judged(self, evidence: Evidence) -> Finding:
        """Returns the paired difference to the best of the others, where most tasks are."""
        labels = (self.better, *self.others)
        places = [
            _Place(board, device, self.tasks)
            for board in evidence.boards
            for device in sorted(
                {row.device for i in board.averaged for row in board.tables[i].rows}
            )
        ]
        place = max(places, key=lambda place: place.preference(labels))
        commands = tuple(place.commands(labels))
        names = place.complete(labels)
        if not names:
            return Finding(commands=commands)
        rows = {label: [place.row(label, name) for name in names] for label in labels}
        other = max(self.others, key=lambda label: mean(row.accuracy for row in rows[label]))
        pairs = list(zip(names, rows[other], rows[self.better], strict=True))
        found = bootstrap([(name, _tested(a), _tested(b)) for name, a, b in pairs])[-1]
        unlearned = [n for n, a, b in pairs if NOT_LEARNED in a.marks and NOT_LEARNED in b.marks]
        told = [f"{place.board.protocol}: {', '.join(names)}"]
        if unlearned:
            told.append(f"not learned: {', '.join(unlearned)}")
        if len(self.others) > 1:
            told.append(f"the best other is {other}")
        told += [f"seeds {found.seeds[1]} and {found.seeds[0]}", ", ".join(place.device)]
        return Finding(
            MISSING if commands else _verdict(found.low, found.high, 0.0),
            signed(found.b - found.a),
            f"{signed(found.low)} to {signed(found.high)}",
            "; ".join(told),
            commands,
        )


@dataclass(frozen=True)
class Growth:
    """A figure grows no faster than a power of the length.

    Attributes:
        text: The claim.
        source: Where the paper makes it.
        row: Name of the row of cells.
        quantity: ``train seconds`` and ``train memory`` by length; ``decode seconds`` (of a token)
            and ``decode state`` by position.
        power: The power claimed.
    """

    text: str
    source: str
    row: str
    quantity: str
    power: int

    @property
    def paper(self) -> str:
        """The growth that is claimed."""
        return {0: "constant", 1: "N"}[self.power]

    def judged(self, evidence: Evidence) -> Finding:
        """Returns the fitted exponent of the widest range of lengths."""
        known = []
        for panel in evidence.panels:
            values = _by_length(panel, self.row, self.quantity)
            if len(values) > 2:
                widest = _first(panel, self.quantity), max(values) / min(values), len(values)
                known.append((widest, panel, values))
        if not known:
            command = "lra bench attention=softmax,{} mode=train lengths=1024,4096,16384 batch=2"
            if self.quantity.startswith("decode"):
                command = "lra bench attention=softmax,{} mode=decode"
            return Finding(commands=(command.format(self.row),))
        _, panel, values = max(known, key=lambda candidate: candidate[0])
        slope, low, high = exponent_interval(values)
        return Finding(
            _verdict(-high, -low, -(self.power + TOLERANCE)),
            f"N^{_plain(slope)}",
            f"{_plain(low)} to {_plain(high)}",
            f"{_told(panel)}; N = {min(values):,} to {max(values):,}",
        )


@dataclass(frozen=True)
class Multiple:
    """A figure is better than that of softmax at one length.

    Attributes:
        text: The claim.
        printed: Paper and table, as `published_speed.csv` has them.
        row: Name of the row of cells.
        quantity: As `published_speed.csv` calls it.
        length: The length.
        softmax: Row of what it is compared with.
    """

    text: str
    printed: str
    row: str
    quantity: str
    length: int
    softmax: str = "softmax"

    @property
    def source(self) -> str:
        """Table or figure of the paper."""
        return self.printed.rpartition(", ")[2]

    @property
    def paper(self) -> str:
        """The paper's multiple of softmax."""
        return published_ratio(self.printed, self.quantity, self.row, self.length)

    def judged(self, evidence: Evidence) -> Finding:
        """Returns the multiple of softmax at the length, in the largest batch."""
        mode = self.quantity.partition(" ")[0]
        known = []
        for panel in evidence.panels:
            pair = [panel.rows.get(name, {}).get(self.length) for name in (self.row, self.softmax)]
            if panel.mode == mode and all(m and _tells(m, self.quantity) for m in pair):
                largest = _first(panel, self.quantity), panel.conditions.batch
                known.append((largest, panel, pair))
        if not known:
            lengths = f"lengths={self.length}"
            return Finding(
                commands=(f"lra bench attention=softmax,{self.row} mode={mode} {lengths}",)
            )
        _, panel, (ours, base) = max(known, key=lambda candidate: candidate[0])
        place = f"{_told(panel)}; N = {self.length:,}"
        if ours.figures is None or base.figures is None:
            verdict = HELD if ours.figures else REFUTED if base.figures else OPEN
            told = " and ".join(m.cell.name for m in (ours, base) if m.figures is None)
            return Finding(verdict, f"{CROSS} {told}", DASH, place)
        if self.quantity.endswith("GB"):
            ratio = ours.figures.peak_bytes / base.figures.peak_bytes
            return Finding(_verdict(-ratio, -ratio, -1.0), f"× {ratio:.2f}", DASH, place)
        ratio = _speed(ours) / _speed(base)
        error = math.hypot(_relative_error(ours), _relative_error(base))
        low, high = ratio * math.exp(-1.96 * error), ratio * math.exp(1.96 * error)
        return Finding(
            _verdict(low, high, 1.0), f"× {ratio:.2f}", f"{low:.2f} to {high:.2f}", place
        )


Claim = Accuracy | Growth | Multiple


def _verdict(low: float, high: float, limit: float) -> str:
    """Returns what an interval says of the claim that the figure is above the limit."""
    return HELD if low > limit else REFUTED if high < limit else OPEN


@dataclass(frozen=True)
class _Place:
    """Runs of one protocol, kind of device and precision, on tasks."""

    board: Board
    device: tuple[str, str]
    tasks: tuple[str, ...]

    def preference(self, labels: Sequence[str]) -> tuple[int, int, int, tuple[str, str]]:
        """Returns what is larger for the place to be judged by."""
        protocol = self.board.protocol
        order = PROTOCOLS.index(protocol) if protocol in PROTOCOLS else len(PROTOCOLS)
        known = sum(self.row(label, name) is not None for label in labels for name in self.names())
        return len(self.complete(labels)), known, -order, self.device

    def names(self) -> list[str]:
        """Returns the tasks, each by the name that it has here."""
        there = self._tables()
        other = {task: name for task, name in STAND_INS.items() if name in there}
        return [task if task in there else other.get(task, task) for task in self.tasks]

    def complete(self, labels: Sequence[str]) -> list[str]:
        """Returns the tasks that all rows have finished."""
        return [n for n in self.names() if all(self.row(label, n) is not None for label in labels)]

    def row(self, label: str, name: str) -> Row | None:
        """Returns a row with finished runs whose predictions are there."""
        there = self._tables()
        rows = there.get(name, [])
        found = [
            row for row in rows if (row.label, row.device) == (label, self.device) and _tested(row)
        ]
        return max(found, key=lambda row: row.first.started, default=None)

    def commands(self, labels: Iterable[str]) -> Iterator[str]:
        """Yields what trains the runs that are missing, attentions with equal options at once."""
        groups: dict[tuple[str, str], list[str]] = {}
        known = any(self.row(label, name) for label in labels for name in self.names())
        protocol = self.board.protocol if known else "quick"
        for label in labels:
            attention, *options = label.split(" ")
            tasks = ",".join(name for name in self.names() if self.row(label, name) is None)
            told = "".join(f" attention.{option}" for option in options)
            if tasks:
                groups.setdefault((tasks, told), []).append(attention)
        for (tasks, told), attentions in groups.items():
            named = f"attention={','.join(attentions)}{told}"
            yield f"lra train -m protocol={protocol} task={tasks} {named} seed={SEEDS}"

    def _tables(self) -> Mapping[str, list[Row]]:
        tables = [self.board.tables[i] for i in self.board.averaged]
        return {table.task: table.rows for table in tables}


def _tested(row: Row) -> list[Run]:
    """Returns the finished runs of a row whose predictions are there."""
    return [
        run
        for run in row.runs
        if run.record.status == "ok" and (run.folder / "test_predictions.npy").is_file()
    ]


def _by_length(panel: Panel, name: str, quantity: str) -> dict[int, float]:
    """Returns a row's figures by length, or by position of its longest generation."""
    mode, _, what = quantity.partition(" ")
    if panel.mode != mode:
        return {}
    row = {n: m.figures for n, m in sorted(panel.rows.get(name, {}).items()) if m.figures}
    if mode == "decode":
        if not row or (made := row[max(row)].decoding) is None:
            return {}
        values = made.seconds if what == "seconds" else made.state_bytes
        return {n: float(v) for n, v in zip(made.positions, values, strict=True) if v}
    if what == "seconds":
        return {n: figures.step.median for n, figures in row.items()}
    return {n: float(figures.peak_bytes) for n, figures in row.items() if figures.peak_bytes}


def _tells(m: Measured, quantity: str) -> bool:
    """Returns whether a cell has the quantity, or told that memory ran out."""
    if m.figures is None:
        return m.status == "oom"
    return bool(m.figures.peak_bytes) or not quantity.endswith("GB")


def _speed(m: Measured) -> float:
    """Returns steps per second, or tokens per second of a whole generation."""
    assert m.figures
    made = m.figures.decoding
    return made.tokens_per_second[-1] if made else 1 / m.figures.step.median


def _relative_error(m: Measured) -> float:
    """Returns the standard error of the median step, from its quartiles, over the median.

    The quartiles of a normal distribution are 1.349 standard deviations apart, and the standard
    error of its median is sqrt(pi / 2 n) of them.
    """
    assert m.figures
    step = m.figures.step
    deviation = (step.high - step.low) / 1.349
    return deviation * math.sqrt(math.pi / (2 * step.repetitions)) / step.median


def _first(panel: Panel, quantity: str) -> tuple[bool, bool]:
    """Returns what is larger for panels that come first, whatever their sizes."""
    whole = quantity.endswith(("memory", "GB")) and panel.conditions.micro_batches == 1
    return panel.conditions.device["kind"] != "cpu", whole


def _plain(value: float) -> str:
    """Returns two places; what rounds to 0 has no sign."""
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "−")


def _told(panel: Panel) -> str:
    given = panel.conditions
    size = f"{given.model['layers']} × {given.model['dim']}"
    device = f"{given.device['name']}, {given.device['threads']} threads"
    return f"{device}, {given.precision}; batch {given.batch}, {size}"
