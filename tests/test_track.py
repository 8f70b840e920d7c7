"""Weights & Biases: offline without an account, and never at the cost of a run."""

import pytest
import wandb

from lra import record
from lra.cli import main
from lra.compose import load
from lra.config import WandbConfig
from lra.run import run, run_folder
from lra.track import log_leaderboards
from lra.tune import trials

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def test_a_run_is_tracked_offline_by_default(smoke):
    overrides = [o for o in smoke() if o != "tracker=none"]
    assert run(load(overrides)).status == "ok"
    folder = run_folder(load(overrides))
    assert len(list(folder.glob("wandb/offline-run-*/run-*.wandb"))) == 1


class FakeRun:
    def __init__(self):
        self.logged, self.summary, self.finished = [], {}, None

    def define_metric(self, *_, **__):
        pass

    def log(self, metrics, step):
        self.logged.append((step, metrics))

    def finish(self, exit_code):
        self.finished = exit_code


@pytest.fixture
def fake(monkeypatch):
    fake = FakeRun()

    def init(**settings):
        fake.settings = settings
        return fake

    monkeypatch.setattr(wandb, "init", init)
    return fake


def test_group_tags_and_id_name_the_cell_and_the_run(smoke, fake):
    done = run(load(smoke("tracker=wandb", "seed=4")))
    assert fake.settings["group"] == f"smoke/listops/softmax-{done.hash}"
    assert fake.settings["tags"] == ["smoke", "listops", "softmax"]
    assert fake.settings["id"].startswith(f"{done.hash}-s4-")
    assert fake.settings["resume"] == "allow"
    assert fake.settings["config"] == done.config
    assert [step for step, _ in fake.logged] == [5, 10, 15, 20]
    assert fake.summary["test"]["accuracy"] == done.test.accuracy
    assert fake.finished == 0


def test_a_resumed_run_keeps_its_id(smoke, fake):
    cut = run(load(smoke("tracker=wandb", "time_limit_minutes=0.00001")))
    first = fake.settings["id"]
    assert fake.finished == 1
    assert cut.status == "timeout"
    run(load(smoke("tracker=wandb")))
    assert fake.settings["id"] == first


def test_online_without_a_login_is_offline_with_a_warning(smoke, fake, caplog):
    run(load(smoke("tracker=wandb", "wandb.mode=online")))
    assert fake.settings["mode"] == "offline"
    assert "wandb login" in caplog.text


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_failing_tracker_costs_one_warning_and_no_run(smoke, fake, caplog, monkeypatch, broken):
    def fail(*_, **__):
        raise OSError("no space left for wandb")

    if broken == "init":
        monkeypatch.setattr(wandb, "init", fail)
    else:
        monkeypatch.setattr(fake, broken, fail)
    overrides = smoke("tracker=wandb")
    assert run(load(overrides)).status == "ok"
    assert record.load(run_folder(load(overrides))).status == "ok"
    assert caplog.text.count("no space left for wandb") == 1


def test_a_trial_stands_in_the_group_of_what_is_tuned(smoke, fake):
    [trial, *_] = trials(load(smoke("tracker=wandb", "tune=lr")))
    run(trial)
    assert fake.settings["group"] == f"smoke/listops/softmax-{trial.trial_of}"
    assert fake.settings["job_type"] == "trial"


OFFLINE = WandbConfig(mode="offline", project="lra", entity=None)


def test_leaderboards_are_logged_as_tables_of_one_artefact(tmp_path, monkeypatch):
    for protocol in ("quick", "nystrom"):
        (tmp_path / f"leaderboard-{protocol}.csv").write_text("name,accuracy\nsoftmax,33.1\nrfa,\n")
    logged = []
    log = wandb.Run.log_artifact
    monkeypatch.setattr(
        wandb.Run, "log_artifact", lambda run, one: (logged.append(one), log(run, one))[1]
    )
    files = sorted(tmp_path.glob("*.csv"))
    log_leaderboards(files, OFFLINE, tmp_path)
    [artifact] = [one for one in logged if one.type == "leaderboard"]
    names = set(artifact.manifest.entries)
    assert {"leaderboard-quick.csv", "leaderboard-quick.table.json"} <= names
    assert {"leaderboard-nystrom.csv", "leaderboard-nystrom.table.json"} <= names
    assert len(list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))) == 1


def test_leaderboards_that_are_not_there_or_fail_are_told(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"no .*a.csv: run lra report first"):
        log_leaderboards([tmp_path / "a.csv"], OFFLINE, tmp_path)

    def fail(*_, **__):
        raise OSError("no space left for wandb")

    monkeypatch.setattr(wandb, "init", fail)
    (tmp_path / "a.csv").write_text("name\nsoftmax\n")
    with pytest.raises(ValueError, match="W&B failed: no space left for wandb"):
        log_leaderboards([tmp_path / "a.csv"], OFFLINE, tmp_path)


def test_the_report_logs_its_tables_when_asked(tmp_path, monkeypatch, smoke):
    run(load([*smoke(), "tracker=none"]))
    logged = []
    monkeypatch.setattr("lra.track.log_leaderboards", lambda *given: logged.append(given))
    arguments = ["report", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    for more in ([], ["--wandb", "offline", "--project", "arena"]):
        with pytest.raises(SystemExit) as end:
            main([*arguments, *more])
        assert end.value.code == 0
    settings = WandbConfig("offline", "arena", None)
    assert logged == [([tmp_path / "out" / "leaderboard-smoke.csv"], settings, tmp_path / "out")]
