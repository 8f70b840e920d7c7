"""The gradient of a batch, from its micro-batches."""

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lra.batches import MicroBatch
from lra.workers import Workers
from models.classifier import Classifier
from models.dropout import seeded

LOG = logging.getLogger("lra")


def accumulate(
    model: Classifier,
    pieces: list[MicroBatch],
    size: int,
    autocast: Callable[[], torch.autocast],
    workers: Workers,
    seed: int,
    check: Callable[[], None] = lambda: None,
) -> Tensor:
    """Gives a model's parameters the gradients of the loss that is summed over micro-batches.

    They are added up in the order of the micro-batches, and dropout depends on ``seed`` and that
    order alone: how many workers compute at once changes nothing.

    Args:
        model: The model, whose parameters have no gradients yet.
        pieces: The micro-batches.
        size: What the loss is divided by: the examples of the batch.
        autocast: Makes the context to compute in.
        workers: Who computes.
        seed: Seed of what is drawn.
        check: Called before every micro-batch, in the thread that computes it; may raise to stop.

    Returns:
        The sums of losses and right answers (2,), in float64.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(2**62, (len(pieces),), generator=generator).tolist()

    def work(piece: MicroBatch, seed: int) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        check()
        if workers.at_once == 1:  # for whatever draws from torch's own generators
            torch.manual_seed(seed)
        with seeded(seed):
            with autocast():
                logits = model(piece.tokens, piece.key_mask).float()
            loss = F.cross_entropy(logits, piece.labels, reduction="sum")
            gradients = torch.autograd.grad(loss / size, parameters, allow_unused=True)
        correct = (logits.detach().argmax(-1) == piece.labels).sum()
        return torch.stack([loss.detach().double(), correct.double()]), gradients

    before = torch.get_rng_state()
    device = parameters[0].device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    totals: list[Any] = [None] * len(parameters)
    for told, gradients in workers.map(work, pieces, seeds):
        sums += told
        for i, gradient in enumerate(gradients):
            if gradient is None:
                continue
            if totals[i] is None:  # copied: it may be the gradient of another parameter too
                totals[i] = torch.empty_like(parameters[i]).copy_(gradient)
            else:
                totals[i] += gradient
        del gradients, gradient  # before the next are there
    if workers.at_once > 1 and not torch.equal(before, torch.get_rng_state()):
        LOG.info(
            "The model draws from torch's default generator, which threads would take turns with: "
            "micro-batches are computed one after the other."
        )
        workers.reduce()
        return accumulate(model, pieces, size, autocast, workers, seed, check)
    for parameter, total in zip(parameters, totals, strict=True):
        parameter.grad = total
    return sums
