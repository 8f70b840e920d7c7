"""Frozen dataclasses from plain mappings, strictly: every unknown or ill-typed key is reported."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union

T = TypeVar("T")


def near_matches(given: str, allowed: Iterable[str]) -> str:
    """Returns ``given``'s near matches as a phrase for an error message, or an empty string.

    Of dotted names only the last part is compared: what they share says nothing.
    """
    names = {name.rpartition(".")[2]: name for name in allowed}
    last = given.rpartition(".")[2]
    matches = [names[match] for match in difflib.get_close_matches(last, list(names), n=3)]
    return f" Did you mean {' or '.join(matches)}?" if matches else ""


def unknown(kind: str, given: str, allowed: Iterable[str]) -> str:
    """Returns the one message for a name that does not exist: given, near match, allowed."""
    names = sorted(allowed)
    listed = ", ".join(names) if names else "none"
    return f"Unknown {kind} '{given}'.{near_matches(given, names)} Allowed: {listed}."


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Builds the dataclass ``cls`` from ``values``.

    Args:
        cls: A dataclass whose fields are bool, int, float, str, Literal, unions, tuples and lists
            of these, dataclasses of the same kind, or dicts of these by any keys.
        values: Field values by name; fields with a default may be absent.
        where: The key that holds the values, as a prefix for messages; may be empty.

    Raises:
        ValueError: One message that lists every problem found.
    """
    built, problems = _build(cls, values, where)
    if problems:
        raise ValueError("\n".join(problems))
    return typing.cast(T, built)


def check_known(cls: type, values: Mapping[str, Any], where: str) -> None:
    """Checks the values that `from_mapping` would take, and leaves others alone.

    Raises:
        ValueError: One message that lists every problem found.
    """
    _, problems = _build(cls, values, where, strict=False)
    if problems:
        raise ValueError("\n".join(problems))


def require(conditions: Mapping[str, bool]) -> None:
    """Raises one ValueError with every message whose condition does not hold.

    For ``__post_init__`` of a dataclass: its fields have their types by then.
    """
    broken = [message + "." for message, holds in conditions.items() if not holds]
    if broken:
        raise ValueError("\n".join(broken))


def _build(
    cls: type, values: Mapping[str, Any], where: str, strict: bool = True
) -> tuple[Any, list[str]]:
    hints = typing.get_type_hints(cls)
    prefix = f"{where}." if where else ""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    problems = [
        unknown("key", f"{prefix}{key}", [f"{prefix}{name}" for name in fields])
        for key in values
        if strict and key not in fields
    ]
    arguments = {}
    for name, field in fields.items():
        if name in values:
            arguments[name], found = _convert(hints[name], values[name], f"{prefix}{name}", strict)
            problems += found
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"{prefix}{name} is not set and has no default.")
    if problems:
        return None, problems
    try:
        return cls(**arguments), []
    except ValueError as error:
        return None, [f"{where}: {line}" if where else line for line in str(error).splitlines()]


def _convert(hint: Any, value: Any, where: str, strict: bool = True) -> tuple[Any, list[str]]:
    """Returns ``value`` as ``hint`` asks, and the problems that stand against it."""
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return _build(typing.cast(type, hint), value, where, strict)
    if origin is Literal:
        allowed = typing.get_args(hint)
        if value in allowed and type(value) in {type(choice) for choice in allowed}:
            return value, []
        message = unknown("value", str(value), map(str, allowed))
        return None, [f"{where}: {message}"]
    if origin in (Union, types.UnionType):
        if value is None and type(None) in typing.get_args(hint):
            return None, []
        attempts = [_convert(option, value, where, strict) for option in typing.get_args(hint)]
        accepted = [converted for converted, problems in attempts if not problems]
        if accepted:
            return accepted[0], []
        for option, (_, problems) in zip(typing.get_args(hint), attempts, strict=True):
            if dataclasses.is_dataclass(option) and isinstance(value, Mapping):
                return None, problems  # of its keys, which tell more than that it is none of these
    elif origin in (tuple, list) and isinstance(value, list | tuple):
        inner = typing.get_args(hint)
        if origin is list or inner[-1] is Ellipsis:
            inner = (inner[0],) * len(value)
        if len(inner) == len(value):
            pairs = [
                _convert(option, item, f"{where}[{index}]", strict)
                for index, (option, item) in enumerate(zip(inner, value, strict=True))
            ]
            return origin(item for item, _ in pairs), [p for _, found in pairs for p in found]
    elif hint is Any or (hint is dict and isinstance(value, Mapping)):
        return value, []
    elif origin is dict and isinstance(value, Mapping):
        inner = typing.get_args(hint)[1]
        found = {k: _convert(inner, v, f"{where}.{k}", strict) for k, v in value.items()}
        problems = [problem for _, its in found.values() for problem in its]
        return {key: converted for key, (converted, _) in found.items()}, problems
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value), []
        except OverflowError:
            return None, [f"{where} is too large for a float."]
    elif hint in (bool, int, str) and type(value) is hint:
        return value, []
    name = getattr(hint, "__name__", None) if origin is None else None
    return None, [f"{where} must be {name or hint}, not {type(value).__name__} {value!r}."]
