"""What a run computes with: its model, compiled where asked for, and its precision."""

import logging
import os
import shutil
import warnings
from typing import Any

import torch
from torch import nn

from lra.config import ModelConfig, RunConfig
from lra.tasks.base import Task
from models.classifier import Classifier
from models.encoder import EncoderShape


def build_model(config: RunConfig, task: Task, attention: str | None = None) -> Classifier:
    """Builds the run's model; with ``attention``, the same with that mechanism's defaults."""
    options: dict[str, Any] = {} if attention else config.attention_options
    model = build_classifier(
        config.model,
        attention or config.attention["name"],
        options,
        num_classes=task.num_classes,
        dual=task.dual,
    )
    model.encoder.checkpointing = config.activation_checkpointing
    return model


def compiled(model: Classifier, device: torch.device) -> None:
    """Makes the calls of a model's blocks go through torch.compile, for batches of any size.

    Each block by itself: that takes half the time to compile of a whole model, gives no slower
    steps, and leaves activation checkpointing outside of what is compiled.

    Raises:
        ValueError: If there is no C++ compiler where one is needed.
    """
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise ValueError(
            f"compile=true needs a C++ compiler on CPU, and there is no {compiler}: install one, "
            f"name another in the environment variable CXX, or pass compile=false."
        )
    torch._inductor.config.fallback_random = True  # the draws of the model as it is
    torch._logging.set_logs(dynamo=logging.ERROR)  # no word of graphs that end at dropout's draws
    # Of what a compiler looks at in the inputs of a block; nothing is amiss.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor", module="torch")
    for block in model.encoder.blocks:
        block.compile(dynamic=True)


def build_classifier(
    model: ModelConfig, attention: str, options: dict[str, Any], *, num_classes: int, dual: bool
) -> Classifier:
    """Builds the model of a configuration's model section."""
    shape = EncoderShape(
        layers=model.layers,
        dim=model.dim,
        heads=model.heads,
        head_dim=model.head_dim,
        ffn_dim=model.ffn_dim,
        vocab_size=model.vocab_size,
        max_len=model.max_len,
        dropout=model.dropout,
        attention_dropout=model.attention_dropout,
        positions=model.positions,
        cls=model.pooling == "cls",
        projection_bias=model.projection_bias,
        norm_eps=model.norm_eps,
        init=model.init,
    )
    return Classifier(
        shape,
        attention,
        options,
        num_classes=num_classes,
        head_dims=model.classifier_dims,
        pooling=model.pooling,
        zero_is_padding=model.zero_is_padding,
        dual=dual,
        nli_features=model.nli_features,
    )


def count_parameters(model: nn.Module) -> int:
    """Returns the number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Returns the context that computes in ``precision``, fp32 or bf16."""
    # All threads share the cache of weights, and one that leaves the context empties it.
    cached = device.type != "cpu"
    enabled = precision == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=cached)
