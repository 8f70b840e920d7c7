"""Experiment tracking with Weights & Biases behind log() and close(), and leaderboards on request.

A tracker mirrors the run's own files, which are the source of truth, and never costs a run: what
it raises becomes one warning, and the run goes on without it.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lra.config import WandbConfig
from lra.record import Record

LOG = logging.getLogger("lra")

SECONDS = 60
"""The longest that a connection may take to begin or to end."""


class Tracker:
    """Mirrors a run to W&B, offline unless asked and logged in; does nothing without settings.

    Args:
        settings: Where to log to; None for no tracking.
        record: The run's record at its start.
        folder: The run's folder; offline files go to its sub-folder ``wandb``.
    """

    def __init__(self, settings: WandbConfig | None, record: Record, folder: Path) -> None:
        self._run: Any = None
        if settings is not None:
            self._run = self._try(lambda: _init(settings, record, folder))

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Logs the metrics of an optimiser step."""
        if self._run is not None:
            self._try(lambda: self._run.log(metrics, step=step))

    def close(self, summary: dict[str, Any], failed: bool) -> None:
        """Logs the final figures and ends the connection."""
        if self._run is not None:
            self._try(lambda: self._run.summary.update(summary))
        if self._run is not None:
            self._try(lambda: self._run.finish(exit_code=int(failed)))

    def _try(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            LOG.warning("W&B failed and is left out from here on: %s", error)
            self._run = None
            return None


def log_leaderboards(files: Sequence[Path], settings: WandbConfig, folder: Path) -> None:
    """Logs tables that `lra report` has written, as one artefact of tables and files.

    Args:
        files: The CSV files; each becomes a table of its name.
        settings: Where to log to.
        folder: Where offline files go, to a sub-folder ``wandb``.

    Raises:
        ValueError: If there is no such file, or W&B fails, with its reason.
    """
    import pandas as pd
    import wandb

    if missing := [str(file) for file in files if not file.is_file()]:
        raise ValueError(f"There is no {' and no '.join(missing)}: run lra report first.")
    try:
        run = wandb.init(
            mode=_mode(settings),
            project=settings.project,
            entity=settings.entity,
            dir=folder,
            name="leaderboards",
            job_type="report",
            settings=_settings(),
        )
        artifact = wandb.Artifact("leaderboards", type="leaderboard")
        for file in files:
            table = wandb.Table(dataframe=pd.read_csv(file))
            artifact.add(table, file.stem)
            artifact.add_file(str(file))
            run.log({file.stem: table})
        run.log_artifact(artifact)
        run.finish()
    except Exception as error:  # of another package, or of the network
        raise ValueError(f"W&B failed: {error}") from error


def _mode(settings: WandbConfig) -> str:
    """Returns the mode that is possible."""
    import wandb

    # Without a key wandb would ask for one at the terminal, or raise where there is none.
    if settings.mode == "online" and not wandb.login(prompt=False, verify=False):
        LOG.warning("wandb.mode=online needs `wandb login` first: it is logged offline.")
        return "offline"
    return settings.mode


def _settings() -> Any:
    import wandb

    return wandb.Settings(silent=True, console="off", init_timeout=SECONDS, finish_timeout=SECONDS)


def _init(settings: WandbConfig, record: Record, folder: Path) -> Any:
    import wandb

    task, attention = record.task["name"], record.attention["name"]
    started = "".join(filter(str.isdigit, record.started))
    run = wandb.init(
        mode=_mode(settings),
        project=settings.project,
        entity=settings.entity,
        dir=folder,
        id=f"{record.hash}-s{record.seed}-{started}",
        name=f"{record.protocol} {task} {attention} s{record.seed}",
        group=f"{record.protocol}/{task}/{attention}-{record.trial_of or record.hash}",
        job_type="train" if record.trial_of is None else "trial",
        tags=[record.protocol, task, attention],
        config=record.config,
        resume="allow",
        settings=_settings(),
    )
    run.define_metric("val_accuracy", summary="max")
    return run
