"""Real processes: killed runs that go on bit by bit, and sweeps that survive their runs."""

import os
import shutil
import signal
import time

import pytest
from conftest import ROOT
from processes import Forked, children, start, wait_for_lines
from test_run import assert_same_end, folder_of

from lra import record


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache):
    """The folder of a run that nothing cut."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    overrides = long_run(folder, cache)
    process = start(overrides, os.environ | {"PYTHONPATH": str(ROOT)}, folder)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 0, output
    return folder_of(overrides)


def long_run(folder, cache):
    return [
        "protocol=smoke",
        "attention=softmax",
        "train.steps=60",
        "train.eval_every=5",
        "checkpoint_seconds=0",
        "keep_checkpoint=true",
        "tracker=none",
        f"runs_dir={folder / 'runs'}",
        f"cache_dir={cache}",
    ]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_a_killed_process_goes_on_where_it_was(name, uninterrupted, tmp_path, cache, environment):
    overrides = long_run(tmp_path, cache)
    folder = folder_of(overrides)
    process = Forked(overrides, environment, tmp_path)
    wait_for_lines(folder / "metrics.jsonl", 2, process)
    process.send_signal(signal.Signals[name])
    process.communicate(timeout=30)
    cut = record.load(folder)
    if name == "SIGKILL":
        assert process.returncode == -signal.SIGKILL
        assert cut.status == "running"
    else:
        assert process.returncode == 130
        assert (cut.status, cut.reason) == ("interrupted", f"{name} received")
        assert 10 <= cut.steps < 60

    again = Forked(overrides, environment, tmp_path)
    output, _ = again.communicate(timeout=90)
    assert again.returncode == 0, output
    assert "goes on from step" in output
    assert record.load(folder).sessions == 2
    assert_same_end(folder, uninterrupted)


def test_a_sweep_runs_each_combination_and_tells_how_it_ended(tmp_path, cache, environment):
    overrides = long_run(tmp_path, cache)
    rates = ("1e30", "1e-3", "2e-3")
    sweep = Forked(["-m", *overrides, f"train.lr={','.join(rates)}"], environment, tmp_path)
    diverged, killed, ok = (folder_of([*overrides, f"train.lr={lr}"]) for lr in rates)
    wait_for_lines(killed / "metrics.jsonl", 1, sweep)
    [child] = children(sweep.pid)
    os.kill(child, signal.SIGKILL)
    output, _ = sweep.communicate(timeout=120)
    assert sweep.returncode == 1, output
    table = [row.split() for row in output[output.rindex("run  ") :].splitlines()[1:]]
    ends = [[str(diverged), "diverged"], [str(killed), "failed"], [str(ok), "ok"]]
    assert [row[:2] for row in table] == ends
    assert table[0][-1] == f"{diverged}/log.txt)"
    assert "SIGKILL" in record.load(killed).reason

    shutil.rmtree(diverged)
    sweep = Forked(["-m", *overrides, f"train.lr={','.join(rates[1:])}"], environment, tmp_path)
    output, _ = sweep.communicate(timeout=60)
    assert sweep.returncode == 0, output
    assert "2 runs, 1 of them finished before" in output
    assert "goes on from step" in output
    assert [row.split()[1] for row in output.splitlines()[-2:]] == ["ok", "skipped"]


def test_a_sweep_with_a_mistake_starts_nothing(tmp_path, smoke, environment):
    process = Forked(["-m", *smoke("attention=softmax,cosfomer")], environment, tmp_path)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "Unknown attention 'cosfomer'. Did you mean cosformer" in output
    assert "Traceback" not in output
    assert not (tmp_path / "runs").exists()


def test_ctrl_c_in_a_sweep_saves_the_run_and_ends_the_sweep(tmp_path, cache, environment):
    overrides = long_run(tmp_path, cache)
    # As shells start background jobs: with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        sweep = start(["-m", *overrides, "seed=0,1"], environment, tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    first = folder_of([*overrides, "seed=0"])
    wait_for_lines(first / "metrics.jsonl", 2, sweep)
    sweep.send_signal(signal.SIGINT)
    output, _ = sweep.communicate(timeout=30)
    assert sweep.returncode == 130, output
    assert record.load(first).status == "interrupted"
    assert not folder_of([*overrides, "seed=1"]).exists()
    assert [line.split()[1] for line in output.splitlines()[-2:]] == ["interrupted", "not"]


def test_joblib_runs_several_at_once_and_one_that_is_killed_costs_no_other(
    tmp_path, cache, environment
):
    del environment["OMP_NUM_THREADS"]  # the threads are divided
    overrides = [*long_run(tmp_path, cache), "launch=joblib", "runs_at_once=2", "train.steps=3000"]
    sweep = start(["-m", *overrides, "seed=0,1,2,3"], environment, tmp_path)
    folders = [folder_of([*overrides, f"seed={seed}"]) for seed in range(4)]
    for folder in folders[:2]:
        wait_for_lines(folder / "metrics.jsonl", 1, sweep)
    runs = {}
    for worker in children(sweep.pid):
        runs |= children(worker)
    [first] = [run for run, command in runs.items() if command.endswith("seed=0")]
    os.kill(first, signal.SIGKILL)
    wait_for_lines(folders[2] / "metrics.jsonl", 1, sweep)  # its place is taken
    assert record.load(folders[0]).status == "failed"
    # A Ctrl-C reaches all processes of the terminal but the runs, which have their own session.
    os.killpg(sweep.pid, signal.SIGINT)
    output, _ = sweep.communicate(timeout=60)
    assert sweep.returncode == 130, output
    ends = [record.load(folder) for folder in folders]
    assert "SIGKILL" in ends[0].reason
    assert [end and end.status for end in ends[1:]] == ["interrupted", "interrupted", None]
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert [one.device["threads"] for one in ends[:3]] == [share] * 3
    assert [one.device["runs_at_once"] for one in ends[:3]] == [2] * 3
    assert "Traceback" not in output
    assert "step/s" not in output  # bars of two runs in one terminal


def test_a_second_ctrl_c_ends_a_run_that_does_not_end(tmp_path, cache, environment):
    overrides = long_run(tmp_path, cache)
    sweep = Forked(["-m", *overrides, "seed=0,1"], environment, tmp_path)
    folder = folder_of([*overrides, "seed=0"])
    wait_for_lines(folder / "metrics.jsonl", 2, sweep)
    [child] = children(sweep.pid)
    os.kill(child, signal.SIGSTOP)
    for _ in range(2):
        sweep.send_signal(signal.SIGINT)
        time.sleep(0.1)  # two at once are one
    output, _ = sweep.communicate(timeout=30)
    assert sweep.returncode == 130, output
    assert record.load(folder).status == "running"  # it could not say more
