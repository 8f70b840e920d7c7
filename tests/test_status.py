"""lra status: how far runs are, from the small files of their folders and without torch."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from conftest import ROOT
from test_record import minimal

from lra import record, train
from lra.compose import load
from lra.files import Busy, is_locked, locked
from lra.record import Progress, Score
from lra.run import run, run_folder
from lra.status import SILENT, duration, state_of, status

ENDED = replace(minimal(), status="oom")
TRAIN = {"steps": 400, "tested": "best", "best_from": 0}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / "smoke" / "listops" / "softmax" / "s0-aaaaaaaa"


def save(folder, step=None, seconds=0.0, accuracies=(), silent=0.0, **changes):
    """Writes what a run has in its folder while it works, all of it so many seconds ago."""
    replace(ENDED, config={"train": TRAIN}, **changes).save(folder)
    if step is not None:
        record.save_progress(folder, Progress(step, seconds))
    lines = [
        json.dumps({"step": 50 * i, "seconds": 1.0 * i, "val_accuracy": accuracy})
        for i, accuracy in enumerate(accuracies, start=1)
    ]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 5']))
    then = time.time() - silent
    for path in folder.iterdir():
        os.utime(path, (then, then))


def test_a_run_that_trains_has_progress_accuracy_and_time_left(folder):
    save(folder, step=100, seconds=60.0, accuracies=[0.2, 0.3, 0.25], status="running")
    state = state_of(folder)
    assert (state.status, state.step, state.steps) == ("running", 100, 400)
    assert state.accuracy == 0.3
    assert state.seconds_left == 180.0
    assert state.note == ""


def test_the_accuracy_is_that_of_the_last_step_where_that_is_tested(folder):
    save(folder, accuracies=[0.2, 0.3, 0.25], status="running")
    last = TRAIN | {"tested": "last"}
    replace(ENDED, status="running", config={"train": last}).save(folder)
    assert state_of(folder).accuracy == 0.25
    later = TRAIN | {"best_from": 150}
    replace(ENDED, status="running", config={"train": later}).save(folder)
    assert state_of(folder).accuracy == 0.25


def test_a_run_of_which_nothing_is_heard_is_cut_and_says_for_how_long(folder):
    save(folder, step=100, seconds=60.0, silent=12 * 60, status="running")
    state = state_of(folder)
    assert (state.status, state.step) == ("cut", 100)
    assert state.note == "no sign of life for 12 min"
    assert state.seconds_left == 180.0


def test_a_silent_run_whose_lock_is_held_is_running_all_the_same(folder):
    save(folder, silent=2 * SILENT, status="running")
    with locked(folder / ".lock", wait=False):
        state = state_of(folder)
    assert state.status == "running"
    assert state.note == "no sign of life for 4 min"
    assert state_of(folder).status == "cut"


def test_a_run_that_has_just_begun_has_no_step_yet(folder):
    save(folder, status="running")
    state = state_of(folder)
    assert (state.status, state.step, state.note) == ("running", 0, "no step yet")
    assert state.seconds_left is None


@pytest.mark.parametrize("end", ["oom", "diverged", "failed"])
def test_an_ended_run_tells_its_reason_and_no_time(folder, end):
    save(folder, status=end, reason="the first line\nthe second", steps=20)
    state = state_of(folder)
    assert (state.status, state.note, state.step) == (end, "the first line", 20)
    assert state.seconds_left is None


def test_an_interrupted_run_tells_the_time_that_is_left(folder):
    seconds = {"train_seconds": 30.0, "evaluation_seconds": 10.0}
    save(folder, status="interrupted", reason="SIGINT received", steps=100, **seconds)
    assert state_of(folder).seconds_left == 120.0


def test_a_finished_run_has_the_accuracy_of_its_record(folder):
    save(folder, status="ok", steps=400, validation=Score(0.5, 1.0, 100, 0.4, 0.6, 350))
    state = state_of(folder)
    assert (state.status, state.step, state.accuracy) == ("ok", 400, 0.5)


def test_a_folder_without_a_record_was_not_started_and_a_damaged_one_is_told(folder):
    assert state_of(folder).status == "not started"
    save(folder)
    (folder / "record.json").write_text("{")
    state = state_of(folder)
    assert state.status == "damaged"
    assert str(folder / "record.json") in state.note


def test_the_table_has_a_line_for_each_run_and_counts_them(folder):
    save(folder, step=100, seconds=60.0, accuracies=[0.3], status="running")
    save(folder.with_name("s1-aaaaaaaa"), status="ok", steps=400)
    heading, first, second, count = status(folder.parents[3]).splitlines()
    assert heading.split()[:4] == ["run", "status", "steps", "%"]
    assert first.split()[1:] == ["running", "100/400", "25", "30.00%", "3", "min"]
    assert second.split()[1:4] == ["ok", "400/400", "100"]
    assert count == "2 runs: 1 running, 1 ok"


def test_a_store_without_runs_says_what_to_type(tmp_path):
    with pytest.raises(ValueError, match=r"no run below .*: train first \(lra train\)"):
        status(tmp_path)


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (7, "7 s"),
        (100, "2 min"),
        (720, "12 min"),
        (7_200, "2 h 00 min"),
        (100_000, "27 h 47 min"),
        (200_000, "2 d 7 h"),
    ],
)
def test_times_are_told_in_units_that_fit(seconds, told):
    assert duration(seconds) == told


def test_status_of_a_store_loads_no_torch(folder):
    save(folder, status="ok", steps=400)
    script = (
        "import sys\n"
        "from lra.cli import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "except SystemExit:\n"
        "    loaded = {'torch', 'hydra', 'omegaconf', 'pandas', 'models'} & set(sys.modules)\n"
        "    print(sorted(loaded))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "status", str(folder.parents[3])],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert "1 runs: 1 ok" in done.stdout


def test_asking_whether_a_lock_is_held_keeps_nobody_out(tmp_path):
    path = tmp_path / ".lock"
    assert not is_locked(path)
    assert not path.exists()
    with locked(path, wait=False):
        assert is_locked(path)
        with pytest.raises(Busy), locked(path, wait=False):
            pass
    assert not is_locked(path)


def test_a_run_gives_signs_of_life_and_leaves_none_behind(smoke, monkeypatch):
    told = []
    monkeypatch.setattr(train, "PROGRESS_SECONDS", 0)
    save_progress = record.save_progress

    def noted(folder, progress):
        save_progress(folder, progress)
        told.append(state_of(folder))

    monkeypatch.setattr(train, "save_progress", noted)
    run(load(smoke()))
    folder = run_folder(load(smoke()))
    assert {state.status for state in told} == {"running"}
    steps = [state.step for state in told]
    assert steps == sorted(steps)
    assert set(steps) == set(range(1, 21))
    assert steps.count(10) > 1  # in evaluations too
    assert told[-1].accuracy is not None
    assert not (folder / record.PROGRESS).exists()
    assert state_of(folder).status == "ok"


def test_signs_of_life_are_not_written_all_the_time(smoke, monkeypatch):
    told = []
    monkeypatch.setattr(train, "save_progress", lambda *arguments: told.append(arguments))
    run(load(smoke()))
    assert len(told) == 1  # in all of a second


def test_a_record_of_other_types_is_a_line_and_hides_no_other(folder):
    save(folder)
    values = json.loads((folder / "record.json").read_text())
    values["config"]["train"]["steps"] = "400"
    other = folder.with_name("s1-aaaaaaaa")
    other.mkdir()
    (other / "record.json").write_text(json.dumps(values))
    table = status(folder.parents[3])
    assert "s0-aaaaaaaa" in table
    assert "config.train.steps must be int" in table
