"""ListOps: the value of a nested list expression, ten classes (Nangia & Bowman 2018).

Expressions of MIN, MAX, MED (floor of the median) and SM (sum modulo 10) over digits, up to ten
levels deep, with the settings of the Long Range Arena (Tay et al. 2021). They are generated here or
read from its official files; round parentheses, which carry no information, are no tokens.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from lra.tasks import register_task
from lra.tasks._listops import VOCAB, evaluate
from lra.tasks._listops_files import find_files, read_files
from lra.tasks._listops_generator import generate
from lra.tasks._official import origin
from lra.tasks._splits import tell_other_sizes
from lra.tasks.base import SPLITS, Built, Split, Task


@register_task("listops")
class ListOps(Task):
    """ListOps expressions: generated, distinct across all splits, or those of the release."""

    @dataclass(frozen=True)
    class Config:
        """Options of ListOps.

        Attributes:
            source: ``generated``, by the options below; or ``official``: the files of the Long
                Range Arena release, found in ``data_dir``, to which no other option applies.
            num_train: Training examples.
            num_val: Validation examples.
            num_test: Test examples.
            min_length: Expressions have more tokens than this.
            max_length: Expressions have fewer tokens than this.
            max_depth: Digits only from this depth on; the root has depth 1.
            max_args: Operators have 2 up to this many arguments.
            data_seed: Seed of the generator.
        """

        source: Literal["generated", "official"] = "generated"
        num_train: int = 96_000
        num_val: int = 2_000
        num_test: int = 2_000
        min_length: int = 500
        max_length: int = 2_000
        max_depth: int = 10
        max_args: int = 10
        data_seed: int = 0

        def __post_init__(self) -> None:
            if min(self.num_train, self.num_val, self.num_test) < 1:
                raise ValueError("num_train, num_val and num_test must be at least 1.")
            if self.source == "official":
                self._refuse_generator_options()

        def _refuse_generator_options(self) -> None:
            changed = [
                f"{field.name}={getattr(self, field.name)}"
                for field in fields(self)
                if field.name != "source" and getattr(self, field.name) != field.default
            ]
            if changed:
                raise ValueError(
                    f"source=official takes the released files as they are; options of the "
                    f"generator must keep their defaults, but there is {', '.join(changed)}. Leave "
                    f"them out, and use a protocol that sets none of them, such as "
                    f"protocol=nystrom."
                )

    name = "listops"
    version = 1
    sources = frozenset({"source"})
    num_classes = 10
    vocab_size = len(VOCAB)

    @property
    def max_len(self) -> int:
        """The longest expression that the options admit."""
        return self.config.max_length - 1

    def source_files(self) -> dict[str, Path]:
        """Returns the official files; nothing where they are not all there, or not asked for."""
        if self.config.source == "generated":
            return {}
        try:
            return find_files(self.data_dir)
        except ValueError:
            return {}

    def locate(self) -> None:
        """Looks for the official files, where they are to be read."""
        if self.config.source == "official":
            find_files(self.data_dir)

    def origin(self) -> str:
        """Returns what a build would do, and where official files are."""
        return origin(self.config.source, lambda: find_files(self.data_dir)["train"].parent)

    def build(self) -> Built:
        """Reads the official files, or generates all splits from one stream of expressions."""
        config = self.config
        if config.source == "official":
            splits = read_files(find_files(self.data_dir), self.max_len)
            found = {name: len(split) for name, split in splits.items()}
            released = (config.num_train, config.num_val, config.num_test)
            tell_other_sizes("ListOps", found, dict(zip(SPLITS, released, strict=True)))
            source = "files of the Long Range Arena release"
        else:
            splits = self._generate()
            source = f"generated, data_seed {config.data_seed}"
        return Built({name: [split] for name, split in splits.items()}, source, _rules)

    def _generate(self) -> dict[str, Split]:
        config = self.config
        sizes = (config.num_train, config.num_val, config.num_test)
        total = sum(sizes)
        with tqdm(total=total, desc="ListOps expressions", unit="", unit_scale=True) as bar:
            tokens, offsets, labels = generate(
                total,
                min_length=config.min_length,
                max_length=config.max_length,
                max_depth=config.max_depth,
                max_args=config.max_args,
                seed=config.data_seed,
                processes=_processes(total),
                progress=bar.update,
            )
        everything = Split.of(tokens, offsets, labels)
        ends = np.cumsum((0, *sizes)).tolist()
        return {name: everything.take(*ends[i : i + 2]) for i, name in enumerate(SPLITS)}


def _rules(splits: Mapping[str, Split]) -> dict[str, float]:
    """Scores evaluation that sees the root operator only, or is cut below a depth."""
    test = splits["test"]
    names = {0: "root operator only"} | {d: f"evaluation cut at depth {d}" for d in (1, 2, 3)}
    return {
        name: float(np.mean([evaluate(test[i], cut) for i in range(len(test))] == test.labels))
        for cut, name in names.items()
    }


def _processes(total: int) -> int:
    """Returns one where starting more processes would take longer than the work."""
    return 1 if total < 50_000 else os.cpu_count() or 1
