"""Shared fixtures: one thread, one cache of prepared data, and runs that take a second."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

# Before torch is imported, and for every process that a test starts: tests share two cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["WANDB_SILENT"] = "true"

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for prepared data that all tests share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def smoke(tmp_path: Path, cache: Path) -> Callable[..., list[str]]:
    """Returns the overrides of a smoke run below the test's own folder."""

    def overrides(*more: str) -> list[str]:
        return [
            "protocol=smoke",
            "tracker=none",
            f"runs_dir={tmp_path / 'runs'}",
            f"cache_dir={cache}",
            *more,
        ]

    return overrides


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The environment of a newcomer: an empty home, and this checkout on the path."""
    home = tmp_path / "home"
    home.mkdir()
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "XDG"))}
    return kept | {"HOME": str(home), "PYTHONPATH": str(ROOT)}
