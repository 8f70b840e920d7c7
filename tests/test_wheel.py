"""The built wheel in an empty directory with an empty home: it lists, trains and reports."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGED = ("lra", "models", "conf")


def call(*command, cwd, **variables):
    """Runs a command as one does who has this wheel and no checkout; returns what it prints."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "XDG", "PYTHON"))}
    done = subprocess.run(
        command, cwd=cwd, env=kept | variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy of what the wheel is built from: a build writes beside its sources."""
    folder = tmp_path_factory.mktemp("sources")
    for name in PACKAGED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory):
    """The wheel, built without a network by the setuptools that the tests come with."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index")
    call(*pip, "-w", folder, sources, cwd=folder, HOME=str(folder))
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """Where the wheel is installed."""
    folder = tmp_path_factory.mktemp("site")
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-compile")
    call(*pip, "--target", folder, wheel, cwd=folder, HOME=str(folder))
    return folder


@pytest.fixture
def installed(site, tmp_path):
    """Calls a command in an empty directory, with an empty home and the installed wheel."""
    home, directory = tmp_path / "home", tmp_path / "directory"
    home.mkdir()
    directory.mkdir()

    def in_directory(*command):
        return call(
            *command, cwd=directory, HOME=str(home), PYTHONPATH=str(site), PYTHONSAFEPATH="1"
        )

    in_directory.cwd = directory
    return in_directory


def test_the_wheel_has_all_sources_and_all_of_conf_and_nothing_else(sources, wheel):
    files = [path.relative_to(sources) for name in PACKAGED for path in (sources / name).rglob("*")]
    expected = {str(path) for path in files if path.suffix == ".py"}
    expected |= {str(path) for path in files if path.suffix == ".csv"}
    page = Path("lra", "report", "page")
    expected |= {str(path) for path in files if page in path.parents and path.suffix}
    conf = [path for path in files if path.parts[0] == "conf"]
    expected |= {f"lra/{path}" for path in conf if path.suffix in (".yaml", ".md")}
    assert {"lra/cli.py", "models/encoder.py", "lra/conf/config.yaml"} <= expected
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_the_installed_wheel_is_what_runs_and_not_the_checkout(installed, site):
    script = (
        "import sys, lra.run, lra.sweep, lra.report\n"
        "from lra.compose import conf_dir, load\n"
        "load([])\n"
        "print(conf_dir(), *[module.__file__ for name, module in sys.modules.items()\n"
        "                    if name.partition('.')[0] in ('lra', 'models')], sep='\\n')"
    )
    paths = [Path(line) for line in installed(sys.executable, "-c", script).splitlines()]
    assert site / "lra" / "conf" in paths
    assert site / "models" / "attention" / "softmax.py" in paths
    assert [path for path in paths if not path.is_relative_to(site)] == []


def test_the_installed_wheel_lists_trains_and_reports_in_an_empty_directory(installed, site):
    lra = site / "bin" / "lra"
    smoke = ("protocol=smoke", "attention=cosformer", "tracker=none", "device=cpu")
    listed = installed(sys.executable, "-m", "lra", "ls")
    assert all(name in listed for name in ("listops", "cosformer", "smoke"))
    assert "cosformer seed 0: test" in installed(lra, "train", *smoke)
    installed(lra, "report")
    leaderboard = installed.cwd / "results" / "leaderboard-smoke.md"
    assert "cosformer" in leaderboard.read_text()
    assert {path.name for path in installed.cwd.iterdir()} == {"runs", "results"}
