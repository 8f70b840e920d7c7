"""The trainer: steps, evaluations and the final test of a session.

One trainer for every task and attention. All randomness is a function of (seed, step), so that a
run resumed from any checkpoint ends exactly as the uninterrupted one.
"""

import copy
import logging
import math
import sys
from dataclasses import asdict
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lra import divergence, measure, ranks
from lra.accumulate import accumulate
from lra.checkpoint import State
from lra.config import TrainConfig
from lra.evaluate import evaluate
from lra.record import Progress, Score, Status, save_predictions, save_progress
from lra.schedules import learning_rate
from lra.session import Session
from models.classifier import Classifier
from models.encoder import resample

LOG = logging.getLogger("lra")

WARMUP_STEPS = 5
"""Steps of a session left out of the throughput: memory pools and kernels settle in them."""

PROGRESS_SECONDS = 10
"""The shortest time between two signs of life."""


class Stopped(Exception):
    """A run that ends before its last step, with the status and the reason for its record."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(status, reason)
        self.status: Status = status

    def __str__(self) -> str:
        return self.args[1]


class Trainer(Session):
    """A session that trains and tests."""

    # --- loop -----------------------------------------------------------------------------------

    def fit(self) -> None:
        """Takes the remaining steps, with the evaluations and checkpoints that are due.

        Raises:
            Stopped: On a signal, at the time limit, or when the loss is no longer finite.
        """
        steps, state = self.config.train.steps, self.state
        with tqdm(
            total=steps,
            initial=state.step,
            desc=f"{self.record.attention['name']} s{self.config.seed}",
            unit="step",
            mininterval=0.5 if sys.stderr.isatty() else 10,
            **({} if ranks.leads() else {"disable": True}),
        ) as bar:
            while True:
                if state.step > state.evaluated and (
                    state.step == steps or state.step % self.config.train.eval_every == 0
                ):
                    self._validate(bar)
                    self.save()
                if state.step == steps:
                    return
                self.clock.switch("train")
                self._step()
                bar.update()
                with ranks.together() as meeting:
                    self._look_up("train")
                    unsaved = self.clock.total() - self.saved_at
                    meeting.vote = unsaved > self.config.checkpoint_seconds
                if meeting.vote:
                    self.save()

    def _step(self) -> None:
        """Takes one optimiser step on one batch, in more micro-batches where memory runs out."""
        train, step, data = self.config.train, self.state.step, self.data["train"]
        batch = data.batch(step, train.batch_size, self.config.seed)
        with ranks.together() as meeting:
            sums = self._accumulated(step)
            meeting.vote = self.gradients.changed()
        self.gradients.sum_(bool(meeting.vote))
        with self.changing:
            if train.clip_value:
                nn.utils.clip_grad_value_(self.model.parameters(), train.clip_value)
            if train.clip_norm:
                nn.utils.clip_grad_norm_(self.model.parameters(), train.clip_norm)
            self._set_rates(step)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.sums = sums
            self.state.step += 1
            self.state.train_seen += len(batch)
        self.session_steps += 1
        if self.session_steps == WARMUP_STEPS:
            self.untimed_seconds = self.clock.read()["train"]
        elif self.session_steps > WARMUP_STEPS:
            self.timed.steps += 1
            self.timed.examples += len(batch)
            self.timed.tokens += int(data.lengths[batch].sum())

    def _accumulated(self, step: int) -> Tensor:
        """Adds up the gradients of a step's batch, in more pieces where memory runs out.

        Of several processes, each does so for its share of the batch.

        Returns:
            The sums of losses and right answers, with those of the batch.
        """
        while True:
            try:
                return self._accumulate(step)
            except Exception as error:
                self.optimizer.zero_grad(set_to_none=True)
                if not (measure.out_of_memory(error) and (self._reduced() or self._more_pieces())):
                    raise
            torch.cuda.empty_cache()  # not before the error and what it holds is gone

    def _accumulate(self, step: int) -> Tensor:
        """Adds up the gradients of a step's batch; nothing else is changed that is kept."""
        seed, batch_size, data = self.config.seed, self.config.train.batch_size, self.data["train"]
        resample(self.model, torch.Generator().manual_seed(step_seed(seed, step)))
        self.model.train()
        return self.sums + accumulate(
            self.model,
            data.training(step, batch_size, self.pieces, seed),
            min(batch_size, len(data)),
            self.autocast,
            self.workers,
            step_seed(seed, step, ranks.index()),
            self._heed_signal,
        )

    def _reduced(self) -> bool:
        """Computes micro-batches one after the other from now on, if some were side by side."""
        reduced = self.workers.reduce()
        if reduced:
            told = "Out of memory in step %d: it is taken again, its micro-batches in turn"
            LOG.warning(told, self.state.step + 1)
        return reduced

    def _more_pieces(self) -> bool:
        """Doubles the micro-batches of a batch, if they are not of one example already."""
        batch = min(self.config.train.batch_size, len(self.data["train"]))
        most = math.ceil(batch / ranks.count())
        if self.pieces >= most:
            return False
        self.pieces = self.state.micro_batches = min(2 * self.pieces, most)
        told = "Out of memory in step %d: it is taken again, in %d micro-batches, as are the others"
        LOG.warning(told, self.state.step + 1, self.pieces)
        return True

    def _look_up(self, phase: str) -> None:
        """Gives a sign of life where one is due, and stops the run where it is to be stopped."""
        due = self.clock.total() - self.told_at > PROGRESS_SECONDS
        if due:
            self.clock.switch("other")
            seconds = self.clock.read()
            done = Progress(self.state.step, seconds["train"] + seconds["evaluate"])
            self._write(partial(save_progress, self.folder, done))
            self.told_at = self.clock.total()
            self.clock.switch(phase)
        # On a GPU a look waits for all that it was given, as the sign of life does anyway.
        if phase == "train" and (due or self.device.type == "cpu"):
            self._read_sums()
            self._check_loss()
        self._heed_signal()
        limit = self.config.time_limit_minutes
        if limit and self.clock.total() > 60 * limit:
            raise Stopped("timeout", f"time_limit_minutes={limit:g}")

    def _heed_signal(self) -> None:
        if self.stop.signal is not None:
            raise Stopped("interrupted", f"{self.stop.signal} received")

    def _check_loss(self) -> None:
        """Stops the run if a training loss since the last evaluation is not finite."""
        state = self.state
        if not math.isfinite(state.train_loss):
            raise self._diverged("training loss")
        self.finite_step, self.finite_loss = state.step, state.train_loss / state.train_seen

    def _diverged(self, what: str) -> Stopped:
        """Leaves what is known in the folder; returns what to raise."""
        last, kept = self.state.step, self.saved[0]
        first = min(self.finite_step + 1, last)
        rate = learning_rate(self.config.train, first - 1)
        found = divergence.evidence(
            self.model,
            (first, last),
            loss=what,
            lr=rate,
            train_loss_before=self.finite_loss,
            checkpoint_of_step=kept or None,
        )
        self._write(partial(divergence.save, self.folder, found), leader=False)
        when = f"at step {last:,}" if first == last else f"from one of steps {first:,} to {last:,}"
        start = f"from the checkpoint of step {kept:,}" if kept else "from the beginning"
        return Stopped(
            "diverged",
            f"the {what} is not finite {when} (learning rate {rate:.3g}); the same command takes "
            f"the way again {start}",
        )

    # --- evaluation -----------------------------------------------------------------------------

    def _validate(self, bar: tqdm) -> None:
        """Scores the validation set, logs, and keeps the weights if they are the best so far."""
        self._gather()
        self._check_loss()
        state = self.state
        score, _ = self._evaluate(self.model, "val", state.step)
        if not math.isfinite(score.loss):
            raise self._diverged("validation loss")
        metrics = {
            "train_loss": state.train_loss / state.train_seen,
            "train_accuracy": state.train_correct / state.train_seen,
            "val_loss": score.loss,
            "val_accuracy": score.accuracy,
            "lr": learning_rate(self.config.train, state.step - 1),
        }
        line = {"step": state.step, "seconds": round(self.clock.total(), 3)} | metrics
        self._write(lambda: self.metrics.append(line))
        self.tracker.log(metrics, state.step)
        bar.set_postfix(loss=f"{metrics['train_loss']:.3f}", val=f"{score.accuracy:.1%}")
        best = state.best["accuracy"] if state.best else -1.0
        with self.changing:
            state.last = asdict(score)
            if state.step >= self.config.train.best_from and score.accuracy > best:
                state.best = asdict(score)
                weights = self.model.state_dict().items()
                state.best_model = {k: v.detach().clone() for k, v in weights}
            state.evaluated, state.train_seen = state.step, 0
            self.sums.zero_()

    def _evaluate(self, model: Classifier, split: str, step: int) -> tuple[Score, np.ndarray]:
        self.clock.switch("evaluate")
        look_up = partial(self._look_up, "evaluate")
        data = self.data[split]
        data.evaluation_tokens = self.state.evaluation_tokens
        result = evaluate(model, data, self.autocast, self.evaluating[split], step, look_up)
        self.state.evaluation_tokens = data.evaluation_tokens
        self.clock.switch("other")
        return result

    def test(self) -> None:
        """Scores the weights that the protocol tests on the test set; writes the predictions.

        A trial of a tuning ends with their validation score.
        """
        validation, weights = tested(self.config.train, self.state)
        self.record.validation = validation
        if self.config.trial_of is not None:
            return
        model = self.model
        if weights is not None:
            # A copy: a signal may yet ask for a checkpoint, which is of the last step.
            model = copy.deepcopy(model)
            model.load_state_dict(weights)
        score, predictions = self._evaluate(model, "test", validation.step)
        self._gather()
        self.record.test = score
        if ranks.leads():
            save_predictions(self.folder, predictions, self.data["test"].labels.cpu().numpy())


def step_seed(seed: int, step: int, process: int = 0) -> int:
    """Returns the seed of random features and dropout in one step of a run.

    Random features are those of process 0 in all processes; dropout has a seed in each.
    """
    entropy = (seed, step, process) if process else (seed, step)
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


def tested(train: TrainConfig, state: State) -> tuple[Score, dict[str, Tensor] | None]:
    """Returns the validation score of the weights that are tested, and the weights.

    None for the weights stands for those of the last step.
    """
    assert state.best is not None
    assert state.last is not None
    if train.tested == "best":
        return Score(**state.best), state.best_model
    return Score(**state.last), None
