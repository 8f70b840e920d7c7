"""`lra.typed.from_mapping`: what every hint takes and refuses, and how problems are told."""

from contextlib import suppress
from dataclasses import asdict, dataclass, field, make_dataclass
from typing import Any, Literal, Optional, Union

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lra.typed import check_known, from_mapping, near_matches, unknown

deterministic = settings(derandomize=True, deadline=None, max_examples=50)


@dataclass(frozen=True)
class Inner:
    depth: int
    width: int = 8


@dataclass(frozen=True)
class Outer:
    flag: bool
    count: int
    rate: float
    name: str
    mode: Literal["fast", "exact"]
    pieces: int | Literal["auto"]
    label: str | None
    pair: tuple[float, float]
    many: tuple[int, ...]
    words: list[str]
    inner: Inner
    maybe: Inner | None
    extra: dict[str, Any] = field(default_factory=dict)


WHOLE = {
    "flag": True,
    "count": 3,
    "rate": 0.5,
    "name": "n",
    "mode": "fast",
    "pieces": "auto",
    "label": None,
    "pair": [0.9, 0.999],
    "many": [1, 2, 3],
    "words": ["a", "b"],
    "inner": {"depth": 2},
    "maybe": None,
    "extra": {"any": ["thing"]},
}


def convert(hint, value):
    """Returns ``value`` as a field of type ``hint`` holds it."""
    return from_mapping(make_dataclass("One", [("x", hint)]), {"x": value}, "").x


def message(cls, values, where=""):
    with pytest.raises(ValueError, match=r".") as error:
        from_mapping(cls, values, where)
    return str(error.value)


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (bool, True, True),
        (bool, False, False),
        (int, 3, 3),
        (int, -3, -3),
        (float, 0.5, 0.5),
        (float, 2, 2.0),
        (str, "", ""),
        (str, "text", "text"),
        (Any, {1, 2}, {1, 2}),
        (Literal["fast", "exact"], "exact", "exact"),
        (Literal[1, 2], 2, 2),
        (int | Literal["auto"], "auto", "auto"),
        (int | Literal["auto"], 4, 4),
        (str | None, None, None),
        (str | None, "text", "text"),
        (Optional[float], 1, 1.0),  # noqa: UP045
        (Union[int, str], "text", "text"),  # noqa: UP007
        (tuple[float, float], [0, 0.5], (0.0, 0.5)),
        (tuple[int, str], (1, "a"), (1, "a")),
        (tuple[int, ...], [], ()),
        (tuple[int, ...], [1, 2, 3], (1, 2, 3)),
        (list[str], ("a", "b"), ["a", "b"]),
        (list[tuple[int, int]], [[1, 2], [3, 4]], [(1, 2), (3, 4)]),
        (list[float] | None, [1], [1.0]),
        (Inner, {"depth": 2}, Inner(2, 8)),
        (Inner | None, {"depth": 2, "width": 3}, Inner(2, 3)),
        (list[Inner], [{"depth": 1}], [Inner(1)]),
        (dict[str, Any], {"a": [1, None]}, {"a": [1, None]}),
        (dict, {"a": 1}, {"a": 1}),
    ],
)
def test_a_value_that_fits_its_hint_is_taken_in_the_type_of_the_hint(hint, value, expected):
    assert repr(convert(hint, value)) == repr(expected)


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (bool, 1),
        (bool, 0),
        (bool, "true"),
        (int, True),
        (int, 1.0),
        (int, "1"),
        (int, None),
        (float, True),
        (float, "0.1"),
        (float, None),
        (str, 1),
        (str, None),
        (str, ["a"]),
        (Literal["fast", "exact"], "slow"),
        (Literal["fast", "exact"], None),
        (Literal["fast", "exact"], ["fast"]),
        (Literal[1, 2], True),
        (Literal[0, 1], False),
        (Literal[1, 2], 1.0),
        (int | Literal["auto"], "manual"),
        (int | Literal["auto"], True),
        (str | None, 3),
        (Inner | None, {"depth": "deep"}),
        (tuple[float, float], [1.0]),
        (tuple[float, float], [1.0, 2.0, 3.0]),
        (tuple[float, float], [1.0, "x"]),
        (tuple[float, float], 1.0),
        (tuple[int, ...], "12"),
        (tuple[int, ...], [1, 2.0]),
        (list[str], "ab"),
        (list[str], {"a": 1}),
        (list[int], None),
        (dict[str, Any], [1]),
        (dict[str, Any], None),
        (Inner, 3),
        (Inner, None),
        (Inner, {"depth": 2.0}),
    ],
)
def test_a_value_that_does_not_fit_its_hint_is_refused_by_its_key(hint, value):
    assert message(make_dataclass("One", [("x", hint)]), {"x": value}).startswith("x")


def test_a_refusal_says_what_is_wanted_and_what_was_given():
    assert message(Outer, WHOLE | {"count": "many"}) == "count must be int, not str 'many'."


def test_a_whole_mapping_builds_the_dataclass_with_its_defaults():
    assert from_mapping(Outer, WHOLE, "") == Outer(
        flag=True,
        count=3,
        rate=0.5,
        name="n",
        mode="fast",
        pieces="auto",
        label=None,
        pair=(0.9, 0.999),
        many=(1, 2, 3),
        words=["a", "b"],
        inner=Inner(2, 8),
        maybe=None,
        extra={"any": ["thing"]},
    )


def test_all_problems_stand_in_one_message_one_to_a_line():
    values = WHOLE | {
        "flag": 1,
        "count": 1.5,
        "mode": "fsat",
        "words": ["a", 2, None],
        "inner": {"depth": "deep", "widht": 3},
        "raet": 0.5,
    }
    del values["name"]
    lines = message(Outer, values).splitlines()
    starts = [
        "flag must be bool",
        "count must be int",
        "mode: Unknown value 'fsat'. Did you mean fast?",
        "words[1] must be str",
        "words[2] must be str",
        "inner.depth must be int",
        "Unknown key 'inner.widht'. Did you mean inner.width",
        "Unknown key 'raet'. Did you mean rate?",
        "name is not set",
    ]
    assert len(lines) == len(starts)
    assert [s for s in starts if not any(line.startswith(s) for line in lines)] == []


def test_an_unknown_key_is_told_with_its_near_match_and_what_is_allowed():
    text = message(Inner, {"depth": 1, "widht": 2})
    assert text == "Unknown key 'widht'. Did you mean width? Allowed: depth, width."


def test_an_unknown_choice_is_told_with_its_near_match_and_what_is_allowed():
    text = message(Outer, WHOLE | {"mode": "exat"})
    assert text == "mode: Unknown value 'exat'. Did you mean exact? Allowed: exact, fast."


def test_an_unknown_key_that_resembles_nothing_gets_no_guess():
    assert "Did you mean" not in message(Inner, {"depth": 1, "zzz": 2})


def test_a_missing_key_without_a_default_is_told():
    assert message(Inner, {}) == "depth is not set and has no default."


def test_every_message_carries_the_prefix_of_where_the_values_stand():
    lines = message(Inner, {"width": "x", "dept": 1}, where="model").splitlines()
    assert len(lines) == 3
    assert "Unknown key 'model.dept'. Did you mean model.depth" in lines[0]
    assert lines[1] == "model.depth is not set and has no default."
    assert lines[2] == "model.width must be int, not str 'x'."


def test_prefixes_go_down_into_nested_dataclasses_and_lists():
    cls = make_dataclass("Deep", [("layers", list[Inner])])
    text = message(cls, {"layers": [{"depth": 1}, {"depth": None}]}, where="model")
    assert text == "model.layers[1].depth must be int, not NoneType None."


@dataclass(frozen=True)
class Checked:
    low: int
    high: int

    def __post_init__(self):
        if self.low > self.high:
            raise ValueError("low must not exceed high\nand another line")


def test_what_a_dataclass_checks_itself_is_told_with_the_prefix_on_every_line():
    text = message(Checked, {"low": 2, "high": 1}, where="range")
    assert text == "range: low must not exceed high\nrange: and another line"


def test_what_a_dataclass_checks_itself_is_not_asked_of_values_of_the_wrong_type():
    assert "low must not exceed high" not in message(Checked, {"low": "x", "high": 1})


def test_a_number_too_large_for_a_float_is_a_problem_and_no_crash():
    assert message(make_dataclass("One", [("x", float)]), {"x": 10**400}).startswith("x")


def test_the_given_mapping_is_left_as_it_was():
    values = {"pair": [1, 2]}
    from_mapping(make_dataclass("One", [("pair", tuple[float, float])]), values, "")
    assert values == {"pair": [1, 2]}


def test_near_matches_are_a_phrase_or_nothing():
    assert near_matches("sofmax", ["softmax", "linear"]) == " Did you mean softmax?"
    assert near_matches("zzz", ["softmax", "linear"]) == ""


def test_unknown_lists_what_is_allowed_in_order_and_says_none_for_nothing():
    assert unknown("task", "x", ["b", "a"]) == "Unknown task 'x'. Allowed: a, b."
    assert unknown("task", "x", []) == "Unknown task 'x'. Allowed: none."


# Integers beyond a float's range have a test of their own above.
numbers = st.integers(-(2**70), 2**70) | st.floats()
scalars = st.none() | st.booleans() | numbers | st.text(max_size=5) | st.just("auto")
json_like = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5) | st.sampled_from(["depth", "width"]), inner)
    ),
    max_leaves=6,
)


@deterministic
@given(st.dictionaries(st.sampled_from([*WHOLE, "raet", ""]) | st.text(max_size=5), json_like))
def test_whatever_json_is_given_the_outcome_is_an_instance_or_a_value_error(values):
    with suppress(ValueError):
        assert isinstance(from_mapping(Outer, values, "x"), Outer)


@deterministic
@given(st.sampled_from(list(WHOLE)), json_like)
def test_one_wrong_field_among_right_ones_is_the_only_one_complained_of(name, value):
    try:
        built = from_mapping(Outer, WHOLE | {name: value}, "")
    except ValueError as error:
        lines = str(error).splitlines()
        keys = (name, f"Unknown key '{name}.")
        # A value with line breaks may spread one problem over several lines.
        assert lines[0].startswith(keys)
    else:
        assert asdict(built).keys() == WHOLE.keys()


@deterministic
@given(
    st.builds(
        Outer,
        flag=st.booleans(),
        count=st.integers(),
        rate=st.floats(allow_nan=False),
        name=st.text(),
        mode=st.sampled_from(["fast", "exact"]),
        pieces=st.integers() | st.just("auto"),
        label=st.none() | st.text(),
        pair=st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False)),
        many=st.lists(st.integers()).map(tuple),
        words=st.lists(st.text()),
        inner=st.builds(Inner, st.integers(), st.integers()),
        maybe=st.none() | st.builds(Inner, st.integers(), st.integers()),
    )
)
def test_a_dataclass_taken_apart_is_put_together_again(instance):
    assert from_mapping(Outer, asdict(instance), "") == instance


@dataclass
class Counts:
    by_name: dict[str, int]


def test_the_values_of_a_dict_are_of_its_type():
    assert from_mapping(Counts, {"by_name": {"a": 1}}, "") == Counts({"a": 1})
    with pytest.raises(ValueError, match=r"^counts.by_name.b must be int, not str 'x'\.$"):
        from_mapping(Counts, {"by_name": {"a": 1, "b": "x"}}, "counts")


def test_keys_that_nobody_asks_for_are_left_alone_where_only_known_ones_are_checked():
    check_known(Counts, {"by_name": {}, "other": 1}, "")
    with pytest.raises(ValueError, match="by_name is not set"):
        check_known(Counts, {"other": 1}, "")
