"""Plugins: modules of the user that register attentions or tasks when they are imported."""

import importlib
import os
import sys
from collections.abc import Iterable


def import_plugins(modules: Iterable[str]) -> None:
    """Imports modules that register attentions or tasks; the current directory is searched too.

    Raises:
        ValueError: If one cannot be imported.
    """
    for module in modules:
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever a user's module does when it is imported
            raise ValueError(
                f"plugins: cannot import '{module}': {type(error).__name__}: {error}"
            ) from error


def named_plugins(overrides: list[str]) -> list[str]:
    """Returns the modules that ``plugins=[...]`` names; they come before all other overrides."""
    named = [o for o in overrides if o.lstrip("+~").startswith("plugins=")]
    if not named:
        return []
    from hydra.core.override_parser.overrides_parser import OverridesParser

    modules: list[str] = []
    for text in named:
        try:
            override = OverridesParser.create().parse_override(text)
            value = None if override.is_sweep_override() else override.value()
        except Exception:  # Hydra's, and those of what it calls in a value
            value = None
        if not isinstance(value, list):
            raise ValueError(
                f"'{text}' is no list of modules: write 'plugins=[my_module,my_package.attention]'."
            )
        modules += map(str, value)
    return modules
