"""Fair tuning: the same grid for all, chosen by validation, and tests of the chosen run alone."""

import multiprocessing
from dataclasses import replace

import pytest
from test_run import folder_of

import lra.tune
from lra import record
from lra.compose import load
from lra.files import locked
from lra.kept import evaluate_again
from lra.plan import dry_run
from lra.run import run, run_folder
from lra.status import state_of
from lra.train import Stopped, Trainer
from lra.tune import train, trials

RATE = 1e-3
GRID = [0.000333333, 0.001, 0.003]


@pytest.fixture
def smoke(smoke):
    """Runs of whole batches: each tuning is four of them."""
    return lambda *more: smoke("micro_batches=1", *more)


def trial_records(overrides):
    return [record.load(run_folder(trial)) for trial in trials(load(overrides))]


@pytest.fixture
def counted(monkeypatch):
    """The learning rates and seeds of all training that is done."""
    trained = []
    fit = Trainer.fit

    def counting_fit(trainer):
        trained.append((trainer.config.train.lr, trainer.config.seed))
        fit(trainer)

    monkeypatch.setattr(Trainer, "fit", counting_fit)
    return trained


@pytest.fixture
def scored(monkeypatch):
    """Gives trials the validation accuracies that are put into it, by learning rate."""
    scores = {}
    test = Trainer.test

    def ending(trainer):
        test(trainer)
        accuracy = scores.get(trainer.config.train.lr)
        if trainer.config.trial_of is not None and accuracy is not None:
            trainer.record.validation = replace(trainer.record.validation, accuracy=accuracy)

    monkeypatch.setattr(Trainer, "test", ending)
    return scores


def test_the_grid_is_a_third_one_and_three_times_the_rate_of_the_protocol():
    config = load(["protocol=smoke", "tune=lr"])
    assert config.train.lr == RATE
    assert config.grid == GRID


def test_a_tuned_run_tries_the_grid_with_seed_0_and_runs_the_best(smoke, counted, scored):
    scored.update(zip(GRID, (0.2, 0.1, 0.4), strict=True))
    done = train(load(smoke("tune=lr", "seed=4")))
    assert counted == [*((rate, 0) for rate in GRID), (0.003, 4)]
    assert done.status == "ok"
    assert done.test.n == 100
    assert done.tuning["name"] == "lr"
    assert done.tuning["grid"] == GRID
    assert done.tuning["chosen"] == 0.003
    told = [(t["lr"], t["status"], t["validation"], t["steps"]) for t in done.tuning["trials"]]
    assert told == [
        (rate, "ok", score, 20) for rate, score in zip(GRID, (0.2, 0.1, 0.4), strict=True)
    ]
    assert record.load(folder_of(smoke("tune=lr", "seed=4"))) == done


def test_a_tuned_run_ends_as_a_plain_one_with_the_chosen_rate(smoke):
    tuned = train(load(smoke("tune=lr", "seed=1")))
    plain = run(load(smoke(f"train.lr={tuned.tuning['chosen']}", "seed=1")))
    assert (tuned.validation, tuned.test) == (plain.validation, plain.test)
    assert tuned.hash != plain.hash


def test_the_chosen_rate_is_no_departure_from_the_protocol(smoke, scored):
    scored.update(zip(GRID, (0.4, 0.1, 0.1), strict=True))
    done = train(load(smoke("tune=lr")))
    assert done.modified == {}
    assert done.config["train"]["lr"] == RATE
    assert done.config["tune"] == "lr"


def test_of_equal_scores_the_smaller_rate_is_chosen(smoke, scored):
    scored.update(dict.fromkeys(GRID[1:], 0.3))
    scored[GRID[0]] = 0.2
    assert train(load(smoke("tune=lr"))).tuning["chosen"] == RATE


def test_a_trial_is_never_tested(smoke, monkeypatch):
    seen = []
    evaluate = Trainer._evaluate

    def noting(trainer, model, split, step):
        seen.append((trainer.config.trial_of is not None, split, "test" in trainer.data))
        return evaluate(trainer, model, split, step)

    monkeypatch.setattr(Trainer, "_evaluate", noting)
    done = train(load(smoke("tune=lr")))
    assert {split for trial, split, _ in seen if trial} == {"val"}
    assert not any(has_test for trial, _, has_test in seen if trial)
    for one in trial_records(smoke("tune=lr")):
        assert one.status == "ok"
        assert one.validation is not None
        assert one.test is None
        assert one.trial_of == done.hash
        assert one.tuning is None
        assert one.seed == 0
    for trial in trials(load(smoke("tune=lr"))):
        assert not (run_folder(trial) / "test_predictions.npy").exists()
        with pytest.raises(ValueError, match="trials are never tested"):
            evaluate_again(run_folder(trial))


def test_other_seeds_and_later_calls_use_the_same_trials(smoke, counted):
    first = train(load(smoke("tune=lr", "seed=0")))
    second = train(load(smoke("tune=lr", "seed=1")))
    assert second.tuning == first.tuning
    assert second.hash == first.hash
    assert len(counted) == 5
    assert train(load(smoke("tune=lr", "seed=1"))) == second
    assert len(counted) == 5


def test_another_seed_keeps_the_choice_when_the_trials_are_gone(smoke, counted):
    first = train(load(smoke("tune=lr", "seed=0")))
    for trial in trials(load(smoke("tune=lr"))):
        (run_folder(trial) / "record.json").unlink()
    assert train(load(smoke("tune=lr", "seed=1"))).tuning == first.tuning
    assert len(counted) == 5


def test_starting_over_tries_again(smoke, counted):
    train(load(smoke("tune=lr")))
    train(load(smoke("tune=lr", "reuse=never")))
    assert len(counted) == 8


def test_a_cut_trial_cuts_the_run_and_goes_on_later(smoke, monkeypatch, counted):
    step = Trainer._step

    def interrupted(trainer):
        if trainer.config.train.lr == RATE and trainer.state.step == 7:
            raise Stopped("interrupted", "SIGINT received")
        step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupted)
        cut = train(load(smoke("tune=lr")))
    assert (cut.status, cut.reason) == ("interrupted", "trial lr=0.001: SIGINT received")
    assert cut.tuning["chosen"] is None
    assert [one and one.status for one in trial_records(smoke("tune=lr"))] == [
        "ok",
        "interrupted",
        None,
    ]
    done = train(load(smoke("tune=lr")))
    assert done.status == "ok"
    assert len(counted) == 2 + 3  # the first trial was not run again
    assert trial_records(smoke("tune=lr"))[1].sessions == 2


def test_a_trial_that_diverges_or_fails_loses(smoke, monkeypatch, counted):
    step = Trainer._step

    def failing(trainer):
        if trainer.config.train.lr == GRID[2]:
            raise Stopped("diverged", "the training loss is not finite")
        if trainer.config.train.lr == GRID[1]:
            raise RuntimeError("a kernel failed")
        step(trainer)

    monkeypatch.setattr(Trainer, "_step", failing)
    done = train(load(smoke("tune=lr")))
    assert (done.status, done.tuning["chosen"]) == ("ok", GRID[0])
    assert [t["status"] for t in done.tuning["trials"]] == ["ok", "failed", "diverged"]
    assert [t["validation"] is None for t in done.tuning["trials"]] == [False, True, True]


def test_without_any_trial_to_choose_from_the_run_ends_as_they_did(smoke, monkeypatch, counted):
    def failing(trainer):
        raise Stopped("diverged", "the training loss is not finite")

    monkeypatch.setattr(Trainer, "_step", failing)
    done = train(load(smoke("tune=lr")))
    assert done.status == "diverged"
    assert done.reason.startswith("no trial came to its end: lr=0.000333333 diverged: ")
    train(load(smoke("tune=lr", "seed=1")))
    assert len(counted) == 3  # they would diverge again


def test_a_cut_run_goes_on_with_its_rate(smoke, scored, monkeypatch):
    scored.update(zip(GRID, (0.2, 0.1, 0.4), strict=True))
    step = Trainer._step

    def interrupted(trainer):
        if trainer.config.trial_of is None and trainer.state.step == 7:
            raise Stopped("interrupted", "SIGINT received")
        step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupted)
        cut = train(load(smoke("tune=lr")))
    assert (cut.status, cut.tuning["chosen"]) == ("interrupted", GRID[2])
    for trial in trials(load(smoke("tune=lr"))):
        (run_folder(trial) / "record.json").unlink()
    done = train(load(smoke("tune=lr")))
    assert (done.status, done.sessions, done.tuning["chosen"]) == ("ok", 2, GRID[2])


def test_the_tuning_is_part_of_the_identity_and_the_choice_is_not():
    plain = load(["protocol=smoke"])
    tuned = load(["protocol=smoke", "tune=lr"])
    identity = tuned.identity("fp32", "cpu")
    assert identity.pop("tuning") == {"name": "lr", "grid": GRID}
    assert identity == plain.identity("fp32", "cpu")
    hashes = [run_folder(trial) for trial in trials(tuned)]
    hashes += [run_folder(plain), run_folder(tuned)]
    hashes += [run_folder(load(["protocol=smoke", f"train.lr={rate}"])) for rate in GRID]
    assert len(set(hashes)) == 3 + 2 + 2  # the middle of the grid is the plain run


def test_the_test_set_may_not_choose_the_rate():
    legacy = ["protocol=smoke", "task=text", "task.validation=legacy", "train.tested=last"]
    assert load(legacy).tune == "none"
    with pytest.raises(ValueError, match="tune=lr would choose by test scores"):
        load([*legacy, "tune=lr"])


def test_a_trial_of_another_process_is_waited_for(smoke, monkeypatch, counted):
    tried = []
    whole = lra.tune.run

    def noting(config, tuning=None, wait=False):
        if config.trial_of is not None:
            tried.append((config.train.lr, wait))
        return whole(config, tuning, wait)

    monkeypatch.setattr(lra.tune, "run", noting)
    middle = run_folder(trials(load(smoke("tune=lr")))[1])
    # Another process, as locks are of processes: it lets go once the other two are done.
    fork = multiprocessing.get_context("spawn")
    held, go = fork.Event(), fork.Event()
    holder = fork.Process(target=hold, args=(middle / ".lock", held, go))
    holder.start()
    assert held.wait(30)
    fit = Trainer.fit

    def releasing(trainer):
        fit(trainer)
        if trainer.config.train.lr == GRID[2]:
            go.set()

    monkeypatch.setattr(Trainer, "fit", releasing)
    assert train(load(smoke("tune=lr"))).status == "ok"
    holder.join()
    assert tried == [*((rate, False) for rate in GRID), (GRID[1], True)]


def hold(path, held, go):
    with locked(path, wait=False):
        held.set()
        go.wait(60)


def test_status_and_dry_run_show_trials(smoke, capsys):
    run(trials(load(smoke("tune=lr")))[0])
    capsys.readouterr()
    dry_run(smoke("tune=lr", "seed=0,1"), multirun=True)
    rows = capsys.readouterr().out.splitlines()[1:-2]
    told = ["ok (trial)", "not started (trial)", "not started (trial)"] + ["not started"] * 2
    assert [row.partition("  ")[2].strip().partition("  ")[0] for row in rows] == told
    train(load(smoke("tune=lr")))
    assert state_of(run_folder(trials(load(smoke("tune=lr")))[1])).trial
    dry_run(smoke("tune=lr", "seed=0,1"), multirun=True)
    rows = capsys.readouterr().out.splitlines()[1:-2]
    assert len(rows) == 2  # the choice is made
