"""The tasks of the arena, one file each; `base` has the contract and the prepared-data cache."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lra.registry import Registry
from lra.typed import from_mapping

if TYPE_CHECKING:
    from lra.tasks.base import Task

TASKS: "Registry[Task]" = Registry(
    "task", "lra.tasks", base="lra.tasks.base:Task", entry_points="lra.task"
)
register_task = TASKS.register


def build_task(name: str, options: Mapping[str, Any], *, data_dir: Path, cache_dir: Path) -> "Task":
    """Builds a registered task; its data is not touched.

    Raises:
        ValueError: For an unknown name, an unknown option or one of the wrong type.
    """
    cls = TASKS.get(name)
    config = from_mapping(cls.Config, options, "task")
    return cls(config, data_dir=data_dir, cache_dir=cache_dir)
