"""What is there: `lra ls` (names, instantly) and `lra data` (prepared data of each task)."""

import shlex
from collections.abc import Sequence

from lra.compose import conf_dir, load
from lra.tasks import TASKS
from models.attention import ATTENTIONS


def listing() -> str:
    """Returns every task, attention and protocol with one line on each."""
    protocols = {
        path.stem: path.read_text().split("\n")[1].lstrip("# ")
        for path in sorted((conf_dir() / "protocol").glob("*.yaml"))
    }
    groups = {
        "task": TASKS.summaries(),
        "attention": ATTENTIONS.summaries(),
        "protocol": protocols,
    }
    width = max(len(name) for group in groups.values() for name in group)
    lines = []
    for group, entries in groups.items():
        lines.append(f"{group}=")
        lines += [f"  {name:<{width}}  {line}".rstrip() for name, line in entries.items()]
    return "\n".join(lines)


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
        task.prepare(hashes=True)
        print(f"{task.name}: ready in {task.folder}")
        return 0
    whole = True
    for name in TASKS.names():
        task = load([*overrides, f"task={name}"]).build_task()
        state, reason = task.state(hashes=True)
        whole = whole and state == "found"
        command = shlex.join(["lra", "data", f"task={name}", *overrides])
        print(f"{name}: {state}: {reason}" + ("" if state == "found" else f"; run: {command}"))
    return 0 if whole else 1
