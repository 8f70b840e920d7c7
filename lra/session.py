"""One session of a run: what it computes with, what it measures, and what it keeps."""

import logging
import math
import threading
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from lra import checkpoint, divergence, measure, ranks
from lra.batches import Batches, evaluation_tokens, resolve_micro_batches
from lra.build import autocast, build_model, compiled, count_parameters
from lra.checkpoint import Metrics, State, Timed
from lra.config import RunConfig
from lra.files import disk_is_full
from lra.record import Record, Throughput
from lra.schedules import beta1, learning_rate
from lra.tasks.base import Prepared
from lra.track import Tracker
from lra.workers import Workers

LOG = logging.getLogger("lra")


class StopRequest(Protocol):
    """Where a signal is noted until the trainer can act on it."""

    signal: str | None


class Session:
    """One session of a run: model, optimiser, data and clocks, as the session before left them.

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
        self.autocast = partial(autocast, device, record.precision["name"])
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
        share_of_batch = math.ceil(config.train.batch_size / ranks.count())
        widths = self.data["train"].widths
        self.pieces_asked = resolve_micro_batches(
            config.micro_batches, share_of_batch, widths, device
        )
        self.pieces = max(self.pieces_asked, self.state.micro_batches or 0)
        # Of the pieces asked for: where memory ran out, smaller ones are as many at once.
        at_once = self.data["train"].trained_at_once(share_of_batch, self.pieces_asked)
        self.workers = Workers(1 if config.compile else at_once)
        self.evaluating = {
            name: Workers(1 if config.compile else data.evaluated_at_once())
            for name, data in self.data.items()
            if name != "train"
        }

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

    def _set_rates(self, step: int) -> None:
        """Gives the optimiser its learning rate and averaging coefficients for a step."""
        train = self.config.train
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(train, step)
            group["betas"] = (beta1(train, step), train.betas[1])

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

    # --- what is measured -----------------------------------------------------------------------

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
