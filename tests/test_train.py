"""The trainer's arithmetic: schedule, micro-batches, clipping, evaluation, and that it learns."""

import warnings

import numpy as np
import pytest
import torch

from lra.batches import Batches
from lra.compose import load
from lra.evaluate import evaluate
from lra.measure import Clock
from lra.run import new_record
from lra.schedules import beta1, learning_rate
from lra.tasks.base import Prepared, Split
from lra.train import Trainer, step_seed
from lra.workers import Workers


class NoStop:
    signal = None


def trainer(overrides, folder, prepared=None):
    config = load(overrides)
    folder.mkdir(parents=True)
    prepared = prepared or config.build_task().prepare()
    cpu = torch.device("cpu")
    return Trainer(config, new_record(config), prepared, folder, cpu, NoStop(), Clock(cpu))


def weights(of):
    return torch.cat([p.detach().flatten().double() for p in of.model.parameters()])


@pytest.mark.parametrize(("steps", "warmup"), [(5000, 1000), (20, 4), (3, 2)])
def test_the_schedule_is_torch_s_one_cycle_with_linear_annealing(smoke, steps, warmup):
    """Torch cycles AdamW's first coefficient too, as the published code lets it."""
    train = load(smoke(f"train.steps={steps}", f"train.warmup_steps={warmup}")).train
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=train.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, train.lr, total_steps=steps, pct_start=warmup / steps, anneal_strategy="linear"
    )
    expected, momenta = [], []
    for _ in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        momenta.append(optimizer.param_groups[0]["betas"][0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no optimiser step is taken here
            schedule.step() if len(expected) < steps else None
    ours = [learning_rate(train, step) for step in range(steps)]
    # pct_start * steps is rounded in torch.
    np.testing.assert_allclose(ours, expected, rtol=1e-9)
    np.testing.assert_allclose([beta1(train, step) for step in range(steps)], momenta, rtol=1e-9)


def test_the_inverse_square_root_schedule_is_that_of_the_arena_s_code(smoke):
    """The peaks are those that the released settings lead to."""

    def rate(step, warmup, lr=0.05):
        settings = ("train.schedule=rsqrt", f"train.warmup_steps={warmup}", f"train.lr={lr}")
        return learning_rate(load(smoke(*settings, "train.steps=20000")).train, step)

    assert rate(0, 1000) == 0
    assert rate(500, 1000) == pytest.approx(0.05 * 0.5 / 1000**0.5)
    assert rate(1000, 1000) == pytest.approx(1.58e-3, rel=2e-3)  # ListOps
    assert rate(8000, 8000) == pytest.approx(5.6e-4, rel=5e-3)  # Text
    assert rate(20_000, 8000) == pytest.approx(3.5e-4, rel=2e-2)
    assert rate(5000, 8000) == pytest.approx(3.5e-4, rel=5e-3)  # Retrieval, still warming up


def test_the_cosine_schedule_is_that_of_the_arena_s_code(smoke):
    settings = ("train.schedule=cosine", "train.warmup_steps=175", "train.steps=35000")
    train = load(smoke(*settings, "train.lr=5e-4")).train
    assert learning_rate(train, 0) == 0
    assert learning_rate(train, 70) == pytest.approx(5e-4 * 0.4)
    assert learning_rate(train, 175) == pytest.approx(5e-4)
    assert learning_rate(train, 175 + 17_500) == pytest.approx(2.5e-4)
    assert learning_rate(train, 175 + 8_750) == pytest.approx(2.5e-4 * (1 + 0.5**0.5))


def test_a_run_without_warm_up_starts_at_the_peak(smoke):
    train = load(smoke("train.warmup_steps=0")).train
    assert learning_rate(train, 0) == pytest.approx(train.lr, rel=0.06)
    assert learning_rate(train, train.steps - 1) == pytest.approx(train.lr / 25 / 1e4)


@pytest.mark.parametrize("attention", ["softmax", "linear", "cosformer"])
def test_micro_batches_take_the_step_of_the_whole_batch(smoke, tmp_path, attention):
    dry = ("model.dropout=0", "model.attention_dropout=0", "train.eps=1e-3")
    arguments = [f"attention={attention}", *dry]
    whole = trainer(smoke("micro_batches=1", *arguments), tmp_path / "whole")
    pieces = trainer(smoke("micro_batches=4", *arguments), tmp_path / "pieces")
    for _ in range(3):
        whole._step()
        pieces._step()
    torch.testing.assert_close(weights(whole), weights(pieces), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole.sums, pieces.sums, rtol=1e-6, atol=0)


def test_the_gradient_is_clipped_to_its_global_norm(smoke, tmp_path, monkeypatch):
    clipped = trainer(smoke("train.clip_norm=0.01"), tmp_path / "clipped")
    norms = []
    take = clipped.optimizer.step

    def note():
        gradients = [p.grad.flatten() for p in clipped.model.parameters()]
        norms.append(float(torch.cat(gradients).norm()))
        take()

    monkeypatch.setattr(clipped.optimizer, "step", note)
    clipped._step()
    assert norms == [pytest.approx(0.01, rel=1e-3)]


def test_elements_of_the_gradient_are_clipped_to_a_value(smoke, tmp_path, monkeypatch):
    clipped = trainer(smoke("train.clip_value=1e-4"), tmp_path / "clipped")
    largest = []
    take = clipped.optimizer.step

    def note():
        largest.append(max(float(p.grad.abs().max()) for p in clipped.model.parameters()))
        take()

    monkeypatch.setattr(clipped.optimizer, "step", note)
    clipped._step()
    assert largest == [pytest.approx(1e-4)]


def test_earlier_validation_scores_than_asked_for_cannot_be_the_best(smoke, tmp_path):
    late = trainer(smoke("train.best_from=20", "train.tested=best"), tmp_path / "late")
    late.fit()
    assert late.state.best["step"] == 20


def test_random_draws_depend_on_the_step_and_nothing_before_it(smoke, tmp_path):
    a = trainer(smoke("seed=5"), tmp_path / "a")
    b = trainer(smoke("seed=5"), tmp_path / "b")
    torch.rand(1000)  # whatever else was drawn in this process
    a._step()
    np.random.rand()
    torch.rand(1)
    b._step()
    assert torch.equal(weights(a), weights(b))
    assert step_seed(0, 1) != step_seed(1, 0)
    assert len({step_seed(seed, step) for seed in range(20) for step in range(50)}) == 1000


def test_evaluation_scores_every_example_whatever_the_batches(smoke, tmp_path, monkeypatch):
    trained = trainer(smoke(), tmp_path / "run")
    trained._step()
    data = trained.data["val"]
    arguments = (trained.model, data, trained.autocast, Workers(1), 1)
    score, predictions = evaluate(*arguments)
    monkeypatch.setattr("lra.batches.CPU_TOKENS", 1)
    one_by_one, same = evaluate(*arguments)
    assert score.n == len(data) == 100
    assert (predictions == same).all()
    assert (predictions == data.labels.numpy()).mean() == score.accuracy
    assert one_by_one.loss == pytest.approx(score.loss, rel=1e-6)


def test_a_rule_that_can_be_read_off_the_tokens_is_learned(smoke, tmp_path):
    """The class is the first token: every mechanism's model must find it in seconds."""
    random = np.random.default_rng(0)

    def split(n):
        lengths = random.integers(5, 40, n)
        labels = random.integers(0, 10, n).astype(np.uint8)
        tokens = random.integers(11, 16, lengths.sum()).astype(np.uint8)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        tokens[offsets[:-1]] = labels + 1
        return Split.of(tokens, offsets, labels)

    data = Prepared({"train": split(2000), "val": split(300), "test": split(300)}, {})
    overrides = smoke("attention=cosformer", "train.steps=300", "train.lr=5e-3", "model.dim=32")
    learner = trainer(overrides, tmp_path / "run", data)
    learner.fit()
    learner.test()
    assert learner.record.test.accuracy > 0.95


def test_the_throughput_leaves_out_the_first_steps_of_a_session(smoke, tmp_path):
    timed = trainer(smoke("train.steps=8"), tmp_path / "run")
    timed.fit()
    timed.complete_record()
    speed = timed.record.throughput
    assert speed.steps == 3
    assert speed.examples_per_second == pytest.approx(16 * speed.steps_per_second)
    lengths = Batches(load(smoke()).build_task().prepare().splits["train"], torch.device("cpu"))
    assert speed.tokens_per_second < lengths.lengths.max() * speed.examples_per_second
