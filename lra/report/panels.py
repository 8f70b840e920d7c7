"""Cells in panels: those of one mode under equal conditions, and how the conditions are told."""

import dataclasses
import json
from collections.abc import Callable

from lra.cells import Ceilings, Conditions, Measured, Mode, Store
from lra.report.table import CROSS, DASH

TITLES: dict[Mode, str] = {
    "train": "Training step",
    "infer": "Inference step",
    "decode": "Generation, token by token",
}


@dataclasses.dataclass(frozen=True)
class Panel:
    """Cells of one mode under equal conditions, by row and length; softmax is the first row."""

    mode: Mode
    conditions: Conditions
    rows: dict[str, dict[int, Measured]]
    ceilings: Ceilings | None

    @property
    def lengths(self) -> list[int]:
        """All lengths, ascending."""
        return sorted({n for row in self.rows.values() for n in row})

    def values(
        self, name: str, figure: Callable[[Measured], float | None]
    ) -> dict[int, float | None]:
        """Returns a figure of a row by length; None where there is none."""
        return {n: figure(m) for n, m in sorted(self.rows.get(name, {}).items())}


def seconds(m: Measured) -> float | None:
    """Median time of a step."""
    return m.figures.step.median if m.figures else None


def memory(m: Measured) -> float | None:
    """Peak memory in bytes."""
    return m.figures.peak_bytes if m.figures else None


def panels_of(store: Store) -> list[Panel]:
    """Returns all cells in panels, those with most rows first and generation last."""
    groups: dict[tuple[str, Mode], list[Measured]] = {}
    for measured in store.cells.values():
        given = json.dumps(dataclasses.asdict(measured.cell.conditions), sort_keys=True)
        groups.setdefault((given, measured.cell.mode), []).append(measured)
    panels = []
    for (_, mode), members in groups.items():
        rows: dict[str, dict[int, Measured]] = {}
        for m in members:
            rows.setdefault(m.cell.name, {})[m.cell.length] = m
        given = members[0].cell.conditions
        rows = dict(sorted(rows.items(), key=lambda row: _rank(*row)))
        panels.append(Panel(mode, given, rows, _ceilings(store, given)))
    order = list(TITLES)
    return sorted(
        panels, key=lambda p: (p.mode == "decode", -len(p.rows), panel_key(p), order.index(p.mode))
    )


def _rank(name: str, row: dict[int, Measured]) -> tuple[bool, float, float, str]:
    """Softmax first, then by speed at the longest length that was measured."""
    done = [n for n, m in row.items() if m.figures]
    longest = max(done, default=0)
    return name != "softmax", -longest, (seconds(row[longest]) or 0.0) if done else 0.0, name


def _ceilings(store: Store, given: Conditions) -> Ceilings | None:
    """Returns the best that the machine has shown under these conditions."""
    same = [
        c
        for c in store.ceilings
        if (c.precision, c.device, c.torch) == (given.precision, given.device, given.torch)
    ]
    if not same:
        return None
    return dataclasses.replace(
        same[-1],
        flops_per_second=max(c.flops_per_second for c in same),
        bytes_per_second=max(c.bytes_per_second for c in same),
    )


def missing(m: Measured | None) -> str:
    """Returns what stands in a table where a cell has no figures."""
    if m is None or m.status == "ok":
        return DASH
    return {"oom": CROSS, "timeout": f">{m.seconds:g} s"}.get(m.status, m.status)


def panel_key(panel: Panel) -> str:
    """The same for panels that share their conditions and a figure."""
    given = json.dumps(dataclasses.asdict(panel.conditions), sort_keys=True)
    return f"{'decode' if panel.mode == 'decode' else 'step'} {given}"


def model_line(panel: Panel) -> str:
    """Returns batch and model in a few words."""
    model, given = panel.conditions.model, panel.conditions
    return (
        f"batch {given.batch}, {model['layers']} layers of {model['dim']} dimensions, "
        f"{model['heads']} heads"
    )


def machine_line(panel: Panel) -> str:
    """Returns what the figures were measured with."""
    given = panel.conditions
    device = given.device
    return f"{device['name']}, {device['threads']} threads, {given.precision}, torch {given.torch}"


def conditions_line(panel: Panel) -> str:
    """Returns all conditions of a panel's figures, with dates and commands."""
    given, every = panel.conditions, [m for row in panel.rows.values() for m in row.values()]
    model = given.model
    filled = "all positions filled" if given.filled else "lengths as of IMDb's reviews, cut at N"
    pieces = ", batches whole"
    if given.micro_batches != 1:
        count = "as in training" if given.micro_batches == "auto" else f"of {given.micro_batches}"
        pieces = f", batches in micro-batches {count}"
    days = sorted(m.date[:10] for m in every)
    dates = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    commands = "; ".join(f"`{command}`" for command in dict.fromkeys(m.command for m in every))
    kinds = sorted({m.figures.memory_kind for m in every if m.figures})
    return (
        f"{machine_line(panel)}; {model_line(panel)} of {model['head_dim']}, feed-forward "
        f"{model['ffn_dim']}, vocabulary {model['vocab_size']}, dropout {model['dropout']:g}, "
        f"attention dropout {model['attention_dropout']:g}; {filled}{pieces}; memory: "
        f"{' or '.join(kinds) or DASH}, above what was held before the model; {dates}; {commands}."
    )
