"""Cells of `lra bench` to tables and figures, in the layout of the papers.

Reads the file of cells alone and gives the same bytes for the same file. Absolute figures share a
table only under equal conditions; published ones appear as ratios to softmax alone.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import pandas as pd

from lra import cells
from lra.cells import Ceilings, Measured
from lra.files import write_text
from lra.report.decoding import decoding_tables
from lra.report.efficiency_figures import draw
from lra.report.panels import (
    TITLES,
    Panel,
    conditions_line,
    machine_line,
    memory,
    missing,
    model_line,
    panel_key,
    panels_of,
    seconds,
)
from lra.report.published_speed import published_table
from lra.report.scaling import crossover, exponent
from lra.report.table import CROSS, DASH, Table


def write(path: Path) -> None:
    """Writes tables (Markdown, CSV, LaTeX) and figures beside a file of cells, and prints them.

    Raises:
        ValueError: If a line of the file is damaged.
    """
    store = cells.load(path)
    if not store.cells:
        print(f"{path} has no cell yet.")
        return
    panels = panels_of(store)
    device, precision, *_ = [*path.stem.split("-")[1:], "", ""]
    title = f"# Speed and memory by length: {', '.join(filter(None, [device, precision]))}"
    figures: dict[str, str] = {}
    sections, tex = [title], []
    for panel in panels:
        heading = f"## {TITLES[panel.mode]}: {model_line(panel)}"
        told = conditions_line(panel)
        tables = decoding_tables(panel) if panel.mode == "decode" else _tables(panel)
        tables += published_table(panel)
        key = panel_key(panel)
        if key not in figures:
            name = _figure_name(path.stem, panel, set(figures.values()))
            figures[key] = name
            together = [p for p in panels if panel_key(p) == key]
            draw(path.with_name(name), together, f"{model_line(panel)}\n{machine_line(panel)}")
            told += f"\n\n![{heading.strip('# ')}]({name})"
        sections += [heading, told, *(table.markdown() for table in tables)]
        tex += [table.tex(f"{TITLES[panel.mode]}, {conditions_line(panel)}") for table in tables]
    markdown = "\n\n".join(sections) + "\n"
    write_text(path.with_suffix(".md"), markdown)
    write_text(path.with_suffix(".csv"), _csv(panels))
    write_text(path.with_suffix(".tex"), "\n\n".join(tex) + "\n")
    names = [path.with_suffix(end).name for end in (".md", ".csv", ".tex")]
    print(f"{markdown}\nwritten to {path.parent}: {', '.join([*names, *figures.values()])}")


def _tables(panel: Panel) -> list[Table]:
    speed = Table(
        "Steps per second, and peak memory in MB",
        [
            "attention",
            *(f"{n:,} steps/s" for n in panel.lengths),
            *(f"{n:,} MB" for n in panel.lengths),
        ],
        [
            [
                name,
                *_row(panel, name, lambda m: 1 / m.figures.step.median),
                *_row(panel, name, lambda m: (m.figures.peak_bytes or 0) / 1e6 or None),
            ]
            for name in panel.rows
        ],
        [_spread_note(panel), "In brackets: multiples of softmax.", *_cross_notes(panel)],
    )
    tables = [speed]
    measured = any(m.figures for row in panel.rows.values() for m in row.values())
    if measured and len(panel.lengths) > 1:
        tables.append(_growth(panel))
    if measured and panel.ceilings:
        tables.append(_floor(panel, panel.ceilings))
    return tables


def _row(panel: Panel, name: str, figure: Callable[[Measured], float | None]) -> list[str]:
    """Returns a row's figures at all lengths, each with its multiple of softmax."""
    texts = []
    base = panel.rows.get("softmax", {})
    for n in panel.lengths:
        m = panel.rows[name].get(n)
        value = figure(m) if m and m.figures else None
        if value is None:
            texts.append(missing(m))
            continue
        other = base.get(n)
        reference = figure(other) if other and other.figures else None
        ratio = f" ({value / reference:.2f})" if reference and name != "softmax" else ""
        texts.append(_digits(value) + ratio)
    return texts


def _digits(value: float) -> str:
    """Returns three digits, or all those before the point."""
    places = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.3g}" if value < 1 else f"{value:,.{places}f}"


def _spread_note(panel: Panel) -> str:
    steps = [m.figures.step for row in panel.rows.values() for m in row.values() if m.figures]
    if not steps:
        return "No cell was measured."
    counts = sorted(s.repetitions for s in steps)
    widths = sorted((s.high - s.low) / s.median for s in steps)
    return (
        f"Medians of {counts[0]} to {counts[-1]} steps; the interquartile range is "
        f"{median(widths):.1%} of the median in half of the cells, {widths[-1]:.1%} at most."
    )


def _cross_notes(panel: Panel) -> list[str]:
    every = [m for row in panel.rows.values() for m in row.values()]
    limits = sorted({m.memory_gb for m in every if m.status == "oom" and m.memory_gb})
    notes = []
    if any(m.status == "oom" for m in every):
        told = " or ".join(f"{limit:g} GB" for limit in limits) or "the device's memory"
        notes.append(f"{CROSS}: more than {told}.")
    notes += sorted(
        f"{m.cell.name} {m.cell.length:,} failed: {m.reason}."
        for m in every
        if m.status == "failed"
    )
    return notes


def _growth(panel: Panel) -> Table:
    rows = []
    for name in panel.rows:
        time, peak = panel.values(name, seconds), panel.values(name, memory)
        rows.append(
            [
                name,
                _exponent(time),
                _exponent(peak),
                _from(panel, time, panel.values("softmax", seconds), name),
                _from(panel, peak, panel.values("softmax", memory), name),
            ]
        )
    return Table(
        "Growth, and the length from which softmax is beaten",
        ["attention", "time ~ N^", "memory ~ N^", "faster from N =", "less memory from N ="],
        rows,
        [
            f"Least squares of logarithms over {_span(panel.lengths)}; interpolated between "
            "measured lengths. Softmax is torch's fused kernel."
        ],
    )


def _span(lengths: Sequence[int]) -> str:
    return f"{lengths[0]:,} to {lengths[-1]:,} positions"


def _exponent(values: dict[int, float | None]) -> str:
    slope = exponent(values)
    return DASH if slope is None else f"{slope:.2f}"


def _from(
    panel: Panel, ours: dict[int, float | None], base: dict[int, float | None], name: str
) -> str:
    at = None if name == "softmax" else crossover(ours, base)
    if at is None:
        return DASH
    common = sorted(set(ours) & set(base))
    if at == float("inf"):
        return f"not up to {common[-1]:,}"
    return f"≤ {at:,}" if at == common[0] else f"{at:,.0f}"


def _floor(panel: Panel, ceilings: Ceilings) -> Table:
    rows = []
    for name, row in panel.rows.items():
        done = [m for _, m in sorted(row.items()) if m.figures]
        if not done:
            continue
        figures = done[-1].figures
        times = floor_seconds(done[-1], ceilings)
        rows.append(
            [
                name,
                _digits(figures.flops / 1e9),
                _digits(figures.bytes / 1e9),
                "products" if times[0] > times[1] else "memory",
                *(_share(row.get(n), ceilings) for n in panel.lengths),
            ]
        )
    return Table(
        "The floor of a step, and the share of it that is reached",
        ["attention", "GFLOP", "GB", "bound by", *(f"{n:,}" for n in panel.lengths)],
        rows,
        [
            "Operations and bytes of the longest step measured, by the declared costs of attention "
            "and model: a backward pass counts as two forward passes, and every intermediate is "
            "written and read once. Floor: the longer of operations at the rate of a large matrix "
            f"product ({ceilings.flops_per_second / 1e9:,.0f} GFLOP/s) and bytes at that of a "
            f"large copy ({ceilings.bytes_per_second / 1e9:,.1f} GB/s), both measured in the same "
            "run. Share: floor over measured time; what stays in cache may exceed 100 %."
        ],
    )


def floor_seconds(m: Measured, ceilings: Ceilings) -> tuple[float, float]:
    """Returns the least time of a step's operations, and of its bytes."""
    assert m.figures
    return (
        m.figures.flops / ceilings.flops_per_second,
        m.figures.bytes / ceilings.bytes_per_second,
    )


def _share(m: Measured | None, ceilings: Ceilings) -> str:
    if m is None or m.figures is None:
        return missing(m)
    return f"{max(floor_seconds(m, ceilings)) / m.figures.step.median:.0%}"


def _figure_name(stem: str, panel: Panel, taken: set[str]) -> str:
    given = panel.conditions
    model = f"{given.model['layers']}x{given.model['dim']}"
    kind = "decode-" if panel.mode == "decode" else ""
    filled = "" if given.filled else "-lengths"
    name = f"{stem}-{kind}b{given.batch}-{model}{filled}"
    number = 2
    while f"{name}.png" in taken:
        name, number = f"{name.removesuffix(f'-{number - 1}')}-{number}", number + 1
    return f"{name}.png"


def _csv(panels: Sequence[Panel]) -> str:
    """Returns every cell with its unrounded figures."""
    records = []
    for panel in panels:
        given = panel.conditions
        for name, row in panel.rows.items():
            for n, m in sorted(row.items()):
                record = {
                    "mode": panel.mode,
                    "attention": name,
                    "length": n,
                    "batch": given.batch,
                    "filled": given.filled,
                    "micro_batches": given.micro_batches,
                    "precision": given.precision,
                    "device": given.device["name"],
                    "threads": given.device["threads"],
                    "torch": given.torch,
                    "model": json.dumps(given.model),
                    "status": m.status,
                    "reason": m.reason,
                    "memory_limit_gb": m.memory_gb,
                    "seconds_limit": m.seconds,
                    "date": m.date,
                    "command": m.command,
                }
                records.append(record | _figures(panel, m))
    return pd.DataFrame(records).convert_dtypes().to_csv(index=False, lineterminator="\n")


def _figures(panel: Panel, m: Measured) -> dict[str, object]:
    if m.figures is None:
        return {}
    figures = m.figures
    record: dict[str, object] = {
        "seconds": figures.step.median,
        "seconds_q1": figures.step.low,
        "seconds_q3": figures.step.high,
        "repetitions": figures.step.repetitions,
        "peak_bytes": figures.peak_bytes,
        "parameters": figures.parameters,
        "flops": figures.flops,
        "bytes": figures.bytes,
    }
    base = panel.rows.get("softmax", {}).get(m.cell.length)
    if base and base.figures:
        record["speed_vs_softmax"] = base.figures.step.median / figures.step.median
        if base.figures.peak_bytes and figures.peak_bytes:
            record["memory_vs_softmax"] = figures.peak_bytes / base.figures.peak_bytes
    if panel.ceilings:
        record["floor_seconds"] = max(floor_seconds(m, panel.ceilings))
        record["share_of_floor"] = record["floor_seconds"] / figures.step.median
    if figures.decoding:
        record["decoding"] = json.dumps(dataclasses.asdict(figures.decoding))
    return record
