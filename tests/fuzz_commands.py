"""Command lines that `tests/fuzz.py` damages, and how it judges what a user sees."""

import contextlib
import io
import re

from fuzz_mutations import damaged_words

import lra.bench.run
import lra.conformance
from lra.cli import main

CODES = {0: "accepted", 1: "failed with a reason", 2: "refused", 130: "interrupted"}

RAW = re.compile(
    r"codec can't|not enough values|too many values|could not convert|invalid literal|out of range"
    r"|Cannot specify|unhashable|math domain|Exceeds the limit|has no attribute|unsupported operand"
    r"|not subscriptable|is not iterable|cannot be interpreted|object is not|recursion"
)
"""What Python says to a programmer, and no user should read."""


class Failure(Exception):
    """What this script is there to find."""


def call(*arguments, named=""):
    """Runs `lra` here and returns its exit code and what it printed, once a user can read it.

    Args:
        arguments: Of the command line.
        named: What a refusal must name.
    """
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2)]
    streams[1].reconfigure(errors="backslashreplace")  # as Python's own
    code = None
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            main(arguments)
        except SystemExit as end:
            code = end.code
    texts = []
    for stream in streams:
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())
    printed, told = texts
    shown = f"lra {' '.join(map(repr, arguments))}\n{told[-2000:]}"
    if code not in CODES:
        raise Failure(f"exit code {code!r} of {shown}")
    if "Traceback" in printed + told:
        raise Failure(f"a traceback in the output of {shown}")
    if code == 2 and not told.strip():
        raise Failure(f"no message of {shown}")
    lines = [line for line in told.splitlines() if "it/s" not in line and "%|" not in line]
    if code == 2 and (len(lines) > 60 or any(map(RAW.search, lines)) or named not in told):
        raise Failure(f"no message for a user, that names {named!r}: {shown}")
    return code, printed, told


class CommandLines:
    """Arguments of every command that starts nothing long."""

    name, share = "command lines", 8

    WORDS = (
        "task=listops", "attention=softmax,cosformer", "protocol=quick", "seed=0,1", "tune=lr",
        "train.steps=100", "train.betas=[0.9,0.98]", "model.dim=32", "model.classifier_dims=[16]",
        "attention=rfa", "attention.gate=true", "task.num_train=500", "device=cpu", "reuse=never",
        "runs_at_once=2", "time_limit_minutes=1", "micro_batches=4", "sweep=rfa_table3",
        "launch=joblib", "cache_dir=cache", "data_dir=data", "wandb.mode=online", "precision=bf16",
        "model.positions=rotary", "train.schedule=cosine", "task=text", "runs_dir=runs",
        "task.max_length=100", "plugins=[no_such_module]", "attention=glob(l*)", "tracker=none",
    )  # fmt: skip
    BENCH = (
        "attention=softmax,rfa", "mode=train,infer", "mode=decode", "lengths=64,128", "batch=2",
        "model.layers=1", "model.dim=16", "micro_batches=1", "filled=false", "memory_gb=1",
        "seconds=10", "reuse=never", "out=results", "threads=1", "precision=fp32", "shape=decode",
        "attention.num_features=16", "repetitions=[1,2]", "measure_seconds=0",
    )  # fmt: skip

    @staticmethod
    def make(folder):
        """Nothing: only words are damaged."""

    def __init__(self, good, folder):
        self.folder = folder
        # What a call is to do, but for the work itself.
        lra.bench.run._measure = lambda asked, command: False
        lra.conformance.check = lambda cls, options: []

    def case(self, random):
        command = random.choice(("train",) * 5 + ("sweep",) * 5 + ("bench",) * 3 + (
            "check", "check", "ls", "data", "status", "status", "plain"))  # fmt: skip
        words = random.sample(self.WORDS, random.randrange(1, 6))
        if command == "bench":
            words = random.sample(self.BENCH, random.randrange(1, 5))
        keys = [word.partition("=")[0] for word in (*self.WORDS, *self.BENCH)]
        keys += ["hydra.run.dir", "hydra/launcher", "hydra", "task.name", "model", "seed", "other"]
        if command == "check":
            words = [w for w in words if w.startswith("attention")] or ["attention=rfa"]
        words = damaged_words(random, words, keys)
        if command == "data":
            words = [w for w in words if "task" not in w]  # it would prepare that
        start = {
            "train": ["train", "--dry-run"],
            "sweep": ["train", "-m", "--dry-run"],
            "plain": random.choice((["report"], ["compare"], ["eval"], ["compare", "a"], [])),
        }.get(command, [command])
        words = [w for w in words if not w.lstrip("+~").startswith("out=/")]
        if command in ("train", "sweep", "bench") and {"-h", "--help"} & set(words):
            words = []
        code, _, _ = call(*start, *words)
        return CODES[code]
