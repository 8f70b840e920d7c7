"""What is there: `lra ls` (names, capabilities, options) and `lra data` (prepared data)."""

import inspect
import json
import re
import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lra.compose import conf_dir, load, sweep_files
from lra.plugins import import_plugins, named_plugins
from lra.tasks import TASKS
from lra.text import aligned
from lra.typed import unknown
from models.attention import ATTENTIONS

DATA_SETTINGS = ("protocol=", "task.", "data_dir=", "cache_dir=")
"""What the data of a task follows from, beside its name."""

REGISTRIES = {"task": TASKS, "attention": ATTENTIONS}
FAMILIES = {
    "full": "the whole N x N matrix",
    "pattern": "parts of the matrix, chosen by place or content",
    "low rank": "a product of thin matrices in its place",
    "kernel": "sums of features, no matrix",
    "mixer": "no queries and keys at all",
    "other": "",
}
"""What an attention does about its matrix, in the order of the listing."""

LAYER = {"num_heads": 2, "head_dim": 32, "max_len": 2048, "model_dim": 64}


def listing(what: Sequence[str]) -> str:
    """Returns what ``lra ls`` prints.

    Args:
        what: Nothing: every name with one line on it, without importing code. ``attention``: what
            each can do. ``attention=NAME``: its options. ``task=NAME``: its options and the data
            that ``protocol=``, ``task.OPTION=``, ``data_dir=`` and ``cache_dir=`` lead to.
            ``plugins=[...]`` with any of these.

    Raises:
        ValueError: If there is no such thing.
    """
    import_plugins(named_plugins(list(what)))
    words = [word for word in what if not word.startswith("plugins=")]
    settings = [word for word in words if word.startswith(DATA_SETTINGS)]
    asked = [word for word in words if word not in settings]
    if not words:
        return _names()
    parts = []
    for word in asked:
        group, given, name = word.partition("=")
        if word == "attention":
            parts.append(_capabilities())
        elif given and group in REGISTRIES:
            parts.append(_options(group, name))
            if group == "task":
                parts.append(_data_of([*(w for w in what if w not in asked), word]))
        else:
            raise ValueError(unknown("listing", word, ["attention", "attention=NAME", "task=NAME"]))
    if settings and not any(word.startswith("task=") for word in asked):
        raise ValueError(f"{settings[0]} says which data of a task: name it, as task=NAME.")
    return "\n\n".join(parts)


def _names() -> str:
    protocols = {
        path.stem: path.read_text().split("\n")[1].lstrip("# ")
        for path in sorted((conf_dir() / "protocol").glob("*.yaml"))
    }
    sweeps = {
        name: path.read_text().partition("\n")[0].lstrip("# ")
        for name, path in sweep_files().items()
    }
    groups = {
        "task": TASKS.summaries(),
        "attention": ATTENTIONS.summaries(),
        "protocol": protocols,
        "sweep": sweeps,
    }
    width = max(len(name) for group in groups.values() for name in group)
    lines = []
    for group, entries in groups.items():
        lines.append(f"{group}=")
        lines += [f"  {name:<{width}}  {line}".rstrip() for name, line in entries.items()]
    return "\n".join(lines)


def _capabilities() -> str:
    """Returns a table of what every attention can do with its default options, by family."""
    rows = [("attention", "patterns", "masks", "growth", "extra parameters", "paper")]
    failures, families = [], []
    for name in ATTENTIONS.names():
        try:
            cls = ATTENTIONS.get(name)
            config = cls.Config()
            parameters = sum(p.numel() for p in cls(config, **LAYER).parameters())
        except Exception as error:  # of another package; the others are not to suffer
            failures.append(f"{name}: {type(error).__name__}: {error}")
            continue
        able = cls.capabilities_with(config)
        patterns = [p for p in ("self", "causal", "cross") if p in able.patterns]
        patterns += ["recurrent"] if able.recurrent else []
        masks = {"none": "refused"}.get(able.key_mask, able.key_mask)
        growth = able.time if able.memory == able.time else f"{able.time}, memory {able.memory}"
        row = (f"  {name}", ", ".join(patterns), masks, growth, f"{parameters:,}", able.paper)
        rows.append(row)
        families.append(able.family)
    heading, *lines = aligned(rows).splitlines()
    listed = [heading]
    for family in dict.fromkeys([*FAMILIES, *families]):
        what = FAMILIES.get(family, "")
        members = [line for line, its in zip(lines, families, strict=True) if its == family]
        if members:
            listed += [f"{family}: {what}".rstrip(": "), *members]
    size = "{num_heads} heads of {head_dim}, {model_dim} dimensions, {max_len:,} positions"
    notes = [
        "Options may change them: lra ls attention=NAME. Growth is of time and memory beyond q, k,",
        f"v and output; extra parameters are those of a layer with {size.format(**LAYER)}.",
    ]
    return "\n".join([*listed, "", *notes, *failures])


def _options(group: str, name: str) -> str:
    """Returns a mechanism's or task's docstring and its options: default, choices, meaning."""
    from omegaconf import OmegaConf

    cls = REGISTRIES[group].get(name)
    about = (inspect.getdoc(inspect.getmodule(cls)) or inspect.getdoc(cls) or "").strip()
    hints = get_type_hints(cls.Config)
    meanings = option_meanings(cls.Config)
    lines = [f"{group}={name}", "", about, ""]
    for field in fields(cls.Config):
        default = getattr(cls.Config(), field.name)
        shown = json.dumps(default) if default is None or isinstance(default, bool) else default
        lines.append(f"{group}.{field.name}={shown}    {_allowed(hints[field.name])}")
        lines += textwrap.wrap(
            meanings.get(field.name, ""), 96, initial_indent="    ", subsequent_indent="    "
        )
    if not fields(cls.Config):
        lines.append("It has no options.")
    for task in TASKS.names() if group == "attention" else ():
        path = conf_dir() / "task" / task / f"{name}.yaml"
        if path.exists():
            lines += ["", f"With task={task} the defaults are:"]
            values = OmegaConf.load(path).attention.items()
            lines += [f"    attention.{key}={value}" for key, value in values]
    return "\n".join(lines)


def _data_of(overrides: Sequence[str]) -> str:
    """Returns what is known of the data that a run would have: sizes, lengths, balance, hash."""
    import numpy as np

    try:
        config = load(overrides)
    except ValueError as error:
        return f"No data: {error}"
    task = config.build_task()
    state, reason = task.state()
    heading = f"Data with protocol={config.protocol.name}"
    if state != "found":
        return f"{heading}: {state}: {reason}.\nSource: {task.origin()}"
    prepared = task.prepare()
    manifest = prepared.manifest
    rows = [("split", "examples", "tokens: least", "mean", "most", "classes %")]
    for name, split in prepared.splits.items():
        lengths = split.lengths
        counts = np.bincount(split.labels, minlength=task.num_classes)
        shares = " ".join(f"{100 * share:.1f}" for share in counts / len(split))
        figures = (f"{len(split):,}", f"{lengths.min():,}", f"{lengths.mean():,.1f}")
        rows.append((name, *figures, f"{lengths.max():,}", shares))
    rules = [f"{name} {100 * score:.2f} %" for name, score in manifest["baselines"].items()]
    return (
        f"{heading}: {manifest['hash']}, {manifest['source']}\n{aligned(rows)}\n"
        f"Test accuracy of rules that learn nothing: {', '.join(rules)}.\n{task.folder}"
    )


def option_meanings(config: type) -> dict[str, str]:
    """Returns the text on each attribute from the ``Attributes:`` section of a docstring."""
    _, _, section = (inspect.getdoc(config) or "").partition("Attributes:\n")
    meanings: dict[str, str] = {}
    name = None
    for line in section.splitlines():
        if start := re.match(r"    (\w+): (.*)", line):
            name = start[1]
            meanings[name] = start[2].strip()
        elif name is not None and line.startswith("        "):
            meanings[name] += " " + line.strip()
        else:
            name = None
    return meanings


def _allowed(hint: Any) -> str:
    choices = _choices(hint)
    if choices:
        return "one of " + ", ".join(map(str, choices))
    plain = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}
    plain[type(None)] = "null"
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(plain.get(part, str(part)) for part in get_args(hint))
    return plain.get(hint, str(hint))


def _choices(hint: Any) -> list[Any]:
    """Returns the values of a Literal, or of a union of them; nothing for any other hint."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return [choice for part in get_args(hint) for choice in _choices(part)]
    return []


def data(overrides: Sequence[str]) -> int:
    """Prints the state of every task's data; prepares that of a task named by ``task=``.

    Args:
        overrides: ``task=NAME`` to prepare, and ``protocol=``, ``data_dir=`` and ``cache_dir=``.

    Returns:
        0, or 1 if a listed task's data is not there or damaged.

    Raises:
        ValueError: For a mistake in the overrides, or if the data cannot be made.
    """
    if any(override.startswith("task=") for override in overrides):
        task = load(overrides).build_task()
        task.prepare(hashes="all")
        print(f"{task.name}: ready in {task.folder}")
        return 0
    whole = True
    for name in TASKS.names():
        task = load([*overrides, f"task={name}"]).build_task()
        state, reason = task.state(hashes="all")
        whole = whole and state == "found"
        command = shlex.join(["lra", "data", f"task={name}", *overrides])
        print(f"{name}: {state}: {reason}" + ("" if state == "found" else f"; run: {command}"))
        print(f"    source: {task.origin()}")
    return 0 if whole else 1
