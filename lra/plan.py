"""What a call would run: each run with its folder, its state, and the time that it will take."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lra import record
from lra.compose import load_jobs
from lra.config import RunConfig
from lra.files import canonical_json, user_path
from lra.record import Record
from lra.run import check_finished, new_record, run_folder
from lra.status import State, duration, state_of, summary, table
from lra.tune import earlier_choice, trials

LOG = logging.getLogger("lra")


@dataclass
class Planned:
    """A run of a call.

    Attributes:
        job: Its overrides.
        config: Its configuration.
        state: How far it is. Beside the states of its folder there are ``data missing``, with what
            to type as its note, and ``starts over``.
    """

    job: list[str]
    config: RunConfig
    state: State

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.state.folder


def plan(overrides: Sequence[str]) -> list[Planned]:
    """Returns the runs that ``overrides`` spell out, each once; loads no data and starts nothing.

    Raises:
        ValueError: For a mistake in any of them, or if a finished one was run on other data.
    """
    runs: dict[Path, Planned] = {}
    lacking: dict[Path, str] = {}
    for job, config in load_jobs(overrides):
        folder = run_folder(config)
        if folder in runs:
            continue
        state = _state(config, folder)
        if state.status != "ok":
            task = config.build_task()
            if task.folder not in lacking:
                lacking[task.folder] = _lacks(config)
            if lacking[task.folder]:
                state.status, state.note = "data missing", lacking[task.folder]
        job = [override for override in job if not override.startswith(("hydra.", "hydra/"))]
        state.steps = config.train.steps
        runs[folder] = Planned(job, config, state)
    return list(runs.values())


def with_trials(runs: Sequence[Planned]) -> list[Planned]:
    """Returns the runs, each tuned one preceded by the trials that its choice still waits for."""
    listed: dict[Path, Planned] = {}
    for run in runs:
        if (
            run.config.tune != "none"
            and run.state.status not in ("ok", "data missing")
            and earlier_choice(run.config) is None
        ):
            for trial in trials(run.config):
                folder = run_folder(trial)
                state = _state(trial, folder)
                state.steps, state.trial = trial.train.steps, True
                listed.setdefault(folder, Planned([], trial, state))
        listed[run.folder] = run
    return list(listed.values())


def tell_missing(runs: Sequence[Planned]) -> None:
    """Names each task that has no data once, with what to type to get it."""
    left_out: dict[str, list[Planned]] = {}
    for run in runs:
        if run.state.status == "data missing":
            left_out.setdefault(run.state.note, []).append(run)
    for reason, group in left_out.items():
        task = group[0].config.task["name"]
        LOG.warning("No data for task=%s, left out in %d runs: %s", task, len(group), reason)
        for run in group:
            run.state.note = f"lra data task={task} says what to type"


def planned_status(overrides: Sequence[str]) -> str:
    """Returns the table of `lra.status` of the runs of a call, whether they were begun or not.

    Raises:
        ValueError: For a mistake in any of them.
    """
    runs = with_trials(plan(overrides))
    tell_missing(runs)
    states = [run.state for run in runs]
    return f"{table(states)}\n{summary(states)}"


def dry_run(overrides: Sequence[str], multirun: bool) -> int:
    """Prints each run of a call with its state, and the time that is to be expected.

    Args:
        overrides: Of the call.
        multirun: Whether they may make several runs.

    Returns:
        0.

    Raises:
        ValueError: For a mistake in any of them.
    """
    runs = plan(overrides)
    if len(runs) > 1 and not multirun:
        raise ValueError(f"These overrides make {len(runs)} runs: use lra train -m.")
    runs = with_trials(runs)
    tell_missing(runs)
    speeds = {
        folder: _speeds(folder) for folder in {user_path(run.config.runs_dir) for run in runs}
    }
    total, unknown = 0.0, 0
    for run in runs:
        state = run.state
        if state.status in ("ok", "data missing") or (state.trial and state.status == "diverged"):
            continue
        measured = speeds[user_path(run.config.runs_dir)].get(_cost(new_record(run.config)))
        if state.seconds_left is None and measured is not None:
            state.seconds_left = (state.steps - state.step) * measured
        total += state.seconds_left or 0.0
        unknown += state.seconds_left is None
    states = [run.state for run in runs]
    print(table(states, left="time"))
    parts = []
    if total or not unknown:
        parts.append(f"{duration(total)} one after the other, as fast as in earlier runs")
    if unknown:
        parts.append(f"{unknown} of unknown speed")
    print(f"{summary(states)}\nTo do: {', and '.join(parts)}. Nothing was started.")
    return 0


def _state(config: RunConfig, folder: Path) -> State:
    if config.reuse == "never":
        return State(folder, "starts over" if folder.exists() else "not started")
    state = state_of(folder)
    if state.status == "ok":
        finished = record.load(folder)
        assert finished is not None
        check_finished(config, folder, finished)
    return state


def _lacks(config: RunConfig) -> str:
    """Returns why the data of a run cannot be had, in one line; empty if it can."""
    task = config.build_task()
    if task.state()[0] == "found":
        return ""
    try:
        task.locate()
    except ValueError as error:
        return " ".join(str(error).split())
    return ""


def _speeds(runs: Path) -> dict[str, float]:
    """Returns seconds a step, evaluations included, by what they depend on; the latest count."""
    records = []
    for path in runs.rglob("record.json"):
        try:
            loaded = record.load(path.parent)
        except ValueError:  # told where it is asked for
            continue
        if loaded is not None and loaded.steps:
            records.append(loaded)
    return {
        _cost(r): (r.train_seconds + r.evaluation_seconds) / r.steps
        for r in sorted(records, key=lambda r: r.started)
    }


def _cost(r: Record) -> str:
    """Returns what the time of a step depends on."""
    train = r.config.get("train", {})
    return canonical_json(
        [
            r.task.get("fingerprint"),
            r.attention,
            r.config.get("model"),
            [train.get(key) for key in ("batch_size", "eval_every")],
            r.precision.get("name"),
            r.device.get("name"),
            r.device.get("processes", 1),
        ]
    )
