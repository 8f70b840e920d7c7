"""What a run keeps between sessions: its state, its checkpoints and its step metrics."""

import json
import logging
import math
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lra import facts
from lra.files import parsed, write_atomically, write_text
from lra.measure import PHASES
from lra.record import Score

LOG = logging.getLogger("lra")

FILE = "checkpoint.pt"
PREVIOUS = "checkpoint.previous.pt"
"""The checkpoint before the newest, for when that one cannot be used."""

UNUSABLE = "checkpoint.unusable.pt"
"""What could not be used, once the run has gone on from the one before it."""

FORMAT = 2
"""1 had no number of its format, and neither micro_batches nor evaluation_tokens."""


@dataclass
class Timed:
    """Training that counts for the throughput: all but the first steps of each session."""

    steps: int = 0
    examples: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class _Sound:
    """Types of the fields of `State` that are no weights, and of those that are dicts."""

    step: int
    evaluated: int
    train_loss: float
    train_correct: float
    train_seen: int
    last: Score | None
    best: Score | None
    seconds: dict[str, float]
    timed: Timed
    peak_memory: int
    micro_batches: int | None
    evaluation_tokens: int | None


@dataclass
class State:
    """What a checkpoint holds beside the weights and the optimiser.

    Attributes:
        step: Optimiser steps done.
        evaluated: The last step at which the validation set was scored.
        train_loss: Summed loss of the training examples since then,
        train_correct: how many of them were answered right, and
        train_seen: how many they were.
        last: The latest validation score, as a dict.
        best: The best validation score, as a dict.
        best_model: The weights that reached it.
        seconds: The three clocks.
        timed: Training that counts for the throughput.
        peak_memory: Largest peak of any session, bytes.
        micro_batches: Pieces of a batch since memory ran out; None if it never did.
        evaluation_tokens: Tokens of an evaluation batch since then, likewise.
    """

    step: int = 0
    evaluated: int = 0
    train_loss: float = 0.0
    train_correct: float = 0.0
    train_seen: int = 0
    last: dict[str, Any] | None = None
    best: dict[str, Any] | None = None
    best_model: dict[str, Tensor] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    timed: Timed = field(default_factory=Timed)
    peak_memory: int = 0
    micro_batches: int | None = None
    evaluation_tokens: int | None = None


def save(
    folder: Path,
    run_hash: str,
    state: State,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Writes the checkpoint atomically, and keeps the one before it."""
    # Field by field: asdict would copy every tensor.
    values = {f.name: getattr(state, f.name) for f in fields(state)}
    content = {
        "format": FORMAT,
        "hash": run_hash,
        "state": values | {"timed": asdict(state.timed)},
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    write_atomically(
        folder / FILE, lambda file: torch.save(content, file), previous=folder / PREVIOUS
    )


def load(folder: Path, run_hash: str, model: torch.nn.Module) -> dict[str, Any] | None:
    """Reads the newest checkpoint that can be used; writes nothing.

    Args:
        folder: The run's folder.
        run_hash: The run's hash.
        model: What the weights are for; it stays as it is.

    Returns:
        ``state`` (a State), ``model`` and ``optimizer``, and the ``name`` of the file; None if
        there is no checkpoint.

    Raises:
        ValueError: If there are checkpoints and none can be used; what is wrong with each.
    """
    problems = []
    for name in (FILE, PREVIOUS):
        try:
            with (folder / name).open("rb") as file:
                content = _read(file, run_hash, model)
        except FileNotFoundError:
            continue
        except (_Unusable, OSError) as error:
            problems.append(f"{folder / name} {error}")
            continue
        step = content["state"].step
        for problem in problems:
            LOG.warning("%s: the one before it, of step %d, is used", problem, step)
        return content | {"name": name}
    if problems:
        raise ValueError(
            f"{'; '.join(problems)}. Delete it or pass reuse=never to start the run over."
        )
    return None


def settle(folder: Path, name: str) -> None:
    """Makes the checkpoint that a run goes on from the newest.

    One that could not be used is put aside: the next to be written is not to push out a good one
    for its sake.
    """
    if name != FILE:
        if (folder / FILE).exists():
            (folder / FILE).replace(folder / UNUSABLE)
        (folder / name).replace(folder / FILE)


def remove(folder: Path) -> None:
    """Removes the checkpoints of a run that is finished."""
    for name in (FILE, PREVIOUS, UNUSABLE):
        (folder / name).unlink(missing_ok=True)


class _Unusable(Exception):
    """What is wrong with a checkpoint, to be said after its path."""


def _read(file: BinaryIO, run_hash: str, model: torch.nn.Module) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()  # torch.load checks no sums
    except Exception as error:  # a damaged archive can raise anything
        file.seek(0)
        kind = "is cut short or damaged" if file.read(2) == b"PK" else "is no checkpoint"
        raise _Unusable(f"{kind} ({type(error).__name__})") from error
    if damaged is not None:
        raise _Unusable(f"is damaged (checksum of {damaged})")
    file.seek(0)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # as can a pickle
        raise _Unusable(f"cannot be read ({type(error).__name__})") from error
    if not isinstance(content, dict) or "hash" not in content:
        raise _Unusable("is no checkpoint of a run")
    version = content.get("format", 1)
    if not isinstance(version, int) or version > FORMAT:
        raise _Unusable(f"has format {version}, newer than {FORMAT}: update lra")
    if content["hash"] != run_hash:
        raise _Unusable(f"is of run {content['hash']}, not of {run_hash}")
    if missing := {"state", "model", "optimizer"} - content.keys():
        raise _Unusable(f"has no {' and no '.join(sorted(missing))}")
    content["state"] = _state(content["state"], version)
    if not _fits(content["optimizer"], model):
        raise _Unusable("has a state of the optimiser that is none of this model's")
    weights = model.state_dict()
    for name, found in (("model", content["model"]), ("best_model", content["state"].best_model)):
        if found is not None and (differing := _differing(found, weights)):
            more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise _Unusable(f"has another {name}: {', '.join(differing[:3])}{more}")
    return content


def _state(values: Any, version: int) -> State:
    """Returns the state of a checkpoint in the format ``version``."""
    if not isinstance(values, dict):
        raise _Unusable("has no state")
    if version == 1:
        values = {"micro_batches": None, "evaluation_tokens": None} | values
    for known, given in ((State, values), (Timed, values.get("timed"))):
        names = {f.name for f in fields(known)}
        if not isinstance(given, dict) or given.keys() != names:
            odd = names ^ given.keys() if isinstance(given, dict) else names
            told = ", ".join(sorted(map(str, odd)))
            raise _Unusable(f"has other fields in its state, or lacks them: {told}")
    numbers = {key: value for key, value in values.items() if key != "best_model"}
    try:
        facts.check_section(_Sound, numbers, "state")
    except ValueError as error:
        raise _Unusable(f"is damaged: {error}") from None
    if not set(PHASES) >= values["seconds"].keys():
        raise _Unusable("is damaged: it has other clocks")
    if not 0 <= values["evaluated"] <= values["step"] or (
        values["evaluated"] and not values["last"]
    ):
        raise _Unusable("is damaged: its steps and scores do not go together")
    return State(**values | {"timed": Timed(**values["timed"])})


def _fits(optimizer: Any, model: torch.nn.Module) -> bool:
    """Whether a state of AdamW has what it keeps of the parameters of a model, and no more."""
    shapes = [parameter.shape for parameter in model.parameters()]
    try:
        return all(
            its.keys() == {"step", "exp_avg", "exp_avg_sq"}
            and its["step"].numel() == 1
            and its["exp_avg"].shape == its["exp_avg_sq"].shape == shapes[number]
            for number, its in optimizer["state"].items()
        )
    except Exception:  # of whatever stands in the place of tensors and dicts
        return False


def _differing(found: Any, weights: Mapping[str, Tensor]) -> list[str]:
    """Returns how tensors differ from those of the model, in names and shapes."""
    if not isinstance(found, Mapping):
        return ["it holds no tensors"]
    told = [f"{name} is missing" for name in weights.keys() - found.keys()]
    told += [f"{name} is not the model's" for name in found.keys() - weights.keys()]
    for name in weights.keys() & found.keys():
        if not isinstance(found[name], Tensor):
            told.append(f"{name} is no tensor")
            continue
        shapes = [tuple(of[name].shape) for of in (found, weights)]
        if shapes[0] != shapes[1]:
            told.append(f"{name} is {shapes[0]}, not {shapes[1]}")
    return sorted(told)


class Metrics:
    """The step metrics of a run, one JSON line for each evaluation.

    Args:
        path: The file.
        last_step: Lines of later steps, which will be run again, are dropped.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        self._path = path
        self._text, self._written = "", True
        if path.exists():
            lines = path.read_text(errors="replace").splitlines()
            kept = [line for line in lines if _step_of(line) <= last_step]
            self._text, self._written = "".join(line + "\n" for line in kept), False
            self.write()

    def append(self, metrics: dict[str, float]) -> None:
        """Adds one line.

        Raises:
            OSError: If the disk is full; the line is kept for the next time.
        """
        self._text += json.dumps(metrics) + "\n"
        self._written = False
        self.write()

    def write(self) -> None:
        """Writes the lines that are not in the file yet, if there are any."""
        if not self._written:
            write_text(self._path, self._text)
            self._written = True


def _step_of(line: str) -> float:
    """Returns the step of a metrics line, or infinity for a line that was cut or damaged."""
    try:
        step = parsed(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
    return step if isinstance(step, int) else math.inf
