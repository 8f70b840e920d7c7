"""Cells of `lra bench`: what was measured of one attention at one length, kept a line a cell."""

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lra.files import parsed, short_hash
from lra.typed import check_known, from_mapping, require

Mode = Literal["train", "infer", "decode"]
Status = Literal["ok", "oom", "timeout", "failed"]

SMALLEST, LARGEST = 1e-30, 1e30
"""Beyond what any figure but 0 can be."""


def _positive(*numbers: float) -> bool:
    return all(SMALLEST < n < (2**63 if isinstance(n, int) else LARGEST) for n in numbers)


def _numbers(*numbers: float) -> bool:
    return all(number == 0 or _positive(number) for number in numbers)


@dataclass(frozen=True)
class _Model:
    """What tables ask for of the model around the attention."""

    layers: int
    dim: int
    heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    dropout: float
    attention_dropout: float


@dataclass(frozen=True)
class _Device:
    """What tables ask for of a device."""

    kind: str
    name: str
    threads: int


@dataclass(frozen=True)
class Conditions:
    """What cells must share to be compared.

    Attributes:
        batch: Sequences of a step.
        filled: Whether all have the full length.
        micro_batches: Pieces a batch is run in, or auto.
        model: The model around the attention, but its length.
        precision: ``fp32`` or ``bf16``.
        device: Kind (cpu, cuda), name and threads.
        torch: Version of torch.
    """

    batch: int
    filled: bool
    micro_batches: int | Literal["auto"]
    model: dict[str, Any]
    precision: Literal["fp32", "bf16"]
    device: dict[str, Any]
    torch: str

    def __post_init__(self) -> None:
        check_known(_Model, self.model, "model")
        check_known(_Device, self.device, "device")
        counts = (self.batch, self.device["threads"])
        require({"batch and threads must be numbers of something": _positive(*counts)})


@dataclass(frozen=True)
class Cell:
    """What is measured.

    Attributes:
        attention: Registered name.
        options: Its options that are not default.
        mode: ``train``: a training step; ``infer``: a forward pass; ``decode``: generation.
        length: Positions of a sequence, and of the model; the tokens generated.
        conditions: All else that the figures depend on.
    """

    attention: str
    options: dict[str, Any]
    mode: Mode
    length: int
    conditions: Conditions

    def __post_init__(self) -> None:
        require({"length must be at least 1": _positive(self.length)})

    @property
    def key(self) -> str:
        """The same for equal cells only."""
        return short_hash(dataclasses.asdict(self), 12)

    @property
    def name(self) -> str:
        """The attention with its options, as a table's row is called."""
        return self.attention + "".join(f" {key}={value}" for key, value in self.options.items())


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements, in seconds."""

    median: float
    low: float
    high: float
    repetitions: int

    def __post_init__(self) -> None:
        times = (self.median, self.low, self.high)
        told = "times must be positive and finite, and so must repetitions"
        require({told: _positive(*times, self.repetitions)})


@dataclass(frozen=True)
class Decoding:
    """Generation by position.

    Attributes:
        positions: Numbers of tokens generated.
        seconds: Median time of a step to each position, a token of each sequence.
        tokens_per_second: Tokens of all sequences, from the start to each position.
        state_bytes: Memory of the recurrent state there, all layers and sequences.
    """

    positions: list[int]
    seconds: list[float]
    tokens_per_second: list[float]
    state_bytes: list[int]

    def __post_init__(self) -> None:
        lists = (self.positions, self.seconds, self.tokens_per_second, self.state_bytes)
        require(
            {
                "its lists must be of one length, and not empty": 0
                < min(map(len, lists))
                == max(map(len, lists)),
                "positions, times and speeds must be positive and finite": _positive(
                    *self.positions, *self.seconds, *self.tokens_per_second
                ),
                "state_bytes must be finite and not negative": _numbers(*self.state_bytes),
            }
        )

    @property
    def variation(self) -> float:
        """The slowest of the positions' times over the fastest, minus 1."""
        return max(self.seconds) / min(self.seconds) - 1


@dataclass(frozen=True)
class Figures:
    """What one process measured.

    Attributes:
        step: Time of a step; in generation, of the last tokens.
        peak_bytes: Peak memory above what was held before the model was built.
        memory_kind: What the peak counts, or why there is none.
        parameters: Trainable parameters.
        flops: Floating point operations of a step, by the declared costs.
        bytes: Bytes that a step must move at least.
        decoding: Generation by position.
    """

    step: Spread
    peak_bytes: int | None
    memory_kind: str
    parameters: int
    flops: float
    bytes: float
    decoding: Decoding | None = None

    def __post_init__(self) -> None:
        counts = (self.peak_bytes or 0, self.parameters, self.flops, self.bytes)
        require({"numbers must be finite and not negative": _numbers(*counts)})


@dataclass(frozen=True)
class Measured:
    """A cell and how it ended.

    Attributes:
        cell: What was measured.
        status: ``oom`` and ``timeout`` are results: beyond the limit of memory or time.
        reason: Why, where the status is not ``ok``.
        memory_gb: The limit of the process's memory, GB; None where the device sets it.
        seconds: The limit of the process's time.
        date: When it ended, UTC, ISO 8601.
        command: The command line.
        figures: What was measured; None unless the status is ``ok``.
    """

    cell: Cell
    status: Status
    reason: str
    memory_gb: float | None
    seconds: float
    date: str
    command: str
    figures: Figures | None = None

    def __post_init__(self) -> None:
        decoded = self.figures is not None and self.figures.decoding is not None
        require(
            {
                "a cell has figures if it is ok, and only then": (self.figures is not None)
                == (self.status == "ok"),
                "generation by position is of mode=decode alone": decoded
                == (self.figures is not None and self.cell.mode == "decode"),
            }
        )

    def holds(self, memory_gb: float | None, seconds: float) -> bool:
        """Whether measuring again under other limits would tell nothing new."""
        if self.status == "ok":
            return True
        if self.status == "timeout":
            return seconds <= self.seconds
        if self.status == "oom":
            return self.memory_gb == memory_gb or (
                None not in (self.memory_gb, memory_gb) and memory_gb <= self.memory_gb
            )
        return False


@dataclass(frozen=True)
class Ceilings:
    """What a machine can do at best.

    Attributes:
        precision: ``fp32`` or ``bf16``.
        device: Kind, name and threads.
        torch: Version of torch.
        flops_per_second: Of a large matrix product.
        bytes_per_second: Read and written by a large copy.
        date: When it was measured, UTC, ISO 8601.
    """

    precision: str
    device: dict[str, Any]
    torch: str
    flops_per_second: float
    bytes_per_second: float
    date: str

    def __post_init__(self) -> None:
        speeds = (self.flops_per_second, self.bytes_per_second)
        require({"speeds must be positive and finite": _positive(*speeds)})


@dataclass(frozen=True)
class Store:
    """The lines of a file of cells, the latest of each cell.

    Attributes:
        cells: By key.
        ceilings: In the order they were measured.
    """

    cells: dict[str, Measured] = field(default_factory=dict)
    ceilings: list[Ceilings] = field(default_factory=list)


def load(path: Path) -> Store:
    """Reads a file of cells; none if it is not there.

    A last line without an end is left out: it was cut while it was written.

    Raises:
        ValueError: If another line is damaged; it names file and line.
    """
    store = Store()
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            values = parsed(line)
            if not isinstance(values, dict):
                raise ValueError("it is no JSON object")
            if "cell" in values:
                measured = from_mapping(Measured, values, "")
                store.cells[measured.cell.key] = measured
            else:
                store.ceilings.append(from_mapping(Ceilings, values, ""))
        except (ValueError, TypeError) as error:
            told = "; ".join(part.rstrip(".") for part in str(error).splitlines())
            raise ValueError(f"{path}, line {number}: {told}. Delete the line.") from None
    return store


def append(path: Path, entry: Measured | Ceilings) -> None:
    """Adds a line, and removes what is left of one that was cut."""
    line = json.dumps(dataclasses.asdict(entry)) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())
