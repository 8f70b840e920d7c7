"""Tuning: values are tried with one seed, and the best by validation is run and alone is tested.

``tune=lr`` tries 1/3, 1 and 3 times the learning rate of the protocol (or of ``train.lr=``) with
seed 0, for every attention alike. Trials are runs of their own in the store, so that all seeds
share them, and cut ones go on. One that diverges or fails loses. Of equal scores the smaller rate
is chosen.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from lra import ranks, record
from lra.config import RunConfig
from lra.files import Busy
from lra.record import Record
from lra.run import check_finished, new_record, run, run_folder

LOG = logging.getLogger("lra")

SEED = 0
"""Seed of all trials."""


def train(config: RunConfig) -> Record:
    """Runs as `lra.run.run` does; a run with ``tune`` is preceded by its trials.

    Raises:
        ValueError: As `lra.run.run` does, for the run or one of its trials.
    """
    if config.tune == "none" or ranks.first(lambda: is_finished(config)):
        return run(config)
    tuning = ranks.first(lambda: earlier_choice(config))
    if tuning is None:
        tuning = _tuned(config)
    return run(config, tuning)


def trials(config: RunConfig) -> list[RunConfig]:
    """Returns the trials of a tuned run, by ascending learning rate."""
    tuned = new_record(config).hash
    return [
        replace(
            config, tune="none", seed=SEED, train=replace(config.train, lr=rate), trial_of=tuned
        )
        for rate in config.grid
    ]


def is_finished(config: RunConfig) -> bool:
    """Tells whether a run has ended well, and is to be kept."""
    earlier = record.load(run_folder(config)) if config.reuse == "auto" else None
    return earlier is not None and earlier.status == "ok"


def earlier_choice(config: RunConfig) -> dict[str, Any] | None:
    """Returns the tuning that this run, or one with another seed, has recorded with its choice.

    So all seeds have the same learning rate, whatever has become of the trials, and a cut run goes
    on with its own.

    Raises:
        ValueError: If the other seed was run on other data than is prepared now.
    """
    if config.reuse == "never":
        return None
    own = run_folder(config)
    _, _, setting = own.name.partition("-")
    for folder in [own, *sorted(own.parent.glob(f"s*-{setting}"))]:
        found = _load(folder)
        if found is not None and found.tuning is not None and found.tuning["chosen"] is not None:
            if folder != own:
                check_finished(config, folder, found)
            return found.tuning
    return None


def _load(folder: Path) -> Record | None:
    try:
        return record.load(folder)
    except ValueError:  # told where that run is asked for
        return None


def _tuned(config: RunConfig) -> dict[str, Any]:
    """Runs the trials and returns what is recorded of them."""
    wanted = dict(zip(config.grid, trials(config), strict=True))
    done: dict[float, Record] = {}
    chosen = None
    # What another process is trying comes last.
    for wait in (False, True):
        for rate, trial in wanted.items():
            if rate in done:
                continue
            if wait:
                LOG.info("waits for another process that tries lr=%g", rate)
            try:
                done[rate] = run(trial, wait=wait)
            except Busy:
                continue
            if done[rate].status in ("interrupted", "timeout"):
                return _told(config, done, None)
    scores = {r: one.validation.accuracy for r, one in done.items() if _has_score(one)}
    if scores:
        chosen = max(scores, key=lambda rate: (scores[rate], -rate))
        LOG.info("tune=%s: lr=%g is best by validation", config.tune, chosen)
    return _told(config, done, chosen)


def _has_score(trial: Record) -> bool:
    return trial.status == "ok" and trial.validation is not None


def _told(config: RunConfig, done: dict[float, Record], chosen: float | None) -> dict[str, Any]:
    """Returns `Record.tuning`."""
    return {
        "name": config.tune,
        "grid": config.grid,
        "chosen": chosen,
        "trials": [
            {
                "lr": rate,
                "status": trial.status,
                "reason": trial.reason,
                "validation": trial.validation.accuracy if trial.validation else None,
                "steps": trial.steps,
                "seconds": trial.train_seconds + trial.evaluation_seconds,
                "hash": trial.hash,
            }
            for rate, trial in sorted(done.items())
        ],
    }
