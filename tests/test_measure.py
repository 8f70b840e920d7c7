"""What a run measures: clocks, memory against a program of known size, device and precision."""

import subprocess
import sys
import time

import pytest
import torch

from lra.measure import Clock, allocated_peak, resolve_device, resolve_precision

CPU = torch.device("cpu")


def test_exactly_one_clock_runs():
    clock = Clock(CPU)
    time.sleep(0.02)
    clock.switch("train")
    time.sleep(0.05)
    clock.switch("evaluate")
    seconds = clock.read()
    assert 0.05 <= seconds["train"] < 0.2
    assert 0.02 <= seconds["other"] < 0.1
    assert sum(seconds.values()) == pytest.approx(clock.total(), abs=0.02)


def test_clocks_go_on_from_an_earlier_session():
    clock = Clock(CPU)
    clock.carry({"train": 100.0})
    assert clock.read()["train"] == 100.0
    assert clock.total() >= 100.0


@pytest.mark.skipif(sys.platform != "linux", reason="the resettable high-water mark is Linux's")
def test_peak_memory_is_that_of_a_program_of_known_size():
    # 200 MB held and freed before the start do not count; 100 MB freed before the reading do.
    program = """
import torch
from lra.measure import PeakMemory
before = torch.ones(50_000_000)
del before
memory = PeakMemory(torch.device("cpu"))
held = torch.ones(25_000_000)
del held
print(memory.read())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert int(done.stdout) == pytest.approx(100e6, rel=0.05), done.stderr


def test_the_allocated_peak_counts_what_lives_at_the_same_time_once():
    megabyte = 250_000  # numbers in float32

    def two_at_a_time():
        held = torch.ones(megabyte)
        for _ in range(3):
            held = held + 1
        view = held.view(500, 500).T
        view += 1

    assert allocated_peak(two_at_a_time) == 2_000_000


def test_the_allocated_peak_counts_what_the_backward_pass_needs():
    x = torch.ones(250_000, requires_grad=True)

    def chain():
        y = x
        for _ in range(4):
            y = y.sin()  # keeps its input: three of these, besides x
        y.sum().backward()

    # Three kept inputs, the output, and the gradient on its way.
    assert 4_000_000 <= allocated_peak(chain) <= 6_100_000


def test_the_allocated_peak_leaves_out_what_was_there_before():
    x = torch.ones(1_000_000)
    assert allocated_peak(lambda: x.sum()) < 100


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_one_message(name):
    with pytest.raises(ValueError, match=f"device={name}"):
        resolve_device(name)


def test_auto_is_resolved_with_a_reason():
    assert resolve_precision("auto", CPU) == ("fp32", "auto: CPU")
    assert resolve_precision("bf16", CPU) == ("bf16", "asked for")
