"""`lra maps`: mean attention matrices of trained runs on the same examples.

The form of cosFormer's Figure 3 (Qin et al., ICLR 2022): the matrix of every layer and head, and
what re-weights similarities by position; of random features (Peng et al., ICLR 2021) also the
matrix that they estimate, of the same queries and keys.

Examples are the first of the validation split: the test split is scored, not looked at. They have
different lengths, and a matrix of n tokens is put on a grid of CELLS x CELLS relative positions
before the mean is taken: token i covers [i/n, (i+1)/n] of both axes, queries of a cell are averaged
and what keys of a cell get is summed, each by the part that it shares with the cell. Rows that sum
to 1 still do. Truncating to common first positions would keep less of long examples, and would mix
cosFormer's horizons M, which are the examples' own lengths: what depends on (i - j) / M is the same
for all of them on this grid. Figures of the table are of the matrices as they are.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lra.batches import Batches
from lra.files import write_text
from lra.kept import Kept, restore
from lra.report.leaderboard import label_of
from lra.report.maps_figure import Panels, draw
from lra.text import aligned
from models.attention.base import Attention, Context, own_lengths

EXAMPLES = 64
CELLS = 64

NEAR = 0.1
"""Keys at most so far from a query, as part of the length, are near."""


def _grid() -> Tensor:
    return torch.zeros(CELLS, CELLS, dtype=torch.float64)


@dataclass
class Head:
    """Sums over sequences, of one head of one layer.

    Attributes:
        matrix: Attention on the grid.
        exact: Attention by the kernel that random features estimate, on the grid; 0 without any.
        near: Weight of near keys, mean over queries.
        entropy: Of the weights, mean over queries, 1 where all keys have the same; None once a
            weight was negative.
        total: Sum of the weights, mean over queries; less than 1 where queries have no feature.
        error: Half the absolute differences to it (0: the same weights; 1: no key in common), mean
            over queries; None without any.
    """

    matrix: Tensor = field(default_factory=_grid)
    exact: Tensor = field(default_factory=_grid)
    near: float = 0.0
    entropy: float | None = 0.0
    total: float = 0.0
    error: float | None = None


@dataclass
class Maps:
    """What a run attends to.

    Attributes:
        heads: Layers, and their heads.
        reweighting: Sum of the factors that positions decide, on the grid; None without any.
        sequences: Sequences of the sums: the examples, or twice as many of a dual task.
    """

    heads: list[list[Head]]
    reweighting: Tensor | None = None
    sequences: int = 0


def write(folders: Sequence[Path], out: Path) -> Path:
    """Draws the runs' mean attention, and prints and writes its figures.

    Args:
        folders: Folders of runs of one task and one set of data, with their checkpoints.
        out: The folder to write ``maps-<protocol>-<task>.png`` and ``.csv`` to.

    Returns:
        The PNG file.

    Raises:
        ValueError: If a folder has no checkpoint (with what to type), if runs are of different
            tasks or data, or if a mechanism has no attention matrix.
    """
    runs = [restore(folder) for folder in folders]
    _check_same_data(folders, runs)
    for folder, kept in zip(folders, runs, strict=True):
        if not _attentions(kept):
            name = kept.record.attention["name"]
            raise ValueError(
                f"{folder} is a run of {name}, which mixes tokens without an attention matrix: "
                f"leave it out."
            )
    names = _names(runs)
    found = [maps_of(kept) for kept in runs]
    record = runs[0].record
    protocols = "-".join(sorted({kept.record.protocol for kept in runs}))
    path = out / f"maps-{protocols}-{record.task['name']}.png"
    count = min(EXAMPLES, len(runs[0].prepared.splits["val"]))
    title = (
        f"Mean attention on the first {count} validation examples of {record.task['name']}, "
        f"protocol {protocols}"
    )
    draw(path, title, [_panels(*pair) for pair in zip(names, found, strict=True)])
    rows = _table(names, found)
    print(aligned(rows))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path.with_suffix(".csv"), text.getvalue())
    print(
        f"\nnear: weight of keys within {NEAR:.0%} of the length; entropy: 1 where all keys have "
        f"the same weight;\nsum: of a query's weights; error: half the absolute differences to "
        f"the exact kernel.\nwritten to {path} and .csv"
    )
    return path


@torch.no_grad()
def maps_of(kept: Kept) -> Maps:
    """Returns the sums of a run over the first validation examples, one example at a time.

    Computed in float32 whatever the run's precision, with the random draws of evaluation.
    """
    attentions = _attentions(kept)
    found = Maps([[Head() for _ in range(attention.num_heads)] for attention in attentions])
    kept.model.eval()
    data = Batches(kept.prepared.splits["val"], kept.device)
    with ExitStack() as hooks:
        for layer, attention in enumerate(attentions):

            def look(module: Attention, given: Sequence[Any], layer: int = layer) -> None:
                for each in _sequences(module, *given):
                    _add(found, layer, *each)

            hooks.callback(attention.register_forward_pre_hook(look).remove)
        for i in range(min(EXAMPLES, len(data))):
            batch = data.gather(np.array([i]))
            kept.model(batch.tokens, batch.key_mask)
    return found


def _sequences(
    attention: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    causal: bool,
    hidden: Tensor | None,
) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
    """Yields matrix, exact kernel and re-weighting (H, n, n) of sequences without padding."""
    context = Context(key_mask, causal, hidden)
    matrices = (
        attention.weights(q, k, key_mask, causal, hidden),
        attention.exact(q, k, context),
        attention.reweighting(q, k, context),
    )
    for i, n in enumerate(own_lengths(key_mask, k).tolist()):
        if n:
            weights, exact, factors = (
                None if x is None else x[i, :, :n, :n].double().cpu() for x in matrices
            )
            assert weights is not None
            yield weights, exact, factors


def _add(
    found: Maps, layer: int, weights: Tensor, exact: Tensor | None, factors: Tensor | None
) -> None:
    """Adds one sequence (H, n, n)."""
    n = weights.shape[-1]
    shared = _shared(n)
    summed, averaged = n * shared, CELLS * shared.T
    distance = (torch.arange(n)[:, None] - torch.arange(n)).abs()
    for h, (head, w) in enumerate(zip(found.heads[layer], weights, strict=True)):
        head.matrix += averaged @ w @ summed
        head.near += float((w * (distance <= NEAR * n)).sum(-1).mean())
        head.total += float(w.sum(-1).mean())
        if head.entropy is not None:
            nats = -torch.special.xlogy(w, w).sum(-1).mean() / np.log(n) if n > 1 else 1.0
            head.entropy = None if w.min() < 0 else head.entropy + float(nats)
        if exact is not None:
            head.exact += averaged @ exact[h] @ summed
            head.error = (head.error or 0.0) + float((w - exact[h]).abs().sum(-1).mean() / 2)
    if layer == 0:
        found.sequences += 1
        if factors is not None:
            known = _grid() if found.reweighting is None else found.reweighting
            found.reweighting = known + averaged @ factors.mean(0) @ averaged.T


def _shared(n: int) -> Tensor:
    """Returns how much of the axis, of length 1, each of n tokens shares with each cell."""
    tokens, cells = (torch.arange(m + 1, dtype=torch.float64) / m for m in (n, CELLS))
    ends = torch.minimum(tokens[1:, None], cells[1:])
    return (ends - torch.maximum(tokens[:-1, None], cells[:-1])).clamp_min(0)


def _attentions(kept: Kept) -> list[Attention]:
    return [module for module in kept.model.modules() if isinstance(module, Attention)]


def _check_same_data(folders: Sequence[Path], runs: Sequence[Kept]) -> None:
    """Refuses runs whose examples are not the same.

    Raises:
        ValueError: It names two folders, and what each is of.
    """
    told = [
        f"{kept.record.task['name']}, settings {kept.record.task['fingerprint']}, data "
        f"{kept.prepared.manifest['hash']}"
        for kept in runs
    ]
    for folder, its in zip(folders, told, strict=True):
        if its != told[0]:
            raise ValueError(
                f"Attention is compared on the same examples, but {folders[0]} is of {told[0]}, "
                f"and {folder} of {its}: name runs of one task and protocol."
            )


def _names(runs: Sequence[Kept]) -> list[str]:
    """Returns what the runs are called, with seeds where they tell runs apart."""
    labels = [label_of(kept.record) for kept in runs]
    return [
        f"{label}, seed {kept.record.seed}" if labels.count(label) > 1 else label
        for label, kept in zip(labels, runs, strict=True)
    ]


def _panels(name: str, found: Maps) -> Panels:
    """Returns the means of a run, in multiples of even attention."""

    def mean(matrix: Tensor, scale: float = CELLS) -> np.ndarray:
        return (scale * matrix / found.sequences).numpy()

    heads = [head for layer in found.heads for head in layer]
    estimates = heads[0].error is not None
    return Panels(
        name,
        [
            f"layer {i + 1}, head {h + 1}"
            for i, its in enumerate(found.heads)
            for h in range(len(its))
        ],
        [mean(head.matrix) for head in heads],
        [mean(head.exact) for head in heads] if estimates else None,
        [head.error / found.sequences for head in heads if head.error is not None],
        None if found.reweighting is None else mean(found.reweighting, 1.0),
    )


def _table(names: Sequence[str], found: Sequence[Maps]) -> list[list[str]]:
    rows = [["run", "layer", "head", "near", "entropy", "sum", "error"]]
    for name, maps in zip(names, found, strict=True):
        for i, heads in enumerate(maps.heads):
            for h, head in enumerate(heads):
                figures = (head.near, head.entropy, head.total, head.error)
                told = ["–" if x is None else f"{x / maps.sequences:.3f}" for x in figures]
                rows.append([name, f"{i + 1}", f"{h + 1}", *told])
    return rows
