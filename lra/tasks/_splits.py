"""Examples in an order that no source decides, and the seeded choice of those of each split."""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

_TRAIN, _TEST = 1, 2  # random streams of their own


@dataclass(frozen=True)
class Examples:
    """Labelled contents, sorted by content and then by label, wherever they came from.

    Attributes:
        contents: What each example holds, as bytes.
        labels: Class of each example, (examples,) uint8.
    """

    contents: list[bytes]
    labels: np.ndarray

    @classmethod
    def of(cls, contents: list[bytes], labels: list[int]) -> "Examples":
        """Returns the examples in their order."""
        order = sorted(range(len(contents)), key=lambda i: (contents[i], labels[i]))
        chosen = np.array(labels, dtype=np.uint8)[order]
        return cls([contents[i] for i in order], chosen)

    def __len__(self) -> int:
        return len(self.contents)


def check_choice(seed: int, wanted: Iterable[int | None]) -> list[str]:
    """Returns what is wrong with the options of a choice, one sentence each.

    Args:
        seed: The option split_seed.
        wanted: The options num_train, num_val and num_test.
    """
    problems = []
    if seed < 0:
        problems.append(f"split_seed must be at least 0, not {seed}.")
    if any(count is not None and count < 1 for count in wanted):
        problems.append("num_train, num_val and num_test must be at least 1, or null for all.")
    return problems


def choose(
    train: int,
    test: int,
    wanted: Mapping[str, int | None],
    seed: int,
    validation: Literal["tenth", "legacy"] = "tenth",
) -> dict[str, np.ndarray]:
    """Chooses the examples of each split: of a smaller number a subset of those of a larger one.

    Args:
        train: The number of examples of the training set.
        test: The number of examples of the test set.
        wanted: How many examples each split gets; None for all there are.
        seed: Seed of the choice.
        validation: ``tenth``: a tenth of the training set, rounded down, is for validation only;
            ``legacy``: examples for validation are examples of the test set.

    Returns:
        Ascending places by split, int64: in the training set for train, in the test set for test,
        and for val in the set that ``validation`` says.

    Raises:
        ValueError: If a split would be empty, or more examples are wanted than there are.
    """
    training, testing = (
        np.random.default_rng((seed, stream)).permutation(count)
        for stream, count in ((_TRAIN, train), (_TEST, test))
    )
    pools = {"train": training, "val": testing, "test": testing}
    if validation == "tenth":
        pools["val"], pools["train"] = np.split(training, [train // 10])
    problems = []
    for name, pool in pools.items():
        asked = wanted[name]
        if not len(pool):
            problems.append(
                f"There is no example for {name}: the source has {train} for training and {test} "
                f"for test."
            )
        elif asked is not None and asked > len(pool):
            problems.append(f"num_{name}={asked}, but there are only {len(pool)} examples.")
    if problems:
        raise ValueError("\n".join(problems))
    return {name: np.sort(pool[: wanted[name]]) for name, pool in pools.items()}


def tell_other_sizes(title: str, found: Mapping[str, int], published: Mapping[str, int]) -> None:
    """Tells where a data set has not its published size; a download may lack a file."""
    told = [
        f"{name} has {count:,} examples, not {published[name]:,}"
        for name, count in found.items()
        if count != published[name]
    ]
    if told:
        print(f"This is not the published {title} data set: {', '.join(told)}.", file=sys.stderr)
