"""The report: tables from records alone, the same bytes each time, and nothing averaged wrongly."""

import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from lra import report
from lra.record import SCHEMA, Record, Score, Throughput, save_predictions
from lra.report import figures, store
from lra.report.leaderboard import Board
from lra.report.published import published
from lra.tasks import TASKS
from models.attention import ATTENTIONS

ROOT = Path(__file__).parents[1]

TASK = {"name": "listops", "version": 1, "fingerprint": "f" * 12, "chance": 0.1}
DATA = {
    "data_hash": "d" * 16,
    "splits": {
        name: {"examples": n, "tokens": 50 * n, "longest": 199, "classes": [n // 10] * 10}
        for name, n in (("train", 20_000), ("val", 2_000), ("test", 1_000))
    },
    "baselines": {"majority class": 0.17, "root operator only": 0.25},
}
FINISHED = Record(
    hash="aaaaaaaa",
    protocol="quick",
    modified={},
    task=TASK | DATA,
    attention={"name": "softmax", "options": {}, "non_default": {}},
    seed=0,
    config={},
    command="lra train",
    started="2025-01-01T00:00:00+00:00",
    precision={"name": "fp32", "reason": "auto: CPU"},
    device={"kind": "cpu", "name": "CPU A", "threads": 2},
    versions={"torch": "2.9.0"},
    commit={"commit": "0123456789abcdef", "dirty": False},
    status="ok",
    parameters=1000,
    parameters_of_softmax=1000,
    steps=600,
    validation=Score.of(510, 1000, 1.25, 600),
    test=Score.of(500, 1000, 1.25, 600),
    train_seconds=60.0,
    evaluation_seconds=6.0,
    throughput=Throughput(10.0, 640.0, 64_000.0, 595),
    peak_memory_bytes=123_000_000,
    memory_kind="resident set",
    micro_batches=4,
)


def run(correct=500, **changes):
    """Returns a finished run with ``correct`` answers of 1,000."""
    return dataclasses.replace(FINISHED, test=Score.of(correct, 1000, 1.25, 600), **changes)


def failed(status="oom", data=True, **changes):
    """Returns a run that ended without a result; ``data`` tells whether it had its data."""
    return dataclasses.replace(
        FINISHED,
        status=status,
        reason="reason",
        task=TASK | DATA if data else TASK,
        parameters=1000 if data else None,
        parameters_of_softmax=1000 if data else None,
        validation=None,
        test=None,
        throughput=None,
        peak_memory_bytes=None,
        **changes,
    )


def named(name, **non_default):
    return {"name": name, "options": non_default, "non_default": non_default}


def sound(record):
    """Returns the record with the hash of its settings; records of other hashes stay apart."""
    settings = {
        "attention": record.attention | {"salt": record.hash},
        "model": {},
        "train": {"steps": 600, "batch_size": 64},
    }
    record = dataclasses.replace(record, config=settings)
    return dataclasses.replace(record, hash=record.identity_hash())


OVERVIEWS = ("all tasks", "beside published figures")


def table_of(markdown):
    """Returns the rows of a Markdown table as dictionaries."""
    lines = [line.strip("| ").split(" | ") for line in markdown.splitlines() if line[:1] == "|"]
    header, _, *rows = [[cell.strip() for cell in line] for line in lines]
    return [dict(zip(header, row, strict=True)) for row in rows]


class Report:
    """What `lra report` writes of given records."""

    def __init__(self, folder, records, protocol="quick"):
        for i, one in enumerate(records):
            sound(one).save(folder / "runs" / f"{i:03}")
        report.write([folder / "runs"], folder / "results")
        path = folder / "results" / f"leaderboard-{protocol}"
        self.markdown = path.with_suffix(".md").read_text()
        self.csv = path.with_suffix(".csv").read_text()
        self.figures = list(csv.DictReader(self.csv.splitlines()))
        self.tex = path.with_suffix(".tex").read_text()
        parts = [part.partition("\n") for part in self.markdown.split("\n## ")[1:]]
        self.sections = {}
        for title, _, text in parts:
            self.sections.setdefault(title, []).append(table_of(text))
        tasks = [t for name, part in self.sections.items() if name not in OVERVIEWS for t in part]
        self.columns = list(tasks[0][0])
        self.rows = [row for table in tasks for row in table]
        self.names = [row["attention"] for row in self.rows]

    def row(self, name):
        [row] = [row for row in self.rows if row["attention"] == name]
        return row


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes a report without figures, which take longer than the rest."""
    monkeypatch.setattr(figures, "write", lambda *_: [])
    return lambda *records, **options: Report(tmp_path, records, **options)


# Averages


def test_seeds_of_one_setting_are_a_mean_and_a_standard_deviation(make):
    made = make(run(500, seed=0), run(600, seed=1), run(700, seed=2))
    row = made.row("softmax")
    assert row["test accuracy %"] == "60.00 ± 10.00"
    assert row["seeds"] == "3"
    [figures] = [row for row in made.figures if row["name"] == "softmax"]
    assert float(figures["accuracy"]) == pytest.approx(60, abs=1e-12)
    assert float(figures["sd"]) == pytest.approx(10, abs=1e-12)
    assert figures["seeds"] == "3"


def test_a_single_seed_has_an_interval_and_no_standard_deviation(make):
    row = make(run(500)).row("softmax")
    assert row["test accuracy %"] == "50.00"
    assert row["95 % interval"] == "46.9 to 53.1"
    assert row["seeds"] == "1"


def test_speed_time_and_memory_are_means_over_seeds(make):
    second = run(
        seed=1,
        train_seconds=80.0,
        throughput=Throughput(20.0, 1.0, 32_000.0, 595),
        peak_memory_bytes=125_000_000,
    )
    row = make(run(seed=0), second).row("softmax")
    assert (row["train s"], row["steps/s"]) == ("70", "15.00")
    assert row["peak MB"] == "124.0"


def test_records_of_different_hash_are_never_averaged(make):
    made = make(run(500, hash="aaaaaaaa"), run(700, hash="bbbbbbbb", seed=1))
    assert [row["test accuracy %"] for row in made.rows[:2]] == ["70.00", "50.00"]
    assert [row["seeds"] for row in made.rows[:2]] == ["1", "1"]
    assert len({row["hash"] for row in made.figures[:2]}) == 2


def test_a_run_found_twice_is_one_seed(make):
    row = make(run(500, seed=0), run(500, seed=0), run(600, seed=1)).row("softmax")
    assert (row["test accuracy %"], row["seeds"]) == ("55.00 ± 7.07", "2")


def test_speeds_of_two_devices_are_never_averaged(make):
    other = run(
        seed=1,
        device={"kind": "cpu", "name": "CPU B", "threads": 2},
        throughput=Throughput(20.0, 1.0, 1.0, 595),
    )
    made = make(run(seed=0), other)
    assert "15.00" not in [row.get("steps/s") for row in made.rows]
    assert "CPU A" in made.markdown
    assert "CPU B" in made.markdown


def test_results_on_different_data_are_never_averaged(make):
    other = run(700, seed=1, task=TASK | DATA | {"data_hash": "e" * 16})
    made = make(run(500, seed=0), other)
    assert "60.00" not in [row["test accuracy %"] for row in made.rows if row["seeds"] != "–"]
    assert "d" * 16 in made.markdown
    assert "e" * 16 in made.markdown


# Rows


def test_options_that_are_not_default_stand_in_the_name(make):
    linear = run(600, hash="bbbbbbbb", attention=named("linear", feature="relu", eps=0.5))
    assert make(run(), linear).names[:2] == ["linear feature=relu eps=0.5", "softmax"]


def test_rows_go_from_the_best_to_the_worst_and_failures_come_last(make):
    made = make(
        failed(hash="aaaaaaaa", attention=named("a")),
        run(500, hash="bbbbbbbb", attention=named("b")),
        run(600, hash="cccccccc", attention=named("c")),
    )
    assert made.names[:3] == ["c", "b", "a"]


@pytest.mark.parametrize("status", ["oom", "failed", "diverged", "timeout", "interrupted"])
@pytest.mark.parametrize("data", [True, False])
def test_a_run_without_a_result_has_its_status_for_a_cell(make, status, data):
    made = make(
        run(attention=named("good")),
        failed(status, data, hash="bbbbbbbb", attention=named("bad")),
    )
    row = made.row("bad")
    assert row["test accuracy %"] == f"✗ {status}"
    assert (row["seeds"], row["95 % interval"], row["steps/s"]) == ("0", "–", "–")
    assert (row["train s"], row["peak MB"]) == ("–", "–")
    [figures] = [row for row in made.figures if row["name"] == "bad"]
    assert (figures["status"], figures["accuracy"], figures["train_seconds"]) == (status, "", "")
    assert made.row("good")["test accuracy %"] == "50.00"


@pytest.mark.parametrize("data", [True, False])
def test_failures_alone_make_a_table_too(make, data):
    made = make(failed(data=data))
    assert made.row("softmax")["test accuracy %"] == "✗ oom"


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("seed", [0, 2])
def test_a_failed_seed_leaves_the_average_of_the_others_as_it_is(make, data, seed):
    made = make(
        *sorted(
            [failed("oom", data, seed=seed), run(500, seed=1), run(600, seed=2 - seed)],
            key=lambda one: one.seed,
        )
    )
    row = made.row("softmax")
    assert row["test accuracy %"].startswith("55.00 ± 7.07")
    assert row["seeds"].startswith("2")
    assert (row["parameters"], row["vs softmax"]) == ("1,000", "1.000")
    assert [row["status"] for row in made.figures if row["name"] == "softmax"] == ["oom"]


def test_a_failed_seed_is_told_in_the_table_beside_those_that_succeeded(make):
    made = make(run(500, seed=0), failed("diverged", seed=1))
    assert "diverged" in made.markdown


def test_a_score_of_a_run_that_did_not_end_well_is_not_averaged(make):
    made = make(run(500, seed=0), run(900, seed=1, status="failed", reason="disk full"))
    row = made.row("softmax")
    assert row["test accuracy %"].startswith("50.00")
    assert row["seeds"].startswith("1")


@pytest.mark.parametrize("n", [7, 100, 2000])
def test_a_run_that_got_nothing_right_is_a_row_like_any_other(make, n):
    row = make(dataclasses.replace(FINISHED, test=Score.of(0, n, 9.0, 600))).row("softmax†")
    assert row["test accuracy %"] == "0.00"
    assert row["95 % interval"].startswith("0.0 to ")


def test_a_run_that_got_everything_right_is_a_row_like_any_other(make):
    row = make(run(1000)).row("softmax")
    assert row["test accuracy %"] == "100.00"
    assert row["95 % interval"] == "99.6 to 100.0"


def test_rules_that_learn_nothing_stand_in_the_same_table(make):
    made = make(run())
    assert made.names == ["softmax", "*majority class*", "*root operator only*"]
    assert made.row("*root operator only*")["test accuracy %"] == "25.00"
    assert [(row["kind"], row["name"]) for row in made.figures] == [
        ("attention", "softmax"),
        ("rule", "majority class"),
        ("rule", "root operator only"),
    ]


# Tuning

TUNING = {
    "name": "lr",
    "grid": [0.1, 0.3, 0.9],
    "chosen": 0.3,
    "trials": [{"lr": lr, "status": "ok", "validation": 0.5} for lr in (0.1, 0.3, 0.9)],
}


def test_a_tuned_run_is_a_row_of_its_own_that_counts_its_trials(make):
    made = make(run(500), run(600, hash="bbbbbbbb", tuning=TUNING))
    assert made.names[:2] == ["softmax (lr of 3 trials)", "softmax"]


def test_trials_stand_in_no_table(make, capsys):
    trial = dataclasses.replace(failed(hash="bbbbbbbb"), status="ok", trial_of="cccccccc")
    trial = dataclasses.replace(trial, validation=Score.of(510, 1000, 1.25, 600))
    made = make(run(500), trial)
    assert made.names[:2] == ["softmax", "*majority class*"]
    assert capsys.readouterr().err == ""


# Marks


def test_a_run_whose_interval_reaches_the_majority_class_is_marked_as_not_learned(make):
    # The majority class is right in 170 of 1,000; the interval is about 2.4 points either way.
    made = make(
        run(180, hash="aaaaaaaa", attention=named("a")),
        run(220, hash="bbbbbbbb", attention=named("b")),
        run(100, hash="cccccccc", attention=named("c")),
    )
    assert made.names[:3] == ["b", "a†", "c†"]
    assert "† not learned" in made.markdown


def test_more_than_110_percent_of_the_parameters_of_softmax_is_marked(make):
    made = make(
        run(500, hash="aaaaaaaa", attention=named("a"), parameters=1100),
        run(400, hash="bbbbbbbb", attention=named("b"), parameters=1101),
    )
    assert made.names[:2] == ["a", "b‡"]
    assert "‡ more than 110 %" in made.markdown
    assert [row["vs softmax"] for row in made.rows[:2]] == ["1.100", "1.101"]


def test_a_departure_from_the_protocol_is_marked_and_told(make):
    made = make(run(), run(600, hash="bbbbbbbb", modified={"train.lr": [0.001, 0.01]}))
    assert made.names[:2] == ["softmax (train.lr=0.01)*", "softmax"]
    assert "* departs from the protocol" in made.markdown


def test_validation_on_the_test_split_is_marked(make):
    made = make(run(task=TASK | DATA | {"validation_is_test": True}))
    assert made.names[0] == "softmax§"
    assert "§ legacy validation" in made.markdown


def test_a_run_of_fewer_steps_than_the_protocols_is_marked(make):
    fewer = run(modified={"train.steps": [600, 60]})
    more = run(hash="bbbbbbbb", attention=named("linear"), modified={"train.steps": [600, 900]})
    assert make(fewer, more).names[:2] == [
        "linear (train.steps=900)*",
        "softmax (train.steps=60)*¶",
    ]


def test_marks_that_nothing_bears_are_not_explained(make):
    markdown = make(run()).markdown
    assert [mark for mark in ("†", "‡", "§", "departs") if mark in markdown] == []


def test_the_csv_holds_names_without_marks(make):
    made = make(run(100, parameters=2000, modified={"train.lr": [0.001, 0.01]}))
    assert made.names[0] == "softmax (train.lr=0.01)*‡†"
    assert made.figures[0]["name"] == "softmax (train.lr=0.01)"


# Conditions


def test_conditions_that_all_rows_share_are_told_once_below_the_table(make):
    made = make(run(), run(600, hash="bbbbbbbb", attention=named("linear")))
    assert "conditions" not in made.columns
    assert "Speed and memory: CPU A, 2 threads, fp32." in made.markdown


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"precision": {"name": "bf16", "reason": "asked for"}}, "CPU A, 2 threads, bf16"),
        (
            {"device": {"kind": "cuda", "name": "GPU", "threads": 2}},
            "GPU, 2 threads, fp32",
        ),
        (
            {"device": {"kind": "cpu", "name": "CPU A", "threads": 8}},
            "CPU A, 8 threads, fp32",
        ),
        (
            {"device": {"kind": "cpu", "name": "CPU A", "threads": 2, "runs_at_once": 4}},
            "CPU A, 2 threads, fp32, 4 runs at once",
        ),
    ],
)
def test_rows_of_different_conditions_get_a_column_that_tells_them(make, change, told):
    made = make(run(), run(600, hash="bbbbbbbb", attention=named("linear"), **change))
    assert made.row("softmax")["conditions"] == "CPU A, 2 threads, fp32"
    assert made.row("linear")["conditions"] == told
    assert "Speed and memory:" not in made.markdown


# Tables


def test_versions_and_data_of_a_task_never_share_a_table(make):
    newer = TASK | DATA | {"version": 2, "fingerprint": "0" * 12}
    shorter = TASK | DATA | {"fingerprint": "1" * 12}
    made = make(
        run(),
        run(600, hash="bbbbbbbb", task=newer),
        run(700, hash="cccccccc", task=shorter),
    )
    assert made.markdown.count("## listops") == 3
    assert [row["test accuracy %"] for row in made.rows if row["attention"] == "softmax"] == [
        "70.00",
        "50.00",
        "60.00",
    ]


def test_two_protocols_are_two_files_that_share_no_row(tmp_path):
    quick = Report(tmp_path, [run(500), run(600, protocol="nystrom")])
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [
        "claims.md",
        *(f"leaderboard-nystrom.{kind}" for kind in ("csv", "md", "tex")),
        *(f"leaderboard-quick.{kind}" for kind in ("csv", "md", "tex")),
        "leaderboard.html",  # where a choice shows one of them
        "seeds-nystrom.png",
        "seeds-quick.png",
    ]
    nystrom = (tmp_path / "results" / "leaderboard-nystrom.md").read_text()
    assert ("50.00" in quick.markdown, "60.00" in quick.markdown) == (True, False)
    assert ("50.00" in nystrom, "60.00" in nystrom) == (False, True)


def test_a_table_tells_what_it_was_made_of(make):
    dirty = run(
        seed=1,
        started="2025-03-05T00:00:00+00:00",
        commit={"commit": "fedcba9876543210", "dirty": True},
        versions={"torch": "2.8.0"},
    )
    markdown = make(run(), dirty).markdown
    assert "20,000 train / 2,000 val / 1,000 test examples of up to 199 tokens" in markdown
    assert "version 1, data dddddddddddddddd" in markdown
    assert "2 records of 2025-01-01 to 2025-03-05" in markdown
    assert "torch 2.8.0, 2.9.0" in markdown
    assert "code 0123456789, fedcba9876 (modified)" in markdown


def test_the_csv_holds_unrounded_numbers(make):
    accuracies = (501, 602, 704)
    made = make(*(run(correct, seed=seed) for seed, correct in enumerate(accuracies)))
    figures = made.figures[0]
    mean = sum(accuracies) / 30
    assert float(figures["accuracy"]) == pytest.approx(mean, rel=1e-14)
    deviations = [(correct / 10 - mean) ** 2 for correct in accuracies]
    assert float(figures["sd"]) == pytest.approx((sum(deviations) / 2) ** 0.5, rel=1e-13)
    assert (figures["n"], figures["parameters"]) == ("1000", "1000")
    assert float(figures["peak_megabytes"]) == 123
    assert float(figures["tokens_per_second"]) == 64_000
    text = {"protocol", "task", "data", "kind", "name", "status", "conditions", "hash"}
    text |= {"source", "source_protocol", "difference", "low", "high"}
    for name, value in figures.items():
        assert name in text or float(value) >= 0


def test_the_table_is_printed_too(make, capsys):
    made = make(run())
    assert made.markdown in capsys.readouterr().out


# Ranks, all tasks, published figures


def on(task, correct=500, **changes):
    """Returns a finished run on another task."""
    about = TASK | DATA | {"name": task, "fingerprint": task}
    return run(
        correct,
        hash=f"{task}-{changes.get('attention', {}).get('name')}"[:16],
        task=about,
        **changes,
    )


def test_equal_accuracies_share_a_rank(make):
    scores = {"a": 600, "b": 500, "c": 500, "d": 400}
    made = make(
        *(run(score, hash=name * 8, attention=named(name)) for name, score in scores.items()),
        failed(hash="eeeeeeee", attention=named("e")),
    )
    assert [(row["attention"], row["rank"]) for row in made.rows[:5]] == [
        ("a", "1"),
        ("b", "2"),
        ("c", "2"),
        ("d", "4"),
        ("e", "–"),
    ]


def test_speed_is_told_beside_that_of_softmax_on_the_same_device(make):
    fast = {"throughput": Throughput(25.0, 1.0, 1.0, 595)}
    other = {"device": {"kind": "cpu", "name": "CPU B", "threads": 2}}
    made = make(
        run(),
        run(hash="bbbbbbbb", attention=named("linear"), **fast),
        run(hash="cccccccc", attention=named("rfa"), **fast, **other),
    )
    speeds = {row["attention"]: row["speed vs softmax"] for row in made.rows[:3]}
    assert speeds == {"softmax": "1.00", "linear": "2.50", "rfa": "–"}


def test_the_average_is_over_all_tasks_and_only_of_rows_that_have_them_all(make):
    made = make(
        on("listops", 300, attention=named("a")),
        on("text", 500, attention=named("a")),
        on("listops", 500, attention=named("a"), seed=1),
        on("text", 900, attention=named("b")),
        on("listops", 200, attention=named("c")),
        on("text", 300, attention=named("c")),
    )
    [rows] = made.sections["all tasks"]
    assert rows[0] == {
        "attention": "a",
        "rank": "1",
        "listops": "40.00 ± 14.14 (2)",
        "text": "50.00",
        "average of 2": "45.00",
    }
    assert [(r["attention"], r["rank"], r["average of 2"]) for r in rows[1:3]] == [
        ("c", "2", "25.00"),
        ("b", "–", "–"),
    ]
    assert rows[1]["listops"] == "20.00"
    assert rows[2]["listops"] == "–"


def test_path_x_is_left_out_of_the_average(make):
    made = make(*(on(task, 500) for task in ("pathx", "text", "listops")))
    [rows] = made.sections["all tasks"]
    assert list(rows[0]) == ["attention", "rank", "listops", "text", "pathx", "average of 2"]
    assert "pathx is left out of the average" in made.markdown


def test_precisions_are_rows_of_their_own_over_all_tasks(make):
    bf16 = {"precision": {"name": "bf16", "reason": "asked for"}}
    made = make(
        on("listops", 300),
        on("text", 300),
        dataclasses.replace(on("listops", 400), hash="b1", **bf16),
        dataclasses.replace(on("text", 600), hash="b2", **bf16),
    )
    [rows] = made.sections["all tasks"]
    averages = {row["attention"]: row["average of 2"] for row in rows[:2]}
    assert averages == {"softmax [cpu, bf16]": "50.00", "softmax [cpu, fp32]": "30.00"}


def test_published_figures_stand_beside_ours_with_difference_source_and_protocol(make):
    made = make(
        run(400, protocol="nystrom"),
        run(300, protocol="nystrom", hash="bbbbbbbb", attention=named("linear", feature="relu")),
        run(300, protocol="nystrom", hash="cccccccc", attention=named("cosformer")),
        protocol="nystrom",
    )
    [rows] = made.sections["beside published figures"]
    assert [row["attention"] for row in rows] == ["cosformer", "softmax"]  # in their default form
    assert list(rows[1])[:4] == ["task", "attention", "ours", "Nyströmformer Table 3"]
    assert rows[1]["Nyströmformer Table 3"] == "37.10 (+2.90)"
    assert rows[0]["cosFormer Table 4"] == "37.90 (−7.90)"
    assert "LRA Table 1 (Tay et al., ICLR 2021): protocol google." in made.markdown
    published = [row for row in made.figures if row["kind"] == "published"]
    [nystrom] = [row for row in published if row["source_protocol"] == "nystrom"]
    assert (nystrom["name"], nystrom["accuracy"]) == ("softmax", "37.1")
    assert float(nystrom["difference"]) == pytest.approx(2.9)


def test_a_protocol_that_follows_no_paper_has_no_published_figures_beside_it(make):
    assert "published" not in make(run()).markdown


def test_published_names_are_registered_and_no_cell_stands_twice():
    cells = published()
    assert {cell.attention for cell in cells} <= set(ATTENTIONS.names())
    assert {cell.task for cell in cells} <= set(TASKS.names())
    assert len({(c.source, c.task, c.attention) for c in cells}) == len(cells) > 200


# LaTeX


def test_the_latex_tables_escape_what_latex_would_read(make):
    made = make(run(100, attention=named("a_b", eps="1e-5&#"), modified={"train.lr": [1, 2]}))
    assert r"a\_b eps=1e-5\&\# (train.lr=2)*$^\dagger$" in made.tex
    assert r"95 \% interval" in made.tex


def test_the_latex_compiles(make, tmp_path):
    if (
        shutil.which("pdflatex") is None
        or subprocess.run(
            ["kpsewhich", "booktabs.sty"], stdout=subprocess.DEVNULL, check=False
        ).returncode
    ):
        pytest.skip("needs pdflatex and booktabs")
    several = [
        on(task, 100, attention=named(a)) for task in ("listops", "text") for a in ("a_b", "c")
    ]
    made = make(*several, failed(hash="eeeeeeee", attention=named("d<e")), run(hash="f" * 8))
    document = (
        r"\documentclass{article}\usepackage[utf8]{inputenc}\usepackage[T1]{fontenc}"
        r"\usepackage{booktabs}\begin{document}\input{results/leaderboard-quick.tex}\end{document}"
    )
    assert made.tex.count(r"\begin{table}") == 4
    (tmp_path / "paper.tex").write_text(document)
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "paper.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


# Figures


def test_curves_and_tradeoff_are_drawn_where_there_is_something_to_draw(tmp_path):
    made = [run(seed=0), run(seed=1), run(hash="bbbbbbbb", attention=named("linear"))]
    for i in range(2):
        folder = tmp_path / "runs" / f"{i:03}"
        folder.mkdir(parents=True)
        lines = [{"step": 10 * k, "seconds": 1.0 * k, "val_accuracy": 0.1 * k} for k in (1, 2, 3)]
        text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 40, "sec'
        (folder / "metrics.jsonl").write_text(text)
    Report(tmp_path, made)
    for name in ("curves", "seeds", "tradeoff"):
        image = (tmp_path / "results" / f"{name}-quick.png").read_bytes()
        assert image.startswith(b"\x89PNG")
        assert len(image) > 5000


def test_names_beside_circles_do_not_cover_one_another(tmp_path):
    """Circles of equal speed and score need lines to their names, which names may cross."""
    names = [f"mechanism-{letter}" for letter in "abcdefghijkl"]
    runs = [
        store.Run(run(hash=f"{i:08}", attention=named(n)), tmp_path) for i, n in enumerate(names)
    ]
    reference = store.Run(run(400), tmp_path)
    figure = figures.tradeoff(Board([*runs, reference]))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    [panel] = figure.axes
    boxes = [Text.get_window_extent(name, canvas.get_renderer()) for name in panel.texts]
    assert len(boxes) == len(names) + 1
    frame = panel.get_window_extent()
    for i, box in enumerate(boxes):
        assert frame.x0 <= box.x0 < box.x1 <= frame.x1
        assert frame.y0 <= box.y0 < box.y1 <= frame.y1
        assert not any(box.overlaps(other) for other in boxes[:i])


# Reproducibility and damage


SEVERAL = [
    run(500, seed=0),
    run(600, seed=1),
    run(600, hash="bbbbbbbb", attention=named("linear", feature="relu")),
    run(600, hash="cccccccc", attention=named("linear"), versions={"torch": "2.8.0"}),
    run(700, hash="dddddddd", protocol="nystrom"),
    failed(hash="eeeeeeee", attention=named("cosformer")),
]


def written(folder, order):
    for i in order:
        sound(SEVERAL[i]).save(folder / "runs" / str(i))
    report.write([folder / "runs"], folder / "results")
    return {path.name: path.read_bytes() for path in (folder / "results").iterdir()}


def test_the_same_records_give_the_same_bytes_whenever_they_were_written(tmp_path):
    order = range(len(SEVERAL))
    first = written(tmp_path / "a", order)
    assert written(tmp_path / "b", reversed(order)) == first
    assert written(tmp_path / "a", order) == first
    # Leaderboards and figures of the seeds of two protocols, the page, the claims, and
    assert len(first) == 11
    assert "tradeoff-quick.png" in first


def test_the_same_records_give_the_same_bytes_in_every_process(tmp_path):
    first = written(tmp_path, range(len(SEVERAL)))
    for seed in "12":
        subprocess.run(
            [sys.executable, "-m", "lra", "report", "--runs", "runs", "--out", f"again{seed}"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        again = {path.name: path.read_bytes() for path in (tmp_path / f"again{seed}").iterdir()}
        assert again == first


def test_a_damaged_record_is_named_on_standard_error_and_left_out(tmp_path, make, capsys):
    damaged = tmp_path / "runs" / "deep" / "down" / "record.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text('{"hash": "bbbb')
    made = make(run())
    assert made.names[0] == "softmax"
    assert "from 1 records" in made.markdown
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"left out: {damaged} is no record")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"hash": "0" * 8}, "has the hash 00000000, but its settings have"),
        ({"seed": 7, "precision": {"name": "bf16", "reason": ""}}, "was it edited?"),
        ({"test": Score.of(999, 1000, 1.0, 600)}, "tells a test accuracy of 99.90% of 1,000, but"),
        ({"test": None}, "is of a finished run and has no score"),
        ({"config": {}}, "has no 'attention'"),
    ],
)
def test_a_record_that_contradicts_itself_is_named_and_left_out(
    tmp_path, make, capsys, change, told
):
    folder = tmp_path / "runs" / "edited"
    honest = sound(run(500, hash="bbbbbbbb", attention=named("linear")))
    dataclasses.replace(honest, **change).save(folder)
    save_predictions(folder, np.arange(1000) < 500, np.ones(1000))
    made = make(run())
    assert "from 1 records" in made.markdown
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"left out: {folder}/record.json")
    assert told in line


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "records").glob("*.json")))
def test_records_of_older_versions_of_the_format_are_reported(tmp_path, capsys, path):
    folder = tmp_path / "runs" / "old"
    folder.mkdir(parents=True)
    shutil.copy(path, folder / "record.json")
    report.write([tmp_path / "runs"], tmp_path / "results")
    assert capsys.readouterr().err == ""
    old = json.loads(path.read_text())
    assert old["schema"] < SCHEMA
    told = f"{100 * old['test']['accuracy']:.2f}"
    assert told in (tmp_path / "results" / f"leaderboard-{old['protocol']}.md").read_text()


def test_a_record_that_agrees_with_its_predictions_is_taken(tmp_path, make):
    folder = tmp_path / "runs" / "honest"
    sound(run(500, hash="bbbbbbbb", attention=named("linear"))).save(folder)
    save_predictions(folder, np.arange(1000) < 500, np.ones(1000))
    assert "linear" in make(run()).names


def test_folders_of_other_people_are_reported_together(tmp_path):
    sound(run(500)).save(tmp_path / "ours" / "a")
    sound(run(500)).save(tmp_path / "theirs" / "the same run, copied")
    sound(run(700, seed=1)).save(tmp_path / "theirs" / "b")
    report.write([tmp_path / "ours", tmp_path / "theirs"], tmp_path / "results")
    assert "60.00 ± 14.14" in (tmp_path / "results" / "leaderboard-quick.md").read_text()


def test_records_are_found_however_deep_they_lie(tmp_path, make):
    sound(run(700, seed=3)).save(
        tmp_path / "runs" / "quick" / "listops" / "softmax" / "s3-aaaaaaaa"
    )
    assert make(run(500)).row("softmax")["seeds"] == "2"


def test_records_are_read_in_one_order_whatever_the_disk_lists_first(tmp_path, monkeypatch):
    for seed in (2, 0, 1):
        sound(run(seed=seed)).save(tmp_path / str(seed))
    listed = Path.rglob
    for order in (sorted, lambda paths: sorted(paths, reverse=True)):
        monkeypatch.setattr(Path, "rglob", lambda *given, order=order: order(listed(*given)))
        assert [one.record.seed for one in store.read([tmp_path])] == [0, 1, 2]


@pytest.mark.parametrize("folder", ["empty", "damaged"])
def test_without_any_record_the_message_says_what_to_type(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "record.json").write_text("{")
    with pytest.raises(ValueError, match=r"no record below .*lra train.*--runs"):
        report.write([tmp_path / folder], tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"There is no folder .*not there"):
        report.write([tmp_path / "not there"], tmp_path / "results")


def test_the_tables_of_the_readme_are_those_of_the_results():
    readme = (ROOT / "README.md").read_text().partition("## Start")[0]
    written = "".join(path.read_text() for path in (ROOT / "results").glob("leaderboard-*.md"))
    rows = [line for line in readme.splitlines() if line.startswith("|")]
    assert len(rows) > 20
    assert [row for row in rows if row not in written] == []


def test_the_results_are_those_of_the_runs(tmp_path):
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    command = ["git", "ls-files", "runs", "results/*.jsonl"]  # a user may have more
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if not listed.stdout:
        pytest.skip(f"{ROOT} is no git repository: {listed.stderr.strip()}")
    for name in listed.stdout.splitlines():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    report.write([tmp_path / "runs"], tmp_path / "results")
    for path in sorted((tmp_path / "results").iterdir()):
        if path.suffix != ".png":  # which may differ from one version of matplotlib to another
            assert path.read_text() == (ROOT / "results" / path.name).read_text(), path.name


def test_names_are_no_formulas_in_figures(tmp_path):
    odd = named("linear", feature="$a_{b$")
    sound(run(500)).save(tmp_path / "runs" / "a")
    sound(run(400, hash="bbbbbbbb", attention=odd)).save(tmp_path / "runs" / "b")
    report.write([tmp_path / "runs"], tmp_path / "results")
    assert (tmp_path / "results" / "seeds-quick.png").stat().st_size > 0
