"""The generator of ListOps expressions: what it promises, and how its trees are distributed.

Figures called "published" were measured on 20,000 trees of an independent re-implementation of
Google's generator; "exact" ones follow from the definition of the random trees.
"""

import hashlib
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_listops_expressions import ID, TYPICAL, deterministic, reference_value, write

from lra.tasks._listops import decode, evaluate
from lra.tasks._listops_generator import generate

STANDARD = {"min_length": 500, "max_length": 2000, "max_depth": 10, "max_args": 10}
PUBLISHED_N = 20_000


def expressions(tokens, offsets):
    return [tokens[start:end] for start, end in itertools.pairwise(offsets)]


def chi_square_is_plausible(observed, expected):
    """Whether counts fit: the statistic is within 4 standard deviations of its mean."""
    observed, expected = np.asarray(observed), np.asarray(expected)
    assert expected.min() > 5
    freedom = len(observed) - 1
    statistic = ((observed - expected) ** 2 / expected).sum()
    return statistic < freedom + 4 * (2 * freedom) ** 0.5


def agrees_with_published(proportion, published, n):
    """Whether two proportions, ours of n and the published one, differ by sampling error only."""
    error = (published * (1 - published) * (1 / n + 1 / PUBLISHED_N)) ** 0.5
    rounding = 0.0005
    return abs(proportion - published) < 4 * error + rounding


# The generator's promises


@pytest.fixture(scope="module")
def standard_set():
    return generate(20_000, **STANDARD, seed=0)


def test_the_arrays_fit_together(standard_set):
    tokens, offsets, labels = standard_set
    assert (tokens.dtype, offsets.dtype, labels.dtype) == (np.uint8, np.int64, np.uint8)
    assert (len(offsets), len(labels)) == (20_001, 20_000)
    assert (offsets[0], offsets[-1]) == (0, len(tokens))


def test_every_label_is_the_value_of_its_expression(standard_set):
    tokens, offsets, labels = standard_set
    for expression, label in zip(expressions(tokens, offsets[:5_001]), labels[:5_000], strict=True):
        assert evaluate(expression) == label

    small = {"min_length": 0, "max_length": 60, "max_depth": 4, "max_args": 6}
    tokens, offsets, labels = generate(20_000, **small, seed=1)
    for expression, label in zip(expressions(tokens, offsets), labels, strict=True):
        assert evaluate(expression) == label


def test_lengths_are_strictly_between_the_limits(standard_set):
    _, offsets, _ = standard_set
    assert np.diff(offsets).min() > 500
    assert np.diff(offsets).max() < 2000

    _, offsets, _ = generate(500, min_length=8, max_length=11, max_depth=3, max_args=10, seed=0)
    assert set(np.diff(offsets)) == {9, 10}


def test_expressions_are_distinct(standard_set):
    tokens, offsets, _ = standard_set
    assert len({expression.tobytes() for expression in expressions(tokens, offsets)}) == 20_000


TWO_DIGITS = {"min_length": 3, "max_length": 5, "max_depth": 2, "max_args": 2}


def test_a_small_space_can_be_exhausted():
    tokens, offsets, _ = generate(400, **TWO_DIGITS, seed=0)
    found = {decode(expression) for expression in expressions(tokens, offsets)}
    assert found == {f"{op} {i} {j} ]" for op in TYPICAL for i in range(10) for j in range(10)}


def test_asking_for_more_than_there_are_is_an_error_not_an_endless_loop():
    with pytest.raises(ValueError, match=r"asked for 401 .* found 400 in \d+ attempts.* ask for f"):
        generate(401, **TWO_DIGITS, seed=0)


def test_impossible_limits_are_an_error_not_an_endless_loop():
    with pytest.raises(ValueError, match=r"max_depth=2.* found 0 in \d+ attempts.* widen the lim"):
        generate(1, min_length=500, max_length=2000, max_depth=2, max_args=10, seed=0)


def test_all_bad_arguments_are_named_at_once():
    bad = {"min_length": -1, "max_length": 0, "max_depth": 1, "max_args": 11, "seed": -1}
    with pytest.raises(ValueError, match="cannot generate") as error:
        generate(0, **bad, processes=0)
    for name in ["num_examples", *bad, "processes"]:
        assert f"{name}=" in str(error.value)


def test_the_result_does_not_depend_on_the_number_of_processes():
    alone = generate(3_000, **STANDARD, seed=7)
    shared = generate(3_000, **STANDARD, seed=7, processes=2)
    for one, other in zip(alone, shared, strict=True):
        assert one.tobytes() == other.tobytes()


def test_a_smaller_set_is_the_beginning_of_a_larger_one(standard_set):
    tokens, offsets, labels = generate(1_000, **STANDARD, seed=0)
    assert tokens.tobytes() == standard_set[0][: len(tokens)].tobytes()
    assert offsets.tolist() == standard_set[1][:1_001].tolist()
    assert labels.tolist() == standard_set[2][:1_000].tolist()


def test_another_seed_gives_other_expressions(standard_set):
    tokens, offsets, _ = standard_set
    other_tokens, other_offsets, _ = generate(100, **STANDARD, seed=1)
    known = {expression.tobytes() for expression in expressions(tokens, offsets)}
    assert known.isdisjoint(e.tobytes() for e in expressions(other_tokens, other_offsets))


def test_the_standard_set_stays_what_it_is(standard_set):
    # If this fails on purpose, or because numpy changed its random numbers, results on the old and
    # the new data are not comparable: the version of the task must change as well.
    digest = hashlib.sha256(b"".join(array.tobytes() for array in standard_set)).hexdigest()
    assert digest[:16] == "ff3e5c2d6bc181f6"


def test_progress_adds_up_to_the_number_of_examples():
    steps = []
    generate(3_000, **STANDARD, seed=0, progress=steps.append)
    assert sum(steps) == 3_000
    assert len(steps) > 1
    assert min(steps) > 0


def parse(expression):
    """The tree of a well-formed expression; fails on any other."""
    words = decode(expression).split()

    def node():
        word = words.pop(0)
        if word not in TYPICAL:
            return int(word)
        arguments = []
        while words[0] != "]":
            arguments.append(node())
        words.pop(0)
        return word, arguments

    tree = node()
    assert not words
    return tree


def operators_with_depth(tree, depth=1):
    if isinstance(tree, tuple):
        yield tree, depth
        for argument in tree[1]:
            yield from operators_with_depth(argument, depth + 1)


@deterministic
@given(
    min_length=st.integers(0, 6),
    extra=st.integers(5, 60),
    max_depth=st.integers(2, 6),
    max_args=st.integers(2, 10),
    seed=st.integers(0, 2**70),
)
def test_expressions_are_well_formed_and_within_all_limits(
    min_length, extra, max_depth, max_args, seed
):
    # The tightest of these limits still allow the ten digits or hundreds of short expressions.
    limits = {"max_depth": max_depth, "max_args": max_args}
    min_length = min(min_length, max_args + 1)
    max_length = min_length + extra
    tokens, offsets, labels = generate(
        10, min_length=min_length, max_length=max_length, **limits, seed=seed
    )
    for expression, label in zip(expressions(tokens, offsets), labels, strict=True):
        tree = parse(expression)
        assert min_length < len(expression) < max_length
        assert reference_value(tree) == label
        for (_, arguments), depth in operators_with_depth(tree):
            assert 2 <= len(arguments) <= max_args
            assert depth < max_depth


# The distribution, against exact probabilities


def length_distribution(max_depth, max_args, below):
    """P(length = n) of a random tree, n < below, and the same jointly with the root's arity.

    With f(x) the generating function of the length of an argument, that of its parent's is
    3/4 x + 1/4 x^2 mean(f(x)^k), k from 2 to max_args.
    """

    def times(a, b):
        return np.convolve(a, b)[:below]

    digit, brackets = np.eye(below)[1], np.eye(below)[2]
    tree = digit
    for _ in range(max_depth - 1):
        power, by_arity = tree, {}
        for arity in range(2, max_args + 1):
            power = times(power, tree)
            by_arity[arity] = times(brackets, power) / 4 / (max_args - 1)
        tree = 0.75 * digit + sum(by_arity.values())
    return tree, by_arity


@pytest.fixture(scope="module")
def small_trees():
    """Trees that no limit of length cuts off, at most 1,222 tokens long."""
    tokens, offsets, _ = generate(
        30_000, min_length=0, max_length=1_300, max_depth=4, max_args=10, seed=0
    )
    # Repeated expressions are dropped, which thins out the short ones. From nine tokens on there
    # are so many that hardly any is ever repeated.
    return [parse(e) for e in expressions(tokens, offsets) if len(e) >= 9]


def test_arity_of_the_root_is_distributed_exactly(small_trees):
    _, by_arity = length_distribution(max_depth=4, max_args=10, below=1_300)
    expected = np.array([by_arity[arity][9:].sum() for arity in range(2, 11)])
    observed = np.bincount([len(arguments) for _, arguments in small_trees], minlength=11)[2:]
    assert chi_square_is_plausible(observed, expected / expected.sum() * len(small_trees))


def test_lengths_are_distributed_exactly(small_trees):
    distribution, _ = length_distribution(max_depth=4, max_args=10, below=1_300)
    length = [len(write(tree).split()) for tree in small_trees]
    edges = [9, 10, 11, 12, 13, 14, 16, 18, 20, 25, 30, 40, 50, 70, 100, 150]
    observed = np.add.reduceat(np.bincount(length, minlength=1_300), edges)
    expected = np.add.reduceat(distribution, edges)
    assert chi_square_is_plausible(observed, expected / expected.sum() * len(small_trees))


@pytest.fixture(scope="module")
def wide_trees(small_trees):
    """Trees whose roots have seven arguments or more: these are all there, however short."""
    return [tree for tree in small_trees if len(tree[1]) >= 7]


def operators_at(depth, trees):
    return [
        operator for tree in trees for operator, at in operators_with_depth(tree) if at == depth
    ]


@pytest.mark.parametrize("depth", [2, 3])
def test_arity_is_uniform_from_two_to_the_maximum(wide_trees, depth):
    arity = [len(arguments) for _, arguments in operators_at(depth, wide_trees)]
    observed = np.bincount(arity)
    assert observed[:2].tolist() == [0, 0]
    assert len(observed) == 11
    assert chi_square_is_plausible(observed[2:], np.full(9, len(arity) / 9))


@pytest.mark.parametrize(
    ("depth", "arity"), [(1, 7), (1, 10), (2, 2), (2, 3), (2, 4), (2, 7), (2, 10)]
)
def test_the_number_of_nested_operators_is_binomial(wide_trees, depth, arity):
    nested = [
        sum(isinstance(argument, tuple) for argument in arguments)
        for _, arguments in operators_at(depth, wide_trees)
        if len(arguments) == arity
    ]
    probability = [math.comb(arity, k) * 0.25**k * 0.75 ** (arity - k) for k in range(arity + 1)]
    classes = range(min(arity, 5) + 1)  # five or more are too rare to be told apart
    observed = np.add.reduceat(np.bincount(nested, minlength=arity + 1), classes)
    assert chi_square_is_plausible(observed, len(nested) * np.add.reduceat(probability, classes))


def test_every_argument_is_as_likely_to_be_an_operator(wide_trees):
    first_seven = np.array([[isinstance(a, tuple) for a in args[:7]] for _, args in wide_trees])
    error = (0.25 * 0.75 / len(wide_trees)) ** 0.5
    assert np.abs(first_seven.mean(axis=0) - 0.25).max() < 4 * error


def test_operators_and_digits_are_uniform(wide_trees):
    text = " ".join(map(write, wide_trees)).split()
    for alphabet in (list(TYPICAL), list("0123456789")):
        observed = [text.count(token) for token in alphabet]
        assert chi_square_is_plausible(observed, np.full(len(observed), np.mean(observed)))


# The standard set, against exact and published figures


def test_standard_lengths_are_distributed_exactly(standard_set):
    length = np.diff(standard_set[1])
    distribution, _ = length_distribution(max_depth=10, max_args=10, below=2000)
    distribution[:501] = 0
    assert distribution.sum() == pytest.approx(0.0833, abs=0.001)  # published acceptance rate
    edges = range(501, 2000, 25)
    expected = np.add.reduceat(distribution, edges) / distribution.sum() * len(length)
    assert chi_square_is_plausible(
        np.add.reduceat(np.bincount(length, minlength=2000), edges), expected
    )


def test_standard_lengths_match_the_published_summary(standard_set):
    length = np.diff(standard_set[1])
    assert length.mean() == pytest.approx(1041, abs=4 * 395 * (2 / PUBLISHED_N) ** 0.5)
    assert length.std() == pytest.approx(395, abs=10)
    published = {0.05: 540, 0.25: 707, 0.5: 963, 0.75: 1316, 0.95: 1806}
    for level, quantile in published.items():
        assert np.quantile(length, level) == pytest.approx(quantile, rel=0.02)


def test_standard_class_frequencies(standard_set):
    labels = standard_set[2]
    published = [0.172, 0.088, 0.077, 0.082, 0.092, 0.088, 0.080, 0.072, 0.082, 0.167]
    for value, frequency in enumerate(published):
        assert agrees_with_published((labels == value).mean(), frequency, len(labels))
    majority = np.bincount(labels).max() / len(labels)
    assert agrees_with_published(majority, 0.172, len(labels))


def test_standard_roots(standard_set):
    tokens, offsets, labels = standard_set
    root = tokens[offsets[:-1]]
    operators = np.array([ID[text] for text in TYPICAL])
    frequency = (root == operators[:, None]).mean(axis=1)
    assert np.abs(frequency - 0.25).max() < 4 * (0.25 * 0.75 / len(root)) ** 0.5
    for operator, answer, published in [("[MIN", 0, 0.58), ("[MAX", 9, 0.57), ("[MED", 4, 0.21)]:
        answers = labels[root == ID[operator]]
        error = (published * (1 - published) * 4 * (1 / len(root) + 1 / PUBLISHED_N)) ** 0.5
        assert (answers == answer).mean() == pytest.approx(published, abs=4 * error + 0.005)
    sums = np.bincount(labels[root == ID["[SM"]])
    assert chi_square_is_plausible(sums, np.full(10, sums.sum() / 10))


def test_standard_shape_of_the_trees(standard_set):
    tokens, offsets, _ = standard_set
    opening, closing = (tokens >= ID["[MIN"]) & (tokens <= ID["[SM"]), tokens == ID["]"]
    operators = np.add.reduceat(opening, offsets[:-1], dtype=int)
    error = operators.std() * (2 / PUBLISHED_N) ** 0.5
    assert operators.mean() == pytest.approx(148, abs=4 * error + 0.5)

    # Operators that are open, including the one just read; every tree starts again from none.
    nesting = np.cumsum(opening.astype(int) - closing)
    deepest = np.maximum.reduceat(nesting, offsets[:-1])
    assert set(deepest) == {9}

    # An argument of the root is a digit or a ] that leaves just the root open.
    arguments = np.add.reduceat((nesting == 1) & ~opening, offsets[:-1], dtype=int)
    error = arguments.std() * (2 / PUBLISHED_N) ** 0.5
    assert arguments.mean() == pytest.approx(6.9, abs=4 * error + 0.05)


@pytest.mark.parametrize(
    ("cut", "published"), [(0, 0.368), (1, 0.602), (2, 0.740), (3, 0.834), (4, 0.898)]
)
def test_standard_accuracy_of_evaluation_down_to_a_depth(standard_set, cut, published):
    tokens, offsets, labels = standard_set
    n = 5_000
    values = [evaluate(e, cut=cut) for e in expressions(tokens, offsets[: n + 1])]
    assert agrees_with_published(np.mean(values == labels[:n]), published, n)
