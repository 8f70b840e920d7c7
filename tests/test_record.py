"""Records, predictions, step metrics and checkpoints: read as written, refused when damaged."""

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lra import checkpoint, record
from lra.checkpoint import Metrics, State, Timed
from lra.record import SCHEMA, Record, Score, Throughput, save_predictions, wilson_interval

deterministic = settings(derandomize=True, deadline=None)


def minimal():
    return Record(
        hash="1a2b3c4d",
        protocol="smoke",
        modified={},
        task={"name": "listops", "version": 1, "fingerprint": "f" * 12, "chance": 0.1},
        attention={"name": "softmax", "options": {}, "non_default": {}},
        seed=0,
        config={"seed": 0},
        command="lra train",
        started="2025-01-01T00:00:00+00:00",
        precision={"name": "fp32", "reason": "auto: CPU"},
        device={"kind": "cpu", "name": "CPU", "threads": 2},
        versions={"python": "3.11", "torch": "2.9"},
        commit={"commit": "unknown", "dirty": None},
    )


def finished():
    return dataclasses.replace(
        minimal(),
        status="ok",
        modified={"train.betas": [[0.9, 0.999], [0.5, 0.9]]},
        sessions=2,
        parameters=1234,
        parameters_of_softmax=1200,
        steps=20,
        validation=Score.of(11, 100, 2.25, 15),
        test=Score.of(12, 100, 2.5, 15),
        train_seconds=1.5,
        evaluation_seconds=0.1,
        other_seconds=0.7,
        throughput=Throughput(13.3, 213.3, 9999.9, 15),
        peak_memory_bytes=10**10,
        memory_kind="resident set",
        micro_batches=4,
    )


# The interval

# 81 of 263, 15 of 148, 0 of 20 and 1 of 29: Newcombe 1998, Table I, method 3 (four digits).
KNOWN = [
    (0, 10, 0.0, 0.2775),
    (5, 10, 0.2366, 0.7634),
    (10, 10, 0.7225, 1.0),
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0, 0.1611),
    (1, 29, 0.0061, 0.1718),
]


@pytest.mark.parametrize(("correct", "n", "low", "high"), KNOWN)
def test_the_wilson_interval_has_its_published_values(correct, n, low, high):
    assert wilson_interval(correct, n) == pytest.approx((low, high), abs=5.1e-5)


counts = st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@deterministic
@given(counts)
def test_the_wilson_interval_of_the_wrong_answers_mirrors_that_of_the_right_ones(count):
    correct, n = count
    low, high = wilson_interval(correct, n)
    assert wilson_interval(n - correct, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


@deterministic
@given(counts)
def test_the_wilson_interval_holds_the_proportion(count):
    correct, n = count
    low, high = wilson_interval(correct, n)
    assert low - 1e-12 <= correct / n <= high + 1e-12
    assert high - low > 0


def test_the_wilson_interval_of_none_begins_at_0_and_that_of_all_ends_at_1():
    assert [n for n in range(1, 300) if wilson_interval(0, n)[0] != 0] == []
    assert [n for n in range(1, 300) if wilson_interval(n, n)[1] != 1] == []


def test_more_examples_give_a_narrower_interval():
    widths = [np.diff(wilson_interval(n // 2, n))[0] for n in (10, 100, 1000, 10_000)]
    assert sorted(widths, reverse=True) == widths


def test_a_score_holds_its_counts_and_its_interval():
    score = Score.of(correct=5, n=10, loss=1.25, step=40)
    assert (score.accuracy, score.n, score.loss, score.step) == (0.5, 10, 1.25, 40)
    assert (score.low, score.high) == wilson_interval(5, 10)


# The record


@pytest.mark.parametrize("make", [minimal, finished])
def test_a_record_is_read_as_it_was_written(tmp_path, make):
    make().save(tmp_path)
    assert record.load(tmp_path) == make()


def test_a_record_of_a_model_that_is_never_right_is_read_as_it_was_written(tmp_path):
    written = dataclasses.replace(finished(), test=Score.of(0, 243, 2.5, 15))
    written.save(tmp_path)
    assert record.load(tmp_path) == written


def test_a_record_with_a_loss_that_is_no_number_is_read_as_it_was_written(tmp_path):
    written = dataclasses.replace(finished(), test=Score.of(1, 10, float("nan"), 5))
    written.save(tmp_path)
    assert repr(record.load(tmp_path)) == repr(written)


def test_a_new_record_is_running_and_carries_the_format(tmp_path):
    minimal().save(tmp_path)
    values = json.loads((tmp_path / "record.json").read_text())
    assert (values["status"], values["schema"], values["test"]) == ("running", SCHEMA, None)


def test_saving_again_replaces_the_record_and_leaves_nothing_beside_it(tmp_path):
    minimal().save(tmp_path)
    finished().save(tmp_path)
    assert record.load(tmp_path) == finished()
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_a_folder_without_a_record_has_none(tmp_path):
    assert record.load(tmp_path) is None
    assert record.load(tmp_path / "not there") is None


def refusal(folder):
    """Returns why the folder's record is refused, after the file's name."""
    with pytest.raises(ValueError, match=r"record\.json") as error:
        record.load(folder)
    start = f"{folder / 'record.json'} is no record: "
    assert str(error.value).startswith(start)
    return str(error.value).removeprefix(start)


def write(folder, **changes):
    finished().save(folder)
    path = folder / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_record_of_a_newer_format_is_refused_for_that_and_not_for_its_new_fields(tmp_path):
    write(tmp_path, schema=SCHEMA + 1, carbon=3.5)
    reason = refusal(tmp_path)
    assert f"its format {SCHEMA + 1} is newer than {SCHEMA}" in reason
    assert "update lra" in reason
    assert "carbon" not in reason


def test_a_record_cut_anywhere_is_refused_with_its_path(tmp_path):
    finished().save(tmp_path)
    path = tmp_path / "record.json"
    whole = path.read_bytes()
    for length in range(0, len(whole.rstrip()), 7):
        path.write_bytes(whole[:length])
        assert refusal(tmp_path)


@pytest.mark.parametrize("content", [b"[]", b"null", b"3", b'"text"', b"\xff\xfe\x00", b"{}"])
def test_a_file_that_is_something_else_is_refused_with_its_path(tmp_path, content):
    (tmp_path / "record.json").write_bytes(content)
    assert refusal(tmp_path)


def test_an_unknown_field_is_refused_with_its_near_match(tmp_path):
    write(tmp_path, paramters=3)
    reason = refusal(tmp_path)
    assert "Unknown key 'paramters'. Did you mean parameters" in reason


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"status": "done"}, "status"),
        ({"seed": "0"}, "seed"),
        ({"seed": None}, "seed"),
        ({"task": None}, "task"),
        ({"test": {"accuracy": 0.5}}, "test"),
        ({"schema": "new"}, ""),
        ({"schema": None}, ""),
    ],
)
def test_a_field_of_the_wrong_type_is_refused_by_name(tmp_path, changes, name):
    write(tmp_path, **changes)
    assert name in refusal(tmp_path)


# Predictions


def test_predictions_and_labels_are_one_byte_each_in_the_order_of_the_split(tmp_path):
    predictions, labels = np.array([3, 0, 255, 9]), np.array([3, 1, 254, 9], np.uint8)
    save_predictions(tmp_path, predictions, labels)
    pair = np.load(tmp_path / "test_predictions.npy")
    assert (pair.dtype, pair.shape) == (np.uint8, (2, 4))
    assert pair.tolist() == [[3, 0, 255, 9], [3, 1, 254, 9]]
    assert [path.name for path in tmp_path.iterdir()] == ["test_predictions.npy"]


# Step metrics


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_are_appended_one_json_line_each(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, last_step=0)
    metrics.append({"step": 5, "loss": 2.5})
    metrics.append({"step": 10, "loss": float("inf")})
    assert lines(path) == [{"step": 5, "loss": 2.5}, {"step": 10, "loss": float("inf")}]


def test_on_resume_lines_of_steps_that_will_run_again_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (5, 10, 15, 20)))
    metrics = Metrics(path, last_step=10)
    metrics.append({"step": 15})
    assert [line["step"] for line in lines(path)] == [5, 10, 15]


def test_a_start_from_scratch_drops_all_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5}\n')
    Metrics(path, last_step=0)
    assert path.read_text() == ""


def test_on_resume_a_cut_line_is_dropped_wherever_it_was_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole, last = '{"step": 5, "loss": 2.5}\n', '{"step": 10, "loss": 2.25}'
    for length in range(len(last)):
        path.write_text(whole + last[:length])
        Metrics(path, last_step=10).append({"step": 15})
        assert [line["step"] for line in lines(path)] == [5, 15]


def test_on_resume_a_whole_line_without_its_line_break_is_kept_and_ended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 5}\n{"step": 10}')
    Metrics(path, last_step=10).append({"step": 15})
    assert [line["step"] for line in lines(path)] == [5, 10, 15]


@pytest.mark.parametrize("line", ["[1]", "null", '"step"', "{}", '{"loss": 1}'])
def test_on_resume_a_line_without_a_step_is_dropped(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{line}\n{{"step": 5}}\n')
    Metrics(path, last_step=10)
    assert path.read_text() == '{"step": 5}\n'


# Checkpoints


@pytest.fixture
def trained():
    """A model and its optimiser after one step, so that the optimiser has a state."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def state(model):
    return State(
        step=10,
        evaluated=5,
        train_loss=1.5,
        train_correct=2.0,
        train_seen=3,
        last=dataclasses.asdict(Score.of(5, 10, 1.0, 10)),
        best=dataclasses.asdict(Score.of(7, 10, 1.0, 5)),
        best_model={name: value + 1 for name, value in model.state_dict().items()},
        seconds={"train": 1.0, "evaluate": 2.0, "other": 3.0},
        timed=Timed(1, 2, 3, 4.0),
        peak_memory=12345,
        micro_batches=8,
        evaluation_tokens=4096,
    )


def test_a_folder_without_a_checkpoint_has_none(tmp_path, trained):
    assert checkpoint.load(tmp_path, "1a2b3c4d", trained[0]) is None


def test_a_checkpoint_is_read_as_it_was_written(tmp_path, trained):
    model, optimizer = trained
    written = state(model)
    checkpoint.save(tmp_path, "1a2b3c4d", written, model, optimizer)
    loaded = checkpoint.load(tmp_path, "1a2b3c4d", model)
    torch.testing.assert_close(loaded["model"], dict(model.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(loaded["state"].best_model, dict(written.best_model), rtol=0, atol=0)
    for field in dataclasses.fields(State):
        if field.name != "best_model":
            assert getattr(loaded["state"], field.name) == getattr(written, field.name)
    moments = loaded["optimizer"]["state"][0]
    torch.testing.assert_close(moments, optimizer.state_dict()["state"][0], rtol=0, atol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_the_checkpoint_before_the_newest_is_kept(tmp_path, trained):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, "1a2b3c4d", State(step=step), *trained)
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint.pt",
        "checkpoint.previous.pt",
    }
    assert checkpoint.load(tmp_path, "1a2b3c4d", trained[0])["state"].step == 3
    # As a process leaves it that dies after the first of the two renamings.
    (tmp_path / "checkpoint.pt").unlink()
    left = checkpoint.load(tmp_path, "1a2b3c4d", trained[0])
    assert left["state"].step == 2
    checkpoint.settle(tmp_path, left["name"])
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_an_unusable_checkpoint_never_pushes_out_a_good_one(tmp_path, trained):
    for step in (1, 2):
        checkpoint.save(tmp_path, "1a2b3c4d", State(step=step), *trained)
    (tmp_path / "checkpoint.pt").write_text("no checkpoint")
    checkpoint.settle(tmp_path, checkpoint.load(tmp_path, "1a2b3c4d", trained[0])["name"])
    assert (tmp_path / "checkpoint.unusable.pt").read_text() == "no checkpoint"
    checkpoint.save(tmp_path, "1a2b3c4d", State(step=2), *trained)
    (tmp_path / "checkpoint.pt").unlink()
    assert checkpoint.load(tmp_path, "1a2b3c4d", trained[0])["state"].step == 1
    checkpoint.remove(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("full", ["checkpoint.pt", None])
def test_what_cannot_be_written_leaves_both_checkpoints(tmp_path, trained, monkeypatch, full):
    for step in (1, 2):
        checkpoint.save(tmp_path, "1a2b3c4d", State(step=step), *trained)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    if full and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    if full:  # the system's own error, in the midst of what torch writes
        real = Path.open
        monkeypatch.setattr(Path, "open", lambda _, mode: real(Path("/dev/full"), mode))
    else:
        monkeypatch.setattr(torch, "save", lambda *_: 1 / 0)
    with pytest.raises(OSError if full else ZeroDivisionError) as error:
        checkpoint.save(tmp_path, "1a2b3c4d", State(step=3), *trained)
    if full:
        assert (error.value.errno, error.value.filename) == (28, str(tmp_path / full))
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_checkpoint_of_the_first_format_is_read(tmp_path, trained):
    checkpoint.save(tmp_path, "1a2b3c4d", state(trained[0]), *trained)
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    del content["format"], content["state"]["micro_batches"]
    del content["state"]["evaluation_tokens"]
    torch.save(content, tmp_path / "checkpoint.pt")
    loaded = checkpoint.load(tmp_path, "1a2b3c4d", trained[0])["state"]
    assert (loaded.step, loaded.micro_batches, loaded.evaluation_tokens) == (10, None, None)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"hash": "aaaaaaaa"}, "is of run aaaaaaaa, not of 1a2b3c4d"),
        ({"format": 9}, "has format 9, newer than 2: update lra"),
        ({"format": "new"}, "has format new"),
        ({"optimizer": None}, "has no optimizer"),
        ({"state": {"steps": 1}}, "lacks them: best, best_model, evaluated, "),
        ({"model": {"weight": torch.zeros(2, 3)}}, "has another model: bias is missing"),
        (
            {"model": {"weight": torch.zeros(5, 3), "bias": torch.zeros(2)}},
            "has another model: weight is (5, 3), not (2, 3)",
        ),
        (
            {"model": {name: torch.zeros(1) for name in "abcd"}},
            "a is not the model's, b is not the model's, bias is missing, and 3 more",
        ),
        ({"model": 5}, "has another model: it holds no tensors"),
    ],
)
def test_a_checkpoint_that_does_not_fit_tells_what_differs(
    tmp_path, trained, caplog, monkeypatch, change, told
):
    monkeypatch.setattr(logging.getLogger("lra"), "propagate", True)
    for step in (1, 2):
        checkpoint.save(tmp_path, "1a2b3c4d", State(step=step), *trained)
    newest = tmp_path / "checkpoint.pt"
    content = torch.load(newest, weights_only=True) | change
    torch.save({key: value for key, value in content.items() if value is not None}, newest)
    loaded = checkpoint.load(tmp_path, "1a2b3c4d", trained[0])
    assert (loaded["state"].step, loaded["name"]) == (1, "checkpoint.previous.pt")
    assert f"{newest} " in caplog.text
    assert told in caplog.text
    assert "the one before it, of step 1, is used" in caplog.text

    (tmp_path / "checkpoint.previous.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"checkpoint\.previous\.pt is no checkpoint") as error:
        checkpoint.load(tmp_path, "1a2b3c4d", trained[0])
    assert told in str(error.value)


def outcome(folder, content, model):
    """Returns what loading ``content`` as a checkpoint comes to."""
    (folder / "checkpoint.pt").write_bytes(content)
    try:
        checkpoint.load(folder, "1a2b3c4d", model)
    except ValueError as error:
        told = str(folder / "checkpoint.pt") in str(error) and "reuse=never" in str(error)
        return "refused" if told else f"refused without path or advice: {error}"
    except Exception as error:
        return f"crashed: {error!r}"
    return "loaded"


@pytest.fixture
def saved(tmp_path, trained):
    """The bytes of a whole checkpoint."""
    checkpoint.save(tmp_path, "1a2b3c4d", State(), *trained)
    return (tmp_path / "checkpoint.pt").read_bytes()


def test_a_checkpoint_cut_anywhere_is_refused_with_its_path_and_what_to_do(
    tmp_path, saved, trained
):
    outcomes = {
        outcome(tmp_path, saved[:length], trained[0]) for length in range(0, len(saved), 61)
    }
    assert outcomes == {"refused"}


@pytest.mark.filterwarnings("ignore")  # torch warns of what it finds in damaged files
def test_a_checkpoint_with_a_blank_anywhere_crashes_nothing(tmp_path, saved, trained):
    outcomes = {
        outcome(tmp_path, saved[:start] + bytes(16) + saved[start + 16 :], trained[0])
        for start in range(0, len(saved), 16)
    }
    assert outcomes <= {"refused", "loaded"}


def test_a_changed_bit_in_the_weights_is_noticed(tmp_path, saved, trained):
    start = saved.index(trained[0].weight.detach().numpy().tobytes())
    damaged = bytearray(saved)
    damaged[start + 3] ^= 0x40
    assert outcome(tmp_path, bytes(damaged), trained[0]) == "refused"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"no checkpoint", id="text"),
        pytest.param(bytes(100), id="blank"),
        pytest.param(b"\x80\x02a.", id="pickle that pops from nothing"),
        pytest.param(b"\x80\x02X\x02\x00\x00\x00\xff\xff.", id="pickle of no UTF-8"),
        pytest.param(b"\x80\x02J\x01.", id="pickle of half a number"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused_with_its_path_and_what_to_do(
    tmp_path, trained, content
):
    assert outcome(tmp_path, content, trained[0]) == "refused"


@pytest.mark.parametrize(
    "content", [[], {}, {"hash": "1a2b3c4d"}, {"hash": "1a2b3c4d", "state": {"steps": 1}}]
)
def test_a_checkpoint_without_its_parts_is_refused_with_its_path_and_what_to_do(
    tmp_path, trained, content
):
    torch.save(content, tmp_path / "whole.pt")
    assert outcome(tmp_path, (tmp_path / "whole.pt").read_bytes(), trained[0]) == "refused"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c["state"].update(step="10"), "state.step must be int"),
        (lambda c: c["state"].update(peak_memory=float("nan")), "state.peak_memory must be int"),
        (lambda c: c["state"].update(seconds={"train": -1.0}), "state.seconds.train is -1.0"),
        (lambda c: c["state"].update(seconds={"nap": 1.0}), "it has other clocks"),
        (lambda c: c["state"]["best"].update(accuracy=2.0), "state.best.accuracy is 2.0"),
        (lambda c: c["state"]["best"].update(other=1), "Unknown key 'state.best.other'"),
        (lambda c: c["state"]["best"].pop("loss"), "state.best.loss is not set"),
        (lambda c: c["state"].update(evaluated=11), "steps and scores do not go together"),
        (lambda c: c["model"].update(weight=None), "weight is no tensor"),
        (lambda c: c["optimizer"]["state"][0].pop("exp_avg"), "state of the optimiser"),
        (lambda c: c["optimizer"].update(state={99: {}}), "state of the optimiser"),
        (lambda c: c["optimizer"].pop("state"), "state of the optimiser"),
    ],
)
def test_a_checkpoint_of_which_something_is_another_thing_is_refused(
    tmp_path, trained, change, told
):
    model, optimizer = trained
    checkpoint.save(tmp_path, "1a2b3c4d", state(model), model, optimizer)
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    change(content)
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint\.pt ") as error:
        checkpoint.load(tmp_path, "1a2b3c4d", model)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


# Records of others


def edited(change):
    values = dataclasses.asdict(finished())
    values["task"] |= {
        "data_hash": "d" * 16,
        "splits": {"test": {"examples": 100, "tokens": 200, "longest": 3, "classes": [50, 50]}},
        "baselines": {"majority class": 0.5},
    }
    values["config"] = {"train": {"steps": 20, "lr": 0.1}}
    change(values)
    return values


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda v: v["task"].pop("name"), "task.name is not set"),
        (lambda v: v["task"].update(version="1"), "task.version must be int"),
        (lambda v: v["task"].update(baselines={"majority class": None}), "task.baselines.majority"),
        (lambda v: v["task"]["splits"]["test"].pop("longest"), "task.splits.test.longest"),
        (lambda v: v["attention"].pop("non_default"), "attention.non_default is not set"),
        (lambda v: v["config"].update(train=[]), "config.train must be"),
        (lambda v: v["config"]["train"].update(steps="20"), "config.train.steps must be int"),
        (lambda v: v["device"].update(threads=-1), "device.threads is -1"),
        (lambda v: v.update(versions={}), "versions.torch is not set"),
        (lambda v: v.update(commit={"commit": None, "dirty": None}), "commit.commit must be str"),
        (lambda v: v.update(modified={"train.lr": 1}), "modified.train.lr must be"),
        (lambda v: v.update(modified={"train.steps": [1, "2"]}), "modified.train.steps must be"),
        (lambda v: v.update(tuning={"name": "lr"}), "tuning.trials is not set"),
        (lambda v: v["test"].update(accuracy=float("nan")), "test.accuracy is nan"),
        (lambda v: v["test"].update(high=1.5), "test.high is 1.5"),
        (lambda v: v.update(train_seconds=float("inf")), "train_seconds is inf"),
        (lambda v: v.update(peak_memory_bytes=10**30), "peak_memory_bytes is 1000000"),
        (lambda v: v["throughput"].update(steps_per_second=-1), "throughput.steps_per_second is"),
    ],
)
def test_a_record_that_nothing_can_be_made_of_is_refused_by_its_key(tmp_path, change, told):
    (tmp_path / "record.json").write_text(json.dumps(edited(change)))
    with pytest.raises(ValueError, match="is no record") as error:
        record.load(tmp_path)
    assert told in str(error.value)
    assert str(tmp_path / "record.json") in str(error.value)


def test_a_record_may_tell_more_than_is_asked_for(tmp_path):
    more = edited(lambda values: values["task"].update(told_by="a later version"))
    (tmp_path / "record.json").write_text(json.dumps(more))
    assert record.load(tmp_path).task["told_by"] == "a later version"


def test_a_record_nested_too_deeply_is_refused_and_no_crash(tmp_path):
    (tmp_path / "record.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is no record: it is nested"):
        record.load(tmp_path)


def test_metrics_that_are_no_numbers_are_left_out(tmp_path):
    good = {"step": 1, "seconds": 0.5, "val_accuracy": 0.25}
    others = [
        *({**good, key: value} for key in good for value in ("1", None, [], float("nan"), 10**400)),
        [good],
        7,
    ]
    lines = [*map(json.dumps, others), json.dumps(good), "[" * 100_000, '{"step": 5']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    kept = record.load_metrics(tmp_path)
    assert good in kept
    assert all(isinstance(line["step"], int) for line in kept)
    assert all(0 <= line["val_accuracy"] <= 1 for line in kept)
