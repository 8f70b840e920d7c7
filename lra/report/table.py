"""One table as Markdown and as LaTeX."""

from collections.abc import Sequence
from dataclasses import dataclass

DASH, CROSS = "–", "✗"

TEX = {
    "\\": r"\textbackslash{}",
    "_": r"\_",
    "%": r"\%",
    "&": r"\&",
    "#": r"\#",
    "$": r"\$",
    "{": r"\{",
    "}": r"\}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    ">": r"$>$",
    "<": r"$<$",
    "≤": r"$\leq$",
    "×": r"$\times$",
    CROSS: r"$\times$",
    DASH: "--",
}


@dataclass(frozen=True)
class Table:
    """Cells of text under a heading; the first column is aligned to the left.

    Attributes:
        heading: One line.
        columns: Names of the columns.
        rows: As many cells each.
        notes: Sentences below the table.
    """

    heading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """Returns heading, table and notes."""
        cells = [self.columns, *self.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

        def line(row: Sequence[str]) -> str:
            first, *others = zip(row, widths, strict=True)
            padded = [first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)]
            return f"| {' | '.join(padded)} |"

        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        lines = [line(self.columns), f"| {' | '.join(rule)} |", *map(line, self.rows)]
        parts = [
            f"### {self.heading}",
            "\n".join(lines),
            *([" ".join(self.notes)] * bool(self.notes)),
        ]
        return "\n\n".join(parts)

    def tex(self, conditions: str) -> str:
        """Returns a floating table, for the package booktabs; the caption has the conditions."""
        aligned = "l" + "r" * (len(self.columns) - 1)
        lines = [" & ".join(map(escaped, row)) + r" \\" for row in self.rows]
        caption = escaped(" ".join([self.heading + ".", conditions, *self.notes]).replace("`", ""))
        return "\n".join(
            [
                r"\begin{table}",
                r"\centering",
                rf"\caption{{{caption}}}",
                rf"\begin{{tabular}}{{{aligned}}}",
                r"\toprule",
                " & ".join(map(escaped, self.columns)) + r" \\",
                r"\midrule",
                *lines,
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
            ]
        )


def escaped(text: str) -> str:
    """Returns text with what LaTeX would take for commands escaped."""
    return "".join(TEX.get(character, character) for character in text)
