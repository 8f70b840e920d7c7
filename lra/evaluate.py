"""Scores a split with a model, each example once, in batches that fit."""

import logging
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lra import measure, ranks
from lra.batches import Batches, MicroBatch
from lra.record import Score
from lra.workers import Workers
from models.classifier import Classifier

LOG = logging.getLogger("lra")


def evaluate(
    model: Classifier,
    data: Batches,
    autocast: Callable[[], torch.autocast],
    workers: Workers,
    step: int,
    check: Callable[[], None] = lambda: None,
) -> tuple[Score, np.ndarray]:
    """Scores every example of a split, in smaller batches where memory runs out.

    Of several processes, each scores its share.

    Args:
        model: The model, with the weights of ``step``.
        data: The split; it keeps the size of batch that fits.
        autocast: Makes the context to compute in.
        workers: Who computes.
        step: The optimiser step to write into the score.
        check: Called in this thread before a batch is given to a worker; may raise to stop.

    Returns:
        The score, and the predicted classes in the split's order.
    """
    with ranks.together():
        predictions, loss = _predicted(model, data, autocast, workers, check)
    # Each example is scored by one process; in the others its prediction is 0.
    ranks.sum_(predictions)
    ranks.sum_(loss)
    correct = int((predictions == data.labels).sum())
    score = Score.of(correct, len(data), float(loss) / len(data), step)
    return score, predictions.cpu().numpy()


def _predicted(
    model: Classifier,
    data: Batches,
    autocast: Callable[[], torch.autocast],
    workers: Workers,
    check: Callable[[], None],
) -> tuple[Tensor, Tensor]:
    """Returns predicted classes and the summed loss, whatever size of batch that takes."""
    while True:
        try:
            return _predict(model, data, autocast, workers, check)
        except Exception as error:
            if not measure.out_of_memory(error):
                raise
            reduced = workers.reduce()
            if not reduced and not data.shrink():
                raise
        torch.cuda.empty_cache()  # not before the error and what it holds is gone
        how = "one batch at a time"
        if not reduced:
            how = f"in batches of {data.evaluation_tokens} tokens"
        LOG.warning("Out of memory: it is evaluated again, %s, as are the others", how)


def _predict(
    model: Classifier,
    data: Batches,
    autocast: Callable[[], torch.autocast],
    workers: Workers,
    check: Callable[[], None],
) -> tuple[Tensor, Tensor]:
    model.eval()
    device = data.labels.device
    predictions = torch.zeros(len(data), dtype=torch.long, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)

    def work(batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad(), autocast():
            logits = model(batch.tokens, batch.key_mask).float()
        summed = F.cross_entropy(logits, batch.labels, reduction="sum")
        return batch.indices, logits.argmax(-1), summed

    def checked() -> Iterator[MicroBatch]:
        for batch in data.evaluation():
            check()
            yield batch

    for indices, predicted, summed in workers.map(work, checked()):
        predictions[indices] = predicted
        loss += summed
    return predictions, loss
