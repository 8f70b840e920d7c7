"""The protocols: every task, and models of the published sizes."""

import pytest
import torch

from lra.compose import conf_dir, load
from lra.tasks import TASKS
from lra.train import build_model, count_parameters

PARAMETERS = {
    "nystrom": {
        "listops": 209_802,
        "text": 370_562,
        "retrieval": 395_138,
        "citations": 395_138,
        "image": 174_986,
        "pathfinder": 173_954,
        "pathx": 173_954 + (16_384 - 1_024) * 64,  # no published size: longer positions
    },
    "skyformer": {
        "listops": 209_802,
        "text": 370_562,
        "retrieval": 395_138,
        "citations": 395_138,
        "image": 174_986 - 256 * 64,  # its table of pixel values has 256 rows, not 512
        "pathfinder": 173_954,
        "pathx": 173_954 + (16_384 - 1_024) * 64,
    },
    "google": {
        "listops": 8_948_746,
        "text": 3_486_722,
        "retrieval": 1_087_618,
        "citations": 1_087_618,
        "image": 248_458,
        "pathfinder": 26_530,
        "pathx": 537_954,
    },
}
"""Trainable parameters of the softmax models."""

CELLS = [(protocol, task) for protocol, sizes in PARAMETERS.items() for task in sizes]


@pytest.mark.parametrize(("protocol", "task"), CELLS)
def test_the_softmax_model_has_the_published_number_of_parameters(protocol, task):
    config = load([f"protocol={protocol}", f"task={task}"])
    with torch.device("meta"):
        model = build_model(config, config.build_task())
    assert count_parameters(model) == PARAMETERS[protocol][task]


@pytest.mark.parametrize("protocol", [*PARAMETERS, "quick", "smoke"])
@pytest.mark.parametrize("task", TASKS.names())
def test_every_protocol_runs_every_task(protocol, task):
    config = load([f"protocol={protocol}", f"task={task}"])
    assert config.modified == {}
    assert config.build_task().max_len <= config.model.max_len


def test_the_parameter_counts_are_named_beside_the_settings():
    """A reader of a protocol's file sees what its model weighs."""
    for protocol, task in CELLS:
        text = (conf_dir() / "protocol" / protocol / f"{task}.yaml").read_text()
        assert f"softmax: {PARAMETERS[protocol][task]:,} parameters" in text
