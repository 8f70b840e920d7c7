"""One run from its configuration to its record: folder, lock, log, signals, and how it ended."""

import contextlib
import json
import logging
import os
import shlex
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lra import checkpoint, divergence, measure, ranks, record
from lra.config import RunConfig
from lra.files import Busy, canonical_json, locked, short_hash
from lra.record import Record
from lra.signals import StopSignals
from lra.text import shareable
from lra.train import Stopped, Trainer

LOG = logging.getLogger("lra")


def run(config: RunConfig, tuning: dict[str, Any] | None = None, wait: bool = False) -> Record:
    """Trains and tests as ``config`` says, and leaves everything in the run's folder.

    A finished run is returned, unless the data prepared now is not that of the run; one with a
    checkpoint goes on from it. A trial of a tuning is trained and validated, but not tested.

    Args:
        config: The run.
        tuning: Of a tuned run, what is to be recorded of it (`lra.record.Record.tuning`): it is run
            with the value chosen there; if there is none, it ends as the trials did.
        wait: Whether to wait for another process that has the run.

    Returns:
        The record; its status tells how the run ended.

    Raises:
        ValueError: If the device is not there, another process has the run (Busy), its record is
            damaged, or it was finished on other data.
    """
    folder = run_folder(config)
    try:
        with _locked(folder, wait):
            return _run_owned(config, tuning, folder)
    except Busy:
        raise Busy(f"Another process is working on {folder}.") from None


@contextlib.contextmanager
def _locked(folder: Path, wait: bool) -> Iterator[None]:
    """Holds the lock of a run's folder, which the first process takes for all."""
    with contextlib.ExitStack() as held:

        def take() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(folder / ".lock", wait and ranks.count() == 1))

        while True:
            try:
                ranks.first(take)
                break
            except Busy:
                if not wait:
                    raise
            time.sleep(1)  # rather than in the lock: the others would take it for an end
        yield


def run_folder(config: RunConfig) -> Path:
    """Returns the folder of a run; touches no data.

    Raises:
        ValueError: If the device is not there.
    """
    device = measure.resolve_device(config.device)
    precision, _ = measure.resolve_precision(config.precision, device)
    return config.folder(precision, device.type)


def new_record(config: RunConfig) -> Record:
    """Returns the record a run starts with; touches no data."""
    device = measure.resolve_device(config.device)
    precision, reason = measure.resolve_precision(config.precision, device)
    task = config.build_task()
    settings = json.loads(shareable(canonical_json(asdict(config))))
    for told_elsewhere in ("modified", "non_default", "trial_of"):
        del settings[told_elsewhere]
    return Record(
        hash=short_hash(config.identity(precision, device.type)),
        protocol=config.protocol.name,
        modified=config.modified,
        task={
            "name": task.name,
            "version": task.version,
            "fingerprint": task.fingerprint,
            "chance": task.chance,
            "validation_is_test": task.validation_is_test,
        },
        attention={
            "name": config.attention["name"],
            "options": config.attention_options,
            "non_default": config.non_default,
        },
        seed=config.seed,
        config=settings,
        command=shareable(shlex.join([*_program(), *sys.argv[1:]])),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        precision={"name": precision, "reason": reason},
        device=measure.device_facts(device)
        | {
            "runs_at_once": config.runs_at_once,
            "processes": ranks.count(),
            "compiled": config.compile,
            "activation_checkpointing": config.activation_checkpointing,
        },
        versions=measure.versions(),
        commit=measure.commit(),
        trial_of=config.trial_of,
    )


def _program() -> list[str]:
    if ranks.count() == 1:
        return ["lra"]
    here = os.environ.get("LOCAL_WORLD_SIZE") or ranks.count()
    return ["torchrun", f"--nproc_per_node={here}", "-m", "lra"]


def _run_owned(config: RunConfig, tuning: dict[str, Any] | None, folder: Path) -> Record:
    earlier = ranks.first(lambda: record.load(folder)) if config.reuse == "auto" else None
    # A trial that has diverged has said what it was asked, to all seeds alike.
    if earlier is not None and (
        earlier.status == "ok" or (earlier.status == "diverged" and earlier.trial_of is not None)
    ):
        with ranks.together():
            check_finished(config, folder, earlier)
        LOG.info("Finished before. %s", describe(earlier))
        return earlier
    ranks.first(lambda: _tidy(folder, everything=config.reuse == "never"))
    current = new_record(config)
    current.tuning = tuning
    if earlier is not None:
        current.started, current.sessions = earlier.started, earlier.sessions + 1
    with _log_file(folder) if ranks.leads() else contextlib.nullcontext():
        LOG.debug("%s", current.command)
        data_hash = earlier.task.get("data_hash") if earlier else None
        if tuning is None:
            _run_recorded(config, current, folder, data_hash)
        elif tuning["chosen"] is None:
            current.status, current.reason = _unchosen(tuning["trials"])
            ranks.first(lambda: current.save(folder))
        else:
            train = replace(config.train, lr=tuning["chosen"])
            _run_recorded(replace(config, train=train), current, folder, data_hash)
        LOG.info("%s", describe(current))
    return current


def _run_recorded(config: RunConfig, current: Record, folder: Path, data_hash: str | None) -> None:
    """Runs, and turns whatever ends the run into the status and reason of its record."""

    def begin() -> None:
        current.save(folder)
        (folder / divergence.FILE).unlink(missing_ok=True)

    ranks.first(begin)
    trainer = None
    device = measure.resolve_device(config.device)
    clock = measure.Clock(device)
    ending = threading.Lock()  # held by the thread that writes how the run ended

    def give_up(name: str) -> None:
        """Ends the process in the midst of what it is at; the last whole step is saved.

        Of several processes none saves: what they have to add up first would be waited for.
        """
        with ending:
            try:
                if current.status == "running":
                    current.status, current.reason = "interrupted", f"{name} received"
                    if trainer is not None and ranks.count() == 1:
                        current.reason += ", in a step or batch that is taken again"
                        trainer.save()
                    elif trainer is not None:
                        current.reason += f"; it goes on from step {trainer.saved[0]}"
                    _write_end(current, trainer, folder)
                    LOG.info("%s", describe(current))
                    sys.stdout.flush()
            finally:
                os._exit(130)

    with StopSignals(give_up) as stop:
        status: record.Status
        try:
            with ranks.together():
                prepared = config.build_task().prepare(hashes="splits")
                check_data(prepared.manifest, folder, data_hash)
                current.task |= {
                    "data_hash": prepared.manifest["hash"],
                    "source": prepared.manifest["source"],
                    "splits": prepared.manifest["splits"],
                    "baselines": prepared.manifest["baselines"],
                }
                trainer = Trainer(config, current, prepared, folder, device, stop, clock)
                stop.deferred = True
                status, reason = _train(trainer)
        except KeyboardInterrupt:
            status, reason = "interrupted", "stopped at once, without a checkpoint"
        except Exception as error:
            status, reason = measure.failure(error)
            LOG.debug("%s", traceback.format_exc())
        with ending:
            current.status, current.reason = status, reason
            _write_end(current, trainer, folder)
            if current.status == "ok" and not config.keep_checkpoint and ranks.leads():
                checkpoint.remove(folder)
        if trainer is not None:
            trainer.close()


def _write_end(current: Record, trainer: Trainer | None, folder: Path) -> None:
    """Writes the record of a run that has ended; that it cannot be written is a failure too."""
    current.reason = shareable(current.reason)
    if trainer is not None:
        try:
            trainer.complete_record()
        except Exception as error:  # the device may be what failed
            LOG.warning("The last measures of this run are missing: %s", error)
    if not ranks.leads():
        return
    try:
        current.save(folder)
    except OSError as error:
        current.status, reason = measure.failure(error)
        current.reason = shareable(reason)
    (folder / record.PROGRESS).unlink(missing_ok=True)


def check_finished(config: RunConfig, folder: Path, finished: Record) -> None:
    """Refuses a finished run that is not of the data that is prepared now.

    Raises:
        ValueError: What it was run on, what there is now, and what to type.
    """
    task = config.build_task()
    state, _ = task.state()
    if state != "missing":  # nothing is prepared for the sake of a finished run
        manifest = task.manifest() if state == "found" else task.prepare().manifest
        check_data(manifest, folder, finished.task.get("data_hash"))


def check_data(manifest: Mapping[str, Any], folder: Path, data_hash: str | None) -> None:
    """Refuses other data than an earlier session had.

    Raises:
        ValueError: What the run was on, what there is now, and what to type.
    """
    if data_hash not in (None, manifest["hash"]):
        raise ValueError(
            f"{folder} was run on data {data_hash}, but the prepared data is "
            f"{manifest['hash']} ({manifest['source']}): set data_dir to that of "
            f"the run, another runs_dir, or reuse=never to start the run over."
        )


def _train(trainer: Trainer) -> tuple[record.Status, str]:
    """Trains and tests, and saves the last whole step of a run that is stopped.

    A run that has diverged keeps the checkpoint from before: the same command ends as it did.

    Returns:
        How it ended, and why.
    """
    try:
        trainer.fit()
        trainer.test()
        trainer.finish()
    except Stopped as stopped:
        told = ""
        if stopped.status != "diverged" and not trainer.save():
            told = f"; it goes on from step {trainer.saved[0]}, as no later one could be saved"
        return stopped.status, f"{stopped}{told}"
    return "ok", ""


def _unchosen(trials: list[dict[str, Any]]) -> tuple[record.Status, str]:
    """Returns the status and the reason of a tuned run whose trials leave nothing to choose."""
    for trial in trials:
        if trial["status"] in ("interrupted", "timeout"):
            return trial["status"], f"trial lr={trial['lr']:g}: {trial['reason']}"
    ends = {trial["status"] for trial in trials}
    told = "; ".join(f"lr={t['lr']:g} {t['status']}: {t['reason']}" for t in trials)
    return ends.pop() if len(ends) == 1 else "failed", f"no trial came to its end: {told}"


def describe(finished: Record) -> str:
    """Returns one line on a run: what it is, how it ended, its scores."""
    name = f"{finished.task['name']} {finished.attention['name']} seed {finished.seed}"
    test, validation = finished.test, finished.validation
    if finished.trial_of is not None and finished.status == "ok" and validation is not None:
        rate = finished.config["train"]["lr"]
        return f"{name}: trial lr={rate:g}: validation {validation.accuracy:.2%}"
    if finished.status != "ok" or test is None or validation is None:
        return f"{name}: {finished.status} after {finished.steps:,} steps: {finished.reason}"
    return (
        f"{name}: test {test.accuracy:.2%} [{test.low:.2%}, {test.high:.2%}] of {test.n:,}, "
        f"validation {validation.accuracy:.2%}, weights of step {test.step:,}"
    )


class _LogFile(logging.FileHandler):
    """A file of messages that a full disk ends, but nothing else: the console has them too."""

    def handleError(self, _: logging.LogRecord) -> None:
        """Says nothing."""

    def close(self) -> None:
        """Closes the file, whatever could not be written."""
        with contextlib.suppress(OSError):
            super().close()


@contextlib.contextmanager
def _log_file(folder: Path) -> Iterator[None]:
    """Writes the run's messages and tracebacks to ``log.txt`` too."""
    handler = _LogFile(folder / "log.txt")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    handler.setLevel(logging.DEBUG)
    LOG.addHandler(handler)
    LOG.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        LOG.removeHandler(handler)
        handler.close()


def _tidy(folder: Path, everything: bool) -> None:
    """Removes what a write that a kill -9 cut has left, or all but the lock."""
    for path in folder.iterdir() if everything else folder.glob(".*.tmp"):
        if path.name != ".lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
