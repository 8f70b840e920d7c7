"""Sweeps before anything starts: ready-made ones, what is left out, and --dry-run."""

import json
import shutil
import subprocess
from dataclasses import replace
from importlib.util import find_spec

import pytest
from omegaconf import OmegaConf
from test_run import folder_of

from lra import record, slurm
from lra.compose import conf_dir, load, load_jobs, sweep_files
from lra.plan import dry_run, plan, where
from lra.run import run, run_folder
from lra.sweep import sweep
from lra.tasks import TASKS
from lra.tasks.base import Task
from models.attention import ATTENTIONS

SWEEPS = {"cosformer_table4": 60, "cosformer_table6": 10, "rfa_table3": 27, "lra_table1": 66}
"""Cells of the papers' tables: attentions times tasks."""


def chosen(line, key):
    [value] = [o.partition("=")[2] for o in line.split() if o.startswith(f"{key}=")]
    return value.split(",")


@pytest.mark.parametrize("name", SWEEPS)
def test_a_ready_made_sweep_has_the_cells_of_its_table(name):
    text = sweep_files()[name].read_text()
    assert text.startswith("# ")
    assert "Table" in text.splitlines()[0]
    lines = OmegaConf.create(text)
    cells = [
        (task, attention)
        for line in lines
        for task in chosen(line, "task")
        for attention in chosen(line, "attention")
    ]
    assert len(set(cells)) == len(cells) == SWEEPS[name]
    tasks, attentions = (set(names) for names in zip(*cells, strict=True))
    assert tasks <= set(TASKS.names())
    assert attentions <= set(ATTENTIONS.names())


def test_every_ready_made_sweep_is_tested():
    assert set(SWEEPS) == set(sweep_files())


def test_a_sweep_is_the_union_of_its_lines_and_what_is_given_wins():
    given = ["sweep=cosformer_table6", "protocol=smoke", "task=listops", "seed=0,1"]
    configs = [config for _, config in load_jobs(given)]
    told = [(c.protocol.name, c.task["name"], c.attention["name"], c.seed) for c in configs]
    assert told == [
        ("smoke", "listops", "cosformer", 0),
        ("smoke", "listops", "cosformer", 1),
        ("smoke", "listops", "linear", 0),
        ("smoke", "listops", "linear", 1),
    ]
    assert configs[2].attention_options["feature"] == "relu"
    assert all(config.modified == {} for config in configs)


def test_a_run_of_two_lines_is_run_once():
    given = ["sweep=cosformer_table6,cosformer_table6", "protocol=smoke", "task=listops"]
    assert len(load_jobs(given)) == 2


def test_an_unknown_sweep_is_told_with_its_near_match():
    with pytest.raises(ValueError, match=r"Unknown sweep .rfa_table2.\. Did you mean rfa_table3"):
        load_jobs(["sweep=rfa_table2"])


def test_an_unknown_launcher_is_told_as_other_names_are():
    with pytest.raises(ValueError, match=r"Unknown launch .joblob.\. Did you mean joblib"):
        load(["launch=joblob"])


def test_joblib_has_two_runs_at_once_unless_told_otherwise():
    assert load(["launch=joblib"]).runs_at_once == 2
    assert load(["launch=joblib", "runs_at_once=4"]).runs_at_once == 4
    assert load([]).runs_at_once == 1


@pytest.mark.parametrize(
    ("launch", "package"), [("slurm", "submitit"), ("ray", "ray"), ("joblib", "joblib")]
)
def test_a_launcher_is_composed_or_says_what_to_type_to_install_it(launch, package):
    if find_spec(f"hydra_plugins.hydra_{package}_launcher"):
        assert load([f"launch={launch}"]).device == ("cuda" if launch == "slurm" else "auto")
    else:
        with pytest.raises(
            ValueError, match=rf"^launch={launch} needs a package: .*'\.\[{launch}\]'"
        ):
            load([f"launch={launch}"])


def test_every_launcher_has_a_page_that_its_config_names():
    for launch in ("slurm", "ray"):
        text = (conf_dir() / "launch" / f"{launch}.yaml").read_text()
        assert f"{launch}.md says" in " ".join(text.replace("#", "").split())
        assert f"launch={launch}" in (conf_dir() / "launch" / f"{launch}.md").read_text()


def test_without_sbatch_nothing_is_submitted(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="submits jobs with sbatch, which is not on PATH here"):
        slurm.wait_for(lambda: pytest.fail("it was called"))


def test_runs_of_a_cluster_are_planned_where_there_is_no_gpu(smoke, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    asked = load(smoke("device=cuda", "precision=bf16"))
    with pytest.raises(ValueError, match="device=cuda is not there"):
        run_folder(asked)
    for there in (["launch=slurm"], ["launch=ray", "hydra.launcher.ray.init.address=auto"]):
        with where(there):
            assert run_folder(asked) == asked.folder("bf16", "cuda")
            with pytest.raises(ValueError, match="say precision=bf16"):
                run_folder(load(smoke("device=cuda")))
    with where(["launch=ray"]), pytest.raises(ValueError, match="is not there"):  # of this machine
        run_folder(asked)


def test_tasks_without_data_are_named_once_and_left_out(smoke, tmp_path, caplog):
    with caplog.at_level("INFO", logger="lra"):
        runs = smoke("task=citations,listops", "seed=0,1", f"data_dir={tmp_path}")
        planned = plan(runs)
    assert [one.state.status for one in planned] == ["data missing"] * 2 + ["not started"] * 2
    assert "papers.parquet" in planned[0].state.note
    assert "\n" not in planned[0].state.note

    overrides = smoke("task=citations", "seed=0,1", f"data_dir={tmp_path}")
    assert sweep(overrides) == 1  # there was nothing that could be run
    [line] = [one.message for one in caplog.records if "No data" in one.message]
    assert line.startswith("No data for task=citations, left out in 2 runs: ")
    assert "set data_dir=FOLDER" in line
    assert not (tmp_path / "runs" / "smoke").exists()


def test_finished_runs_of_a_task_whose_data_is_gone_count_as_finished(smoke, cache, tmp_path):
    done = run(load(smoke()))
    # As if it had been trained on data that is no longer there.
    overrides = smoke("task=citations", f"data_dir={tmp_path}")
    done.save(folder_of(overrides))
    assert [one.state.status for one in plan(overrides)] == ["ok"]


def test_a_sweep_of_finished_runs_loads_no_data_and_starts_nothing(smoke, monkeypatch, capsys):
    for seed in (0, 1):
        run(load(smoke(f"seed={seed}")))

    def refused(*_, **__):
        raise AssertionError("data was loaded or a process was started")

    monkeypatch.setattr(Task, "prepare", refused)
    monkeypatch.setattr(subprocess, "Popen", refused)
    assert sweep(smoke("seed=0,1")) == 0
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert [row.split()[1] for row in rows] == ["skipped", "skipped"]


def lines_of(capsys, overrides, multirun=True):
    capsys.readouterr()
    assert dry_run(overrides, multirun) == 0
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def store(smoke, tmp_path):
    """A store with a finished run, a cut one, and one that failed."""
    run(load(smoke()))
    cut = run(load(smoke("seed=1", "time_limit_minutes=0.00001")))
    failed = replace(cut, status="failed", reason="a reason", seed=2, steps=0)
    failed.save(folder_of(smoke("seed=2")))
    return tmp_path / "runs"


def test_a_dry_run_tells_each_run_and_starts_nothing(smoke, store, tmp_path, capsys):
    before = sorted(store.rglob("*"))
    overrides = smoke("task=listops,citations", "seed=0,1,2,3", f"data_dir={tmp_path}")
    heading, *rows, count, total = lines_of(capsys, overrides)
    assert heading.split() == ["run", "status", "steps", "%", "validation", "time", "note"]
    states = ["ok", "timeout", "failed", "not started"] + ["data missing"] * 4
    assert [row[row.index("  ") :].strip().partition("  ")[0] for row in rows] == states
    assert [row.split("/20")[0].split()[-1] for row in rows[:4]] == ["20", "1", "0", "0"]
    assert rows[2].endswith("a reason")
    assert count.startswith("8 runs: 4 data missing, ")
    assert total.startswith("To do: ")
    assert sorted(store.rglob("*")) == before


def test_the_time_of_a_dry_run_is_that_of_measured_steps(smoke, capsys):
    *_, total = lines_of(capsys, smoke())
    assert total == "To do: 1 of unknown speed. Nothing was started."
    done = run(load(smoke()))
    done.train_seconds, done.evaluation_seconds, done.steps = 90.0, 10.0, 20
    done.save(folder_of(smoke()))
    # The same work with another seed and another learning rate.
    *_, row, _, total = lines_of(capsys, smoke("seed=1", "train.lr=2e-3"))
    assert row.split()[-2:] == ["2", "min"]
    assert total.startswith("To do: 2 min one after the other")
    # Twice the steps; another attention is of unknown speed.
    *_, total = lines_of(capsys, smoke("train.steps=40", "attention=softmax,linear"))
    assert total.startswith("To do: 3 min one after the other")
    assert "1 of unknown speed" in total


def test_a_dry_run_of_several_runs_needs_the_flag_as_the_real_one_does(smoke):
    with pytest.raises(ValueError, match="make 2 runs: use lra train -m"):
        dry_run(smoke("seed=0,1"), multirun=False)


def test_a_dry_run_passes_over_records_that_cannot_be_read(smoke, store, capsys):
    (folder_of(smoke("seed=2")) / "record.json").write_text("{")
    rows = lines_of(capsys, smoke("seed=0,2"))
    assert "damaged" in rows[2]


def test_a_run_that_starts_over_is_told(smoke, store, capsys):
    rows = lines_of(capsys, smoke("seed=0", "reuse=never"))
    assert "starts over" in rows[1]
    assert "0/20" in rows[1]


def test_a_finished_run_of_other_data_refuses_the_sweep(smoke):
    done = run(load(smoke()))
    folder = folder_of(smoke())
    values = json.loads((folder / "record.json").read_text())
    values["task"]["data_hash"] = "another"
    (folder / "record.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="was run on data another"):
        plan(smoke("seed=0,1"))
    shutil.rmtree(folder)
    assert done.status == "ok"
    assert record.load(folder) is None
    assert [one.state.status for one in plan(smoke("seed=0,1"))] == ["not started"] * 2
