"""The order of examples, and the seeded choice of those of each split."""

import random
from itertools import pairwise

import numpy as np
import pytest

from lra.tasks._splits import Examples, check_choice, choose, tell_other_sizes

ALL = dict.fromkeys(("train", "val", "test"))


def listed(places):
    return {name: chosen.tolist() for name, chosen in places.items()}


def test_examples_are_sorted_by_content_and_then_by_label_whatever_their_order_was():
    given = [(b"b", 1), (b"a", 1), (b"ab", 0), (b"a", 0), (b"\xff", 0), (b"b", 1)]
    for seed in range(5):
        shuffled = random.Random(seed).sample(given, len(given))
        examples = Examples.of(*map(list, zip(*shuffled, strict=True)))
        assert len(examples) == 6
        assert examples.contents == [b"a", b"a", b"ab", b"b", b"b", b"\xff"]
        assert examples.labels.tolist() == [0, 1, 0, 1, 1, 0]
        assert examples.labels.dtype == np.uint8


def test_a_tenth_of_the_training_set_is_for_validation_and_all_of_the_test_set_for_test():
    places = choose(1_239, 7, ALL, seed=0)
    assert [len(places[name]) for name in ALL] == [1_239 - 123, 123, 7]
    assert sorted([*places["train"], *places["val"]]) == list(range(1_239))
    assert places["test"].tolist() == list(range(7))
    for chosen in places.values():
        assert (np.diff(chosen) > 0).all()


def test_the_choice_is_random_and_depends_on_the_seed_alone():
    # A tenth of 10,000 has 500 places in the first half, with a standard deviation of 15.
    val = choose(10_000, 10, ALL, seed=0)["val"]
    assert abs(int((val < 5_000).sum()) - 500) < 60
    np.testing.assert_array_equal(val, choose(10_000, 10, ALL, seed=0)["val"])
    other = choose(10_000, 10, ALL, seed=1)["val"]
    assert len(np.intersect1d(val, other)) < 160  # 100 by chance, with a deviation of 9


def test_the_choice_of_a_seed_never_changes():
    places = choose(20, 6, ALL | {"train": 4, "test": 3}, seed=0)
    assert listed(places) == {"train": [4, 9, 13, 15], "val": [0, 10], "test": [0, 2, 5]}


def test_legacy_validation_is_the_test_set_and_all_training_examples_are_trained_on():
    places = choose(30, 20, ALL, seed=0, validation="legacy")
    assert len(places["train"]) == 30
    assert places["val"].tolist() == places["test"].tolist() == list(range(20))


@pytest.mark.parametrize("validation", ["tenth", "legacy"])
def test_a_smaller_number_gives_a_subset_and_leaves_the_other_splits_alone(validation):
    whole = choose(1_000, 300, ALL, 0, validation)
    for name in ALL:
        subsets = [
            choose(1_000, 300, ALL | {name: count}, 0, validation) for count in (1, 20, 50, None)
        ]
        for less, more in pairwise(subsets):
            assert set(less[name]) < set(more[name])
        assert [len(places[name]) for places in subsets[:3]] == [1, 20, 50]
        for places in subsets:
            assert {n: c for n, c in listed(places).items() if n != name} == {
                n: c for n, c in listed(whole).items() if n != name
            }


def test_a_small_test_set_is_not_the_first_examples():
    chosen = choose(100, 1_000, ALL | {"test": 100}, 0)["test"]
    assert 300 < chosen.mean() < 700


def test_every_number_that_is_more_than_there_is_is_told_at_once():
    with pytest.raises(ValueError, match="num_train") as error:
        choose(100, 20, {"train": 91, "val": 11, "test": 21}, 0)
    assert str(error.value).splitlines() == [
        "num_train=91, but there are only 90 examples.",
        "num_val=11, but there are only 10 examples.",
        "num_test=21, but there are only 20 examples.",
    ]


@pytest.mark.parametrize(
    ("train", "test", "empty"), [(9, 5, ["val"]), (0, 5, ["train", "val"]), (50, 0, ["test"])]
)
def test_a_split_without_examples_is_refused(train, test, empty):
    with pytest.raises(ValueError, match="There is no example") as error:
        choose(train, test, ALL, 0)
    assert str(error.value).splitlines() == [
        f"There is no example for {name}: the source has {train} for training and {test} for test."
        for name in empty
    ]


def test_options_of_a_choice_are_checked():
    assert check_choice(0, (None, 1, 5)) == []
    assert check_choice(-1, (0, None, None)) == [
        "split_seed must be at least 0, not -1.",
        "num_train, num_val and num_test must be at least 1, or null for all.",
    ]


def test_other_sizes_than_the_published_ones_are_told_in_one_line(capsys):
    published = {"train": 25_000, "test": 10}
    tell_other_sizes("IMDb", published, published)
    assert capsys.readouterr() == ("", "")
    tell_other_sizes("IMDb", {"train": 12_500, "test": 10}, published)
    expected = "This is not the published IMDb data set: train has 12,500 examples, not 25,000.\n"
    assert capsys.readouterr() == ("", expected)
