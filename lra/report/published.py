"""Accuracies that papers print, from published.csv, each with its source and its protocol.

Left out: rows of mechanisms that are not here (Informer), Path-X, which no row learned, and RFA's
row of Sinkhorn, whose figures are those of the arena's Sparse Transformer.
"""

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Published:
    """A cell of a paper's table.

    Attributes:
        source: Paper and table.
        protocol: The protocol here that follows the paper's code.
        task: Registered name of the task.
        attention: Registered name of the attention, in its default form.
        printed_as: The row's name in the paper.
        accuracy: Test accuracy, per cent.
    """

    source: str
    protocol: str
    task: str
    attention: str
    printed_as: str
    accuracy: float


@cache
def published() -> tuple[Published, ...]:
    """Returns all cells, in the order of the papers."""
    with (Path(__file__).parent / "published.csv").open(newline="") as file:
        return tuple(
            Published(**row | {"accuracy": float(row["accuracy"])})  # type: ignore[arg-type]
            for row in csv.DictReader(file)
        )
