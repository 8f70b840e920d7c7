"""Schedules: learning rate and first averaging coefficient of every optimiser step."""

import math

from lra.config import TrainConfig


def learning_rate(train: TrainConfig, step: int) -> float:
    """Returns the learning rate of optimiser step ``step`` (from 0); see ``TrainConfig.schedule``.

    ``one_cycle`` equals torch's OneCycleLR with pct_start = warmup_steps / steps and linear
    annealing.
    """
    if train.schedule == "one_cycle":
        return _one_cycle(train, step, train.lr / 25, train.lr, train.lr / 25 / 1e4)
    warm = max(1, train.warmup_steps)
    rate = train.lr * min(1.0, step / warm)
    if train.schedule == "rsqrt":
        return rate / math.sqrt(max(step, warm))
    return rate * (1 + math.cos(math.pi * (max(0, step - warm) / train.steps % 1))) / 2


def beta1(train: TrainConfig, step: int) -> float:
    """Returns AdamW's first averaging coefficient in step ``step``; see ``TrainConfig``."""
    if train.beta1_cycle is None:
        return train.betas[0]
    start, turn = train.beta1_cycle
    return _one_cycle(train, step, start, turn, start)


def _one_cycle(train: TrainConfig, step: int, start: float, turn: float, end: float) -> float:
    """Interpolates linearly from start to turn at the end of the warm-up, then to the end."""
    warm, last = train.warmup_steps - 1, train.steps - 1
    if step <= warm:
        return start + (turn - start) * (step / warm if warm else 1.0)
    return turn + (end - turn) * (step - warm) / (last - warm)
