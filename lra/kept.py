"""The kept weights of a run: restored from its checkpoint, and scored again."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from lra import checkpoint, measure, record
from lra.batches import Batches
from lra.build import autocast, build_model
from lra.config import RunConfig
from lra.evaluate import evaluate
from lra.plugins import import_plugins
from lra.record import Record, Score
from lra.run import check_data
from lra.tasks.base import Prepared
from lra.train import tested
from lra.typed import from_mapping
from lra.workers import Workers
from models.classifier import Classifier


@dataclass(frozen=True)
class Kept:
    """A run as its folder has it.

    Attributes:
        record: Its record.
        model: The model with the weights that are tested, on the device of the run.
        prepared: Its data.
        device: Where the model is.
        step: The optimiser step of the weights.
        last_step: That of the checkpoint.
        evaluation_tokens: Padded tokens of an evaluation batch, where memory had run out.
    """

    record: Record
    model: Classifier
    prepared: Prepared
    device: torch.device
    step: int
    last_step: int
    evaluation_tokens: int | None


def restore(folder: Path) -> Kept:
    """Restores the tested weights of a run from its checkpoint.

    Raises:
        ValueError: If the folder has no record, or no checkpoint that has been evaluated.
    """
    finished = record.load(folder)
    if finished is None:
        raise ValueError(f"{folder} has no record.json: give the folder of a run.")
    if finished.trial_of is not None:
        raise ValueError(f"{folder} is a trial of a tuning, and trials are never tested.")
    finished.check_identity(folder / "record.json")
    config = from_mapping(RunConfig, finished.config, "")
    import_plugins(config.plugins)
    device = measure.resolve_device(config.device)
    task = config.build_task()
    if task.fingerprint != finished.task["fingerprint"]:
        raise ValueError(f"{folder}/record.json has settings of another task: was it edited?")
    model = build_model(config, task)
    saved = checkpoint.load(folder, finished.hash, model)
    if saved is None and finished.status == "ok":
        raise ValueError(
            f"{folder} has no checkpoint: that of a finished run is removed, unless it is to be "
            f"kept. Train again: {finished.command} keep_checkpoint=true reuse=never"
        )
    if saved is None or saved["state"].best is None:
        raise ValueError(f"{folder} has no checkpoint with an evaluation: {finished.status}.")
    validation, weights = tested(config.train, saved["state"])
    model.load_state_dict(saved["model"] if weights is None else weights)
    prepared = task.prepare(hashes="splits")
    check_data(prepared.manifest, folder, finished.task.get("data_hash"))
    return Kept(
        finished,
        model.to(device),
        prepared,
        device,
        validation.step,
        saved["state"].step,
        saved["state"].evaluation_tokens,
    )


def evaluate_again(folder: Path) -> tuple[Record, Score]:
    """Scores the tested weights of a run's checkpoint on the test set once more.

    Returns:
        The run's record, and the score computed now.

    Raises:
        ValueError: As `restore`.
    """
    kept = restore(folder)
    kept.record.steps = kept.last_step
    precision = kept.record.precision["name"]
    data = Batches(kept.prepared.splits["test"], kept.device, precision=precision)
    data.evaluation_tokens = kept.evaluation_tokens
    workers = Workers(data.evaluated_at_once())
    computed = partial(autocast, kept.device, precision)
    score, _ = evaluate(kept.model, data, computed, workers, kept.step)
    return kept.record, score
