"""ListOps expressions: vocabulary, text and exact evaluator.

An expression is a digit or an operator with its arguments, as ``[MAX 2 9 [MIN 4 7 ] 0 ]`` (= 9).
The task is Nangia & Bowman 2018 (arXiv 1804.06028); its long version, which `_listops_generator`
draws, is that of the Long Range Arena, Tay et al. 2021 (arXiv 2011.04006).
"""

from collections.abc import Sequence
from reprlib import repr as excerpt

import numpy as np

VOCAB = ("<pad>", *"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]")
"""The text of every token id: 0 is padding, digit d is d + 1, operators are 11 to 14, ``]`` 15."""

_IDS = {text: token for token, text in enumerate(VOCAB) if text != "<pad>"}
_DROPPED = {"", "(", ")"}
ZERO, NINE = _IDS["0"], _IDS["9"]
MIN, MAX, MED, SM, CLOSE = (_IDS[text] for text in ("[MIN", "[MAX", "[MED", "[SM", "]"))


def encode(source: str) -> np.ndarray:
    """Turn the text of one expression into token ids, without checking that it is well-formed.

    Args:
        source: Tokens separated by spaces, and possibly the round parentheses of the official
            files, which only make the tree binary and are dropped.

    Returns:
        The ids, uint8 of shape (length,).

    Raises:
        ValueError: The text holds an unknown token, or no token at all.
    """
    words = [word for word in source.split(" ") if word not in _DROPPED]
    try:
        ids = bytearray(map(_IDS.__getitem__, words))
    except KeyError as error:
        word = error.args[0]
        raise ValueError(
            f"unknown ListOps token {excerpt(word)} at position {words.index(word)} (parentheses "
            f"not counted); allowed: {' '.join(_IDS)} and the parentheses ( )"
        ) from None
    if not ids:
        raise ValueError(f"empty ListOps expression: {excerpt(source)}")
    return np.frombuffer(ids, dtype=np.uint8)


def decode(tokens: Sequence[int] | np.ndarray) -> str:
    """Turn token ids, shape (length,), into text without parentheses, separated by single spaces.

    Raises:
        ValueError: An id is not in the vocabulary.
    """
    ids = np.asarray(tokens).tolist()
    for position, token in enumerate(ids):
        if not 0 <= token < len(VOCAB):
            raise ValueError(
                f"unknown ListOps id {token} at position {position}; allowed: 0 to {len(VOCAB) - 1}"
            )
    return " ".join(VOCAB[token] for token in ids)


def _median(arguments: list[int]) -> int:
    ordered = sorted(arguments)
    last = len(ordered) - 1
    return (ordered[last // 2] + ordered[(last + 1) // 2]) // 2


_OPERATIONS = {MIN: min, MAX: max, MED: _median, SM: lambda arguments: sum(arguments) % 10}
_TYPICAL = {MIN: 0, MAX: 9, MED: 4, SM: 5}


def evaluate(tokens: Sequence[int] | np.ndarray, cut: int | None = None) -> int:
    """Compute the value of one expression, exactly or without looking below some depth.

    ``[MED`` of an even number of arguments is the floor of the mean of the two middle ones; ``[SM``
    is the sum modulo 10.

    Args:
        tokens: Token ids of one expression, shape (length,), without padding.
        cut: Replace every operator at this depth, with all below it, by its typical value (MIN 0,
            MAX 9, MED 4, SM 5). The root operator is at depth 0: cut 0 reads nothing but the root
            operator, cut 1 reads its direct digits too and guesses its other arguments. On the
            standard set cuts 0 to 4 are right for 36.8, 60.2, 74.0, 83.4 and 89.8 %.

    Returns:
        The value, 0 to 9.

    Raises:
        ValueError: The expression is malformed (the message says where), or ``cut`` is negative.
    """
    if cut is not None and cut < 0:
        raise ValueError(f"cut={cut}: must be None or at least 0")

    ids = np.asarray(tokens).tolist()
    open_operators: list[tuple[int, list[int]]] = []
    result = None
    for index, token in enumerate(ids):
        if result is not None:
            raise _malformed(index, "the expression is already complete")
        if token in _OPERATIONS:
            open_operators.append((token, []))
            continue
        if ZERO <= token <= NINE:
            value = token - ZERO
        elif token == CLOSE:
            if not open_operators:
                raise _malformed(index, "] closes nothing")
            operator, arguments = open_operators.pop()
            if not arguments:
                raise _malformed(index, f"{VOCAB[operator]} has no arguments")
            unseen = cut is not None and len(open_operators) >= cut
            value = _TYPICAL[operator] if unseen else _OPERATIONS[operator](arguments)
        else:
            raise _malformed(index, "padding" if token == 0 else f"unknown id {token}")
        if open_operators:
            open_operators[-1][1].append(value)
        else:
            result = value
    if result is None:
        reason = f"ends with {len(open_operators)} operators open" if ids else "empty"
        raise _malformed(len(ids), reason)
    return result


def _malformed(index: int, reason: str) -> ValueError:
    return ValueError(f"malformed ListOps expression at token {index}: {reason}")
