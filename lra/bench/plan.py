"""What `lra bench` measures: conf/bench.yaml with overrides, as a list of cells."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lra import measure
from lra.cells import Cell, Conditions, Mode
from lra.compose import load_attentions, load_section
from lra.config import ModelConfig
from lra.files import user_path
from lra.typed import from_mapping, require
from models.attention import ATTENTIONS, capabilities
from models.encoder import EncoderShape

NEEDED = {"train": "self", "infer": "self", "decode": "recurrent"}
"""What an attention must have for each mode."""


@dataclass(frozen=True)
class BenchConfig:
    """One value of each key of conf/bench.yaml and of a shape; see there."""

    mode: list[Mode]
    lengths: list[int]
    batch: int
    repetitions: tuple[int, int]
    measure_seconds: float
    model: dict[str, Any]
    device: str
    precision: Literal["auto", "fp32", "bf16"]
    threads: int | None
    micro_batches: int | Literal["auto"]
    filled: bool
    memory_gb: float | None
    seconds: float
    reuse: Literal["auto", "never"]
    out: str

    def __post_init__(self) -> None:
        least, most = self.repetitions
        pieces = 1 if self.micro_batches == "auto" else self.micro_batches
        limits = (self.seconds, math.inf if self.memory_gb is None else self.memory_gb)
        require(
            {
                "mode and lengths must not be empty": bool(self.mode and self.lengths),
                "mode=decode is measured by itself, as its model is another": "decode"
                not in self.mode
                or len(self.mode) == 1,
                "lengths, batch, threads and micro_batches must be at least 1": min(
                    *self.lengths, self.batch, self.threads or 1, pieces
                )
                >= 1,
                "repetitions must be [least, most] with 1 <= least <= most": 1 <= least <= most,
                "measure_seconds must not be negative": self.measure_seconds >= 0,
                "seconds and memory_gb must be positive": min(limits) > 0,
                "mode=decode fills all positions: leave out filled=false": self.filled
                or "decode" not in self.mode,
            }
        )
        for length in self.lengths:
            model_of(self.mode[0], self.model, length)


@dataclass(frozen=True)
class Plan:
    """What is to be measured.

    Attributes:
        config: The settings.
        cells: The cells.
        device: Where.
        plugins: Modules that register attentions.
        path: The file of cells.
    """

    config: BenchConfig
    cells: list[Cell]
    device: torch.device
    plugins: list[str]
    path: Path


def plan(overrides: Sequence[str], plugins: list[str]) -> Plan:
    """Returns what overrides ask for.

    Raises:
        ValueError: One message with every problem: what was given, what is allowed.
    """
    ours, settings = [], []
    for text in overrides:
        key = text.lstrip("+~").partition("=")[0]
        asked_of = key.partition(".")[0] in ("attention", "plugins")
        (ours if asked_of else settings).append(text)
    if "mode=decode" in settings and not any(o.startswith("shape=") for o in settings):
        settings.append("shape=decode")
    values = load_section("bench", ("shape",), settings)
    values |= {k: [v] for k, v in values.items() if k in ("mode", "lengths") and _single(v)}
    config = from_mapping(BenchConfig, values, "")
    device = measure.resolve_device(config.device)
    precision, _ = measure.resolve_precision(config.precision, device)
    facts = measure.device_facts(device)
    conditions = Conditions(
        batch=config.batch,
        filled=config.filled,
        micro_batches=1 if "decode" in config.mode else config.micro_batches,
        model=config.model,
        precision=precision,
        device=facts | {"threads": config.threads or facts["threads"]},
        torch=str(torch.__version__),
    )
    cells = [
        Cell(name, options, mode, length, conditions)
        for name, options in _attentions(ours, config.mode)
        for mode in config.mode
        for length in config.lengths
    ]
    path = user_path(config.out) / f"efficiency-{device.type}-{precision}.jsonl"
    return Plan(config, cells, device, plugins, path)


def model_of(mode: Mode, model: dict[str, Any], length: int) -> ModelConfig | EncoderShape:
    """Returns the model section of a cell, for a classifier or a decoder of ``length`` positions.

    Raises:
        ValueError: For a key that is missing, unknown or ill-typed.
    """
    if mode == "decode":
        return from_mapping(EncoderShape, model | {"max_len": length, "cls": False}, "model")
    return from_mapping(ModelConfig, model | {"max_len": length}, "model")


def _single(value: Any) -> bool:
    return isinstance(value, str | int)


def _attentions(overrides: list[str], modes: Sequence[Mode]) -> list[tuple[str, dict[str, Any]]]:
    """Returns the attentions asked for with the options that are not default; else all that fit."""
    named = any(o.lstrip("+").startswith("attention=") for o in overrides)
    found = load_attentions(overrides if named else [*overrides, "attention=glob(*)"])
    needed = {NEEDED[mode] for mode in modes}
    fits = [(name, options) for name, options in found if _has(name, options, needed)]
    if named and len(fits) < len(found):
        others = ", ".join(name for name, options in found if (name, options) not in fits)
        able = ", ".join(name for name in ATTENTIONS.names() if _has(name, {}, needed))
        raise ValueError(
            f"attention={others} has no {' and '.join(sorted(needed))} form, which "
            f"mode={','.join(modes)} needs. With default options these have: {able}."
        )
    return [(name, _non_default(name, options)) for name, options in fits]


def _has(name: str, options: dict[str, Any], needed: set[str]) -> bool:
    able = capabilities(name, options)
    return needed <= {*able.patterns, *(["recurrent"] if able.recurrent else [])}


def _non_default(name: str, options: dict[str, Any]) -> dict[str, Any]:
    config = ATTENTIONS.get(name).Config
    given, default = asdict(from_mapping(config, options, "attention")), asdict(config())
    return {key: value for key, value in given.items() if value != default[key]}
