"""Micro-batches side by side: the same numbers as one after the other, and nothing left running."""

import signal
import threading
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_run import assert_same_end, folder_of
from test_train import trainer, weights

from lra.batches import Batches
from lra.compose import load
from lra.evaluate import evaluate
from lra.run import run
from lra.tasks.base import Split
from lra.train import Stopped, Trainer
from lra.workers import Workers
from models.classifier import Classifier

CPU = torch.device("cpu")


@pytest.fixture
def two_threads():
    """Torch computes with two threads, as outside of these tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "settings",
    [
        ("attention=softmax", "model.attention_dropout=0.3"),
        ("attention=cosformer", "precision=bf16"),
        ("attention=rfa",),
        ("attention=kernelized", "model.attention_dropout=0.3"),
        ("attention=reformer", "model.attention_dropout=0.3", "activation_checkpointing=true"),
        ("attention=bigbird", "task=pathfinder"),
    ],
    ids=lambda settings: settings[0].removeprefix("attention="),
)
def test_steps_are_bit_by_bit_those_of_one_thread(smoke, tmp_path, two_threads, settings):
    """With dropout, random features and checkpointing: draws depend on no thread."""
    settings = smoke("model.dropout=0.3", "micro_batches=4", *settings)
    beside = trainer(settings, tmp_path / "beside")
    assert beside.workers.count == 2
    torch.set_num_threads(1)
    alone = trainer(settings, tmp_path / "alone")
    assert alone.workers.count == 1
    for _ in range(3):
        beside._step()
        alone._step()
    assert beside.workers.at_once == 2
    assert torch.equal(weights(beside), weights(alone))
    assert torch.equal(beside.sums, alone.sums)
    for one, other in zip(*(t._evaluate(t.model, "val", 3) for t in (beside, alone)), strict=True):
        assert np.array_equal(one, other)


def test_a_run_that_is_resumed_ends_as_the_uninterrupted_one(
    smoke, tmp_path, monkeypatch, two_threads
):
    settings = smoke("train.steps=12", "keep_checkpoint=true", "attention=rfa")
    assert run(load(settings)).status == "ok"
    whole = folder_of(settings).rename(tmp_path / "whole")
    check = Trainer._check_loss

    def stopping(trainer):
        check(trainer)
        if trainer.state.step == 7:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_check_loss", stopping)
        assert run(load(settings)).steps == 7
    assert run(load(settings)).status == "ok"
    assert_same_end(folder_of(settings), whole)


def test_what_draws_from_torch_s_default_generator_goes_one_after_the_other(
    smoke, tmp_path, monkeypatch, two_threads, caplog
):
    """Whose draws would else depend on which thread is first."""
    caplog.set_level("INFO", "lra")
    forward = Classifier.forward
    monkeypatch.setattr(
        Classifier, "forward", lambda *inputs: F.dropout(forward(*inputs), 0.5, inputs[0].training)
    )
    first, second = (trainer(smoke(), tmp_path / name) for name in ("first", "second"))
    for made in (first, second):
        made._step()
        torch.rand(1)
        made._step()
        assert made.workers.at_once == 1
    assert torch.equal(weights(first), weights(second))
    assert caplog.text.count("micro-batches are computed one after the other") == 2


def test_results_come_in_order_and_items_are_taken_as_they_are_wanted(two_threads):
    taken = []

    def items():
        for i in range(20):
            taken.append(i)
            yield i

    results = Workers(8).map(lambda i: (time.sleep(0.002 * (i % 3)), i)[1], items())
    assert next(results) == 0
    assert len(taken) == 4
    assert list(results) == list(range(1, 20))


def test_an_error_is_raised_when_no_thread_computes_any_more(two_threads):
    computing, seen = threading.Semaphore(0), []

    def work(i):
        if i == 1:
            raise ValueError("of item 1")
        computing.release()
        time.sleep(0.05)
        seen.append(i)
        computing.acquire()
        return i

    with pytest.raises(ValueError, match="of item 1"):
        list(Workers(2).map(work, range(50)))
    assert not computing.acquire(blocking=False)
    assert len(seen) < 5


def test_each_worker_has_its_share_of_torch_s_threads(two_threads):
    """Torch's own setting stays what it is in the thread that asks."""

    def threads(_):
        torch.ones(10**6).exp()
        return torch.get_num_threads()

    workers = Workers(2)
    assert set(workers.map(threads, range(4))) == {1}
    assert torch.get_num_threads() == 2
    torch.set_num_threads(2)
    assert set(workers.map(threads, range(4))) == {1}
    assert Workers(1).count == 1
    assert Workers(0).count == 1


@pytest.mark.parametrize(("threads", "most", "count"), [(6, 4, 3), (8, 4, 4), (5, 8, 5), (3, 2, 1)])
def test_shares_are_equal_and_leave_few_threads_without_work(two_threads, threads, most, count):
    torch.set_num_threads(threads)
    assert Workers(most).count == count


@pytest.mark.parametrize(
    ("longest", "pieces", "trained", "evaluated"),
    [(2000, 8, 4, 4), (2000, 2, 1, 4), (200, 4, 4, 4), (16_384, 32, 2, 2), (10**6, 32, 1, 1)],
)
def test_micro_batches_side_by_side_have_a_bounded_number_of_tokens(
    longest, pieces, trained, evaluated
):
    tokens, labels = np.ones(longest + 5, np.uint8), np.zeros(2, np.uint8)
    split = Split.of(tokens, np.array([0, longest, longest + 5]), labels)
    data = Batches(split, CPU)
    assert data.trained_at_once(32, pieces) == trained
    assert data.evaluated_at_once() == evaluated


def test_a_signal_is_heeded_between_micro_batches(smoke, tmp_path, monkeypatch, two_threads):
    made = trainer(smoke("micro_batches=4"), tmp_path / "run")
    before, forward, calls = weights(made), Classifier.forward, []

    def signalled(*inputs):
        calls.append(inputs)
        made.stop.signal = "SIGTERM"
        return forward(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "forward", signalled)
        with pytest.raises(Stopped, match="SIGTERM received"):
            made._step()
    assert len(calls) <= 2
    assert torch.equal(weights(made), before)
    made.stop.signal = None
    made._step()
    assert not torch.equal(weights(made), before)


def one_at_a_time(forward):
    """Returns a forward pass for one of which memory suffices."""
    computing = threading.Semaphore(1)

    def limited(*inputs):
        if not computing.acquire(blocking=False):
            raise MemoryError
        try:
            time.sleep(0.01)
            return forward(*inputs)
        finally:
            computing.release()

    return limited


def test_where_memory_is_for_one_micro_batch_they_are_no_longer_side_by_side(
    smoke, tmp_path, monkeypatch, two_threads, caplog
):
    """And the numbers stay the same, and the micro-batches what they were."""
    short, enough = (trainer(smoke(), tmp_path / name) for name in ("short", "enough"))
    short.state.evaluation_tokens = enough.state.evaluation_tokens = 512
    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "forward", one_at_a_time(Classifier.forward))
        for _ in range(2):
            short._step()
        score, predictions = short._evaluate(short.model, "val", 2)
    assert caplog.text.count("its micro-batches in turn") == 1
    assert caplog.text.count("one batch at a time") == 1
    for _ in range(2):
        enough._step()
    assert short.pieces == enough.pieces
    assert torch.equal(weights(short), weights(enough))
    assert torch.equal(short.sums, enough.sums)
    same, alike = enough._evaluate(enough.model, "val", 2)
    assert score == same
    assert np.array_equal(predictions, alike)


def test_an_evaluation_side_by_side_scores_every_example_once(smoke, tmp_path, two_threads):
    made = trainer(smoke(), tmp_path / "run")
    workers = made.evaluating["val"]
    assert workers.count == 2
    data: Batches = made.data["val"]
    data.evaluation_tokens = 256
    score, predictions = evaluate(made.model, data, made.autocast, workers, 0)
    alone, same = evaluate(made.model, data, made.autocast, Workers(1), 0)
    assert np.array_equal(predictions, same)
    assert score.loss == pytest.approx(alone.loss, rel=1e-6)
