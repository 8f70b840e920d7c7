"""Sweeps: Hydra's launchers, each run in a process of its own, and a table of how they ended."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig

from lra import ranks, record
from lra.compose import conf_dir, load, store_groups
from lra.signals import ENDS, handled
from lra.text import aligned

if TYPE_CHECKING:
    from lra.plan import Planned

LOG = logging.getLogger("lra")

LOOK_SECONDS = 0.2
"""Between two looks whether a run has ended, or is to be stopped."""


def sweep(overrides: Sequence[str]) -> int:
    """Runs every combination that ``overrides`` spell out, and prints how each ended.

    All of them are checked before the first one starts. Finished ones and those without data are
    left out; a failed one does not stop the others.

    Returns:
        0 if every run that has data has finished now or before, else 1; 130 if it was stopped.

    Raises:
        ValueError: For a mistake in any of the combinations.
    """
    from lra.plan import plan, tell_missing

    runs = ranks.first(lambda: plan(overrides))
    shared = max((run.config.runs_at_once for run in runs), default=1)
    if ranks.count() > 1 and shared > 1:
        raise ValueError(
            f"{shared} runs at once would each want all {ranks.count()} processes: leave "
            f"launch= and runs_at_once= out, or start lra without torchrun."
        )
    tell_missing(runs)
    finished = [run for run in runs if run.state.status == "ok"]
    jobs = [run.job for run in runs if run.state.status not in ("ok", "data missing")]
    LOG.info("%d runs, %d of them finished before", len(runs), len(finished))
    stopped = bool(jobs) and _launch(overrides, jobs)
    rows = ranks.first(lambda: [_row(run) for run in runs])
    if ranks.leads():
        print(aligned([("run", "status", "test", "reason or log"), *rows]))
    if stopped:
        return 130
    ended = [row[1] for row in rows if row[1] != "data missing"]
    return int(not ended or any(status not in ("ok", "skipped") for status in ended))


def _launch(overrides: Sequence[str], jobs: Sequence[list[str]]) -> bool:
    """Hands the runs to Hydra's launcher; returns whether a signal stopped them."""
    from hydra import initialize_config_dir
    from hydra._internal.callbacks import Callbacks
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.plugins import Plugins
    from hydra.types import HydraContext, RunMode

    store_groups(list(overrides))
    of_hydra = [override for override in overrides if override.startswith(("hydra.", "hydra/"))]
    with initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        config = hydra.compose_config(
            "config", [*of_hydra, *jobs[0]], RunMode.MULTIRUN, with_log_configuration=False
        )
        folder = Path(config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as signals:
            told = Path(signals)
            launcher = Plugins.instance().instantiate_launcher(
                hydra_context=HydraContext(hydra.config_loader, Callbacks()),
                task_function=partial(_run, signals=told, starter=os.getpid()),
                config=config,
            )
            with _noting_signals(told):
                try:
                    for ended in launcher.launch(jobs, initial_job_idx=0):
                        _ = ended.return_value  # raises what a job of ours has raised
                except Exception:
                    if not _stops(told):
                        raise
            return _stops(told) > 0


def _run(_: Any, signals: Path, starter: int) -> None:
    """Hydra's job: runs one combination in a fresh process.

    Args:
        signals: Where `_noting_signals` notes them.
        starter: The process of the sweep; another one runs this beside others like it.
    """
    if os.getpid() != starter:
        for number in ENDS:  # of the terminal; the sweep notes them
            signal.signal(number, lambda *_: None)
    if _stops(signals):
        return
    overrides = list(HydraConfig.get().overrides.task)
    # In a session of its own, so that a Ctrl-C at the terminal reaches it once: through us.
    # -P and this path: the child has our packages, whatever the current folder holds.
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    bars = {} if os.getpid() == starter else {"TQDM_DISABLE": "1"}  # of several runs, unreadable
    group = ranks.environment(HydraConfig.get().job.num)
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "lra", "train", *overrides],
        env=os.environ | {"PYTHONPATH": path} | bars | group,
        start_new_session=True,
    )
    asked = 0
    while (code := process.poll()) is None:
        stops = _stops(signals)
        if stops > 1:
            process.kill()
        elif stops > asked:
            process.send_signal(signal.SIGINT)  # it saves and ends
        asked = stops
        time.sleep(LOOK_SECONDS)
    # 0, 1 and 130 are told in the record; 2 is a refusal, of a run that is not ours to judge.
    if code not in (0, 1, 2, 130) and not asked and ranks.leads():
        _record_crash(overrides, code)


@contextlib.contextmanager
def _noting_signals(folder: Path) -> Iterator[None]:
    """Notes signals as files in ``folder``, where the processes of all launchers see them.

    The first of them asks all runs to save and end, the second kills them.
    """

    def note(*_: object) -> None:
        (folder / str(_stops(folder))).touch()

    with handled(note):
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
