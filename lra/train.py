"""The trainer, top to bottom: model and optimiser, loop, evaluation, final test.

One trainer for every task and attention. All randomness is a function of (seed, step), so that a
run resumed from any checkpoint ends exactly as the uninterrupted one.
"""

import copy
import logging
import math
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from lra import checkpoint, divergence, measure, ranks
from lra.batches import Batches, evaluation_tokens, resolve_micro_batches
from lra.build import autocast, build_model, compiled, count_parameters
from lra.checkpoint import Metrics, State, Timed
from lra.config import RunConfig, TrainConfig
from lra.evaluate import evaluate
from lra.files import disk_is_full
from lra.record import (
    Progress,
    Record,
    Score,
    Status,
    Throughput,
    save_predictions,
    save_progress,
)
from lra.schedules import beta1, learning_rate
from lra.tasks.base import Prepared
from lra.track import Tracker
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


class StopRequest(Protocol):
    """Where a signal is noted until the trainer can act on it."""

    signal: str | None


class Trainer:
    """One session of a run: model, optimiser, data, clocks, and the loop over them.

    Args:
        config: The run.
        record: Its record; what is measured is written into it.
        prepared: The task's data.
        folder: The run's folder; a checkpoint in it is gone on from.
        device: Where to compute.
        stop: Looked at before every micro-batch and evaluation batch.
        clock: The session's clocks, running since its start.
    """

    def __init__(
        self,
        config: RunConfig,
        record: Record,
        prepared: Prepared,
        folder: Path,
        device: torch.device,
        stop: StopRequest,
        clock: measure.Clock,
    ) -> None:
        self.config, self.record, self.folder = config, record, folder
        self.device, self.stop = device, stop
        # Of several GPUs: some kernels ask for the current one.
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
        self.autocast = autocast(device, record.precision["name"])
        self.clock = clock
        share = (ranks.index(), ranks.count())
        self.data = {
            name: Batches(split, device, share, record.precision["name"])
            for name, split in prepared.splits.items()
            if name != "test" or config.trial_of is None
        }
        tracked = config.tracker == "wandb" and ranks.leads()
        self.tracker = Tracker(config.wandb if tracked else None, record, folder)
        # After the data and the tracker, whose memory is not the model's.
        self.memory = measure.PeakMemory(device)
        torch.manual_seed(config.seed)
        task = config.build_task()
        self.model = build_model(config, task).to(device)
        if config.compile:
            compiled(self.model, device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.train.lr,
            betas=config.train.betas,
            eps=config.train.eps,
            weight_decay=config.train.weight_decay,
            fused=True,
        )
        saved = ranks.first(lambda: checkpoint.load(folder, record.hash, self.model))
        self.state = saved["state"] if saved else State()
        self.clock.carry(self.state.seconds)
        if saved:
            self.model.load_state_dict(saved["model"])
            # Its options are those of the configuration, whatever a file says of them.
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict(saved["optimizer"] | {"param_groups": groups})
            if self.state.step:
                self._set_rates(self.state.step - 1)
            if ranks.leads():
                checkpoint.settle(folder, saved["name"])
            LOG.info("%s: goes on from step %d", folder, self.state.step)
        ranks.share_(self.model.state_dict().values())
        self.gradients = ranks.Gradients(self.model)
        self.pieces_asked = resolve_micro_batches(
            config.micro_batches,
            math.ceil(config.train.batch_size / ranks.count()),
            self.data["train"].widths,
            device,
        )
        self.pieces = max(self.pieces_asked, self.state.micro_batches or 0)

        record.parameters = count_parameters(self.model)
        with torch.device("meta"):
            record.parameters_of_softmax = count_parameters(build_model(config, task, "softmax"))
        if ranks.leads():
            self.metrics = Metrics(folder / "metrics.jsonl", self.state.evaluated)
        # Summed training loss and right answers of this process stay on the device between
        # evaluations.
        before = [self.state.train_loss, self.state.train_correct] if ranks.leads() else [0.0, 0.0]
        self.sums = torch.tensor(before, dtype=torch.float64, device=device)
        # Held by whoever changes or saves what a checkpoint holds: at the worst, a thread saves.
        self.changing = threading.RLock()
        self.session_steps = 0
        self.timed_before = self.state.timed
        self.timed = Timed()
        self.untimed_seconds = 0.0
        self.saved_at = self.clock.total()
        self.told_at = -math.inf
        self.saved = self._mark()
        self.told_of_full_disk = False
        self.finite_step, self.finite_loss = self.state.step, None

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

    def _set_rates(self, step: int) -> None:
        """Gives the optimiser its learning rate and averaging coefficients for a step."""
        train = self.config.train
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(train, step)
            group["betas"] = (beta1(train, step), train.betas[1])

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
                if not (measure.out_of_memory(error) and self._more_pieces()):
                    raise
            torch.cuda.empty_cache()  # not before the error and what it holds is gone

    def _accumulate(self, step: int) -> Tensor:
        """Adds up the gradients of a step's batch; nothing else is changed that is kept."""
        seed = step_seed(self.config.seed, step)
        torch.manual_seed(step_seed(self.config.seed, step, ranks.index()))
        resample(self.model, torch.Generator().manual_seed(seed))
        pieces = self.data["train"].training(
            step, self.config.train.batch_size, self.pieces, self.config.seed
        )
        size = min(self.config.train.batch_size, len(self.data["train"]))
        sums = self.sums.clone()
        self.model.train()
        for piece in pieces:
            self._heed_signal()
            with self.autocast:
                logits = self.model(piece.tokens, piece.key_mask).float()
            loss = F.cross_entropy(logits, piece.labels, reduction="sum")
            (loss / size).backward()
            correct = (logits.detach().argmax(-1) == piece.labels).sum()
            sums += torch.stack([loss.detach().double(), correct.double()])
        return sums

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
        result = evaluate(model, data, self.autocast, step, look_up)
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

    # --- what is kept ---------------------------------------------------------------------------

    def save(self) -> bool:
        """Writes a checkpoint of the last whole step, if that is finite and there is space.

        Returns:
            Whether there is one of that step now.
        """
        with self.changing:
            self.clock.switch("other")
            self._gather()
            finite = math.isfinite(self.state.train_loss) and divergence.is_finite(self.model)
            # What is saved already is not to push out the one before it.
            if finite and self.saved != self._mark():
                self._read_measures()
                # The lines first: those that a checkpoint counts as written must be there.
                self._write(lambda: self.metrics.write()) and self._write(self._save_checkpoint)
                if not ranks.leads():
                    self.saved = self._mark()
            self.saved_at = self.clock.total()
            return self.saved == self._mark()

    def finish(self) -> None:
        """Writes what a full disk has kept from being written so far.

        Raises:
            OSError: If it still does.
        """
        if ranks.leads():
            self.metrics.write()
            if self.config.keep_checkpoint and self.saved != self._mark():
                self._save_checkpoint()

    def _save_checkpoint(self) -> None:
        checkpoint.save(self.folder, self.record.hash, self.state, self.model, self.optimizer)
        self.saved = self._mark()

    def _mark(self) -> tuple[int, ...]:
        """Returns what tells one checkpoint of this run from another; its step is the first."""
        state = self.state
        shrunk = (state.micro_batches or 0, state.evaluation_tokens or 0)
        return state.step, state.evaluated, *shrunk

    def _write(self, write: Callable[[], None], leader: bool = True) -> bool:
        """Writes, and returns whether there was space: a full disk ends no training.

        Of several processes the first alone writes, unless ``leader`` is false.
        """
        if leader and not ranks.leads():
            return True
        try:
            write()
        except OSError as error:
            if not disk_is_full(error):
                raise
            if not self.told_of_full_disk:
                told = "The disk is full: %s. Training goes on; the checkpoint of step %d stays."
                LOG.warning(told, error.filename, self.saved[0])
            self.told_of_full_disk = True
            return False
        return True

    def complete_record(self) -> None:
        """Writes what was measured into the record."""
        self._read_measures()
        record, state = self.record, self.state
        record.steps = state.step
        record.micro_batches = self.pieces
        shrunk = {}
        if self.pieces > self.pieces_asked:
            shrunk["micro_batches"] = [self.pieces_asked, self.pieces]
        if state.evaluation_tokens:
            shrunk["evaluation_tokens"] = [evaluation_tokens(self.device), state.evaluation_tokens]
        record.shrunk = shrunk or None
        record.train_seconds = state.seconds["train"]
        record.evaluation_seconds = state.seconds["evaluate"]
        record.other_seconds = state.seconds["other"]
        record.memory_kind = self.memory.kind
        measured = not self.memory.kind.startswith("none")
        record.peak_memory_bytes = state.peak_memory if measured else None
        timed = state.timed
        if timed.seconds:
            record.throughput = Throughput(
                timed.steps / timed.seconds,
                timed.examples / timed.seconds,
                timed.tokens / timed.seconds,
                timed.steps,
            )

    def close(self) -> None:
        """Ends the tracker, with the record as its summary."""
        summary = {key: value for key, value in asdict(self.record).items() if key != "config"}
        self.tracker.close(summary, failed=self.record.status != "ok")

    def _read_sums(self) -> None:
        """Reads loss and right answers, of several processes as if all had those of this one."""
        self.state.train_loss, self.state.train_correct = (ranks.count() * self.sums).tolist()

    def _gather(self) -> None:
        """Adds up loss and right answers, and takes the largest peak, of all processes."""
        state = self.state
        with ranks.together() as meeting:
            meeting.vote = self.memory.read() or 0
        state.peak_memory = max(state.peak_memory, meeting.vote)
        state.train_loss, state.train_correct = ranks.sum_(self.sums.clone()).tolist()

    def _read_measures(self) -> None:
        state, timed = self.state, self.timed
        state.seconds = self.clock.read()
        state.peak_memory = max(state.peak_memory, self.memory.read() or 0)
        if timed.steps:
            timed.seconds = state.seconds["train"] - self.untimed_seconds
        before = self.timed_before
        state.timed = Timed(
            before.steps + timed.steps,
            before.examples + timed.examples,
            before.tokens + timed.tokens,
            before.seconds + timed.seconds,
        )


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
