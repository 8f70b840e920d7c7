"""The typed schema of conf/ and the identity of a run; `lra.compose` fills it."""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lra.files import short_hash, user_path
from lra.tasks import build_task
from lra.typed import require

if TYPE_CHECKING:
    from lra.tasks.base import Task


TUNING_FACTORS = (1 / 3, 1.0, 3.0)
"""The grid of tune=lr, as factors of the learning rate."""


@dataclass(frozen=True)
class ModelConfig:
    """The model around the attention; attributes as in `models.encoder` and `models.classifier`."""

    layers: int
    dim: int
    heads: int
    head_dim: int
    ffn_dim: int
    classifier_dims: tuple[int, ...]
    vocab_size: int
    max_len: int
    dropout: float
    attention_dropout: float
    positions: Literal["learned", "sinusoidal", "rotary"]
    projection_bias: bool
    norm_eps: float
    init: Literal["normal", "xavier"]
    pooling: Literal["mean_all", "mean_valid", "mean", "first", "cls"]
    zero_is_padding: bool
    nli_features: bool

    def __post_init__(self) -> None:
        sizes = ("layers", "dim", "heads", "head_dim", "ffn_dim", "vocab_size", "max_len")
        require(
            {
                f"{', '.join(sizes)} and each of classifier_dims must be at least 1": min(
                    *(getattr(self, name) for name in sizes), *self.classifier_dims
                )
                >= 1,
                "dropout must lie in [0, 1)": 0 <= self.dropout < 1,
                "attention_dropout must lie in [0, 1)": 0 <= self.attention_dropout < 1,
                "norm_eps must be positive and finite": 0 < self.norm_eps < math.inf,
            }
        )


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation.

    Attributes:
        steps: Optimiser steps.
        batch_size: Examples of a step.
        lr: Peak learning rate.
        schedule: ``one_cycle``: linear from lr/25 to lr at the end of the warm-up, then linear
            down to lr/250,000 at the last step (torch's OneCycleLR with linear annealing).
            ``rsqrt``: lr min(1, s/w) / sqrt(max(s, w)) in step s, with w warm-up steps. ``cosine``:
            lr min(1, s/w) (1 + cos(pi max(0, s - w) / steps)) / 2.
        warmup_steps: Steps until the peak.
        weight_decay: Decoupled weight decay (AdamW).
        betas: AdamW's averaging coefficients.
        beta1_cycle: The first coefficient moves from the first of these values to the second at
            the end of the warm-up, and back, as torch's OneCycleLR does by default; None keeps
            that of ``betas``.
        eps: AdamW's epsilon.
        clip_norm: Largest global gradient norm; 0 for no clipping.
        clip_value: Largest absolute value of a gradient's element; 0 for no clipping.
        eval_every: Steps between evaluations of the whole validation set.
        tested: Which weights are tested: those of the best validation step, or the last.
        best_from: Validation scores of earlier steps cannot be the best.
    """

    steps: int
    batch_size: int
    lr: float
    schedule: Literal["one_cycle", "rsqrt", "cosine"]
    warmup_steps: int
    weight_decay: float
    betas: tuple[float, float]
    beta1_cycle: tuple[float, float] | None
    eps: float
    clip_norm: float
    clip_value: float
    eval_every: int
    tested: Literal["best", "last"]
    best_from: int

    def __post_init__(self) -> None:
        require(
            {
                "steps, batch_size and eval_every must be at least 1": min(
                    self.steps, self.batch_size, self.eval_every
                )
                >= 1,
                "lr must be positive and finite": 0 < self.lr < math.inf,
                "betas and beta1_cycle must lie in [0, 1)": all(
                    0 <= beta < 1 for beta in (*self.betas, *(self.beta1_cycle or ()))
                ),
                "warmup_steps must not be negative": self.warmup_steps >= 0,
                "warmup_steps must be below steps with schedule=one_cycle": self.warmup_steps
                < self.steps
                or self.schedule != "one_cycle",
                f"best_from={self.best_from} must lie in [0, steps], that is up to {self.steps}; "
                f"set both": 0 <= self.best_from <= self.steps,
                "weight_decay, eps, clip_norm and clip_value must be finite and not negative": all(
                    0 <= value < math.inf
                    for value in (self.weight_decay, self.eps, self.clip_norm, self.clip_value)
                ),
            }
        )


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases: where runs go."""

    mode: Literal["offline", "online"]
    project: str
    entity: str | None


@dataclass(frozen=True)
class ProtocolConfig:
    """The protocol's name; its settings are the model, train and task sections."""

    name: str


@dataclass(frozen=True)
class RunConfig:
    """All that a run needs; one value of each key of conf/config.yaml.

    Attributes:
        task: The task's name and options.
        attention: The attention's name and options.
        protocol: The protocol's name.
        model: The model around the attention.
        train: Optimisation.
        seed: Seed of initial weights, order of examples, dropout and random features.
        tune: ``lr``: the learning rate is the best of ``grid`` by validation; see `lra.tune`.
        modified: What the run overrides of its protocol: key to (the protocol's value, the run's).
        non_default: Options of the attention that are not those it has by default for the task.
        activation_checkpointing: Whether the backward pass computes a block's activations again.
        compile: Whether torch compiles the model; rounding differs, random draws do not.
        trial_of: Of a trial of a tuning, the hash of the tuned setting.
    """

    task: dict[str, Any]
    attention: dict[str, Any]
    protocol: ProtocolConfig
    model: ModelConfig
    train: TrainConfig
    seed: int
    device: str
    precision: Literal["auto", "fp32", "bf16"]
    micro_batches: int | Literal["auto"]
    time_limit_minutes: float
    reuse: Literal["auto", "never"]
    tracker: Literal["wandb", "none"]
    wandb: WandbConfig
    data_dir: str
    cache_dir: str | None
    runs_dir: str
    plugins: list[str]
    checkpoint_seconds: float
    activation_checkpointing: bool = False
    compile: bool = False
    runs_at_once: int = 1
    keep_checkpoint: bool = False
    tune: Literal["none", "lr"] = "none"
    modified: dict[str, Any] = field(default_factory=dict)
    non_default: dict[str, Any] = field(default_factory=dict)
    trial_of: str | None = None

    def __post_init__(self) -> None:
        require(
            {
                "seed must not be negative": self.seed >= 0,
                "micro_batches must be auto or at least 1": self.micro_batches == "auto"
                or self.micro_batches >= 1,
                "time_limit_minutes must not be negative": self.time_limit_minutes >= 0,
                "checkpoint_seconds must not be negative": self.checkpoint_seconds >= 0,
                "runs_at_once must be at least 1": self.runs_at_once >= 1,
            }
        )

    def build_task(self) -> "Task":
        """Builds the task; its data is not touched."""
        return build_task(
            self.task["name"],
            options_of(self.task),
            data_dir=user_path(self.data_dir),
            cache_dir=cache_dir(self.cache_dir),
        )

    @property
    def attention_options(self) -> dict[str, Any]:
        """The attention's options without its name."""
        return options_of(self.attention)

    @property
    def grid(self) -> list[float]:
        """The learning rates of the trials of ``tune=lr``, ascending."""
        return [float(f"{self.train.lr * factor:.6g}") for factor in TUNING_FACTORS]

    def identity(self, precision: str, device_kind: str) -> dict[str, Any]:
        """Returns all that changes a run's result, apart from its seed.

        Args:
            precision: The resolved precision, ``fp32`` or ``bf16``.
            device_kind: ``cpu`` or ``cuda``.
        """
        return identity(
            task=self.build_task().fingerprint,
            protocol=self.protocol.name,
            settings=asdict(self),
            precision=precision,
            device_kind=device_kind,
            tuning=None if self.tune == "none" else {"name": self.tune, "grid": self.grid},
            trial=self.trial_of is not None,
        )

    def folder(self, precision: str, device_kind: str) -> Path:
        """Returns the run's folder, which is its key in the store of runs."""
        digest = short_hash(self.identity(precision, device_kind))
        cell = user_path(self.runs_dir) / self.protocol.name / self.task["name"]
        return cell / self.attention["name"] / f"s{self.seed}-{digest}"


def identity(
    *,
    task: str,
    protocol: str,
    settings: Mapping[str, Any],
    precision: str,
    device_kind: str,
    tuning: Mapping[str, Any] | None,
    trial: bool,
) -> dict[str, Any]:
    """Returns all that changes a run's result, apart from its seed; its hash names the run.

    Args:
        task: The task's fingerprint.
        protocol: Name of the protocol.
        settings: The run's sections ``attention``, ``model`` and ``train``.
        precision: ``fp32`` or ``bf16``.
        device_kind: ``cpu`` or ``cuda``.
        tuning: Name and grid of a tuning; None of a run that is not tuned.
        trial: Whether it is a trial, of whichever tuning: all that try one value share it.

    Raises:
        KeyError: If a section is missing.
    """
    told = {key: settings[key] for key in ("attention", "model", "train")}
    told |= {"task": task, "protocol": protocol, "precision": precision, "device": device_kind}
    if tuning is not None:
        told["tuning"] = {key: tuning[key] for key in ("name", "grid")}
    if trial:
        told["trial"] = True
    return told


def cache_dir(setting: str | None) -> Path:
    """Returns where prepared data is kept: the setting, else the user's cache folder."""
    if setting is not None:
        return user_path(setting)
    return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "lra"


def options_of(section: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a task's or attention's section without its name."""
    return {key: value for key, value in section.items() if key != "name"}
