"""What the sections of a record must hold for status, tables and figures to be made of it.

Other keys may stand beside these: a record tells more than its readers ask for.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import TYPE_CHECKING, Any

from lra.typed import check_known, from_mapping

if TYPE_CHECKING:
    from lra.record import Record

SMALLEST, LARGEST = 1e-18, 2**63
"""Beyond what any number but 0 of a record can be."""

_LOSSES = {"loss", "train_loss"}
"""Numbers that may be infinite, and so small as they like."""

_SHARES = {"accuracy", "low", "high"}
"""Numbers of at most 1."""

_OF_ANY_SIGN = ("config", "modified", "attention")
"""Sections of options."""


@dataclass
class _Split:
    examples: int
    tokens: int
    longest: int


@dataclass
class _Task:
    name: str
    version: int
    fingerprint: str
    chance: float
    validation_is_test: bool = False
    data_hash: str = ""
    source: str = ""
    splits: dict[str, _Split] = field(default_factory=dict)
    baselines: dict[str, float] = field(default_factory=dict)


@dataclass
class _Attention:
    name: str
    options: dict[str, Any]
    non_default: dict[str, Any]


@dataclass
class _Train:
    steps: int = 0
    batch_size: int = 0
    lr: float = 0.0
    best_from: int = 0
    tested: str = ""


@dataclass
class _Named:
    name: str


@dataclass
class _Config:
    task: _Named | None = None
    attention: _Named | None = None
    train: _Train = field(default_factory=_Train)


@dataclass
class _Precision:
    name: str


@dataclass
class _Device:
    kind: str
    name: str
    threads: int
    runs_at_once: int = 1


@dataclass
class _Versions:
    torch: str


@dataclass
class _Commit:
    commit: str
    dirty: bool | None


@dataclass
class _Trial:
    lr: float
    status: str
    reason: str = ""


@dataclass
class _Tuning:
    name: str
    grid: list[float]
    trials: list[_Trial]
    chosen: float | None


SECTIONS = {
    "task": _Task,
    "attention": _Attention,
    "config": _Config,
    "precision": _Precision,
    "device": _Device,
    "versions": _Versions,
    "commit": _Commit,
    "tuning": _Tuning,
}


def check(loaded: "Record") -> None:
    """Refuses a record that lacks what its readers ask for, or has it in another form.

    Raises:
        ValueError: One message with every problem.
    """
    problems = []
    for name, form in SECTIONS.items():
        section = getattr(loaded, name)
        if section is not None:  # tuning, of a run that is not tuned
            try:
                check_known(form, section, name)
            except ValueError as error:
                problems += str(error).splitlines()
    _refuse(problems)
    pairs = {k: v for k, v in loaded.modified.items() if isinstance(v, list) and len(v) == 2}
    problems += [
        f"modified.{key} must be [the protocol's value, the run's]"
        for key in sorted(loaded.modified.keys() - pairs)
    ]
    if not all(type(steps) is int for steps in pairs.get("train.steps", ())):
        problems.append("modified.train.steps must be two integers")
    told = {key: value for key, value in vars(loaded).items() if key not in _OF_ANY_SIGN}
    told["config.train.steps"] = loaded.config.get("train", {}).get("steps")
    _refuse(problems + _odd("", told))


def check_section(form: type, values: Mapping[str, Any], where: str) -> None:
    """Refuses values that have not the fields of a dataclass, or numbers that can be none.

    Raises:
        ValueError: One message with every problem.
    """
    try:
        from_mapping(form, values, where)
    except ValueError as error:
        _refuse(str(error).splitlines())
    _refuse(_odd(where, values))


def _refuse(problems: list[str]) -> None:
    """Raises them in one line, as tables of runs have no room for more."""
    if problems:
        raise ValueError("; ".join(problem.rstrip(".") for problem in problems))


def _odd(where: str, values: Any) -> list[str]:
    return [
        f"{key} is {value!r:.30}, which is no such number"
        for key, value in _numbers(where, values)
        if not is_number(value) or (value > 1 and key.rpartition(".")[2] in _SHARES)
    ]


def is_number(value: float) -> bool:
    """Whether a number can be one of times, counts, speeds or shares."""
    return value == 0 or SMALLEST < value < LARGEST


def _numbers(where: str, value: Any) -> Iterator[tuple[str, float]]:
    """Yields every number in a value, but losses, with the keys that lead to it."""
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in _LOSSES:
                continue
            yield from _numbers(f"{where}.{key}".lstrip("."), inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(where, inner)
    elif isinstance(value, int | float):
        yield where, value
