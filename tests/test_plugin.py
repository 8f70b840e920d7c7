"""An attention from another package is listed, checked, trained and reported like our own."""

import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

PLUGIN = ROOT / "tests" / "plugin"

SMOKE = ("protocol=smoke", "tracker=none", "device=cpu")


def call(*arguments, cwd, environment):
    """Runs `lra`; returns its exit code and what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "lra", *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Where the plugin is installed, without a network."""
    sources = shutil.copytree(PLUGIN, tmp_path_factory.mktemp("plugin") / "sources")
    folder = tmp_path_factory.mktemp("site")
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "-q")
    target = ("--no-build-isolation", "--target", folder, sources)
    done = subprocess.run([*pip, *target], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_an_installed_attention_is_listed_checked_trained_and_reported(
    site, environment, tmp_path, cache
):
    environment["PYTHONPATH"] += f":{site}"

    def lra(*arguments):
        code, output = call(*arguments, cwd=tmp_path, environment=environment)
        assert code == 0, output
        return output

    names = [line.split()[0] for line in lra("ls").splitlines()]
    assert {"power", "softmax"} <= set(names)
    options = lra("ls", "attention", "attention=power")
    assert re.search(r"\nother\n  power +self, causal, cross, recurrent +exact +N ", options)
    assert "attention.power=2.0    a number\n    The exponent p." in options

    checks = lra("check", "attention=power", "attention.power=3")
    assert " checks, 0 failed" in checks

    trained = lra("train", *SMOKE, f"cache_dir={cache}", "attention=power", "attention.power=3")
    assert "power seed 0: test" in trained
    lra("report")
    board = (tmp_path / "results" / "leaderboard-smoke.md").read_text()
    assert "| power power=3.0" in board


def test_a_module_is_an_attention_without_any_packaging(environment, tmp_path, cache):
    shutil.copy(PLUGIN / "lra_power.py", tmp_path)
    plugins = "plugins=[lra_power]"

    def lra(*arguments):
        code, output = call(*arguments, cwd=tmp_path, environment=environment)
        assert code == 0, output
        return output

    assert "\n  power" in lra("ls", plugins)
    # In a sweep each run is a process of its own, which must find the module too.
    sweep = (*SMOKE, f"cache_dir={cache}", plugins, "attention=power", "attention.power=1")
    *_, heading, row = lra("train", "-m", *sweep).splitlines()
    assert heading.split()[:2] == ["run", "status"]
    assert row.split()[1] == "ok"
    assert "/power/" in row


def test_the_readme_shows_the_plugin_as_it_is():
    assert (PLUGIN / "lra_power.py").read_text() in (ROOT / "README.md").read_text()


def test_it_takes_about_thirty_lines():
    lines = (PLUGIN / "lra_power.py").read_text().splitlines()
    assert len([line for line in lines if line.strip()]) <= 32
