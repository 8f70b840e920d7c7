"""What a run leaves behind when its loss is no longer finite."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lra.files import write_text

FILE = "diverged.json"


def is_finite(model: nn.Module) -> bool:
    """Tells whether all parameters of ``model`` are finite; waits for the device once."""
    return bool(torch.stack([p.detach().isfinite().all() for p in model.parameters()]).all())


def evidence(model: nn.Module, steps: tuple[int, int], **known: Any) -> dict[str, Any]:
    """Returns the content of ``diverged.json``.

    Args:
        model: The model as it is now.
        steps: The first and the last optimiser step that may have been the first of a loss that
            is not finite; on CPU they are one, on a GPU the loss is looked at every few seconds.
        known: What else is known.
    """
    parameters = list(model.named_parameters())
    broken = [name for name, p in parameters if not p.detach().isfinite().all()]
    return {
        "steps": list(steps),
        **known,
        "parameters": len(parameters),
        "parameters_not_finite": broken,
    }


def save(folder: Path, found: dict[str, Any]) -> None:
    """Writes ``diverged.json`` into ``folder``, atomically."""
    write_text(folder / FILE, json.dumps(found, indent=1) + "\n")
