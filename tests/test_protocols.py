"""The protocols: every task, and models of the published sizes."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from lra import build
from lra.build import build_model, count_parameters
from lra.compose import conf_dir, load
from lra.tasks import TASKS

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


PUBLISHED = """
protocol  task       lr    batch  steps warmup eval  layers heads head_dim dropout attention pooling
nystrom   listops    1e-4   32    5000   1000    50    2      2     32      0.1    0.1     mean_all
nystrom   text       1e-4   32   20000   8000   500    2      2     32      0.1    0.1     mean_all
nystrom   retrieval  1e-4   32   30000    800   300    2      2     32      0.1    0.1     mean_all
nystrom   image      1e-4  256   35000    175   175    2      2     32      0.1    0.1     mean_all
nystrom   pathfinder 1e-4  256   62400    312   312    2      2     32      0.1    0.1     mean_all
skyformer listops    1e-4   32   50000   1000   500    2      2     32      0.1    0.1     mean_all
skyformer text       1e-4   32   50000     80   500    2      2     32      0.1    0.1     mean_all
skyformer retrieval  2e-4   16   50000    800  1000    2      2     32      0.1    0.1     mean_all
skyformer image      1e-4  256   50000    175    50    2      2     32      0.1    0.1     mean_all
skyformer pathfinder 2e-4  128   50000    312   500    2      2     32      0.1    0.1     mean_all
google    listops    0.05   32    5000   1000    50    4      8     64      0.1    0.1     cls
google    text       0.05   32   20000   8000   100    4      4     64      0.1    0.1     cls
google    retrieval  0.05   32    5000   8000   100    4      4     32      0.1    0.1     first
google    image      5e-4  256   35000    175   175    1      8      8      0.3    0.2     cls
google    pathfinder 1e-3  512   62400    312   312    4      4      4      0.2    0.1     mean
google    pathx      1e-3   64  500000   2500  2500    1      2      8      0.1    0.1     mean
"""
"""Settings as the released code has them."""


@pytest.mark.parametrize("row", PUBLISHED.strip().splitlines()[1:], ids=lambda row: row[:20])
def test_the_settings_are_the_published_ones(row):
    protocol, task, *figures = row.split()
    config = load([f"protocol={protocol}", f"task={task}"])
    model, its = config.model, config.train
    ours = [its.lr, its.batch_size, its.steps, its.warmup_steps, its.eval_every]
    ours += [model.layers, model.heads, model.head_dim, model.dropout, model.attention_dropout]
    assert ours == [float(figure) for figure in figures[:-1]]
    assert model.pooling == figures[-1]
    images = task in ("image", "pathfinder", "pathx")
    assert model.zero_is_padding == images
    assert model.nli_features == (protocol != "google")
    assert its.tested == ("last" if protocol == "google" else "best")
    if protocol == "google":
        assert (its.betas, its.beta1_cycle, its.eps) == ((0.9, 0.98), None, 1e-9)
        assert its.weight_decay == (0.0 if images else 0.1)
        assert its.schedule == ("cosine" if images else "rsqrt")
        assert its.clip_norm == (1.0 if task == "pathx" else 0.0)
        assert model.positions == ("learned" if task in ("image", "pathx") else "sinusoidal")
        assert not model.projection_bias
    else:
        assert (its.betas, its.eps, its.schedule) == ((0.9, 0.999), 1e-6, "one_cycle")
        assert (its.weight_decay, model.positions, model.projection_bias) == (0, "learned", True)
        clipped = (1.0, its.steps // 5) if protocol == "skyformer" else (0.0, 0)
        assert (its.clip_value, its.best_from) == clipped


@pytest.mark.parametrize(
    ("task", "tokens"), [("text", 4000), ("retrieval", 4000), ("image", 1024), ("pathx", 16_384)]
)
def test_examples_have_the_published_lengths(task, tokens):
    for protocol in PARAMETERS:
        ours = load([f"protocol={protocol}", f"task={task}"]).build_task().max_len
        assert ours == (1000 if (protocol, task) == ("google", "text") else tokens)


def test_the_model_is_built_with_every_setting(monkeypatch):
    seen = {}

    class Model:
        encoder = SimpleNamespace()

        def __init__(self, shape, *_, **options):
            seen.update(shape=shape, options=options)

    monkeypatch.setattr(build, "Classifier", Model)
    config = load(["task=retrieval", "protocol=google", "model.zero_is_padding=true"])
    build_model(config, config.build_task())
    shape, options = seen["shape"], seen["options"]
    for field in dataclasses.fields(shape):
        if field.name != "cls":
            assert getattr(shape, field.name) == getattr(config.model, field.name)
    assert not shape.cls
    assert options == {
        "num_classes": 2,
        "head_dims": (512, 256),
        "pooling": "first",
        "zero_is_padding": True,
        "dual": True,
        "nli_features": False,
    }
    config = load(["protocol=google"])
    build_model(config, config.build_task())
    assert seen["shape"].cls
    assert (seen["options"]["dual"], seen["options"]["pooling"]) == (False, "cls")


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
