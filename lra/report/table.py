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
    "|": r"\textbar{}",
    ">": r"$>$",
    "<": r"$<$",
    "≤": r"$\leq$",
    "×": r"$\times$",
    "±": r"$\pm$",
    "−": "$-$",
    "†": r"$^\dagger$",
    "‡": r"$^\ddagger$",
    "§": r"$^\S$",
    "¶": r"$^\P$",
    CROSS: r"$\times$",
    DASH: "--",
}


@dataclass(frozen=True)
class Table:
    """Cells of text under a heading.

    Attributes:
        heading: One line.
        columns: Names of the columns.
        rows: As many cells each; one between two asterisks is emphasised.
        notes: Sentences below the table.
        above: Sentences between heading and table.
        left: How many columns are aligned to the left.
    """

    heading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    above: Sequence[str] = ()
    left: int = 1

    def without_empty_columns(self) -> "Table":
        """Returns the table without columns of figures in which nothing stands."""
        kept = [
            i
            for i in range(len(self.columns))
            if i < self.left or {row[i] for row in self.rows} - {DASH}
        ]
        rows = [[row[i] for i in kept] for row in self.rows]
        columns = [self.columns[i] for i in kept]
        return Table(self.heading, columns, rows, self.notes, self.above, self.left)

    def markdown(self, level: int = 3) -> str:
        """Returns heading (of that level), table and notes."""
        table = [[cell.replace("|", r"\|") for cell in row] for row in (self.columns, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]

        def line(row: Sequence[str]) -> str:
            padded = [
                cell.ljust(width) if i < self.left else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            return f"| {' | '.join(padded)} |"

        rule = ["-" * w if i < self.left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
        lines = [line(table[0]), f"| {' | '.join(rule)} |", *map(line, table[1:])]
        parts = [f"{'#' * level} {self.heading}", *self.above, "\n".join(lines)]
        if self.notes:
            parts.append("\\\n".join(self.notes))
        return "\n\n".join(parts)

    def tex(self, conditions: str) -> str:
        """Returns a floating table, for the package booktabs; the caption has the conditions."""
        aligned = "l" * self.left + "r" * (len(self.columns) - self.left)
        heading = self.heading[0].upper() + self.heading[1:]
        caption = [f"{heading}.", conditions, *self.above, *self.notes]
        return "\n".join(
            [
                r"\begin{table}",
                r"\centering\scriptsize\setlength{\tabcolsep}{3pt}",
                rf"\caption{{{escaped(' '.join(filter(None, caption)).replace('`', ''))}}}",
                rf"\begin{{tabular}}{{{aligned}}}",
                r"\toprule",
                " & ".join(map(escaped, self.columns)) + r" \\",
                r"\midrule",
                *(" & ".join(map(_cell, row)) + r" \\" for row in self.rows),
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
            ]
        )


def signed(value: float) -> str:
    """Returns a difference with its sign and two places."""
    return f"{value:+.2f}".replace("-", "−")


def escaped(text: str) -> str:
    """Returns text with what LaTeX would take for commands escaped."""
    return "".join(TEX.get(character, character) for character in text)


def _cell(text: str) -> str:
    if len(text) > 2 and text[0] == text[-1] == "*":
        return rf"\emph{{{escaped(text[1:-1])}}}"
    return escaped(text)
