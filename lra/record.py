"""The run record: one small JSON that needs nothing else to be understood, typed and versioned."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lra import facts
from lra.config import identity
from lra.files import parsed, short_hash, write_atomically, write_text
from lra.typed import check_known, from_mapping

SCHEMA = 3
"""2 adds tuning and trial_of to 1; 3 adds shrunk."""

PROGRESS = "progress.json"
"""Written by a run every few seconds while it trains, and removed at its end."""

Status = Literal["running", "ok", "oom", "diverged", "timeout", "interrupted", "failed"]


@dataclass
class Score:
    """A metric on a whole split.

    Attributes:
        accuracy: Fraction of examples answered right.
        loss: Mean cross-entropy, nats.
        n: Number of examples.
        low: Lower end of the 95 % Wilson interval of the accuracy.
        high: Upper end.
        step: The optimiser step of the weights.
    """

    accuracy: float
    loss: float
    n: int
    low: float
    high: float
    step: int

    @classmethod
    def of(cls, correct: int, n: int, loss: float, step: int) -> "Score":
        """Returns the score of ``correct`` right answers among ``n``."""
        low, high = wilson_interval(correct, n)
        return cls(correct / n, loss, n, low, high, step)


@dataclass
class Throughput:
    """Speed of training steps alone, after the first steps of each session.

    Attributes:
        steps_per_second: Optimiser steps.
        examples_per_second: Examples.
        tokens_per_second: Real tokens, padding not counted.
        steps: Steps that were timed.
    """

    steps_per_second: float
    examples_per_second: float
    tokens_per_second: float
    steps: int


@dataclass
class Record:
    """A run: what was asked, under which conditions, and what came out.

    Attributes:
        status: How the run ended, or ``running``.
        reason: Why, where the status is not ``ok``.
        hash: Identity of the setting without its seed; records of different hash never average.
        protocol: Name of the protocol.
        modified: Overridden keys of the protocol: [its value, the run's value].
        task: Name, version, fingerprint, chance, whether the test split is the validation split,
            and of the data its hash, source, splits, and baselines on the test split.
        attention: Name, options, and those that are not default.
        seed: Seed of the run.
        config: The whole resolved configuration.
        command: The command line that started the run.
        started: UTC time of the first start, ISO 8601.
        sessions: How many processes worked on the run.
        parameters: Trainable parameters.
        parameters_of_softmax: Those of the same model with softmax attention.
        steps: Optimiser steps done.
        validation: Score of the tested weights on the validation split.
        test: Score of the tested weights on the test split.
        train_seconds: Time in optimiser steps.
        evaluation_seconds: Time in evaluations and the final test.
        other_seconds: All other time: data, set-up, checkpoints.
        throughput: Speed of training steps.
        peak_memory_bytes: Peak memory above what was held before the model was built, of the
            process that needed most.
        memory_kind: What the peak counts, or why there is none.
        micro_batches: Pieces that each process ran its share of a batch in, in the end; the batch
            is that of the configuration whatever their number.
        shrunk: What was made smaller where memory ran out, with its numbers at first and at last:
            ``micro_batches``, which become more, and ``evaluation_tokens``, padded tokens of an
            evaluation batch. None if memory sufficed.
        precision: ``fp32`` or ``bf16``, with the reason for it.
        device: Kind (cpu, cuda), name, threads of a process, how many runs shared it, and how many
            processes shared the run, each with such a device.
        versions: Python and package versions.
        commit: Git commit of the code, with ``dirty`` if it was modified; unknown outside git.
        tuning: Of a tuned run, the name of the tuning, its grid, the trials (of each its value,
            status, reason, validation accuracy, steps and seconds), and the chosen value, None
            where no trial was good for it. None of a run that is not tuned.
        trial_of: Of a trial, which is never tested, the hash of the tuned setting that asked for
            it first. None of all other runs.
        schema: Version of this record's format.
    """

    hash: str
    protocol: str
    modified: dict[str, Any]
    task: dict[str, Any]
    attention: dict[str, Any]
    seed: int
    config: dict[str, Any]
    command: str
    started: str
    precision: dict[str, Any]
    device: dict[str, Any]
    versions: dict[str, Any]
    commit: dict[str, Any]
    status: Status = "running"
    reason: str = ""
    sessions: int = 1
    parameters: int | None = None
    parameters_of_softmax: int | None = None
    steps: int = 0
    validation: Score | None = None
    test: Score | None = None
    train_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    other_seconds: float = 0.0
    throughput: Throughput | None = None
    peak_memory_bytes: int | None = None
    memory_kind: str = ""
    micro_batches: int | None = None
    shrunk: dict[str, Any] | None = None
    tuning: dict[str, Any] | None = None
    trial_of: str | None = None
    schema: int = field(default=SCHEMA)

    def identity_hash(self) -> str:
        """Returns the hash of the settings as they are told here; it equals ``hash``.

        Raises:
            KeyError: If a setting is missing.
        """
        return short_hash(
            identity(
                task=self.task["fingerprint"],
                protocol=self.protocol,
                settings=self.config,
                precision=self.precision["name"],
                device_kind=self.device["kind"],
                tuning=self.tuning,
                trial=self.trial_of is not None,
            )
        )

    def check_identity(self, path: Path) -> None:
        """Refuses a record whose settings are no longer those that its hash was made of.

        Raises:
            ValueError: It names the file.
        """
        try:
            identity = self.identity_hash()
        except KeyError as error:
            raise ValueError(f"{path} has no {error}: was it edited?") from None
        if identity != self.hash:
            raise ValueError(
                f"{path} has the hash {self.hash}, but its settings have {identity}: was it edited?"
            )

    def save(self, folder: Path) -> None:
        """Writes ``record.json`` into ``folder``, atomically."""
        write_text(folder / "record.json", json.dumps(dataclasses.asdict(self), indent=1) + "\n")


def load(folder: Path) -> Record | None:
    """Reads a folder's record.

    Returns:
        The record, or None if there is none.

    Raises:
        ValueError: If the file is damaged or of a newer format; it names the file.
    """
    path = folder / "record.json"
    if not path.is_file():
        return None
    try:
        values = parsed(path.read_bytes())
        if not isinstance(values, dict):
            raise ValueError("it is no JSON object")
        if values.get("schema", 0) > SCHEMA:
            raise ValueError(f"its format {values['schema']} is newer than {SCHEMA}: update lra")
        loaded = from_mapping(Record, values, "")
        facts.check(loaded)
        return loaded
    except (ValueError, OSError, TypeError) as error:
        raise ValueError(
            f"{path} is no record: {error}. Delete it or pass reuse=never to start the run over."
        ) from None


@dataclass(frozen=True)
class Progress:
    """How far a run is that is under way.

    Attributes:
        step: Optimiser steps done.
        seconds: Time in them and in evaluations, all sessions together.
    """

    step: int
    seconds: float

    def __post_init__(self) -> None:
        if not (facts.is_number(self.step) and facts.is_number(self.seconds)):
            raise ValueError("these are no such numbers")


def save_progress(folder: Path, progress: Progress) -> None:
    """Writes ``progress.json`` into ``folder``, atomically."""
    write_text(folder / PROGRESS, json.dumps(dataclasses.asdict(progress)) + "\n")


def load_progress(folder: Path) -> Progress | None:
    """Reads a folder's ``progress.json``; None if there is none, or it cannot be read."""
    try:
        return from_mapping(Progress, parsed((folder / PROGRESS).read_bytes()), "")
    except (ValueError, OSError, TypeError):
        return None


@dataclass(frozen=True)
class _Evaluation:
    """What readers of a line of metrics ask for."""

    step: int
    seconds: float
    val_accuracy: float


def load_metrics(folder: Path) -> list[dict[str, Any]]:
    """Reads the evaluations in ``metrics.jsonl``; a line that was cut or damaged is left out."""
    try:
        lines = (folder / "metrics.jsonl").read_text(errors="replace").splitlines()
    except OSError:
        return []
    whole = []
    for line in lines:
        try:
            values = parsed(line)
            check_known(_Evaluation, values, "")
        except (ValueError, TypeError):
            continue
        if (
            facts.is_number(values["step"])
            and facts.is_number(values["seconds"])
            and 0 <= values["val_accuracy"] <= 1
        ):
            whole.append(values)
    return whole


def save_predictions(folder: Path, predictions: np.ndarray, labels: np.ndarray) -> None:
    """Writes the test split's predictions and labels, one byte each, as a (2, n) array."""
    pair = np.stack([predictions, labels]).astype(np.uint8)
    write_atomically(folder / "test_predictions.npy", lambda file: np.save(file, pair))


def wilson_interval(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Returns the Wilson score interval of a proportion (95 % for the default z)."""
    p, z2 = correct / n, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # The ends are exact where rounding would leave a trace of 0 or 1.
    return (centre - half if correct else 0.0), (centre + half if correct < n else 1.0)
