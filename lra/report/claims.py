"""What the two seed papers claim and this harness can test, and the page that judges it.

Left out is what it has no data for: language modelling, translation and fine-tuning.
"""

from collections.abc import Sequence
from pathlib import Path

from lra import cells
from lra.files import write_text
from lra.report.judging import (
    RULES,
    TEXTS,
    VERDICTS,
    Accuracy,
    Claim,
    Evidence,
    Finding,
    Growth,
    Multiple,
)
from lra.report.leaderboard import Board
from lra.report.panels import panels_of
from lra.report.table import Table

TABLE_4 = (
    "local",
    "linear",
    "reformer",
    "sparse",
    "sinkhorn",
    "linformer",
    "performer",
    "synthesizer",
    "longformer",
    "softmax",
    "bigbird",
)
"""The other rows of cosFormer's Table 4."""

COSFORMER_TABLE_5 = "cosFormer (Qin et al. 2022), Table 5"
RFA_TABLE_3 = "RFA (Peng et al. 2021), Table 3"
RFA_FIGURE_3 = "RFA (Peng et al. 2021), Figure 3"
"""As published_speed.csv calls them."""

GLUE = "mean of QQP, SST-2 and MNLI"

CLAIMS: dict[str, tuple[Claim, ...]] = {
    "cosFormer (Qin et al., ICLR 2022)": (
        Accuracy(
            "cosine re-weighting helps",
            "Table 6",
            "+1.03 (55.23, 54.20)",
            "cosformer",
            ("linear feature=relu",),
        ),
        Accuracy(
            "ReLU beats identity",
            "Table 1",
            f"+12.62 ({GLUE})",
            "linear feature=relu",
            ("linear feature=identity",),
        ),
        Accuracy(
            "ReLU beats leaky ReLU",
            "Table 1",
            f"+6.56 ({GLUE})",
            "linear feature=relu",
            ("linear feature=leaky_relu",),
        ),
        Accuracy(
            "cosFormer beats softmax",
            "Table 4",
            "+0.84 (55.23, 54.39)",
            "cosformer",
            ("softmax",),
        ),
        Accuracy(
            "cosFormer is the best of twelve",
            "Table 4",
            "+0.22 (55.23, 55.01)",
            "cosformer",
            TABLE_4,
        ),
        Growth("training time is linear", "abstract", "cosformer", "train seconds", 1),
        Growth("training memory is linear", "abstract", "cosformer", "train memory", 1),
        Multiple(
            "trains faster than softmax at 2,048",
            COSFORMER_TABLE_5,
            "cosformer",
            "train steps/s",
            2048,
        ),
        Multiple(
            "trains faster than softmax at 4,096",
            COSFORMER_TABLE_5,
            "cosformer",
            "train steps/s",
            4096,
        ),
        Multiple(
            "infers faster than softmax at 2,048",
            COSFORMER_TABLE_5,
            "cosformer",
            "infer steps/s",
            2048,
        ),
        Multiple(
            "infers faster than softmax at 4,096",
            COSFORMER_TABLE_5,
            "cosformer",
            "infer steps/s",
            4096,
        ),
    ),
    "RFA (Peng et al., ICLR 2021)": (
        Accuracy(
            "RFA beats softmax on text tasks",
            "Table 3",
            "+0.3 (53.0, 52.7)",
            "rfa",
            ("softmax",),
            TEXTS,
        ),
        Accuracy(
            "RFA beats linear attention on text tasks",
            "Table 3",
            "+8.0 (53.0, 45.0)",
            "rfa",
            ("linear",),
            TEXTS,
        ),
        Accuracy(
            "Gaussian features beat arc-cosine ones",
            "Table 1",
            "27.5, 28.1 (perplexity of WikiText-103)",
            "rfa",
            ("rfa kernel=arccos",),
            TEXTS,
        ),
        Growth("training time is linear", "abstract", "rfa", "train seconds", 1),
        Growth("training memory is linear", "abstract", "rfa", "train memory", 1),
        Multiple("trains faster than softmax at 1,024", RFA_TABLE_3, "rfa", "train steps/s", 1024),
        Multiple("trains faster than softmax at 4,096", RFA_TABLE_3, "rfa", "train steps/s", 4096),
        Multiple(
            "trains in less memory than softmax at 4,096", RFA_TABLE_3, "rfa", "train GB", 4096
        ),
        Growth("a token of generation takes constant time", "Figure 3", "rfa", "decode seconds", 0),
        Growth("generation has a constant state", "Figure 3", "rfa", "decode state", 0),
        Multiple(
            "generates faster than softmax at 2,048", RFA_FIGURE_3, "rfa", "decode tokens/s", 2048
        ),
        Multiple(
            "generates in less memory than softmax at 2,048", RFA_FIGURE_3, "rfa", "decode GB", 2048
        ),
    ),
}


def write(boards: Sequence[Board], stores: Sequence[Path], out: Path) -> Path:
    """Writes ``claims.md`` and prints how many claims got which verdict.

    Args:
        boards: The leaderboards of all protocols.
        stores: Files of cells.
        out: The folder.
    """
    panels = [panel for path in stores for panel in panels_of(cells.load(path))]
    evidence = Evidence(boards, panels)
    judged = {
        paper: [(claim, claim.judged(evidence)) for claim in claims]
        for paper, claims in CLAIMS.items()
    }
    path = out / "claims.md"
    verdicts = [finding.verdict for found in judged.values() for _, finding in found]
    told = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in VERDICTS)
    count = f"{len(verdicts)} claims: {told}."
    write_text(path, _page(judged, count))
    print(f"claims of the seed papers in {path}: {told}")
    return path


def _page(judged: dict[str, list[tuple[Claim, Finding]]], count: str) -> str:
    sections = ["# Claims of the seed papers", count, "\n".join(RULES)]
    missing: dict[str, list[str]] = {}
    number = 0
    for paper, found in judged.items():
        rows = []
        for claim, finding in found:
            number += 1
            rows.append(
                [
                    f"{number}. {claim.text}",
                    finding.verdict,
                    finding.place,
                    claim.source,
                    claim.paper,
                    finding.ours,
                    finding.interval,
                ]
            )
            for command in finding.commands:
                missing.setdefault(command, []).append(str(number))
        columns = ["claim", "verdict", "measured on", "source", "paper", "ours", "95 % interval"]
        sections.append(Table(paper, columns, rows, left=5).markdown(level=2))
    if missing:
        lines = [f"{c}   # {', '.join(numbers)}" for c, numbers in missing.items()]
        block = "\n".join(["```sh", *lines, "```"])
        sections += ["## What measures the rest", block]
    sections.append("Made by `lra report` from the records of runs and the cells of `lra bench`.")
    return "\n\n".join(sections) + "\n"
