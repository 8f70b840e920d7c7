"""What breaks while a run is under way, and that nothing finished is lost by it."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from test_run import assert_same_end, folder_of
from test_train import trainer, weights

from lra import checkpoint, record, train
from lra.batches import Batches
from lra.compose import load
from lra.evaluate import evaluate
from lra.kept import evaluate_again
from lra.run import run
from lra.signals import StopSignals
from lra.train import Trainer
from models.classifier import Classifier


@pytest.fixture(autouse=True)
def warnings(caplog, monkeypatch):
    """The text of all warnings."""
    monkeypatch.setattr(logging.getLogger("lra"), "propagate", True)
    caplog.set_level(logging.WARNING, "lra")
    return lambda: caplog.text


@pytest.fixture
def interrupt(monkeypatch):
    """Makes a run receive SIGTERM in the midst of the step after ``done``, once."""

    def at(done):
        forward, calls = Classifier.forward, []

        def interrupted(model, tokens, key_mask):
            if model.training:
                calls.append(0)
            if len(calls) == 4 * done + 2:  # the second of four micro-batches
                calls.append(0)
                signal.raise_signal(signal.SIGTERM)
            return forward(model, tokens, key_mask)

        monkeypatch.setattr(Classifier, "forward", interrupted)

    return at


def whole_run(settings, tmp_path):
    """Runs without a failure; returns where its folder has been moved to."""
    assert run(load(settings)).status == "ok"
    return shutil.move(folder_of(settings), tmp_path / "whole")


# A damaged checkpoint


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def of_another_run(path):
    content = torch.load(path, weights_only=True)
    torch.save(content | {"hash": "bbbbbbbb"}, path)


def of_another_model(path):
    content = torch.load(path, weights_only=True)
    name = next(iter(content["model"]))
    content["model"][name] = torch.zeros(2, 3)
    torch.save(content, path)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut, "is cut short or damaged"),
        (of_another_run, "is of run bbbbbbbb, not of "),
        (of_another_model, "is (2, 3), not ("),
        (Path.unlink, ""),
    ],
)
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    smoke, tmp_path, interrupt, warnings, damage, told
):
    settings = smoke("train.steps=12", "checkpoint_seconds=0", "keep_checkpoint=true")
    whole = whole_run(settings, tmp_path)
    interrupt(7)
    assert run(load(settings)).steps == 7
    folder = folder_of(settings)
    damage(folder / "checkpoint.pt")

    done = run(load(settings))
    assert (done.status, done.sessions) == ("ok", 2)
    assert told in warnings()
    assert warnings().count("checkpoint.pt ") == bool(told)
    assert_same_end(folder, whole)


def test_lra_eval_takes_the_checkpoint_before_a_damaged_one(smoke, warnings):
    settings = smoke("train.steps=12", "keep_checkpoint=true")
    run(load(settings))
    cut(folder_of(settings) / "checkpoint.pt")
    _, score = evaluate_again(folder_of(settings))
    assert score.step in (5, 10)
    assert "the one before it, of step 10, is used" in warnings()


def test_a_finished_run_leaves_no_checkpoint(smoke, interrupt):
    settings = smoke("checkpoint_seconds=0")
    interrupt(7)
    run(load(settings))
    folder = folder_of(settings)
    kept = {path.name for path in folder.glob("checkpoint*")}
    assert kept == {"checkpoint.pt", "checkpoint.previous.pt"}
    cut(folder / "checkpoint.pt")
    assert run(load(settings)).status == "ok"
    assert not list(folder.glob("checkpoint*"))


# A full disk


@pytest.fixture
def full_disk(monkeypatch):
    """Returns a function: files whose name begins so get no space until None is given."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    real, full = Path.open, []

    def open_there(self, mode="r", *arguments, **options):
        name = self.name.removeprefix(".")
        if mode[0] in "wa" and any(name.startswith(prefix) for prefix in full):
            # What torch or json writes meets the system's own error.
            return real(Path("/dev/full"), mode, *arguments, **options)
        return real(self, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_there)

    def fill(*prefixes):
        full[:] = prefixes

    return fill


def test_a_checkpoint_without_space_costs_a_warning_and_no_run(smoke, full_disk, warnings):
    full_disk("checkpoint")
    done = run(load(smoke()))
    assert done.status == "ok"
    assert warnings().count("The disk is full: ") == 1
    assert "checkpoint.pt. Training goes on" in warnings()


@pytest.mark.parametrize(
    "name", ["test_predictions.npy", "metrics.jsonl", "record.json", "checkpoint.pt"]
)
def test_a_run_whose_result_has_no_space_goes_on_when_there_is_some(
    smoke, tmp_path, full_disk, monkeypatch, name
):
    settings = smoke("keep_checkpoint=true")
    whole = whole_run(settings, tmp_path)
    fit = Trainer.fit

    def without_space(trainer):
        full_disk(name)
        fit(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", without_space)
        failed = run(load(settings))
    folder = folder_of(settings)
    assert failed.status == "failed"
    assert f"{name}. Nothing that was written is lost: make space" in failed.reason
    assert not list(folder.glob(".*.tmp"))
    stored = record.load(folder)
    assert stored.status == ("running" if name == "record.json" else "failed")

    full_disk()
    assert run(load(settings)).status == "ok"
    assert_same_end(folder, whole)


def test_metrics_without_space_are_written_when_there_is_some(
    smoke, tmp_path, full_disk, monkeypatch, warnings
):
    settings = smoke("keep_checkpoint=true", "train.steps=20")
    whole = whole_run(settings, tmp_path)
    save, steps = Trainer.save, []

    def with_and_without(trainer):
        steps.append(trainer.state.step)
        full_disk(*(["metrics"] if trainer.state.step in (5, 10) else []))
        return save(trainer)

    full_disk("metrics")
    monkeypatch.setattr(Trainer, "save", with_and_without)
    assert run(load(settings)).status == "ok"
    assert steps == [5, 10, 15, 20]
    assert warnings().count("The disk is full: ") == 1
    assert_same_end(folder_of(settings), whole)


def test_a_sign_of_life_and_a_log_without_space_cost_nothing(
    smoke, full_disk, monkeypatch, capfd, warnings
):
    monkeypatch.setattr(train, "PROGRESS_SECONDS", 0)
    full_disk("progress")
    folder = folder_of(smoke())
    folder.mkdir(parents=True)
    (folder / "log.txt").symlink_to("/dev/full")
    assert run(load(smoke())).status == "ok"
    assert warnings().count("The disk is full: ") == 1
    assert "Traceback" not in capfd.readouterr().err


def test_an_interrupted_run_without_space_tells_where_it_goes_on(smoke, interrupt, full_disk):
    interrupt(7)
    full_disk("checkpoint")
    cut = run(load(smoke()))
    assert cut.status == "interrupted"
    assert cut.reason == "SIGTERM received; it goes on from step 0, as no later one could be saved"


# Out of memory

LONGEST = 60
"""Tokens of the smoke protocol's longest example."""


def exhausted(most):
    """Returns a forward pass for which memory suffices for so many tokens only."""
    forward = Classifier.forward

    def limited(model, tokens, key_mask):
        if tokens.numel() > most:
            torch.empty(2**60)  # torch's own error
        return forward(model, tokens, key_mask)

    return limited


def test_a_step_that_runs_out_of_memory_is_taken_again_in_more_micro_batches(
    smoke, tmp_path, monkeypatch, warnings
):
    settings = smoke("attention=rfa", "micro_batches=2")  # dropout and random features
    short = trainer(settings, tmp_path / "short")
    asked = trainer(settings, tmp_path / "asked")
    for _ in range(3):
        short._step()
        asked._step()

    forward, calls = Classifier.forward, []

    def once(model, tokens, key_mask):
        calls.append(len(tokens))
        if len(calls) == 2:  # the first half has left its gradients
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(model, tokens, key_mask)

    monkeypatch.setattr(Classifier, "forward", once)
    short._step()
    assert calls == [8, 8, 4, 4, 4, 4]
    asked.pieces = 4
    asked._step()
    for again in (short, asked):
        again._step()
    assert torch.equal(weights(short), weights(asked))
    assert torch.equal(short.sums, asked.sums)
    assert "Out of memory in step 4: it is taken again, in 4 micro-batches" in warnings()


def test_the_record_tells_what_was_made_smaller_and_a_resumed_run_keeps_it(
    smoke, tmp_path, monkeypatch
):
    settings = smoke("keep_checkpoint=true", "train.steps=12", "micro_batches=2")
    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "forward", exhausted(4 * LONGEST))
        done = run(load(settings))
    assert done.status == "ok"
    assert done.micro_batches == 4
    assert done.shrunk["micro_batches"] == [2, 4]
    first, last = done.shrunk["evaluation_tokens"]
    assert first == 2**13
    assert last < first / 2
    assert record.load(folder_of(settings)) == done
    whole = shutil.move(folder_of(settings), tmp_path / "whole")

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "forward", exhausted(4 * LONGEST))
        patch.setattr(Trainer, "_check_loss", stop_after(7))
        assert run(load(settings)).steps == 7
    # There is memory again; what was begun is ended in the same way.
    resumed = run(load(settings))
    assert resumed.shrunk == done.shrunk
    assert_same_end(folder_of(settings), whole)


def stop_after(step):
    check = Trainer._check_loss

    def checked(trainer):
        check(trainer)
        if trainer.state.step == step:
            signal.raise_signal(signal.SIGINT)

    return checked


def test_an_evaluation_that_runs_out_of_memory_scores_every_example_once(
    smoke, tmp_path, monkeypatch
):
    trained = trainer(smoke(), tmp_path / "run")
    data = trained.data["val"]
    arguments = (trained.model, data, trained.autocast, trained.evaluating["val"], 0)
    score, predictions = evaluate(*arguments)
    monkeypatch.setattr(Classifier, "forward", exhausted(4 * LONGEST))
    again, same = evaluate(*arguments)
    assert np.array_equal(predictions, same)
    assert again.accuracy == score.accuracy
    assert max(batch.tokens.numel() for batch in data.evaluation()) <= 4 * LONGEST


def test_one_example_that_does_not_fit_is_out_of_memory(smoke, monkeypatch):
    monkeypatch.setattr(Classifier, "forward", exhausted(0))
    done = run(load(smoke()))
    assert done.status == "oom"
    assert "can't allocate memory" in done.reason
    assert done.micro_batches == load(smoke()).train.batch_size
    assert done.shrunk == {"micro_batches": [4, done.micro_batches]}


def test_an_evaluation_of_single_examples_that_does_not_fit_is_out_of_memory(smoke, monkeypatch):
    forward = Classifier.forward

    def no_evaluation(model, tokens, key_mask):
        if not model.training:
            torch.empty(2**60)
        return forward(model, tokens, key_mask)

    monkeypatch.setattr(Classifier, "forward", no_evaluation)
    assert run(load(smoke())).status == "oom"


def test_batches_of_evaluation_shrink_until_the_longest_is_alone(smoke):
    data = Batches(load(smoke()).build_task().prepare().splits["val"], torch.device("cpu"))
    while data.shrink():
        pass
    batches = list(data.evaluation())
    assert len(batches[0].labels) == 1
    assert sum(len(batch.labels) for batch in batches) == len(data)


# A loss that is not finite


def test_a_loss_that_is_not_finite_is_noticed_in_its_step_and_leaves_evidence(smoke, monkeypatch):
    settings = smoke("checkpoint_seconds=0")
    step = Trainer._step

    def breaking(trainer):
        if trainer.state.step == 7:
            with torch.no_grad():
                next(trainer.model.parameters()).fill_(torch.inf)
        step(trainer)

    monkeypatch.setattr(Trainer, "_step", breaking)
    done = run(load(settings))
    folder = folder_of(settings)
    assert (done.status, done.steps) == ("diverged", 8)
    assert "the training loss is not finite at step 8 (learning rate " in done.reason
    assert "from the checkpoint of step 7" in done.reason
    found = json.loads((folder / "diverged.json").read_text())
    assert found["steps"] == [8, 8]
    assert found["loss"] == "training loss"
    assert 0 < found["train_loss_before"] < 10
    assert found["lr"] > 0
    assert found["checkpoint_of_step"] == 7
    assert 0 < len(found["parameters_not_finite"]) <= found["parameters"]

    # The same command goes the same way again, until what broke it is mended.
    again = run(load(settings))
    assert (again.status, again.steps, again.reason) == ("diverged", 8, done.reason)
    monkeypatch.setattr(Trainer, "_step", step)
    assert run(load(settings)).status == "ok"
    assert not (folder / "diverged.json").exists()


def test_weights_that_are_not_finite_are_never_saved(smoke, tmp_path):
    broken = trainer(smoke(), tmp_path / "run")
    broken._step()
    assert broken.save()
    broken._step()
    with torch.no_grad():
        next(broken.model.parameters()).fill_(torch.nan)
    assert not broken.save()
    saved = checkpoint.load(tmp_path / "run", broken.record.hash, broken.model)
    assert saved["state"].step == 1


def test_where_a_look_costs_time_the_loss_is_looked_at_with_the_signs_of_life(
    smoke, tmp_path, monkeypatch
):
    looked = trainer(smoke("train.lr=1e30"), tmp_path / "run")
    monkeypatch.setattr(looked, "device", torch.device("cuda"))  # as far as looking goes
    looks = []
    monkeypatch.setattr(looked, "_check_loss", lambda: looks.append(looked.state.step))
    for _ in range(3):
        looked._step()
        looked._look_up("train")
    assert looks == [1]
    monkeypatch.setattr(train, "PROGRESS_SECONDS", 0)
    looked._look_up("train")
    assert looks == [1, 3]


# A signal in the midst of a step


def test_a_step_is_left_at_a_signal_and_taken_again(smoke, tmp_path, interrupt):
    settings = smoke("attention=rfa", "train.steps=12", "keep_checkpoint=true")
    whole = whole_run(settings, tmp_path)
    interrupt(7)
    cut = run(load(settings))
    assert (cut.status, cut.reason, cut.steps) == ("interrupted", "SIGTERM received", 7)
    assert run(load(settings)).status == "ok"
    assert_same_end(folder_of(settings), whole)


def test_a_run_in_an_operation_without_end_saves_its_last_step_and_exits(
    smoke, tmp_path, environment
):
    settings = smoke("train.steps=12", "keep_checkpoint=true")
    whole = whole_run(settings, tmp_path)
    program = f"""
import os, signal, threading, time
from lra import signals
from lra.cli import main
from lra.train import Trainer
signals.GRACE_SECONDS = 0.2
accumulate = Trainer._accumulate
def stuck(trainer, step):
    if step == 7:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    return accumulate(trainer, step)
Trainer._accumulate = stuck
main(["train", *{settings!r}])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=40
    )
    assert done.returncode == 130, done.stderr
    assert "interrupted after 7 steps: SIGTERM received, in a step or batch" in done.stdout
    folder = folder_of(settings)
    assert record.load(folder).status == "interrupted"
    assert run(load(settings)).status == "ok"
    assert record.load(folder).sessions == 2
    assert_same_end(folder, whole)


@pytest.mark.parametrize(
    ("signals", "acts_at_once"),
    [
        (["SIGTERM", "SIGTERM"], False),  # of Slurm to all of a job, and of what started the run
        (["SIGUSR2", "SIGTERM"], False),  # its time is up, and it is queued again
        (["SIGINT", "SIGINT"], True),
    ],
)
def test_only_a_second_ctrl_c_does_not_wait_for_the_run_to_save(signals, acts_at_once):
    with StopSignals(lambda _: None) as stop:
        stop.deferred = True
        with pytest.raises(KeyboardInterrupt) if acts_at_once else nullcontext():
            for name in signals:
                signal.raise_signal(signal.Signals[name])
        assert stop.signal == signals[0]


def test_a_signal_that_is_heeded_leaves_no_thread_and_no_pipe(smoke, interrupt):
    run(load(smoke("train.steps=1", "train.warmup_steps=0")))  # what the first run opens for good
    before, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    interrupt(3)
    assert run(load(smoke())).status == "interrupted"
    for thread in threading.enumerate():
        if thread.name.endswith("(_watch)"):
            thread.join(5)
    assert threading.active_count() <= threads
    assert len(os.listdir("/proc/self/fd")) <= before
