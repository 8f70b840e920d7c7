"""Sweeps: Hydra's multirun, each run in a process of its own, and a table of how they ended."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig

from lra import record
from lra.compose import conf_dir, load, load_sweep
from lra.config import RunConfig
from lra.record import Record
from lra.run import check_finished, new_record, run_folder
from lra.text import aligned

LOG = logging.getLogger("lra")


def sweep(overrides: Sequence[str]) -> int:
    """Runs every combination that ``overrides`` spell out, and prints how each ended.

    All of them are checked before the first one starts. A failed run does not stop the others.

    Returns:
        0 if every run has finished now or before, else 1.

    Raises:
        ValueError: For a mistake in any of the combinations.
    """
    configs = load_sweep(overrides)
    folders = [run_folder(config) for config in configs]
    finished = [
        config.reuse == "auto" and _is_finished(config, folder)
        for config, folder in zip(configs, folders, strict=True)
    ]
    LOG.info("%d runs, %d of them finished before", len(folders), sum(finished))
    arguments, sys.argv = sys.argv, ["lra", "--multirun", *overrides]
    # Without this, Hydra prints and swallows what a job raises.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # SIGINT too: a shell starts background jobs with it ignored.
    ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, signal.default_int_handler) for number in ends}
    stopped = False
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir().resolve()), config_name="config")(
            _launch
        )()
    except KeyboardInterrupt:
        stopped = True
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        sys.argv = arguments
    rows = [_row(folder, skipped=done) for folder, done in zip(folders, finished, strict=True)]
    print(aligned([("run", "status", "test", "reason or log"), *rows]))
    return 130 if stopped else int(any(row[1] not in ("ok", "skipped") for row in rows))


def _launch(_: Any) -> None:
    """Hydra's job: runs one combination in a fresh process, unless it has finished before."""
    overrides = list(HydraConfig.get().overrides.task)
    config = load(overrides)
    folder = run_folder(config)
    if config.reuse == "auto" and _is_finished(config, folder):
        return
    # In a session of its own, so that a Ctrl-C at the terminal reaches it once: through us.
    # -P and this path: the child has our packages, whatever the current folder holds.
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "lra", "train", *overrides],
        env=os.environ | {"PYTHONPATH": path},
        start_new_session=True,
    )
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)  # it saves and ends; a second Ctrl-C kills it
        try:
            process.wait()
        except KeyboardInterrupt:
            process.kill()
            process.wait()
        raise
    # 0, 1 and 130 are told in the record; 2 is a refusal, of a run that is not ours to judge.
    if code not in (0, 1, 2, 130):
        _record_crash(config, folder, code)


def _record_crash(config: RunConfig, folder: Path, code: int) -> None:
    """Writes the end of a process that could not write it itself."""
    ended = _read(folder) or new_record(config)
    ended.status = "failed"
    ended.reason = f"the process ended with exit code {code}"
    if code < 0:
        ended.reason = f"the process was killed by {signal.Signals(-code).name}"
    if code == -signal.SIGKILL:
        ended.reason += ", as the system does when memory runs out"
    folder.mkdir(parents=True, exist_ok=True)
    ended.save(folder)


def _read(folder: Path) -> Record | None:
    try:
        return record.load(folder)
    except ValueError as error:
        LOG.warning("%s", error)
        return None


def _is_finished(config: RunConfig, folder: Path) -> bool:
    """Whether a run needs not be started; raises ValueError if it was run on other data."""
    found = _read(folder)
    if found is None or found.status != "ok":
        return False
    check_finished(config, folder, found)
    return True


def _row(folder: Path, skipped: bool) -> tuple[str, str, str, str]:
    found = _read(folder)
    if found is None:
        return str(folder), "not started", "", ""
    score = f"{found.test.accuracy:.2%}" if found.test else ""
    if skipped:
        return str(folder), "skipped", score, f"finished before; {folder / 'log.txt'}"
    log = folder / "log.txt"
    reason = f"{found.reason} (log: {log})" if found.status != "ok" else str(log)
    return str(folder), found.status, score, reason
