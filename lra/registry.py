"""The one registry: names come from files and entry points, code is imported when needed."""

import ast
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Generic, TypeVar, get_origin

from lra.typed import unknown

T = TypeVar("T")


class Registry(Generic[T]):
    """Classes of one kind by name.

    A built-in entry lives in the file of its name inside ``package`` (``base`` and names that
    begin with an underscore are support code). Other packages add entries through an entry point
    of the group ``entry_points``, or by being imported (``plugins=[...]``).

    Args:
        kind: What an entry is called in messages ("attention").
        package: Dotted name of the package whose modules are the built-in entries.
        base: The class every entry must derive from, as "module:name", imported when needed.
        entry_points: Entry point group searched for entries from outside.
    """

    def __init__(self, kind: str, package: str, base: str, entry_points: str) -> None:
        self.kind = kind
        self.package = package
        self.base = base
        self.entry_points = entry_points
        self._entries: dict[str, type[T]] = {}

    def register(self, name: str, base: str | None = None) -> Callable[[type[T]], type[T]]:
        """Returns a decorator that registers a class under ``name``.

        Args:
            name: The entry's name.
            base: Another class to derive from than the registry's, as "module:name".

        Raises:
            TypeError: If the decorated object is not a subclass of the base class, or lacks
                something of what that asks for.
            ValueError: If another class has the name already.
        """

        def add(cls: type[T]) -> type[T]:
            wanted = base or self.base
            module, _, parent = wanted.partition(":")
            if not (
                isinstance(cls, type)
                and issubclass(cls, getattr(importlib.import_module(module), parent))
            ):
                raise TypeError(
                    f"{self.kind} '{name}' must be a subclass of {wanted}, not {cls!r}."
                )
            if lacks := _lacking(cls):
                raise TypeError(f"{self.kind} '{name}' {lacks}.")
            known = self._entries.get(name)
            origin = (cls.__module__, cls.__qualname__)
            if known is not None and (known.__module__, known.__qualname__) != origin:
                raise ValueError(
                    f"{self.kind} '{name}' is registered twice: by {known.__module__} and by "
                    f"{cls.__module__}. Rename one of them."
                )
            self._entries[name] = cls
            return cls

        return add

    def names(self) -> list[str]:
        """Returns every known name, sorted, without importing an entry's code."""
        return sorted({*self._entries, *self._files(), *self._points()})

    def summaries(self) -> dict[str, str]:
        """Returns the first docstring line of every entry, without importing its code."""
        lines = dict.fromkeys(self.names(), "")
        for name, cls in self._entries.items():
            lines[name] = (cls.__doc__ or "").strip().partition("\n")[0]
        for name, file in self._files().items():
            text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
            lines[name] = text.partition("\n")[0]
        for name, point in self._points().items():
            lines[name] = lines[name] or f"from {point.value}"
        return lines

    def get(self, name: str) -> type[T]:
        """Returns the class registered under ``name``, importing its module if need be.

        Raises:
            ValueError: If there is no such name (the message has the near match and all names),
                or if the package that offers it cannot be imported.
        """
        if name not in self._entries:
            if name in self._files():
                importlib.import_module(f"{self.package}.{name}")
            elif name in self._points():
                self._load(self._points()[name])
            else:
                raise ValueError(unknown(self.kind, name, self.names()))
        if name not in self._entries:
            raise ValueError(f"The module of {self.kind} '{name}' does not register that name.")
        return self._entries[name]

    def _load(self, point: importlib.metadata.EntryPoint) -> None:
        try:
            point.load()
        except Exception as error:  # whatever another package does when it is imported
            raise ValueError(
                f"The package that offers {self.kind} '{point.name}' cannot be imported from "
                f"{point.value}: {type(error).__name__}: {error}"
            ) from error

    def _files(self) -> dict[str, Path]:
        spec = importlib.util.find_spec(self.package)
        folders = spec.submodule_search_locations if spec else None
        files = (file for folder in folders or () for file in Path(folder).glob("*.py"))
        return {
            file.stem: file
            for file in files
            if file.stem != "base" and not file.stem.startswith("_")
        }

    def _points(self) -> dict[str, importlib.metadata.EntryPoint]:
        return {p.name: p for p in importlib.metadata.entry_points(group=self.entry_points)}


def _lacking(cls: type) -> str | None:
    """Returns what keeps a class from being an entry: something undefined, or options to fill in.

    An entry defines the methods that its base leaves abstract and the class variables that it only
    declares; each option of its ``Config``, if it has one, has a default.
    """
    declared = {
        name
        for base in cls.__mro__
        for name, hint in inspect.get_annotations(base).items()
        if get_origin(hint) is ClassVar
    }
    missing = {name for name in declared if not hasattr(cls, name)}
    missing |= getattr(cls, "__abstractmethods__", frozenset())
    if missing:
        return f"must define {', '.join(sorted(missing))}"
    config = getattr(cls, "Config", None)
    if config is not None and not dataclasses.is_dataclass(config):
        return "must have a dataclass as its Config"
    for field in dataclasses.fields(config) if config else ():
        if field.default is field.default_factory is dataclasses.MISSING:
            return f"must give its option {field.name} a default"
    return None
