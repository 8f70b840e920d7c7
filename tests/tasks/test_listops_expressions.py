"""ListOps expressions: what they mean and how they are written."""

import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lra.tasks._listops import VOCAB, decode, encode, evaluate

ID = {text: token for token, text in enumerate(VOCAB)}
TYPICAL = {"[MIN": 0, "[MAX": 9, "[MED": 4, "[SM": 5}
deterministic = settings(derandomize=True, deadline=None)


# Vocabulary and text


def test_the_vocabulary_is_fixed():
    assert " ".join(VOCAB) == "<pad> 0 1 2 3 4 5 6 7 8 9 [MIN [MAX [MED [SM ]"


def test_text_becomes_one_id_a_token():
    tokens = encode("[MAX 2 9 ]")
    assert tokens.tolist() == [12, 3, 10, 15]
    assert tokens.dtype == np.uint8


def test_parentheses_of_the_official_files_are_dropped():
    official = "( ( ( [SM ( ( ( ( [MIN 4 ) 7 ) 8 ) ] ) ) 9 ) ] )"
    assert decode(encode(official)) == "[SM [MIN 4 7 8 ] 9 ]"


def test_decode_writes_padding_too():
    assert decode([1, 0, 0]) == "0 <pad> <pad>"


def test_unknown_text_is_named_with_its_position_and_the_allowed_tokens():
    with pytest.raises(ValueError, match=r"'\[FIRST' at position 2 .*allowed: 0 1 .*\[SM \]"):
        encode("( [MAX 1 ) [FIRST 2 3 ] ]")
    with pytest.raises(ValueError, match=r"'12' at position 1"):
        encode("[MAX 12 ]")
    with pytest.raises(ValueError, match="'<pad>'"):
        encode("1 <pad>")


@pytest.mark.parametrize("text", ["", "  ", "( )"])
def test_empty_text_is_refused(text):
    with pytest.raises(ValueError, match="empty"):
        encode(text)


@pytest.mark.parametrize("token", [16, -1])
def test_unknown_ids_are_refused(token):
    with pytest.raises(ValueError, match=f"id {token} at position 1; allowed: 0 to 15"):
        decode([1, token])


# Values


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("7", 7),
        ("[MIN 4 2 8 ]", 2),
        ("[MAX 4 2 8 ]", 8),
        ("[MED 9 1 3 ]", 3),
        ("[MED 1 2 ]", 1),  # 1.5, rounded down
        ("[MED 3 6 ]", 4),  # 4.5, rounded down
        ("[MED 9 0 8 1 ]", 4),  # of 0 1 8 9: 4.5, rounded down
        ("[SM 9 9 ]", 8),
        ("[SM 5 5 ]", 0),
        ("[MAX 2 9 [MIN 4 7 ] 0 ]", 9),
        ("[SM [MAX 1 5 ] [MED 3 [MIN 7 8 9 ] 2 ] 9 ]", 7),  # 5 + 3 + 9
        ("( ( ( ( [MAX ( ( ( [MIN 4 ) 7 ) ] ) ) 2 ) 3 ) ] )", 4),
    ],
)
def test_hand_worked_values(source, value):
    assert evaluate(encode(source)) == value


@pytest.mark.parametrize(
    ("cut", "value"),
    [
        (0, 9),  # MAX is typically 9
        (1, 2),  # [MAX 2 0 1 ], as MIN is typically 0
        (2, 5),  # [MAX 2 [MIN 8 5 ] 1 ], as SM is typically 5
        (3, 6),  # nothing is cut
        (None, 6),
    ],
)
def test_a_cut_replaces_operators_at_its_depth_by_their_typical_values(cut, value):
    assert evaluate(encode("[MAX 2 [MIN 8 [SM 7 9 ] ] 1 ]"), cut=cut) == value


def test_a_lone_digit_is_never_cut():
    assert evaluate(encode("3"), cut=0) == 3


def test_a_negative_cut_is_refused():
    with pytest.raises(ValueError, match="cut=-1"):
        evaluate(encode("3"), cut=-1)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "token 0: empty"),
        (encode("]"), "token 0: ] closes nothing"),
        (encode("[MAX 1 2"), "token 3: ends with 1 operators open"),
        (encode("[MAX 1 [MIN 2 ]"), "token 5: ends with 1 operators open"),
        (encode("[MAX 1 2 ] ]"), "token 4: the expression is already complete"),
        (encode("1 2"), "token 1: the expression is already complete"),
        (encode("[SM 1 [MED ] ]"), r"token 3: \[MED has no arguments"),
        ([*encode("[MAX 1 2 ]"), 0], "token 4: the expression is already complete"),
        ([ID["[MAX"], ID["1"], 0, ID["]"]], "token 2: padding"),
        ([0], "token 0: padding"),
        ([ID["[MAX"], 99, ID["]"]], "token 1: unknown id 99"),
    ],
)
def test_malformed_expressions_are_refused_with_the_reason_and_the_place(tokens, message):
    with pytest.raises(ValueError, match=message):
        evaluate(tokens)


# A tree is a digit or (operator, [trees]).
trees = st.recursive(
    st.integers(0, 9),
    lambda inner: st.tuples(st.sampled_from(sorted(TYPICAL)), st.lists(inner, min_size=1)),
    max_leaves=40,
)


def write(tree):
    if isinstance(tree, int):
        return str(tree)
    operator, arguments = tree
    return " ".join([operator, *map(write, arguments), "]"])


def reference_value(tree, cut=None):
    """The value by recursion, as the definition reads."""
    if isinstance(tree, int):
        return tree
    operator, arguments = tree
    if cut == 0:
        return TYPICAL[operator]
    values = [reference_value(argument, None if cut is None else cut - 1) for argument in arguments]
    match operator:
        case "[MIN":
            return min(values)
        case "[MAX":
            return max(values)
        case "[MED":
            return int(statistics.median(values))
        case "[SM":
            return sum(values) % 10


@deterministic
@given(trees, st.none() | st.integers(0, 4))
def test_values_agree_with_a_recursive_reference(tree, cut):
    assert evaluate(encode(write(tree)), cut=cut) == reference_value(tree, cut)


@deterministic
@given(trees)
def test_text_survives_encoding_and_decoding(tree):
    assert decode(encode(write(tree))) == write(tree)
