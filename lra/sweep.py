"""Sweeps: Hydra's launchers, each run in a process of its own, and a table of how they ended."""

import contextlib
import ctypes
import logging
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig

from lra import ranks, record
from lra.compose import conf_dir, load, store_groups
from lra.files import is_locked
from lra.signals import TIME_IS_UP, handled
from lra.text import aligned

if TYPE_CHECKING:
    from lra.plan import Planned

LOG = logging.getLogger("lra")

LOOK_SECONDS = 0.2
"""Between two looks whether a run has ended, or is to be stopped."""

SAVE_SECONDS = 15
"""How long a run that is asked to end may take; its process ends itself before."""

PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def sweep(overrides: Sequence[str]) -> int:
    """Runs every combination that ``overrides`` spell out, and prints how each ended.

    All of them are checked before the first one starts. Finished ones and those without data are
    left out; a failed one does not stop the others.

    Returns:
        0 if every run that has data has finished now or before, else 1; 130 if it was stopped.

    Raises:
        ValueError: For a mistake in any of the combinations.
    """
    from lra.plan import launch_of, plan, tell_missing

    runs = ranks.first(lambda: plan(overrides))
    shared = max((run.config.runs_at_once for run in runs), default=1)
    launch = launch_of(overrides)
    if ranks.count() > 1 and (shared > 1 or launch == "slurm"):
        what = "jobs of Slurm" if launch == "slurm" else f"{shared} runs at once"
        raise ValueError(
            f"{what} would each want all {ranks.count()} processes: leave "
            f"launch= and runs_at_once= out, or start lra without torchrun."
        )
    tell_missing(runs)
    finished = [run for run in runs if run.state.status == "ok"]
    todo = [run for run in runs if run.state.status not in ("ok", "data missing")]
    LOG.info("%d runs, %d of them finished before", len(runs), len(finished))
    stopped = bool(todo) and _launch(overrides, todo)
    rows = ranks.first(lambda: [_row(run) for run in runs])
    if ranks.leads():
        print(aligned([("run", "status", "test", "reason or log"), *rows]))
    if stopped:
        return 130
    ended = [row[1] for row in rows if row[1] != "data missing"]
    return int(not ended or any(status not in ("ok", "skipped") for status in ended))


def _launch(overrides: Sequence[str], runs: Sequence["Planned"]) -> bool:
    """Hands the runs to Hydra's launcher; returns whether a signal stopped them, or the wait."""
    from hydra import initialize_config_dir
    from hydra._internal.callbacks import Callbacks
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.plugins import Plugins
    from hydra.types import HydraContext, RunMode
    from omegaconf import OmegaConf

    from lra.measure import resolve_device
    from lra.plan import launch_of, where

    slurm = launch_of(overrides) == "slurm"
    jobs = [run.job for run in runs]
    store_groups(list(overrides))
    of_hydra = [override for override in overrides if override.startswith(("hydra.", "hydra/"))]
    # GPUs of a run, as conf/launch/ asks for them.
    OmegaConf.register_new_resolver(
        "gpus", lambda device: int(resolve_device(device).type == "cuda"), replace=True
    )
    with initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"), where(overrides):
        hydra = GlobalHydra.instance().hydra
        config = hydra.compose_config(
            "config", [*of_hydra, *jobs[0]], RunMode.MULTIRUN, with_log_configuration=False
        )
        folder = Path(config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)

        def launch(told: Path | None) -> None:
            folders = [run.folder for run in runs]
            task = partial(_run, signals=told, starter=_process(), folders=folders)
            launcher = Plugins.instance().instantiate_launcher(
                hydra_context=HydraContext(hydra.config_loader, Callbacks()),
                task_function=task,
                config=config,
            )
            for ended in launcher.launch(jobs, initial_job_idx=0):
                _ = ended.return_value  # raises what a job of ours has raised

        if slurm:
            from lra.slurm import wait_for

            return wait_for(lambda: launch(None))
        with tempfile.TemporaryDirectory(dir=folder) as signals:
            told = Path(signals)
            with _noting_signals(told):
                try:
                    launch(told)
                except Exception:
                    if not _stops(told):
                        raise
            return _stops(told) > 0


def _run(_: Any, signals: Path | None, starter: tuple[str, int], folders: Sequence[Path]) -> None:
    """Hydra's job: runs one combination in a fresh process.

    Args:
        signals: Where `_noting_signals` notes them; None if the sweep's are none of its jobs'.
        starter: The process of the sweep; another one runs this beside others like it.
        folders: That of each job's run.
    """
    beside = _process() != starter
    with _receiving() if beside else contextlib.nullcontext([]) as received:
        # At a terminal a Ctrl-C reaches the sweep and this process: it is one all the same.
        def stops() -> int:
            return max(len(received), _stops(signals) if signals else 0)

        if ranks.leads():
            _wait_for_lock(folders[HydraConfig.get().job.num], stops)
        if stops():
            return
        overrides = list(HydraConfig.get().overrides.task)
        process = _start(overrides, quiet=beside)
        asked = 0
        try:
            while (code := process.poll()) is None:
                told = stops()
                if told > 1 and signals:
                    process.kill()
                elif told > asked:
                    process.send_signal(received[0] if received else signal.SIGINT)  # it saves
                asked = told
                time.sleep(LOOK_SECONDS)
        finally:  # what ends the job ends the run
            _end(process)
        # 0, 1 and 130 are told in the record; 2 is a refusal, of a run that is not ours to judge.
        if code not in (0, 1, 2, 130) and not stops() and ranks.leads():
            _record_crash(overrides, code)
        if signals is None and received:
            sys.exit(128 + received[0])  # Slurm has ended the job, or begins it again


def _process() -> tuple[str, int]:
    """Returns what tells this process from others, on other machines too."""
    return platform.node(), os.getpid()


def _wait_for_lock(folder: Path, stops: Callable[[], int]) -> None:
    """Waits for an earlier process of a run to end, whose job was killed and is given again."""
    end = time.monotonic() + SAVE_SECONDS
    while is_locked(folder / ".lock") and not stops() and time.monotonic() < end:
        time.sleep(LOOK_SECONDS)


def _start(overrides: Sequence[str], quiet: bool) -> subprocess.Popen[bytes]:
    """Starts a run in a process that has our packages, whatever the current folder holds."""
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    bars = {"TQDM_DISABLE": "1"} if quiet else {}  # of several runs, unreadable
    group = ranks.environment(HydraConfig.get().job.num)
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "lra", "train", *overrides],
        env=os.environ | {"PYTHONPATH": path} | bars | group,
        # In a session of its own, so that a Ctrl-C at the terminal reaches it once: through us.
        start_new_session=True,
        preexec_fn=_end_with_parent,
    )


def _end_with_parent() -> None:
    """Has the system send this process, which is to be a run, SIGTERM when its parent dies."""
    signal.signal(TIME_IS_UP, signal.SIG_IGN)  # until the run heeds it
    if PRCTL is not None:
        PRCTL(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _end(process: subprocess.Popen[bytes]) -> None:
    """Asks a run to save and end, if it has not ended, and waits for it."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(SAVE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()


@contextlib.contextmanager
def _receiving() -> Iterator[list[int]]:
    """Gives the list of signals that come to this process, of those that end a run."""
    received: list[int] = []
    with handled(lambda number, _: received.append(number)):
        yield received
    signal.signal(signal.SIGINT, lambda *_: None)  # of the terminal; the sweep notes it


@contextlib.contextmanager
def _noting_signals(folder: Path) -> Iterator[None]:
    """Notes signals as files in ``folder``, where the processes of all launchers see them.

    The first of them asks all runs to save and end, the second kills them.
    """
    with handled(lambda *_: (folder / str(_stops(folder))).touch()):
        yield


def _stops(signals: Path) -> int:
    """Returns how many signals have come."""
    try:
        return len(os.listdir(signals))
    except FileNotFoundError:  # the sweep itself is gone
        return 1


def _record_crash(overrides: Sequence[str], code: int) -> None:
    """Writes the end of a process that could not write it itself."""
    from lra.run import new_record, run_folder

    config = load(overrides)
    folder = run_folder(config)
    ended = None
    try:
        ended = record.load(folder)
    except ValueError as error:
        LOG.warning("%s", error)
    ended = ended or new_record(config)
    ended.status = "failed"
    ended.reason = f"the process ended with exit code {code}"
    if code < 0:
        ended.reason = f"the process was killed by {signal.Signals(-code).name}"
    if code == -signal.SIGKILL:
        ended.reason += ", as the system does when memory runs out"
    folder.mkdir(parents=True, exist_ok=True)
    ended.save(folder)


def _row(run: "Planned") -> tuple[str, str, str, str]:
    folder = run.folder
    if run.state.status == "data missing":
        return str(folder), "data missing", "", run.state.note
    log = folder / "log.txt"
    try:
        found = record.load(folder)
    except ValueError as error:
        return str(folder), "damaged", "", str(error)
    if found is None:
        return str(folder), "not started", "", ""
    score = f"{found.test.accuracy:.2%}" if found.test else ""
    if run.state.status == "ok":
        return str(folder), "skipped", score, f"finished before; {log}"
    reason = f"{found.reason} (log: {log})" if found.status != "ok" else str(log)
    return str(folder), found.status, score, reason
