"""From overrides to configurations: Hydra composes conf/, and every mistake is told at once.

Names, keys, types and values of all runs of a call are checked before anything starts.
"""

import copy
import itertools
import logging
import math
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lra.config import RunConfig, options_of
from lra.fit import check_fit
from lra.plugins import import_plugins, named_plugins
from lra.tasks import TASKS
from lra.typed import from_mapping, unknown
from models.attention import ATTENTIONS

LOG = logging.getLogger("lra")

MOST_RUNS = 10_000
"""Of one call: more are a slip, and would take hours to compose."""

GROUPS = ("task", "attention", "protocol", "launch")
PROTOCOL_SECTIONS = ("task", "model", "train")
"""Sections that a protocol fixes: an override of any key in them marks a run as modified."""


def conf_dir() -> Path:
    """Returns the folder of Hydra configurations: beside the package, or inside it in a wheel."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "conf"


def load(overrides: Iterable[str]) -> RunConfig:
    """Composes and checks the configuration of one run.

    Args:
        overrides: Hydra overrides, as on the command line.

    Raises:
        ValueError: One message with every problem: what was given, what is allowed.
    """
    configs = load_sweep(overrides)
    if len(configs) > 1:
        raise ValueError(f"These overrides make {len(configs)} runs: use lra train -m.")
    return configs[0]


def load_sweep(overrides: Iterable[str]) -> list[RunConfig]:
    """Composes and checks the configurations of a sweep, in the order in which they are run.

    Raises:
        ValueError: One message with every problem of any run.
    """
    return [config for _, config in load_jobs(overrides)]


def load_jobs(overrides: Iterable[str]) -> list[tuple[list[str], RunConfig]]:
    """Composes and checks each run of a sweep: its own overrides, and its configuration.

    Raises:
        ValueError: One message with every problem of any run.
    """
    overrides = list(overrides)
    jobs, problems = [], []
    with _composer(overrides) as composer:
        for job in composer.jobs(overrides):
            try:
                jobs.append((job, composer.config(job)))
            except ValueError as error:
                problems += str(error).splitlines()
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)))
    return jobs


def sweep_files() -> dict[str, Path]:
    """Returns the files of ready-made sweeps by their names."""
    return {path.stem: path for path in sorted((conf_dir() / "sweep").glob("*.yaml"))}


def load_attentions(overrides: Iterable[str]) -> list[tuple[str, dict[str, Any]]]:
    """Reads attentions and their options alone, without a task or a protocol around them.

    Args:
        overrides: ``attention=NAME``, ``attention.OPTION=VALUE`` and ``plugins=[...]``; values may
            be lists, as in a sweep.

    Returns:
        The name of each attention, and the options that are given.

    Raises:
        ValueError: One message with every problem.
    """
    overrides = list(overrides)
    found, problems = [], []
    with _composer(overrides) as composer:
        for job in composer.jobs(overrides):
            parsed = composer.parse(job)
            problems += [f"'{o.input_line}': write KEY=VALUE." for o in parsed if o.is_delete()]
            given = {o.key_or_group: o.value() for o in parsed if not o.is_delete()}
            given.pop("plugins", None)
            name = given.pop("attention", None)
            options = {}
            for key, value in given.items():
                if key.startswith("attention."):
                    options[key.removeprefix("attention.")] = value
                else:
                    allowed = ("attention", "attention.OPTION", "plugins")
                    problems.append(unknown("key", key, allowed))
            with _collecting(problems):
                if name is None:
                    names = "|".join(ATTENTIONS.names())
                    raise ValueError(f"Name an attention: attention={names}.")
                name = str(name)
                from_mapping(ATTENTIONS.get(name).Config, options, "attention")
                found.append((name, options))
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)))
    return found


def load_section(config: str, groups: Sequence[str], overrides: Iterable[str]) -> dict[str, Any]:
    """Composes another file of conf/ than config.yaml.

    Args:
        config: Its name.
        groups: The groups that its defaults choose from.
        overrides: Hydra overrides of its keys; a comma-separated value is a list.

    Returns:
        Its keys, as plain containers; their types are the caller's to check.

    Raises:
        ValueError: One message with every problem: names and keys.
    """
    with _composer([], config, groups) as composer:
        listed = []
        for override in composer.parse(overrides):
            text = override.input_line
            if override.is_sweep_override():
                text = f"{override.get_key_element()}=[{','.join(_values(override))}]"
            listed.append(text)
        sound, problems = composer.sound(composer.parse(listed))
        if problems:
            raise ValueError("\n".join(problems))
        return composer.compose(sound)


class _Composer:
    """Hydra's parser, group listing and compose call, while Hydra is initialised.

    Args:
        config_name: The file of conf/ that is composed.
        groups: The groups that its defaults choose from.
    """

    def __init__(self, config_name: str, groups: Sequence[str]) -> None:
        from hydra.core.global_hydra import GlobalHydra
        from hydra.core.override_parser.overrides_parser import OverridesParser

        self.config_name, self.groups = config_name, groups
        self.loader = GlobalHydra.instance().config_loader()
        self.parser = OverridesParser.create(config_loader=self.loader)
        self._composed: dict[tuple[str, ...], Any] = {}

    def parse(self, overrides: Iterable[str]) -> list[Any]:
        overrides = list(overrides)
        for text in overrides:
            if not _is_text(text):  # a record could not tell it
                raise ValueError(f"{text!r} is not UTF-8.")
        try:
            return self.parser.parse_overrides(overrides)
        except Exception as error:  # Hydra's, and those of what it calls in a value
            given = getattr(error, "override", " ".join(overrides))
            raise ValueError(
                f"Cannot read '{given}': write key=value, and quote lists and spaces for the "
                f"shell, as in 'plugins=[my_module]'."
            ) from None

    def jobs(self, overrides: list[str]) -> list[list[str]]:
        """Returns the overrides of each run of a sweep, each run once."""
        jobs = [job for line in _lines(overrides) for job in self._product(line)]
        return list(map(list, dict.fromkeys(map(tuple, jobs))))

    def _product(self, overrides: list[str]) -> list[list[str]]:
        """Returns every combination of the values given."""
        # Of a key given twice, the last counts, as in Hydra.
        last = {override.get_key_element(): override for override in self.parse(overrides)}
        choices = []
        for key, override in last.items():
            if override.is_sweep_override():
                choices.append([f"{key}={value}" for value in _values(override)])
            else:
                choices.append([override.input_line])
        count = math.prod(map(len, choices))
        if count > MOST_RUNS:
            raise ValueError(f"These overrides make {count:,} runs; at most {MOST_RUNS:,} may be.")
        return [list(job) for job in itertools.product(*choices)]

    def config(self, overrides: list[str]) -> RunConfig:
        """Returns the typed configuration of one run.

        Raises:
            ValueError: One message with every problem: names, keys, types and values.
        """
        sound, problems = self.sound(self.parse(overrides))
        composed = self.compose(sound)
        protocol = self.compose([o for o in sound if o.key_or_group in GROUPS])
        with _collecting(problems):
            options = options_of(composed["task"])
            task = from_mapping(TASKS.get(composed["task"]["name"]).Config, options, "task")
            composed["task"] |= asdict(task)
        with _collecting(problems):
            name, options = composed["attention"]["name"], options_of(composed["attention"])
            attention = from_mapping(ATTENTIONS.get(name).Config, options, "attention")
            composed["attention"] |= asdict(attention)
        with _collecting(problems):
            config = from_mapping(RunConfig, composed, "")
        if not problems:
            with _collecting(problems):
                check_fit(config)
        if problems:
            raise ValueError("\n".join(problems))
        asked = dict(_flatten(protocol))
        changed = {key: v for key, v in _flatten(composed) if asked.get(key) != v}
        sources = {f"task.{name}" for name in TASKS.get(config.task["name"]).sources}
        for key, value in changed.items():
            section, _, name = key.partition(".")
            if section == "attention":
                config.non_default[name] = value
            elif section in PROTOCOL_SECTIONS and key not in sources:
                config.modified[key] = [asked.get(key), value]
        return config

    def sound(self, overrides: list[Any]) -> tuple[list[Any], list[str]]:
        """Returns the overrides of names and keys that exist, and what is wrong with the others."""
        problems, wrong = [], []
        for override in overrides:
            if override.key_or_group in self.groups and override.is_delete():
                problems.append(f"{override.key_or_group} cannot be left out.")
                wrong.append(override)
            elif override.key_or_group in self.groups:
                options = self.loader.get_group_options(override.key_or_group)
                if override.value() not in options:
                    problems.append(unknown(override.key_or_group, str(override.value()), options))
                    wrong.append(override)
        groups = [o for o in overrides if o.key_or_group in self.groups and o not in wrong]
        chosen = dict(_flatten(self.compose(groups)))
        keys = [key for key in chosen if not key.endswith(".name")]
        open_sections = {o.key_or_group for o in wrong}  # nobody knows what they would hold
        for override in overrides:
            name = override.key_or_group
            section = name.rpartition(".")[0]
            if section in open_sections:
                wrong.append(override)
            elif not (name in keys or name in self.groups or name.startswith(("hydra.", "hydra/"))):
                siblings = [key for key in keys if key.rpartition(".")[0] == section]
                problems.append(unknown("key", name, siblings))
                wrong.append(override)
        return [o for o in overrides if o not in wrong], problems

    def _chooses_files(self, override: Any) -> bool:
        return override.key_or_group in self.groups or override.is_hydra_override()

    def compose(self, overrides: list[Any]) -> dict[str, Any]:
        """Returns the composed configuration as plain containers."""
        from hydra import compose
        from hydra._internal.config_loader_impl import ConfigLoaderImpl
        from hydra.errors import MissingConfigException
        from omegaconf import OmegaConf

        values = [o for o in overrides if not self._chooses_files(o)]
        files = tuple(o.input_line for o in overrides if self._chooses_files(o))
        try:
            # Files take Hydra far longer than values, and many runs of a sweep share them.
            if files not in self._composed:
                self._composed[files] = compose(self.config_name, overrides=list(files))
            config = copy.deepcopy(self._composed[files])
            ConfigLoaderImpl._apply_overrides_to_config(values, config)
            return OmegaConf.to_container(config, resolve=True)
        except MissingConfigException as error:
            folder, _, task = str(error.missing_cfg_file).rpartition("/")
            if folder == "hydra/launcher":
                extra = task.removeprefix("submitit_")
                told = f"needs a package: pip install -c constraints.txt -e '.[{extra}]'."
                raise ValueError(f"launch={extra} {told}") from None
            if not folder.startswith("protocol/"):
                raise ValueError(str(error).strip()) from None
            known = ", ".join(self.loader.get_group_options(folder)) or "none"
            raise ValueError(
                f"{folder} does not say how task '{task}' is run. It has: {known}."
            ) from None
        except RecursionError:
            raise ValueError("These values stand for one another without end.") from None
        except Exception as error:  # of Hydra and of what it uses: no code of ours is run
            raise ValueError(str(error).strip() or type(error).__name__) from None


def _values(override: Any) -> list[str]:
    """Returns the values of an override that has several.

    Raises:
        ValueError: If there are none, or more than a sweep may have.
    """
    from hydra.core.override_parser.types import RangeSweep

    swept, given = override.value(), override.input_line
    try:
        if isinstance(swept, RangeSweep) and _more_than(MOST_RUNS, swept.range()):
            raise ValueError(f"it has more than {MOST_RUNS:,} values")
        values = list(override.sweep_string_iterator())
    except Exception as error:  # of a range that Hydra cannot count out, too
        raise ValueError(f"'{given}': {str(error) or type(error).__name__}") from None
    if not values:
        raise ValueError(f"'{given}' matches nothing.")
    return values


def _is_text(given: str) -> bool:
    """Whether an argument is no bytes that Python could not decode."""
    return given == given.encode(errors="ignore").decode()


def _more_than(most: int, values: Iterable[Any]) -> bool:
    return next(itertools.islice(values, most, None), None) is not None


def _lines(overrides: list[str]) -> list[list[str]]:
    """Returns the overrides of each line of the sweeps that ``sweep=NAME`` names.

    What else is given is added to every line, after it, and so wins.
    """
    named = [o for o in overrides if o.startswith("sweep=")]
    if not named:
        return [overrides]
    from omegaconf import OmegaConf

    files, others = sweep_files(), [o for o in overrides if o not in named]
    names = [name for o in named for name in o.removeprefix("sweep=").split(",")]
    if wrong := [unknown("sweep", name, files) for name in names if name not in files]:
        raise ValueError("\n".join(wrong))
    lines = [line for name in names for line in OmegaConf.load(files[name])]
    return [[*shlex.split(line), *others] for line in lines]


@contextmanager
def _composer(
    overrides: list[str], config_name: str = "config", groups: Sequence[str] = GROUPS
) -> Iterator[_Composer]:
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    store_groups(overrides)
    if GlobalHydra.instance().is_initialized():  # inside a job of a sweep
        yield _Composer(config_name, groups)
        return
    with initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
        yield _Composer(config_name, groups)


def store_groups(overrides: list[str]) -> None:
    """Imports the plugins that ``overrides`` name, and offers every registered name to Hydra.

    Raises:
        ValueError: If a plugin cannot be imported.
    """
    from hydra.core.config_store import ConfigStore

    import_plugins(named_plugins(overrides))
    store = ConfigStore.instance()
    for group, registry in (("attention", ATTENTIONS), ("task", TASKS)):
        for name in registry.names():
            try:
                options = asdict(registry.get(name).Config())
            except ValueError:  # told when it is chosen; the others are not to suffer
                options = {}
            store.store(group=group, name=name, node={"name": name} | options)


@contextmanager
def _collecting(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        problems += str(error).splitlines()


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
