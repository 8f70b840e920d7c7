"""Published speed and memory (published_speed.csv) beside ours, as ratios to softmax alone."""

import csv
from pathlib import Path

from lra.report.panels import Panel
from lra.report.table import CROSS, DASH, Table

QUANTITIES = {
    "train": (("train steps/s", "speed"), ("train GB", "peak memory")),
    "infer": (("infer steps/s", "speed"),),
    "decode": (("decode tokens/s", "tokens/s from the start"), ("decode GB", "peak memory")),
}
"""What is published for each mode, and what it is called."""

Values = dict[str, dict[int, float | None]]
"""By model and length; None where it ran out of memory."""


def published_ratio(source: str, quantity: str, model: str, length: int) -> str:
    """Returns a paper's multiple of softmax at a length.

    Args:
        source: How the names of its sources begin: paper and table.
        quantity: As in published_speed.csv.
        model: Row of the table.
        length: Tokens.
    """
    [values] = [v for name, v in _published(quantity).items() if name.startswith(source)]
    if values["softmax"][length] is None:
        return f"softmax {CROSS}"
    return f"× {_ratios(values, model, [length])}"


def published_table(panel: Panel) -> list[Table]:
    """Returns a table for each quantity of which both we and a paper have a ratio to softmax."""
    return [t for q, name in QUANTITIES[panel.mode] if (t := _table(panel, q, name)) is not None]


def _table(panel: Panel, quantity: str, name: str) -> Table | None:
    sources = _published(quantity)
    lengths = sorted({n for values in sources.values() for row in values.values() for n in row})
    ours = _ours(panel, quantity)
    if not any(n in row for row in ours.values() for n in lengths):
        return None
    models = [m for m in ours if any(m in values for values in sources.values())]
    rows = [
        [model, *(_ratios(values, model, lengths) for values in (ours, *sources.values()))]
        for model in models
        if model != "softmax"
    ]
    if not rows:
        return None
    given = panel.conditions
    here = f"here ({given.device['kind']}, {given.precision}, batch {given.batch})"
    spelled = " / ".join(f"{n:,}" for n in lengths)
    return Table(
        f"Published {name}, in multiples of softmax, at {spelled} tokens",
        ["attention", here, *sources],
        rows,
        [f"{CROSS}: out of memory. A {DASH} stands where softmax or the model has no figure."],
    )


def _published(quantity: str) -> dict[str, Values]:
    """Returns the values of each source, called by its name and hardware."""
    sources: dict[str, Values] = {}
    with Path(__file__).with_name("published_speed.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["quantity"] == quantity:
                values = sources.setdefault(f"{row['source']}; {row['hardware']}", {})
                value = None if row["value"] == "oom" else float(row["value"])
                values.setdefault(row["model"], {})[int(row["length"])] = value
    return sources


def _ours(panel: Panel, quantity: str) -> Values:
    values: Values = {}
    for name, row in panel.rows.items():
        mine = values.setdefault(name, {})
        for n, m in row.items():
            if m.status not in ("ok", "oom"):
                continue
            figures = m.figures
            if figures is None:
                mine[n] = None
            elif quantity.endswith("GB"):
                mine[n] = figures.peak_bytes
            elif figures.decoding:
                made = figures.decoding
                mine |= dict(zip(made.positions, made.tokens_per_second, strict=True))
            else:
                mine[n] = 1 / figures.step.median
    return values


def _ratios(values: Values, model: str, lengths: list[int]) -> str:
    """Returns the model's ratios to softmax at all lengths, or a dash where there is none."""
    row, base = values.get(model, {}), values.get("softmax", {})
    texts = []
    for n in lengths:
        if n in row and row[n] is None:
            texts.append(CROSS)
        elif row.get(n) and base.get(n):
            texts.append(f"{row[n] / base[n]:.2f}")
        else:
            texts.append(DASH)
    return DASH if set(texts) == {DASH} else " / ".join(texts)
