"""A table of text cells as aligned Markdown and as LaTeX."""

from collections.abc import Sequence

DASH = "–"

LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "†": r"$^\dagger$",
    "‡": r"$^\ddagger$",
    "§": r"$^\S$",
    "¶": r"$^\P$",
    "✗": r"$\times$",
    "×": r"$\times$",
    "±": r"$\pm$",
    "−": "$-$",
    DASH: "--",
}


class Table:
    """Text cells under headers; a column in which nothing stands is left out.

    Args:
        headers: Names of the columns.
        rows: Cells of each row, as many as headers; `DASH` stands for nothing. A cell between
            two asterisks is emphasised.
        left: How many columns are aligned to the left; the others hold figures.
    """

    def __init__(
        self, headers: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1
    ) -> None:
        kept = [i for i in range(len(headers)) if i < left or {row[i] for row in rows} - {DASH}]
        self.headers = [headers[i] for i in kept]
        self.rows = [[row[i] for i in kept] for row in rows]
        self.left = left

    def markdown(self) -> str:
        """Returns the table as Markdown with aligned columns."""
        cells = [[_escaped(cell) for cell in row] for row in [self.headers, *self.rows]]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = []
        for row in cells:
            padded = [
                cell.ljust(w) if i < self.left else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append(f"| {' | '.join(padded)} |")
        rule = ["-" * w if i < self.left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
        lines.insert(1, f"| {' | '.join(rule)} |")
        return "\n".join(lines)

    def latex(self, caption: str, notes: Sequence[str] = ()) -> str:
        """Returns a ``table`` that needs the package booktabs.

        Args:
            caption: What the table shows, as plain text.
            notes: Lines below it, as plain text.
        """
        columns = "l" * self.left + "r" * (len(self.headers) - self.left)
        lines = [
            r"\begin{table}",
            r"\centering\scriptsize\setlength{\tabcolsep}{3pt}",
            rf"\caption{{{latex(caption)}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            " & ".join(map(latex, self.headers)) + r" \\",
            r"\midrule",
            *(" & ".join(map(_latex_cell, row)) + r" \\" for row in self.rows),
            r"\bottomrule",
            r"\end{tabular}",
            *(rf"\par {latex(note)}" for note in notes),
            r"\end{table}",
        ]
        return "\n".join(lines)


def latex(text: str) -> str:
    """Returns ``text`` with LaTeX's special characters and the report's marks written out."""
    return "".join(LATEX.get(character, character) for character in text)


def _latex_cell(cell: str) -> str:
    if len(cell) > 2 and cell[0] == cell[-1] == "*":
        return rf"\emph{{{latex(cell[1:-1])}}}"
    return latex(cell)


def _escaped(cell: str) -> str:
    return cell.replace("|", r"\|")
