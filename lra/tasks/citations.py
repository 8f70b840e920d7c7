"""Citations: whether one paper cites another, from bytes; pairs made from papers and their links.

The same kind of data as Retrieval, for where its archive is not to be had. No document is in two
splits, and each is as often in negative pairs as in positive ones, on either side.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lra.tasks import register_task
from lra.tasks._citations import make_pairs, split_documents
from lra.tasks._citations_files import find_files, read_links, read_papers
from lra.tasks._pairs import VOCAB_SIZE, pieces
from lra.tasks.base import SPLITS, Built, Task

_NO_PAIRS = (
    "The {0} split has no links of which pairs can be made. Set another task.split_seed or a "
    "larger task.num_{0}, or use more documents."
)


@register_task("citations")
class Citations(Task):
    """Pairs of papers: the first cites the second, or there is no link between them."""

    @dataclass(frozen=True)
    class Config:
        """Options of Citations.

        Attributes:
            max_length: Bytes kept of each text, the first ones.
            split_seed: Seed of the split of the documents, of the negative pairs and of the order.
            num_train: Training examples, half of each class, of links chosen at random; null: all.
            num_val: Validation examples, likewise.
            num_test: Test examples, likewise.
        """

        max_length: int = 4_000
        split_seed: int = 0
        num_train: int | None = None
        num_val: int | None = None
        num_test: int | None = None

        def __post_init__(self) -> None:
            sizes = (self.num_train, self.num_val, self.num_test)
            if any(size is not None and (size < 2 or size % 2) for size in sizes):
                raise ValueError(
                    f"num_train, num_val and num_test must be even and at least 2, as half of the "
                    f"pairs are of each class, or null for all; not {', '.join(map(str, sizes))}."
                )
            if self.max_length < 1 or self.split_seed < 0:
                raise ValueError("max_length must be at least 1, and split_seed at least 0.")

    name = "citations"
    version = 1
    dual = True
    num_classes = 2
    vocab_size = VOCAB_SIZE

    @property
    def max_len(self) -> int:
        """Bytes kept of each text."""
        return self.config.max_length

    def source_files(self) -> dict[str, Path]:
        """Returns the two files; nothing where they are not both there."""
        try:
            return find_files(self.data_dir)
        except ValueError:
            return {}

    def locate(self) -> None:
        """Looks for the two files."""
        find_files(self.data_dir)

    def origin(self) -> str:
        """Returns where the papers would be read from."""
        try:
            return f"files in {find_files(self.data_dir)['papers'].parent}"
        except ValueError as error:
            return str(error)

    def build(self) -> Built:
        """Reads the documents and their links, and makes the pairs of each split."""
        paths = find_files(self.data_dir)
        papers = read_papers(paths["papers"], self.config.max_length)
        links = read_links(paths["citations"], {key: i for i, key in enumerate(papers)})
        texts = list(papers.values())
        rows = self._rows(links, len(texts))
        splits = {
            name: pieces((texts[i], texts[j], label) for i, j, label in of_split.tolist())
            for name, of_split in rows.items()
        }
        return Built(splits, f"{len(texts):,} documents with {len(links):,} citation links")

    def _rows(self, links: np.ndarray, documents: int) -> dict[str, np.ndarray]:
        """Returns by split the examples in their order, rows (first, second, label) of int64."""
        rows, problems = {}, []
        for name, inside in split_documents(documents, self.config.split_seed).items():
            rng = np.random.default_rng((self.config.split_seed, 1 + SPLITS.index(name)))
            known = links[inside[links].all(axis=1)]
            count = getattr(self.config, f"num_{name}") or 2 * len(known)
            if not len(known):
                problems.append(_NO_PAIRS.format(name))
                continue
            if count > 2 * len(known):
                problems.append(
                    f"The {name} split has {2 * len(known):,} pairs, fewer than "
                    f"task.num_{name}={count}. Set it lower, or to null for all."
                )
                continue
            # Before the negatives are made, so that these have the documents of the positives.
            chosen = np.sort(rng.permutation(len(known))[: count // 2])
            positives, negatives = _make_pairs(name, known[chosen], known, rng)
            if not len(positives):
                problems.append(_NO_PAIRS.format(name))
            labelled = [
                np.column_stack([pairs, np.full(len(pairs), label)])
                for label, pairs in enumerate((negatives, positives))
            ]
            rows[name] = rng.permutation(np.concatenate(labelled))
        if problems:
            raise ValueError("\n".join(problems))
        return rows


def _make_pairs(
    name: str, links: np.ndarray, known: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the positive and the negative pairs of a split, of whose links some may be left out.

    Where some are, one line on standard error tells how many.
    """
    positives, negatives = make_pairs(links, known, rng)
    if left_out := len(links) - len(positives):
        print(
            f"Citations: {left_out:,} of {len(links):,} links of the {name} split are left out, as "
            f"there are too few pairs without a link for their documents.",
            file=sys.stderr,
        )
    return positives, negatives
