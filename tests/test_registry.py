"""`lra.registry`: names without imports, and everything that may be wrong with an entry."""

import abc
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest

from lra.registry import Registry

ROOT = Path(__file__).parents[1]

FILES = {
    "__init__.py": '"""A package of animals."""',
    "base.py": '"""The base class."""\n\n\nclass Animal:\n    pass\n',
    "_feeding.py": 'raise RuntimeError("support code is no entry")',
    "cat.py": (
        '"""Cat: purrs.\n\nAnd more.\n"""\n'
        "from zoo import animals\n"
        "from zoo.base import Animal\n\n\n"
        '@animals.register("cat")\n'
        "class Cat(Animal):\n"
        "    pass\n"
    ),
    "dog.py": '"""Dog: barks."""\nraise RuntimeError("imported without need")\n',
    "eel.py": '"""Eel: registers nothing."""\n',
    "notes.txt": "no Python",
}


@pytest.fixture
def animals(tmp_path, monkeypatch):
    """A registry whose built-in entries are the files of a package ``zoo``."""
    folder = tmp_path / "zoo"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry("animal", "zoo", base="zoo.base:Animal", entry_points="zoo.animal")
    importlib.import_module("zoo").animals = registry
    yield registry
    for name in [name for name in sys.modules if name.partition(".")[0] == "zoo"]:
        del sys.modules[name]


@pytest.fixture
def base(animals):
    return importlib.import_module("zoo.base").Animal


class Point:
    """What `importlib.metadata` gives for an entry point."""

    def __init__(self, name, load, value="farm.cow:Cow"):
        self.name, self.load, self.value = name, load, value


@pytest.fixture
def points(monkeypatch):
    """The entry points of the group zoo.animal, to be filled by a test."""
    found = []
    monkeypatch.setattr(
        importlib.metadata,
        "entry_points",
        lambda group: found if group == "zoo.animal" else [],
    )
    return found


def test_names_are_those_of_the_files_without_support_code(animals):
    assert animals.names() == ["cat", "dog", "eel"]


def test_names_and_summaries_run_no_entrys_code(animals):
    assert animals.names()
    assert animals.summaries() == {
        "cat": "Cat: purrs.",
        "dog": "Dog: barks.",
        "eel": "Eel: registers nothing.",
    }
    assert not {"zoo.cat", "zoo.dog", "zoo._feeding"} & sys.modules.keys()


def test_the_names_of_tasks_and_attentions_are_known_without_torch():
    script = (
        "import json, sys\n"
        "from lra.tasks import TASKS\n"
        "from models.attention import ATTENTIONS\n"
        "names = [TASKS.names(), ATTENTIONS.names(), TASKS.summaries(), ATTENTIONS.summaries()]\n"
        "assert 'torch' not in sys.modules\n"
        "print(json.dumps(names))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    tasks, attentions, task_lines, attention_lines = json.loads(done.stdout)
    assert "listops" in tasks
    assert {"softmax", "linear", "cosformer"} <= set(attentions)
    assert all(task_lines.values())
    assert all(attention_lines.values())


def test_get_imports_the_file_of_the_name_and_no_other(animals):
    cls = animals.get("cat")
    assert (cls.__module__, cls.__name__) == ("zoo.cat", "Cat")
    assert "zoo.dog" not in sys.modules


def test_a_class_registered_by_hand_is_found_under_its_name(animals, base):
    class Bee(base):
        """Bee: hums.

        More.
        """

    assert animals.register("bee")(Bee) is Bee
    assert animals.get("bee") is Bee
    assert animals.names() == ["bee", "cat", "dog", "eel"]
    assert animals.summaries()["bee"] == "Bee: hums."


@dataclass(frozen=True)
class Width:
    width: int


@dataclass(frozen=True)
class DefaultWidth:
    width: int = 3
    widths: list = field(default_factory=list)


@pytest.mark.parametrize(
    ("lacking", "told"),
    [
        ({"legs": None, "speak": None}, "must define legs, speak"),
        ({"speak": None}, "must define speak"),
        ({"Config": int}, "must have a dataclass as its Config"),
        ({"Config": Width}, "must give its option width a default"),
    ],
)
def test_an_entry_that_lacks_what_its_base_asks_for_is_refused(animals, base, lacking, told):
    class Asking(base, abc.ABC):
        legs: ClassVar[int]
        name: ClassVar[str] = "any"

        @abc.abstractmethod
        def speak(self):
            """Says something."""

    whole = {"legs": 6, "speak": print, "Config": DefaultWidth}
    animals.register("bee")(type("Bee", (Asking,), whole))
    kept = {key: lacking.get(key, value) for key, value in whole.items()}
    broken = type("Wasp", (Asking,), {k: v for k, v in kept.items() if v is not None})
    with pytest.raises(TypeError, match=rf"^animal 'wasp' {told}\.$"):
        animals.register("wasp")(broken)
    assert "wasp" not in animals.names()


def test_a_name_that_another_class_has_is_refused_and_both_are_named(animals, base):
    first = type("First", (base,), {"__module__": "one.place"})
    second = type("Second", (base,), {"__module__": "other.place"})
    animals.register("bee")(first)
    with pytest.raises(ValueError, match=r"'bee' is registered twice.*one\.place.*other\.place"):
        animals.register("bee")(second)
    assert animals.get("bee") is first


def test_two_classes_of_one_module_cannot_share_a_name_either(animals, base):
    animals.register("bee")(type("First", (base,), {}))
    with pytest.raises(ValueError, match="registered twice"):
        animals.register("bee")(type("Second", (base,), {}))


def test_a_module_may_be_loaded_again_and_the_newer_class_counts(animals):
    old = animals.get("cat")
    new = importlib.reload(sys.modules["zoo.cat"]).Cat
    assert new is not old
    assert animals.get("cat") is new


@pytest.mark.parametrize("thing", [int, len, None, "cat"])
def test_what_does_not_derive_from_the_base_class_is_refused(animals, thing):
    with pytest.raises(TypeError, match=r"animal 'bee' must be a subclass of zoo\.base:Animal"):
        animals.register("bee")(thing)
    assert "bee" not in animals.names()


def test_an_instance_in_place_of_the_class_is_refused(animals, base):
    with pytest.raises(TypeError, match="must be a subclass"):
        animals.register("bee")(base())


def test_an_unknown_name_is_told_with_its_near_match_and_all_names(animals):
    with pytest.raises(ValueError, match=r".") as error:
        animals.get("dgo")
    assert str(error.value) == "Unknown animal 'dgo'. Did you mean dog? Allowed: cat, dog, eel."


@pytest.mark.parametrize("name", ["base", "_feeding", "__init__", "notes", ""])
def test_support_code_and_other_files_are_no_entries(animals, name):
    with pytest.raises(ValueError, match="Unknown animal"):
        animals.get(name)


def test_a_file_that_does_not_register_its_name_is_told(animals):
    with pytest.raises(ValueError, match="The module of animal 'eel' does not register that name"):
        animals.get("eel")


def test_an_entry_point_adds_a_name_without_loading_it(animals, points):
    points.append(Point("cow", load=lambda: pytest.fail("loaded without need")))
    assert animals.names() == ["cat", "cow", "dog", "eel"]
    assert animals.summaries()["cow"] == "from farm.cow:Cow"


def test_an_entry_point_is_loaded_when_its_name_is_asked_for(animals, points, base):
    cow = type("Cow", (base,), {"__doc__": "Cow: moos."})
    points.append(Point("cow", load=lambda: animals.register("cow")(cow)))
    assert animals.get("cow") is cow
    assert animals.summaries()["cow"] == "Cow: moos."


def test_a_near_match_may_come_from_an_entry_point(animals, points):
    points.append(Point("cow", load=None))
    with pytest.raises(ValueError, match=r"Did you mean cow\?"):
        animals.get("cwo")


def test_an_entry_point_that_does_not_register_its_name_is_told(animals, points):
    points.append(Point("cow", load=lambda: None))
    with pytest.raises(ValueError, match="'cow' does not register that name"):
        animals.get("cow")


def test_entry_points_of_other_groups_are_not_looked_at(animals, monkeypatch):
    groups = []
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: groups.append(group) or []
    )
    animals.names()
    assert set(groups) == {"zoo.animal"}


def test_an_entry_point_that_cannot_be_imported_is_one_readable_error(animals, points):
    def load():
        raise ImportError("No module named 'farm'")

    points.append(Point("cow", load=load))
    with pytest.raises(ValueError, match=r"cow.*farm"):
        animals.get("cow")
