"""Tables of generation: time a token by position, and the memory of the state."""

from lra.report.panels import Panel
from lra.report.table import CROSS, DASH, Table

FLAT = 0.15
"""Times by position that differ by no more than this part are called flat."""


def decoding_tables(panel: Panel) -> list[Table]:
    """Returns a table for each length generated."""
    return [_table(panel, length) for length in panel.lengths]


def _table(panel: Panel, length: int) -> Table:
    cells = {name: row[length] for name, row in panel.rows.items() if length in row}
    known = {name: m.figures for name, m in cells.items() if m.figures and m.figures.decoding}
    positions = next((f.decoding.positions for f in known.values()), [])
    base = known.get("softmax")
    rows = []
    for name, m in cells.items():
        figures = known.get(name)
        if figures is None:
            told = {"oom": CROSS, "timeout": f">{m.seconds:g} s"}.get(m.status, m.status)
            rows.append([name, told, *[DASH] * (len(positions) + 6)])
            continue
        made = figures.decoding
        constant = "constant" if len(set(made.state_bytes)) == 1 else "growing"
        rows.append(
            [
                name,
                *(f"{1e3 * t:.3g}" for t in made.seconds),
                DASH if base is None else f"{base.decoding.seconds[-1] / made.seconds[-1]:.2f}",
                ("flat, " if made.variation <= FLAT else "") + f"{made.variation:.0%}",
                f"{made.tokens_per_second[-1]:,.0f}",
                f"{made.state_bytes[-1] / 1e6:,.2f}",
                constant,
                DASH if figures.peak_bytes is None else f"{figures.peak_bytes / 1e6:,.0f}",
            ]
        )
    columns = ["attention", *(f"ms at {p:,}" for p in positions)]
    columns += ["speed vs softmax", "variation", "tokens/s", "state MB", "state", "peak MB"]
    rows = [row[: len(columns)] for row in rows]
    return Table(
        f"Milliseconds a token, generating {length:,} tokens",
        columns,
        rows,
        [
            "Medians of steps to each position, taken in turn, all sequences at once; softmax has "
            "a cache made for the whole length. Variation: the slowest position over the fastest; "
            f"flat up to {FLAT:.0%}. Tokens/s: of all sequences, over the whole generation."
        ],
    )
