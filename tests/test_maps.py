"""`lra maps`: the matrices drawn are those that the models use, on a grid that keeps row sums."""

import csv
import dataclasses
import math

import numpy as np
import pytest
import torch

from lra import maps
from lra.compose import load
from lra.kept import restore
from lra.run import run, run_folder
from lra.tasks.base import Prepared, Split
from models.attention import build_attention
from models.attention.base import Attention, Context


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache):
    """Returns a function that trains a smoke run, with its checkpoint, and returns its folder."""
    runs = tmp_path_factory.mktemp("runs")

    def make(*more, keep=True):
        overrides = ["protocol=smoke", "tracker=none", f"cache_dir={cache}", *more]
        overrides += [f"runs_dir={runs / str(keep)}", f"keep_checkpoint={str(keep).lower()}"]
        config = load(overrides)
        assert run(config).status == "ok"
        return run_folder(config)

    return make


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(maps, "EXAMPLES", 3)


def test_runs_are_drawn_with_what_they_estimate_and_how_they_are_reweighted(
    trained, few, tmp_path, capsys
):
    folders = [trained(f"attention={name}") for name in ("softmax", "cosformer", "rfa")]
    folders.append(trained("attention=linear", "attention.feature=relu"))
    path = maps.write(folders, tmp_path / "results")
    assert path.name == "maps-smoke-listops.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    with path.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    printed = capsys.readouterr().out
    for name in ("softmax", "cosformer", "rfa", "linear feature=relu"):
        assert name in printed
        its = [row for row in rows if row["run"] == name]
        if name in ("softmax", "rfa"):  # a query without a positive feature has no weights
            assert {row["sum"] for row in its} == {"1.000"}
        assert all((row["error"] != "–") == (name == "rfa") for row in its)
        assert name == "rfa" or all(0 < float(row["entropy"]) <= 1 for row in its)


def test_the_matrices_are_those_that_the_model_attends_with(trained, few):
    run_kept = restore(trained("attention=rfa"))
    outputs = []

    def keep(module, given, out):
        outputs.append((module.weights(*given[:2], *given[3:]), given[2], out))

    for module in run_kept.model.modules():
        if isinstance(module, Attention):
            module.register_forward_hook(keep)
    found = maps.maps_of(run_kept)
    layers, heads = len(found.heads), len(found.heads[0])
    assert found.sequences == 3 == len(outputs) / layers
    for weights, values, out in outputs:
        assert (weights @ values - out).abs().max() < 1e-5
    for layer in range(layers):
        for head in range(heads):
            expected = sum(_pooled(w[0, head].double()) for w, _, _ in outputs[layer::layers])
            assert (found.heads[layer][head].matrix - expected).abs().max() < 1e-6


def _pooled(weights):
    """Returns a matrix on the grid by way of a finer one, that both divide."""
    n, cells = len(weights), maps.CELLS
    parts = math.lcm(n, cells)
    fine = weights.repeat_interleave(parts // n, 0).repeat_interleave(parts // n, 1) * n / parts
    pooled = fine.unflatten(0, (cells, -1)).mean(1)
    return pooled.unflatten(1, (cells, -1)).sum(2)


@pytest.mark.parametrize("n", [1, 5, 64, 96])
def test_a_matrix_on_the_grid_has_the_row_sums_it_had(n):
    generator = torch.Generator().manual_seed(n)
    weights = torch.rand(2, n, n, generator=generator, dtype=torch.float64).softmax(-1)
    found = maps.Maps([[maps.Head(), maps.Head()]])
    maps._add(found, 0, weights, None, None)
    for head, matrix in zip(found.heads[0], weights, strict=True):
        assert (head.matrix.sum(-1) - 1).abs().max() < 1e-12
        assert (head.matrix - _pooled(matrix)).abs().max() < 1e-12
        if n == maps.CELLS:
            assert (head.matrix - matrix).abs().max() < 1e-12


def test_even_attention_has_the_entropy_of_all_keys_and_no_error_to_itself():
    even = torch.full((1, 40, 40), 1 / 40, dtype=torch.float64)
    found = maps.Maps([[maps.Head()]])
    maps._add(found, 0, even, even, even)
    [[head]] = found.heads
    assert head.entropy == pytest.approx(1)
    assert head.error == 0
    inside = (np.abs(np.subtract.outer(np.arange(40), np.arange(40))) <= 4).mean()
    assert head.near == pytest.approx(inside)
    assert (found.reweighting - 1 / 40).abs().max() < 1e-12
    apart = torch.eye(40, dtype=torch.float64)[None]
    maps._add(found, 0, apart, apart.roll(1, -1), None)
    assert head.error == pytest.approx(1)
    assert head.entropy == pytest.approx(1)  # 0 is added
    maps._add(found, 0, -apart, None, None)
    assert head.entropy is None


def test_cosformers_reweighting_is_the_cosine_of_the_relative_distance(trained, few):
    found = maps.maps_of(restore(trained("attention=cosformer")))
    cells = torch.arange(maps.CELLS) / maps.CELLS
    cosine = (torch.pi / 2 * (cells[:, None] - cells)).cos()
    # A token covers more than a cell where it is longer: of 20 tokens or more, 1 / 20 each.
    assert (found.reweighting / found.sequences - cosine).abs().max() < torch.pi / 2 / 20


RFA = {"projections": 200_000, "pool": 2}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rfa", RFA),
        ("rfa", RFA | {"normalise": False}),
        ("rfa", RFA | {"kernel": "arccos"}),
        ("rfa", RFA | {"tau": 1.5}),
        ("performer", {"features": 200_000}),
    ],
)
def test_random_features_tend_to_what_they_estimate(name, options):
    sizes = {"num_heads": 2, "head_dim": 4, "max_len": 16, "model_dim": 8}
    attention = build_attention(name, **sizes, **options).double()
    if name == "rfa":
        attention.scale.data = torch.linspace(0.5, 1.5, 8, dtype=torch.float64).reshape(2, 4)
    generator = torch.Generator().manual_seed(0)
    q, k = 0.4 * torch.randn(2, 1, 2, 12, 4, generator=generator, dtype=torch.float64)
    mask = torch.arange(12)[None] < 9
    exact = attention.exact(q, k, Context(mask, False, None))
    assert (exact.sum(-1) - 1).abs().max() < 1e-12
    with torch.no_grad():
        assert (exact - attention.weights(q, k, mask)).abs().max() < 0.02


def test_two_sequences_of_an_example_are_two_matrices_without_their_padding(
    trained, few, monkeypatch
):
    single = restore(trained("attention=cosformer"))
    model = single.model
    model.head = torch.nn.Identity()  # takes one encoding or two
    tokens, starts = single.prepared.splits["val"].tokens, single.prepared.splits["val"].starts
    lengths = np.array([[20, 30], [25, 20], [30, 30]])
    pairs = Split(tokens, starts[:6].reshape(3, 2), lengths, np.zeros(3))
    found = maps.maps_of(dataclasses.replace(single, prepared=Prepared({"val": pairs}, {})))
    apart = Split(tokens, starts[:6], lengths.ravel(), np.zeros(6))
    monkeypatch.setattr(maps, "EXAMPLES", 6)
    expected = maps.maps_of(dataclasses.replace(single, prepared=Prepared({"val": apart}, {})))
    assert found.sequences == expected.sequences == 6
    for head, other in zip(found.heads[0], expected.heads[0], strict=True):
        assert (head.matrix - other.matrix).abs().max() < 1e-5


def test_seeds_are_told_apart(trained, few, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(maps, "draw", lambda *_: None)
    maps.write([trained(), trained("seed=1")], tmp_path)
    printed = capsys.readouterr().out
    assert "softmax, seed 0" in printed
    assert "softmax, seed 1" in printed


def test_a_run_without_its_checkpoint_says_what_to_type(trained, tmp_path):
    folder = trained(keep=False)
    with pytest.raises(ValueError, match=r"has no checkpoint.* keep_checkpoint=true reuse=never"):
        maps.write([folder], tmp_path)


def test_runs_of_other_data_are_refused(trained, tmp_path):
    folders = [trained(), trained("task=pathfinder")]
    with pytest.raises(ValueError, match=r"same examples, but .* is of listops.* of pathfinder"):
        maps.write(folders, tmp_path)


def test_a_mixer_has_no_matrix(trained, tmp_path):
    folders = [trained(), trained("attention=fnet")]
    with pytest.raises(ValueError, match=r"fnet, which mixes tokens without .* leave it out"):
        maps.write(folders, tmp_path)
    assert not list(tmp_path.glob("maps-*"))
