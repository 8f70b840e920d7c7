"""Several processes that share a run: the same steps, scores and files as of one process."""

import signal
import socket
import sys
from itertools import chain

import numpy as np
import pytest
import torch
from processes import Forked, start, wait_for_lines
from test_run import folder_of, metrics_without_time

from lra import measure, ranks, record
from lra.batches import Batches
from lra.cli import main
from lra.compose import load
from lra.run import run
from lra.tasks.base import Split
from lra.train import step_seed

DRY = ("model.dropout=0", "model.attention_dropout=0", "train.eps=1e-3", "keep_checkpoint=true")
"""Without dropout, whose draws differ; Adam's eps keeps it from magnifying rounding."""

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def together(count, arguments, environment, cwd):
    """Starts ``count`` processes as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        Forked(
            arguments,
            environment | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd,
        )
        for rank in range(count)
    ]


def ended(processes, seconds=60):
    """Returns exit codes and outputs; kills what does not end."""
    try:
        outputs = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs


def assert_nearly_same_end(folder, other):
    """Compares all of two runs but what is measured, to the tolerance of float32."""
    a, b = (torch.load(path / "checkpoint.pt", weights_only=True) for path in (folder, other))
    torch.testing.assert_close(a["model"], b["model"], rtol=1e-4, atol=1e-5)
    lines, others = metrics_without_time(folder), metrics_without_time(other)
    assert len(lines) == len(others)
    for line, same in zip(lines, others, strict=True):
        assert line == pytest.approx(same, rel=1e-4)
    ours, theirs = (np.load(path / "test_predictions.npy") for path in (folder, other))
    assert (ours == theirs).all()
    ends = [record.load(path) for path in (folder, other)]
    for one, same in (
        (getattr(ends[0], name), getattr(ends[1], name)) for name in ("validation", "test")
    ):
        assert (one.accuracy, one.n, one.step) == (same.accuracy, same.n, same.step)
        assert one.loss == pytest.approx(same.loss, rel=1e-4)


@pytest.fixture
def alone(smoke, tmp_path):
    """Returns the folder of the same run in one process that nothing cuts."""

    def folder(*more):
        overrides = smoke(*DRY, *more, f"runs_dir={tmp_path / 'alone'}")
        assert run(load(overrides)).status == "ok"
        return folder_of(overrides)

    return folder


def test_two_processes_take_the_steps_of_one_and_leave_one_record(
    smoke, tmp_path, environment, alone
):
    whole = alone()
    codes, outputs = ended(together(2, smoke(*DRY), environment, tmp_path))
    assert codes == [0, 0], outputs
    assert "step/s" in outputs[0]
    assert outputs[1] == ""
    [folder] = [path.parent for path in (tmp_path / "runs").rglob("record.json")]
    assert folder == folder_of(smoke(*DRY))
    assert_nearly_same_end(folder, whole)
    done, one = record.load(folder), record.load(whole)
    assert (done.hash, done.steps, done.sessions) == (one.hash, one.steps, 1)
    assert (done.device["processes"], one.device["processes"]) == (2, 1)
    of_both = [r.throughput.tokens_per_second / r.throughput.steps_per_second for r in (done, one)]
    assert of_both[0] == pytest.approx(of_both[1])

    codes, outputs = ended(together(2, smoke(*DRY), environment, tmp_path))
    assert codes == [0, 0], outputs
    assert "Finished before" in outputs[0]
    assert record.load(folder) == done


def test_three_processes_share_what_does_not_divide_by_three(smoke, tmp_path, environment, alone):
    """Of a batch of two one process has nothing; 100 examples of an evaluation are 34, 33, 33."""
    few = ("train.batch_size=2", "train.steps=6", "train.warmup_steps=1")
    codes, outputs = ended(together(3, smoke(*DRY, *few), environment, tmp_path))
    assert codes == [0, 0, 0], outputs
    assert_nearly_same_end(folder_of(smoke(*DRY, *few)), alone(*few))


def test_torchrun_is_stopped_by_a_signal_and_one_process_goes_on(
    smoke, tmp_path, environment, alone
):
    long = ("train.steps=120", "train.lr=1e-4")
    process = start(smoke(*DRY, *long), environment, tmp_path, TORCHRUN)
    folder = folder_of(smoke(*DRY, *long))
    wait_for_lines(folder / "metrics.jsonl", 2, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    cut = record.load(folder)
    assert (cut.status, cut.reason) == ("interrupted", "SIGTERM received"), output
    assert cut.command.startswith("torchrun --nproc_per_node=2 -m lra train ")
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert 10 <= saved["state"]["step"] == cut.steps < 120

    assert run(load(smoke(*DRY, *long))).sessions == 2
    assert_nearly_same_end(folder, alone(*long))


def test_a_run_of_one_process_goes_on_in_two(smoke, tmp_path, environment, alone):
    assert run(load(smoke(*DRY, "time_limit_minutes=0.00001"))).steps == 1
    codes, outputs = ended(together(2, smoke(*DRY), environment, tmp_path))
    assert codes == [0, 0], outputs
    assert "goes on from step 1" in outputs[0]
    assert_nearly_same_end(folder_of(smoke(*DRY)), alone())


FAILING = '''
"""Softmax attention that fails in the second process."""
import os
import torch
from models.attention import register_attention
from models.attention.softmax import Softmax

@register_attention("failing")
class Failing(Softmax):
    def attend(self, *arguments, **named):
        if os.environ["RANK"] == "1" and self.training:
            raise torch.OutOfMemoryError("CUDA out of memory in this process")
        return super().attend(*arguments, **named)
'''


def test_what_fails_in_one_process_ends_all_and_is_recorded(smoke, tmp_path, environment):
    (tmp_path / "failing.py").write_text(FAILING)
    overrides = smoke("plugins=[failing]", "attention=failing")
    codes, outputs = ended(together(2, overrides, environment, tmp_path))
    assert codes == [1, 1], outputs
    [folder] = [path.parent for path in (tmp_path / "runs").rglob("record.json")]
    failed = record.load(folder)
    assert (failed.status, failed.reason) == ("oom", "CUDA out of memory in this process")
    log = (folder / "log.txt").read_text()
    assert "in process 1:" in log
    assert "failing.py" in log


def test_a_killed_process_ends_the_others(smoke, tmp_path, environment):
    overrides = smoke("train.steps=3000")
    processes = together(2, overrides, environment, tmp_path)
    folder = folder_of(overrides)
    wait_for_lines(folder / "metrics.jsonl", 1, processes[0])
    processes[1].kill()
    codes, outputs = ended(processes)
    assert codes == [1, -signal.SIGKILL], outputs
    assert record.load(folder).status == "failed"
    assert "another process of this run has ended" in record.load(folder).reason


def test_a_sweep_is_run_by_all_processes_together(smoke, tmp_path, environment):
    overrides = smoke("train.lr=1e30,1e-3")
    codes, outputs = ended(together(2, ["-m", *overrides], environment, tmp_path))
    assert codes == [1, 1], outputs
    records = [record.load(folder_of(smoke(f"train.lr={lr}"))) for lr in ("1e30", "1e-3")]
    assert [one.status for one in records] == ["diverged", "ok"]
    assert [one.device["processes"] for one in records] == [2, 2]
    assert [row.split()[1] for row in outputs[0].splitlines()[-2:]] == ["diverged", "ok"]


def test_a_mistake_is_told_once(smoke, tmp_path, environment):
    codes, outputs = ended(together(2, smoke("attention=cosfomer"), environment, tmp_path))
    assert codes == [2, 2]
    assert "Did you mean cosformer" in outputs[0]
    assert outputs[1] == ""


def test_other_commands_are_not_for_torchrun(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="2"):
        main(["ls", "attention"])
    assert "type lra ls attention without it" in capsys.readouterr().err


def test_a_number_of_processes_that_is_none_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(SystemExit, match="2"):
        main(["ls", "attention"])
    assert "WORLD_SIZE is 'two'" in capsys.readouterr().err


@pytest.fixture
def second_of_two(monkeypatch):
    """Makes this the second of two processes, without the first."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(ranks, "count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_each_process_has_a_gpu_of_its_own(second_of_two, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert measure.resolve_device("auto") == torch.device("cuda:1")
    assert measure.resolve_device("cuda") == torch.device("cuda:1")
    assert measure.resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="device=cuda:0 is one GPU, but 2 processes"):
        measure.resolve_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="torchrun --nproc_per_node=1"):
        measure.resolve_device("cuda")


def test_dropout_differs_between_processes_and_the_first_has_that_of_a_run_alone():
    assert step_seed(3, 7, 0) == step_seed(3, 7)
    assert len({step_seed(3, step, process) for step in range(50) for process in range(20)}) == 1000


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_have_every_example_once_and_lengths_alike(count):
    lengths = np.random.default_rng(0).integers(1, 200, 41)
    split = Split.of(np.ones(lengths.sum(), np.uint8), np.append(0, lengths.cumsum()), lengths % 2)
    shares = [Batches(split, torch.device("cpu"), (i, count)) for i in range(count)]
    whole = Batches(split, torch.device("cpu")).batch(2, 10, seed=0)

    def examples(pieces):
        return [int(i) for piece in pieces for i in piece.indices]

    trained = [examples(share.training(2, 10, 3, seed=0)) for share in shares]
    assert sorted(chain(*trained)) == sorted(whole)
    scored = [examples(share.evaluation()) for share in shares]
    assert sorted(chain(*scored)) == list(range(41))
    # Shares taken in turn from the sorted split differ by less than its longest example.
    tokens = [lengths[share].sum() for share in scored]
    assert max(tokens) - min(tokens) <= lengths.max()
