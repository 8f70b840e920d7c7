"""Devices: under bf16 gradients are finite, and a CUDA device computes what the CPU computes."""

import copy
import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from attention_cases import MECHANISMS, capabilities, for_those_with
from encoder_shapes import SMALL

from models.classifier import Classifier

NEEDS_GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
)


def on_gpu(test):
    for mark in NEEDS_GPU:
        test = mark(test)
    return test


SHAPE = dataclasses.replace(SMALL, layers=1, max_len=512, init="xavier")
LENGTHS = torch.tensor([300, 150, 7])


def classifier(mechanism, shape=SHAPE):
    torch.manual_seed(0)
    name, options = MECHANISMS[mechanism]
    return Classifier(
        shape,
        name,
        options,
        num_classes=4,
        head_dims=(8,),
        pooling="mean_valid",
        zero_is_padding=False,
        dual=False,
        nli_features=False,
    )


def batch(mechanism):
    """Returns tokens (3, 300), and their mask where the mechanism takes one."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 12, (3, int(LENGTHS.max())), generator=generator)
    if capabilities(mechanism).key_mask == "none":
        return tokens, None
    return tokens, torch.arange(tokens.shape[1]) < LENGTHS[:, None]


def logits_and_gradients(model, tokens, key_mask):
    device = next(model.parameters()).device
    key_mask = None if key_mask is None else key_mask.to(device)
    logits = model(tokens.to(device), key_mask)
    F.cross_entropy(logits, torch.tensor([0, 1, 2], device=device)).backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return logits.detach().cpu().double(), torch.cat(gradients).cpu().double()


def distance(a, b):
    return float((a - b).norm() / b.norm())


@on_gpu
@for_those_with("self")
def test_float64_on_the_gpu_is_float64_on_the_cpu(mechanism):
    model = classifier(mechanism).double()
    expected = logits_and_gradients(copy.deepcopy(model), *batch(mechanism))
    actual = logits_and_gradients(model.cuda(), *batch(mechanism))
    assert distance(actual[0], expected[0]) < 1e-9
    assert distance(actual[1], expected[1]) < 1e-8


@on_gpu
@for_those_with("self")
def test_float32_on_the_gpu_is_near_float64(mechanism):
    if "reformer" in mechanism:
        pytest.skip("rounding moves vectors between buckets, which changes the result")
    model = classifier(mechanism)
    exact = logits_and_gradients(copy.deepcopy(model).double(), *batch(mechanism))
    actual = logits_and_gradients(model.cuda(), *batch(mechanism))
    assert distance(actual[0], exact[0]) < 1e-3
    assert distance(actual[1], exact[1]) < 1e-2


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
@for_those_with("self")
def test_bf16_with_dropout_gives_finite_gradients(mechanism, device):
    shape = dataclasses.replace(SHAPE, dropout=0.1, attention_dropout=0.1)
    model = classifier(mechanism, shape).to(device).train()
    with torch.autocast(device, torch.bfloat16):  # the backward pass too
        logits, gradients = logits_and_gradients(model, *batch(mechanism))
    assert torch.isfinite(logits).all()
    assert torch.isfinite(gradients).all()


@on_gpu
@pytest.mark.parametrize("attention", ["softmax", "cosformer", "rfa", "nystrom"])
def test_a_run_trains_on_the_gpu_and_tells_its_device(smoke, tmp_path, attention):
    overrides = smoke("task=listops", f"attention={attention}", "device=cuda")
    command = [sys.executable, "-m", "lra", "train", *overrides]
    subprocess.run(command, check=True, env=os.environ, timeout=100)
    (path,) = (tmp_path / "runs").rglob("record.json")
    record = json.loads(path.read_text())
    assert record["status"] == "ok"
    assert record["device"]["kind"] == "cuda"
    assert record["precision"]["name"] in ("bf16", "fp32")
    assert record["memory_kind"] == "CUDA memory allocated by torch"
    assert 0 < record["peak_memory_bytes"] < 10e9
