"""What one process measures: a cell, or the ceilings of the machine."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lra import measure
from lra.accumulate import accumulate
from lra.batches import Batches, MicroBatch, resolve_micro_batches
from lra.bench import floor
from lra.bench.limits import limit_own_memory
from lra.bench.plan import model_of
from lra.build import autocast, build_classifier, count_parameters
from lra.cells import Cell, Decoding, Figures, Spread
from lra.plugins import import_plugins
from lra.tasks.base import Split
from lra.text import shareable
from lra.workers import Workers
from models.decoder import Decoder, DecoderState
from models.encoder import resample

CLASSES = 2
WARMUP_STEPS, WARMUP_SECONDS = 3, 1.0
"""Steps before the clock starts: memory pools and kernels settle in them. Slow steps take one."""

REAL_LENGTHS = {"median": 1050.0, "sigma": 0.654, "least": 32}
"""The lognormal of the lengths of IMDb's reviews in bytes (50,000 of them, mean 1,310)."""

DECODED = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
"""Where a generation is told, in parts of its length."""

ROUNDS = 64
"""Steps that are timed at each of these positions, all positions in turn: no drift favours one."""


@dataclass(frozen=True)
class Job:
    """What a process is given.

    Attributes:
        cell: The cell; None for the ceilings of the machine.
        device: Torch's name of the device.
        precision: ``fp32`` or ``bf16``.
        threads: Threads to compute with.
        memory_gb: Limit of the process's memory on CPU, or of the device's.
        end: Time since the epoch when it will be ended.
        repetitions: Steps at least and at most.
        measure_seconds: Seconds of steps at least, where that is more.
        plugins: Modules to import.
    """

    cell: Cell | None
    device: str
    precision: str
    threads: int
    memory_gb: float | None
    end: float
    repetitions: tuple[int, int]
    measure_seconds: float
    plugins: list[str]


def work(job: Job, results: Connection, errors: str) -> None:
    """Sends the result of a job, or how it failed; the whole life of a process.

    Args:
        job: What to do.
        results: Where the result goes.
        errors: A file for what is written to the standard error.
    """
    os.setsid()  # a Ctrl-C at the terminal is for `lra bench`, which ends us
    with open(errors, "ab") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    try:
        result = perform(job)
    except Exception as error:  # whatever an attention does; it is told in the cell
        status, reason = measure.failure(error)
        result = {"status": status, "reason": shareable(reason)}
    results.send(result)


def perform(job: Job) -> dict[str, Any]:
    """Returns the figures of a job."""
    import_plugins(job.plugins)
    torch.set_num_threads(job.threads)
    device = torch.device(job.device)
    if job.memory_gb is not None and device.type == "cpu":
        limit_own_memory(job.memory_gb)
    elif job.memory_gb is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, job.memory_gb * 1e9 / total), device)
    if job.cell is None:
        return ceilings(device, job.precision)
    figures = decoding if job.cell.mode == "decode" else classifying
    return {"status": "ok", "reason": "", "figures": asdict(figures(job.cell, device, job))}


def classifying(cell: Cell, device: torch.device, job: Job) -> Figures:
    """Measures a training step, or a forward pass, of a classifier of byte-level text."""
    given, train = cell.conditions, cell.mode == "train"
    split = examples(given.batch, cell.length, given.filled)
    data = Batches(split, device, precision=given.precision)
    pieces = resolve_micro_batches(given.micro_batches, given.batch, data.widths, device)
    workers = Workers(data.trained_at_once(given.batch, pieces))
    precision = partial(autocast, device, given.precision)
    settle(device, train)
    memory = measure.PeakMemory(device)
    torch.manual_seed(0)
    config = model_of(cell.mode, given.model, cell.length)
    model = build_classifier(config, cell.attention, cell.options, num_classes=CLASSES, dual=False)
    model.to(device).train(train)
    steps = 0

    def training() -> None:
        nonlocal steps
        resample(model, torch.Generator().manual_seed(steps))
        batch = data.training(steps, given.batch, pieces, seed=0)
        accumulate(model, batch, given.batch, precision, workers, steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps += 1

    def inference() -> None:
        for _ in workers.map(predicted, data.training(0, given.batch, pieces, seed=0)):
            pass

    def predicted(piece: MicroBatch) -> Tensor:
        with torch.no_grad(), precision():
            return model(piece.tokens, piece.key_mask).float().argmax(-1)

    if train:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    spread = repeated(training if train else inference, device, job)
    element = 2 if given.precision == "bf16" else 4
    flops, moved = floor.classifier_floor(model, split.lengths.tolist(), train, element)
    return Figures(
        spread, memory.read(), memory.kind, count_parameters(model), float(flops), float(moved)
    )


def decoding(cell: Cell, device: torch.device, job: Job) -> Figures:
    """Measures greedy generation of a decoder, token by token."""
    given, length = cell.conditions, cell.length
    precision = autocast(device, given.precision)
    dtype = torch.bfloat16 if given.precision == "bf16" else torch.float32
    settle(device, train=False)
    memory = measure.PeakMemory(device)
    torch.manual_seed(0)
    shape = model_of(cell.mode, given.model, length)
    model = Decoder(shape, cell.attention, cell.options).to(device).eval()
    positions = sorted({max(1, round(part * length)) for part in DECODED})
    state_bytes: dict[int, int] = {}
    before: dict[int, DecoderState] = {}

    def generate(count: int) -> list[float]:
        """Returns the time at which each token was there; the first entry is the start."""
        state = model.init_state(given.batch, device, dtype)
        tokens = torch.zeros(given.batch, dtype=torch.long, device=device)
        stamps = [stamp(device)]
        for position in range(1, count + 1):
            if times and position in positions:
                before[position] = state
            logits, state = step(tokens, state)
            tokens = logits.argmax(-1)
            stamps.append(stamp(device))
            if position in positions:
                leaves = (x for x in tree_leaves(state) if isinstance(x, Tensor))
                state_bytes[position] = sum(x.nbytes for x in leaves)
        return seconds_of(stamps, device)

    def step(tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        with precision:
            return model.step(tokens, state)

    times: list[np.ndarray] = []
    with torch.inference_mode():
        generate(min(length, 8))
        # The second keeps the states before these positions, the first shows the peak without them.
        while len(times) < 2 or more(len(times), sum(t[-1] - t[0] for t in times), job):
            times.append(np.array(generate(length)))
            if len(times) == 1:
                peak = memory.read()
        # These states are used up, and further steps from them compute something else at their
        # cost.
        tokens = torch.zeros(given.batch, dtype=torch.long, device=device)
        taken = [
            [timed(partial(step, tokens, before[p]), device) for p in positions]
            for _ in range(ROUNDS)
        ]
    by_position = np.array(taken).T
    flops, moved = floor.decoding_floor(model, given.batch, length, length)
    return Figures(
        spread_of(by_position[-1]),
        peak,
        memory.kind,
        count_parameters(model),
        float(flops),
        float(moved),
        Decoding(
            positions,
            np.median(by_position, 1).tolist(),
            [float(given.batch * p / np.median([t[p] - t[0] for t in times])) for p in positions],
            [state_bytes[p] for p in positions],
        ),
    )


def examples(batch: int, length: int, filled: bool) -> Split:
    """Returns sequences of bytes: all of one length, or with the lengths of reviews, cut at it."""
    random = np.random.default_rng(0)
    lengths = np.full(batch, length)
    if not filled:
        drawn = random.lognormal(np.log(REAL_LENGTHS["median"]), REAL_LENGTHS["sigma"], batch)
        lengths = drawn.astype(np.int64).clip(REAL_LENGTHS["least"], None).clip(None, length)
    tokens = random.integers(1, 257, lengths.sum(), dtype=np.uint16)
    labels = random.integers(0, CLASSES, batch, dtype=np.uint8)
    return Split.of(tokens, np.concatenate([[0], lengths.cumsum()]), labels)


def settle(device: torch.device, train: bool) -> None:
    """Loads what a first step loads, so that no cell's memory has it: libraries, threads."""
    layer = torch.nn.Linear(256, 256, device=device)
    loss = layer(torch.ones(256, 256, device=device)).sum()
    if train:
        optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
        loss.backward()
        optimizer.step()


def repeated(step: Callable[[], None], device: torch.device, job: Job) -> Spread:
    """Returns the time of a step, after a warm-up."""
    warming = 0.0
    for _ in range(WARMUP_STEPS):
        warming += timed(step, device)
        if warming > WARMUP_SECONDS:
            break
    taken: list[float] = []
    while more(len(taken), sum(taken), job):
        taken.append(timed(step, device))
    return spread_of(np.array(taken))


def more(count: int, spent: float, job: Job) -> bool:
    """Whether a measurement should be repeated once more, after ``count`` in ``spent`` seconds.

    One is made whatever it takes; another one only if it should end before the process does.
    """
    least, most = job.repetitions
    if count and time.time() + 1.2 * spent / count > job.end:
        return False
    return count < least or (count < most and spent < job.measure_seconds)


def timed(step: Callable[[], None], device: torch.device) -> float:
    """Returns the seconds of one step, from an idle device to an idle device."""
    synchronise(device)
    start = time.perf_counter()
    step()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def stamp(device: torch.device) -> Any:
    """Returns a mark of when the device gets here, without waiting for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_of(stamps: list[Any], device: torch.device) -> list[float]:
    """Returns the seconds of each mark since the first."""
    synchronise(device)
    if device.type != "cuda":
        return [mark - stamps[0] for mark in stamps]
    return [stamps[0].elapsed_time(mark) / 1e3 for mark in stamps]


def spread_of(taken: np.ndarray) -> Spread:
    """Returns median and quartiles."""
    low, median, high = np.quantile(taken, [0.25, 0.5, 0.75])
    return Spread(float(median), float(low), float(high), len(taken))


def ceilings(device: torch.device, precision: str) -> dict[str, Any]:
    """Returns the rates of a large matrix product and of a large copy, the best of several."""
    cuda = device.type == "cuda"
    size = 8192 if cuda else 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty(size, size, device=device, dtype=dtype)
    source = torch.ones(2**28 if cuda else 2**26, device=device)
    target = torch.empty_like(source)

    def best(step: Callable[[], object]) -> float:
        times = [timed(step, device) for _ in range(6)]
        return min(times[1:])

    multiplying = best(lambda: torch.mm(a, b, out=product))
    copying = best(lambda: target.copy_(source))
    return {
        "status": "ok",
        "reason": "",
        "flops_per_second": 2 * size**3 / multiplying,
        "bytes_per_second": 2 * source.nbytes / copying,
    }
