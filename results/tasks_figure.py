"""Draws results/tasks.png, an example of each task, from prepared data.

    python results/tasks_figure.py [data_dir=FOLDER] [cache_dir=FOLDER]

Pathfinder and Path-X are generated, a few images each; Text, Image and Citations need their data in
``data_dir``. Retrieval has the form of Citations.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from lra.compose import load
from lra.tasks._listops import decode
from lra.tasks.base import Split

FEW = ("task.num_train=40", "task.num_val=16", "task.num_test=16")
SHIP = 8  # of the classes of CIFAR-10
COLUMNS, ROWS = 47, 8  # characters of a panel of text
TEXT = {"family": "monospace", "size": 6.4, "va": "top", "linespacing": 1.4}


def test_split(task: str, *overrides: str) -> Split:
    """Returns the test examples of a task, prepared if need be."""
    return load([f"task={task}", *overrides, *sys.argv[1:]]).build_task().prepare().splits["test"]


def first_of(split: Split, label: int, longest: int = 1 << 30) -> int:
    """Returns the first example of a class that has at most so many tokens."""
    fits = (index for index in range(len(split)) if split.lengths[index].max() <= longest)
    return next(index for index in fits if split.labels[index] == label)


def beginning(text: str, rows: int) -> str:
    """Returns the first rows of a text in a panel, with an ellipsis if there is more."""
    flat = " ".join(text.split())
    lines = [flat[i : i + COLUMNS] for i in range(0, COLUMNS * rows, COLUMNS)]
    if len(flat) > COLUMNS * rows:
        lines[-1] = lines[-1][:-2] + " …"
    return "\n".join(filter(None, lines))


def read(tokens: np.ndarray) -> str:
    """Returns the text of byte tokens."""
    return (tokens - 1).tobytes().decode(errors="replace")


def write_panel(axes: Axes, title: str, texts: list[str], answer: str) -> None:
    """Shows the example of a task of text."""
    axes.set_title(title, loc="left", size=9, weight="bold")
    axes.axis("off")
    for row, text in enumerate(texts):
        color = "tab:blue" if row else "black"
        axes.text(0, 1 - row / 2, text, color=color, transform=axes.transAxes, **TEXT)
    axes.text(0, -0.08, f"= {answer}", size=8, va="top", transform=axes.transAxes)


def draw_panel(axes: Axes, title: str, split: Split, index: int, answer: str) -> None:
    """Shows the example of a task of images."""
    side = round(len(split[index]) ** 0.5)
    axes.imshow(split[index].reshape(side, side), cmap="gray", interpolation="nearest")
    axes.set_title(title, loc="left", size=9, weight="bold")
    axes.set_xlabel(f"= {answer}", size=8, loc="left")
    axes.set_xticks([])
    axes.set_yticks([])


def main() -> None:
    """Draws the figure."""
    figure = plt.figure(figsize=(9, 4.3), dpi=150, layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[0.75, 1.2])
    texts, images = above.subplots(1, 3), below.subplots(1, 4)

    listops = test_split("listops", "protocol=quick")
    index = first_of(listops, 7, longest=150)
    expression = beginning(decode(listops[index]), ROWS)
    write_panel(texts[0], "ListOps", [expression], str(listops.labels[index]))

    text = test_split("text")
    review = beginning(read(text[first_of(text, 1)]), ROWS)
    write_panel(texts[1], "Text", [review], "a positive review")

    citations = test_split("citations")
    index = first_of(citations, 1)
    papers = [beginning(read(citations[index, part]), ROWS // 2 - 1) for part in range(2)]
    write_panel(texts[2], "Retrieval, Citations", papers, "the first paper cites the second")

    image = test_split("image")
    draw_panel(images[0], "Image", image, first_of(image, SHIP), "ship")
    pathfinder = test_split("pathfinder", *FEW)
    draw_panel(images[1], "Pathfinder", pathfinder, first_of(pathfinder, 1), "connected")
    draw_panel(images[2], "Pathfinder", pathfinder, first_of(pathfinder, 0), "not connected")
    pathx = test_split("pathx", *FEW)
    draw_panel(images[3], "Path-X", pathx, first_of(pathx, 1), "connected")

    figure.savefig(Path(__file__).with_name("tasks.png"), bbox_inches="tight")


if __name__ == "__main__":
    main()
