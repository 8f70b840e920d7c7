"""The walls of the design: which part may import what, and what the trainer must not know."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lra.tasks import TASKS
from models.attention import ATTENTIONS

ROOT = Path(__file__).parents[1]

TOP_LEVEL = {
    "README.md",
    "pyproject.toml",
    "lra",
    "models",
    "conf",
    "runs",
    "tests",
    "results",
    "Makefile",
    "constraints.txt",
    "LICENSE",
    "CITATION.cff",
    "CONTRIBUTING.md",
}

TRAINER = [
    "lra/session.py",
    "lra/train.py",
    "lra/build.py",
    "lra/evaluate.py",
    "lra/batches.py",
    "lra/run.py",
]


def sources(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"no sources below {folder}"
    return files


def imported(path):
    """Returns the dotted names that a file imports anywhere in it, with what is taken from them."""
    package = path.relative_to(ROOT).parent.parts
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *([node.module] if node.module else [])))
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def crossings(files, forbidden, allowed=()):
    """Returns the imports below a forbidden name and below no allowed one, by file."""

    def below(name, parents):
        return any(f"{name}.".startswith(f"{parent}.") for parent in parents)

    found = {
        str(path.relative_to(ROOT)): sorted(
            name for name in imported(path) if below(name, forbidden) and not below(name, allowed)
        )
        for path in files
    }
    return {path: names for path, names in found.items() if names}


def test_the_reader_of_imports_sees_every_form(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "lra" / "sub" / "file.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import a.b, c as d\nfrom e import f\nfrom . import g\nfrom ..h import i\n"
        "def late():\n    import j\n"
    )
    assert imported(path) == {"a.b", "c", "e.f", "lra.sub.g", "lra.h.i", "j"}
    assert crossings([path], ["a", "e.f.g", "j"]) == {"lra/sub/file.py": ["a.b", "j"]}
    assert crossings([path], ["a", "j"], allowed=["a.b"]) == {"lra/sub/file.py": ["j"]}


def test_models_know_nothing_of_the_harness_but_its_registry_and_its_typed_options():
    allowed = ["lra.registry", "lra.typed"]
    assert crossings(sources("models"), ["lra", "hydra", "omegaconf"], allowed) == {}


def test_tasks_know_neither_models_nor_torch():
    assert crossings(sources("lra/tasks"), ["models", "torch", "hydra", "omegaconf"]) == {}


def test_tasks_know_nothing_of_what_comes_after_them():
    allowed = ["lra.tasks", "lra.files", "lra.registry", "lra.typed"]
    assert crossings(sources("lra/tasks"), ["lra"], allowed) == {}


def test_the_report_knows_neither_torch_nor_hydra_nor_models():
    assert crossings(sources("lra/report"), ["torch", "hydra", "omegaconf", "models"]) == {}


def test_the_report_reads_nothing_but_records():
    allowed = ["lra.report", "lra.record", "lra.cells", "lra.files", "lra.typed"]
    assert crossings(sources("lra/report"), ["lra"], allowed) == {}


def test_the_report_loads_neither_torch_nor_hydra_by_any_detour():
    script = (
        "import sys, lra.report\n"
        "print(*{'torch', 'hydra', 'omegaconf', 'wandb', 'models', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == []


def test_only_the_tracker_imports_wandb():
    found = crossings([*sources("lra"), *sources("models")], ["wandb"])
    assert found == {"lra/track.py": ["wandb"]}


@pytest.mark.parametrize("file", TRAINER)
def test_the_trainer_asks_for_no_attentions_class(file):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    classes = {ATTENTIONS.get(name).__name__ for name in ATTENTIONS.names()} | {"Attention"}
    asked = {
        named.id if isinstance(named, ast.Name) else named.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("isinstance", "issubclass")
        for named in ast.walk(node.args[1])
        if isinstance(named, ast.Name | ast.Attribute)
    }
    assert asked & classes == set()


@pytest.mark.parametrize("file", TRAINER)
def test_the_trainer_imports_no_single_attention_and_no_single_task(file):
    modules = [f"models.attention.{name}" for name in ATTENTIONS.names()]
    modules += [f"lra.tasks.{name}" for name in TASKS.names()]
    assert crossings([ROOT / file], modules) == {}


@pytest.mark.parametrize("file", TRAINER)
def test_the_trainer_compares_nothing_with_the_name_of_a_task_or_an_attention(file):
    names = {*TASKS.names(), *ATTENTIONS.names()}
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    compared = {
        constant.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare | ast.match_case)
        for constant in ast.walk(node.pattern if isinstance(node, ast.match_case) else node)
        if isinstance(constant, ast.Constant) and isinstance(constant.value, str)
    }
    assert compared & names == set()


def test_the_top_level_of_the_repository_holds_what_the_design_lists():
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode != 0 or not listed.stdout:
        pytest.skip(f"{ROOT} is no git repository: {listed.stderr.strip()}")
    top = {line.strip('"').partition("/")[0] for line in listed.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL
    assert {"lra", "models", "conf", "pyproject.toml"} <= top
