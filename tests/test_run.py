"""A run from configuration to record: what it leaves behind, how it ends, when it is reused."""

import json
import re
import shutil
import signal
from functools import partialmethod

import numpy as np
import pytest
import torch

from lra import record
from lra.compose import load
from lra.files import locked
from lra.kept import evaluate_again
from lra.run import new_record, run, run_folder
from lra.sweep import sweep
from lra.tasks.base import Task
from lra.train import Trainer


def folder_of(overrides):
    return run_folder(load(overrides))


def test_a_run_leaves_a_record_that_needs_nothing_else(smoke):
    config = load(smoke("attention=cosformer"))
    done = run(config)
    stored = record.load(folder_of(smoke("attention=cosformer")))
    assert stored == done
    assert done.status == "ok"
    assert done.steps == config.train.steps
    assert done.sessions == 1
    assert done.test.n == 100
    assert done.validation.n == 100
    assert done.test.low < done.test.accuracy < done.test.high
    assert done.task["splits"]["train"]["examples"] == 400
    assert done.task["baselines"].keys() >= {"majority class", "root operator only"}
    assert done.parameters == done.parameters_of_softmax
    assert done.throughput.steps == config.train.steps - 5
    assert done.train_seconds > 0
    assert done.evaluation_seconds > 0
    assert done.peak_memory_bytes >= 0  # 0 where what earlier tests have freed serves this model
    assert done.precision == {"name": "fp32", "reason": "auto: CPU"}
    assert done.device["threads"] == 1
    assert done.versions["torch"] == torch.__version__
    assert done.micro_batches == 4


def test_predictions_and_metrics_agree_with_the_record(smoke):
    done = run(load(smoke()))
    folder = folder_of(smoke())
    predictions, labels = np.load(folder / "test_predictions.npy")
    assert (predictions == labels).mean() == done.test.accuracy
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    best = max(lines, key=lambda line: line["val_accuracy"])
    assert done.validation.accuracy == best["val_accuracy"]
    assert done.validation.step == done.test.step == best["step"]


def test_the_last_step_is_tested_where_the_protocol_says_so(smoke):
    done = run(load(smoke("train.tested=last")))
    assert done.test.step == done.validation.step == 20


def test_the_checkpoint_gives_the_same_test_score_again(smoke):
    done = run(load(smoke("attention=linear", "keep_checkpoint=true")))
    _, score = evaluate_again(folder_of(smoke("attention=linear")))
    assert score == done.test


def test_the_checkpoint_of_a_finished_run_is_removed_and_lra_eval_says_what_to_type(smoke):
    done = run(load(smoke()))
    folder = folder_of(smoke())
    assert not (folder / "checkpoint.pt").exists()
    with pytest.raises(ValueError, match="has no checkpoint") as error:
        evaluate_again(folder)
    assert str(error.value).endswith(f"{done.command} keep_checkpoint=true reuse=never")
    run(load(smoke("reuse=never", "keep_checkpoint=true")))
    _, score = evaluate_again(folder)
    assert score == done.test


def test_the_checkpoint_of_a_cut_run_stays_until_it_is_finished(smoke):
    run(load(smoke("time_limit_minutes=0.00001")))
    assert (folder_of(smoke()) / "checkpoint.pt").exists()
    run(load(smoke()))
    assert not (folder_of(smoke()) / "checkpoint.pt").exists()


def test_other_data_than_a_run_was_begun_on_is_refused(smoke):
    cut = run(load(smoke("time_limit_minutes=0.00001")))
    cut.task["data_hash"] = "another"
    cut.save(folder_of(smoke()))
    again = run(load(smoke()))
    assert again.status == "failed"
    assert "was run on data another" in again.reason
    assert run(load(smoke("reuse=never"))).status == "ok"


def test_a_finished_run_of_other_data_is_not_returned(smoke, capsys):
    done = run(load(smoke()))
    done.task["data_hash"] = "another"
    done.save(folder_of(smoke()))
    with pytest.raises(ValueError, match=r"was run on data another, but .* reuse=never"):
        run(load(smoke()))
    with pytest.raises(ValueError, match="was run on data another"):
        sweep(smoke("seed=0,1"))
    assert not folder_of(smoke("seed=1")).exists()


def test_a_record_names_no_home_folder(smoke, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    done = run(load(smoke("keep_checkpoint=true")))
    assert done.config["runs_dir"] == "~/runs"
    assert str(tmp_path) not in (folder_of(smoke()) / "record.json").read_text()
    _, score = evaluate_again(folder_of(smoke()))
    assert score == done.test


def test_a_finished_run_is_returned_without_touching_data(smoke, monkeypatch):
    done = run(load(smoke()))

    def no_data(_):
        raise AssertionError("data was loaded")

    monkeypatch.setattr(Task, "prepare", no_data)
    assert run(load(smoke())) == done


def test_reuse_never_starts_over(smoke):
    run(load(smoke()))
    folder = folder_of(smoke())
    (folder / "stale").write_text("")
    again = run(load(smoke("reuse=never")))
    assert again.status == "ok"
    assert again.sessions == 1
    assert not (folder / "stale").exists()


def test_equal_seeds_give_equal_bits_and_others_do_not(smoke):
    def weights(*more):
        overrides = smoke("reuse=never", "keep_checkpoint=true", *more)
        run(load(overrides))
        return torch.load(folder_of(overrides) / "checkpoint.pt", weights_only=True)["model"]

    first, second, other = weights("seed=1"), weights("seed=1"), weights("seed=2")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("attention", ["softmax", "rfa", "sinkhorn"])
def test_activation_checkpointing_changes_no_bit(smoke, tmp_path, attention):
    overrides = smoke(f"attention={attention}", "model.dropout=0.1", "keep_checkpoint=true")
    assert run(load(overrides)).status == "ok"
    kept = folder_of(overrides).rename(tmp_path / "kept")
    done = run(load([*overrides, "activation_checkpointing=true"]))
    assert done.device["activation_checkpointing"]
    assert_same_end(folder_of(overrides), kept)


def test_compiling_without_a_compiler_says_what_to_install(smoke, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    done = run(load(smoke("compile=true")))
    assert done.status == "failed"
    assert "C++ compiler" in done.reason
    assert "no-such-compiler" in done.reason


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("attention", ["softmax", "cosformer"])
def test_a_compiled_run_ends_as_the_plain_one(smoke, tmp_path, monkeypatch, attention):
    """With what torch.compile traces run as it is: code takes a compiler and a minute."""
    overrides = smoke(f"attention={attention}", "model.dropout=0", "keep_checkpoint=true")
    plain = run(load(overrides))
    kept = folder_of(overrides).rename(tmp_path / "kept")
    compiling = partialmethod(torch.nn.Module.compile, backend="eager")
    monkeypatch.setattr(torch.nn.Module, "compile", compiling)
    done = run(load([*overrides, "compile=true", "activation_checkpointing=true"]))
    assert done.status == "ok", done.reason
    if attention == "softmax":
        assert_same_end(folder_of(overrides), kept)
    # cosFormer's products are written down otherwise for a compiler, and rounded otherwise.
    assert done.validation.loss == pytest.approx(plain.validation.loss, rel=1e-6)


def test_bf16_is_computed_and_recorded(smoke):
    done = run(load(smoke("precision=bf16")))
    assert done.status == "ok"
    assert done.precision["name"] == "bf16"
    assert done.hash != new_record(load(smoke("precision=fp32"))).hash


def test_another_process_on_the_same_run_is_refused(smoke):
    folder = folder_of(smoke())
    with locked(folder / ".lock", wait=False), pytest.raises(ValueError, match="Another process"):
        run(load(smoke()))


def test_a_loss_that_is_not_finite_ends_the_run_as_diverged(smoke):
    done = run(load(smoke("train.lr=1e30")))
    assert done.status == "diverged"
    assert "not finite" in done.reason
    assert done.test is None


def test_out_of_memory_is_a_result(smoke, monkeypatch):
    def exhausted(_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(Trainer, "_step", exhausted)
    done = run(load(smoke()))
    assert (done.status, done.reason) == ("oom", "CUDA out of memory. Tried to allocate 2 GiB")


def test_torch_running_out_of_cpu_memory_is_a_result_too(smoke, monkeypatch):
    monkeypatch.setattr(Trainer, "_step", lambda _: torch.empty(2**60))
    assert run(load(smoke())).status == "oom"


def test_a_crash_is_recorded_with_its_traceback_in_the_log(smoke, monkeypatch):
    def crash(_):
        raise RuntimeError("boom")

    monkeypatch.setattr(Trainer, "_step", crash)
    done = run(load(smoke()))
    assert (done.status, done.reason) == ("failed", "RuntimeError: boom")
    assert 'raise RuntimeError("boom")' in (folder_of(smoke()) / "log.txt").read_text()


def test_missing_data_is_a_failed_run_with_the_task_s_message(smoke, monkeypatch):
    def missing(task, **_):
        raise ValueError("there is no data in data/listops; put it there")

    monkeypatch.setattr(Task, "prepare", missing)
    done = run(load(smoke()))
    assert (done.status, done.reason) == (
        "failed",
        "there is no data in data/listops; put it there",
    )


def test_the_time_limit_ends_a_run_and_a_larger_one_goes_on(smoke):
    cut = run(load(smoke("seed=3", "time_limit_minutes=0.00001")))
    assert cut.status == "timeout"
    assert cut.steps == 1
    done = run(load(smoke("seed=3")))
    assert done.status == "ok"
    assert done.sessions == 2


@pytest.mark.parametrize("where", ["step", "validation", "test"])
def test_an_interrupted_run_ends_as_the_uninterrupted_one(smoke, tmp_path, monkeypatch, where):
    overrides = smoke("attention=softmax", "train.steps=12", "keep_checkpoint=true")
    whole = run(load(overrides))
    folder = folder_of(overrides)
    kept = shutil.copytree(folder, tmp_path / "whole")
    shutil.rmtree(folder)

    # A signal arrives in the second evaluation, in the last one, or after the seventh step.
    calls = {"evaluations": 0}
    step, evaluate = Trainer._step, Trainer._evaluate

    def interrupted_step(trainer):
        step(trainer)
        if where == "step" and trainer.state.step == 7:
            signal.raise_signal(signal.SIGTERM)

    def interrupted_evaluation(trainer, *arguments):
        calls["evaluations"] += 1
        if (where, calls["evaluations"]) in {("validation", 2), ("test", 4)}:
            signal.raise_signal(signal.SIGINT)
        return evaluate(trainer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupted_step)
        patch.setattr(Trainer, "_evaluate", interrupted_evaluation)
        cut = run(load(overrides))
    assert cut.status == "interrupted"
    assert cut.steps == {"step": 7, "validation": 10, "test": 12}[where]

    resumed = run(load(overrides))
    assert resumed.status == "ok"
    assert resumed.sessions == 2
    assert (resumed.validation, resumed.test) == (whole.validation, whole.test)
    assert_same_end(folder, kept)


def test_a_run_cut_before_its_last_evaluation_ends_as_an_uncut_one(smoke, tmp_path, monkeypatch):
    settings = smoke("keep_checkpoint=true")
    run(load(settings))
    folder = folder_of(settings)
    shutil.copytree(folder, tmp_path / "whole")
    evaluate = Trainer._evaluate

    def cut(trainer, *arguments):
        if trainer.state.step == trainer.config.train.steps:
            trainer.stop.signal = "SIGTERM"
        return evaluate(trainer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_evaluate", cut)
        assert run(load([*settings, "reuse=never"])).status == "interrupted"
    run(load(settings))  # takes no step, and saves
    assert_same_end(folder, tmp_path / "whole")


def assert_same_end(folder, other):
    """Compares all of two runs but their times and memory, bit by bit."""
    a, b = (torch.load(path / "checkpoint.pt", weights_only=True) for path in (folder, other))
    for content in (a, b):
        for measure in ("seconds", "timed", "peak_memory"):
            del content["state"][measure]
    assert a.keys() == b.keys()
    best = [content["state"].pop("best_model") for content in (a, b)]
    torch.testing.assert_close(*best, rtol=0, atol=0)
    for part in ("model", "optimizer"):
        torch.testing.assert_close(a[part], b[part], rtol=0, atol=0)
    assert a["state"] == b["state"]
    assert (folder / "test_predictions.npy").read_bytes() == (
        other / "test_predictions.npy"
    ).read_bytes()
    assert metrics_without_time(folder) == metrics_without_time(other)
    ends = [record.load(path) for path in (folder, other)]
    assert len({str((end.status, end.steps, end.validation, end.test)) for end in ends}) == 1


def metrics_without_time(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key != "seconds"}
        for line in lines
    ]


def test_a_run_does_not_train_on_prepared_data_that_has_changed(smoke, tmp_path, capsys):
    cache = f"cache_dir={tmp_path / 'cache'}"
    done = run(load(smoke(cache)))
    [path] = (tmp_path / "cache").glob("*/train.arrow")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    again = run(load(smoke(cache, "reuse=never")))
    assert f"{path} has not the content that it had then" in capsys.readouterr().err
    assert (again.status, again.test) == ("ok", done.test)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda v: v["config"]["model"].update(dim=32), "was it edited?"),
        (lambda v: v["config"]["task"].update(num_test=10**6), "settings of another task"),
        (lambda v: v["config"]["task"].pop("name"), "config.task.name is not set"),
    ],
)
def test_an_edited_record_is_not_evaluated_again(smoke, change, told):
    run(load(smoke("keep_checkpoint=true")))
    path = folder_of(smoke()) / "record.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=re.escape(told)):
        evaluate_again(path.parent)
