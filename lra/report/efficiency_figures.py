"""Figures of speed and memory by length, on logarithmic axes."""

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from lra.cells import Decoding, Figures
from lra.files import write_atomically
from lra.report.panels import Panel

MARKERS = "osD^vPX<>ph"
WORDS = {"train": "a training step", "infer": "an inference step"}

Line = tuple[list[float], list[float]]


def draw(path: Path, panels: Sequence[Panel], title: str) -> None:
    """Draws panels of equal conditions: time above memory, a column for each mode.

    Of generation: time a token and memory of the state by position, of the longest generation.
    """
    with rc_context({"text.parse_math": False}):  # a name with two dollar signs is no formula
        _draw(path, panels, title)


def _draw(path: Path, panels: Sequence[Panel], title: str) -> None:
    names = list(dict.fromkeys(name for panel in panels for name in panel.rows))
    styles = {name: _style(i, name) for i, name in enumerate(sorted(names, key=_softmax_first))}
    decoding = panels[0].mode == "decode"
    rows, columns = (1, 2) if decoding else (2, len(panels))
    width = 4.1 * columns + 1.8
    figure = Figure(figsize=(width, 3.6 * rows + 0.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    if decoding:
        panel = panels[0]
        _plot(axes[0][0], "ms a token", "position", styles, _decoded(panel, _token_ms))
        _plot(axes[0][1], "state, MB", "position", styles, _decoded(panel, _state_mb))
    else:
        for column, panel in enumerate(panels):
            word = WORDS[panel.mode]
            _plot(axes[0][column], f"seconds of {word}", "", styles, _lines(panel, _seconds))
            _plot(axes[1][column], f"peak MB of {word}", "length N", styles, _lines(panel, _peak))
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right center", fontsize=7.5, frameon=False)
    figure.suptitle(title, fontsize=9)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_atomically(path, lambda file: file.write(buffer.getvalue()))


def _softmax_first(name: str) -> tuple[bool, str]:
    return name != "softmax", name


def _style(index: int, name: str) -> dict[str, object]:
    """Returns a look of its own; softmax is thick and black."""
    if name == "softmax":
        return {"color": "black", "lw": 2.4, "marker": "o", "ms": 4, "zorder": 3}
    color = colormaps["tab20"]((2 * index - 2) % 20 + (index > 10))
    dash = "-" if index <= 10 else "--"
    return {"color": color, "lw": 1.2, "ls": dash, "marker": MARKERS[index % 11], "ms": 3.5}


def _plot(
    axes: Axes, title: str, below: str, styles: dict[str, dict], lines: dict[str, Line]
) -> None:
    for name, style in styles.items():
        x, y = lines.get(name, ([], []))
        axes.plot(x, y, label=name, **style)
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel(below, fontsize=8)
    if not any(y for _, y in lines.values()):
        return
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({value for x, _ in lines.values() for value in x})
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    values = [value for _, y in lines.values() for value in y]
    if max(values) > 10 * min(values):
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(labelsize=7.5, which="both")
    axes.grid(which="major", lw=0.4, alpha=0.5)


def _lines(panel: Panel, figure: Callable[..., float | None]) -> dict[str, Line]:
    lines = {}
    for name, row in panel.rows.items():
        points = [(n, figure(m.figures)) for n, m in sorted(row.items()) if m.figures]
        points = [(n, value) for n, value in points if value]
        lines[name] = ([n for n, _ in points], [value for _, value in points])
    return lines


def _decoded(panel: Panel, figure: Callable[..., list[float]]) -> dict[str, Line]:
    lines = {}
    for name, row in panel.rows.items():
        done = [m.figures.decoding for _, m in sorted(row.items()) if m.figures]
        if done and done[-1]:
            lines[name] = (done[-1].positions, figure(done[-1]))
    return lines


def _seconds(figures: Figures) -> float:
    return figures.step.median


def _peak(figures: Figures) -> float | None:
    return figures.peak_bytes and figures.peak_bytes / 1e6


def _token_ms(made: Decoding) -> list[float]:
    return [1e3 * t for t in made.seconds]


def _state_mb(made: Decoding) -> list[float]:
    return [size / 1e6 for size in made.state_bytes]
