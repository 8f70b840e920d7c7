"""What a run keeps between sessions: its state, its checkpoint and its step metrics."""

import json
import math
import zipfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lra.files import parsed, write_atomically, write_text

FILE = "checkpoint.pt"


@dataclass
class Timed:
    """Training that counts for the throughput: all but the first steps of each session."""

    steps: int = 0
    examples: int = 0
    tokens: int = 0
    seconds: float = 0.0


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


def save(
    folder: Path,
    run_hash: str,
    state: State,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Writes the checkpoint atomically."""
    # Field by field: asdict would copy every tensor.
    values = {f.name: getattr(state, f.name) for f in fields(state)}
    content = {
        "hash": run_hash,
        "state": values | {"timed": asdict(state.timed)},
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    write_atomically(folder / FILE, lambda file: torch.save(content, file))


def load(folder: Path, run_hash: str) -> dict[str, Any] | None:
    """Reads the checkpoint: ``state`` (a State), ``model`` and ``optimizer``; None without one.

    Raises:
        ValueError: If the file is damaged or of another run.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # torch.load checks no sums
                raise ValueError("checksum mismatch")
        content = torch.load(path, map_location="cpu", weights_only=True)
        values = content["state"]
        content["state"] = State(**values | {"timed": Timed(**values["timed"])})
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}). Delete it or pass reuse=never to "
            f"start the run over."
        ) from error
    if content["hash"] != run_hash:
        raise ValueError(f"{path} is of run {content['hash']}, not of {run_hash}.")
    return content


class Metrics:
    """The step metrics of a run, one JSON line for each evaluation.

    Args:
        path: The file.
        last_step: Lines of later steps, which will be run again, are dropped.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        self._path = path
        if path.exists():
            kept = [
                line
                for line in path.read_text(errors="replace").splitlines()
                if _step_of(line) <= last_step
            ]
            write_text(path, "".join(line + "\n" for line in kept))

    def append(self, metrics: dict[str, float]) -> None:
        """Adds one line."""
        with self._path.open("a") as file:
            file.write(json.dumps(metrics) + "\n")


def _step_of(line: str) -> float:
    """Returns the step of a metrics line, or infinity for a line that was cut or damaged."""
    try:
        step = parsed(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
    return step if isinstance(step, int) else math.inf
