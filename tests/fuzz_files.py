"""Records, checkpoints, cells and prepared data that `tests/fuzz.py` damages.

A target makes good files once, in ``make``. A case puts them back, damages some, and judges what
the program does: it returns what a user would see (accepted, refused), or raises.
"""

import contextlib
import io
import json
import re

import numpy as np
import torch
from fuzz_commands import CODES, RAW, Failure, call
from fuzz_mutations import change as change_tree
from fuzz_mutations import damaged, damaged_json, put_back, put_damaged, put_damaged_line

import lra.report.efficiency
import lra.report.figures
import lra.train
from lra import cells, record
from lra.tasks import build_task
from lra.tasks._parts import Parts
from lra.tasks.base import SPLITS

RUN = ["protocol=smoke", "tracker=none", "device=cpu", "task.num_train=32", "task.num_val=16",
       "task.num_test=16", "train.steps=4", "train.warmup_steps=1", "train.eval_every=2",
       "checkpoint_seconds=0", "micro_batches=1"]  # fmt: skip
"""A run of a tenth of a second."""


class Records:
    """The small files of runs, read by report, status, compare, train and eval."""

    name, share = "records", 14
    SMALL = ("record.json", "metrics.jsonl", "test_predictions.npy")

    @staticmethod
    def make(folder):
        common = [*RUN, f"cache_dir={folder / 'cache'}", f"runs_dir={folder / 'runs'}"]
        for more in ("attention=softmax", "attention=linear", "attention=linear seed=1",
                     "attention=linear attention.feature=relu train.lr=0.01"):  # fmt: skip
            code, _, told = call("train", *common, *more.split())
            assert code == 0, told
        [softmax] = (folder / "runs").glob("smoke/listops/softmax/*")
        values = json.loads((softmax / "record.json").read_text())
        under_way = values | {"status": "running", "test": None, "validation": None, "seed": 7}
        other = softmax.with_name(softmax.name.replace("s0-", "s7-"))
        other.mkdir()
        (other / "record.json").write_text(json.dumps(under_way))
        (other / "metrics.jsonl").write_bytes((softmax / "metrics.jsonl").read_bytes())
        record.save_progress(other, record.Progress(3, 0.5))

    def __init__(self, good, folder):
        self.good, self.folder = good, folder
        put_back(folder / "cache", good / "cache")

    def case(self, random):
        put_back(self.folder / "runs", self.good / "runs")
        put_back(self.folder / "out", self.good / "cache")  # any folder
        files = sorted(p for p in (self.folder / "runs").rglob("*.json*"))
        files += sorted((self.folder / "runs").rglob("*.npy"))
        path = random.choice(files)
        if path.suffix == ".json" and random.random() < 0.75:
            path.write_bytes(damaged_json(random, path.read_text()))
        elif path.suffix == ".jsonl" and random.random() < 0.5:
            put_damaged_line(random, path)
        else:
            put_damaged(random, path)
        before = self.contents(path)
        code = getattr(self, random.choice(("report", "status", "compare", "again", "evaluate")))(
            random, path.parent
        )
        if self.contents(path) != before:
            raise Failure(f"files beside {path} have changed")
        return CODES[code]

    def contents(self, but):
        """Returns all of the runs but the damaged file, and what takes up a run."""
        changing = (but.name, ".lock", "log.txt")
        return {
            path: path.read_bytes()
            for path in (self.folder / "runs").rglob("*")
            if path.is_file() and path.parent != but.parent and path.name not in changing
        }

    def report(self, random, folder):
        drawn = random.random() < 0.1  # figures take a second
        keep = lra.report.figures.save
        lra.report.figures.save = keep if drawn else lambda figure, path: None
        try:
            code, printed, _ = call(
                "report", "--runs", str(self.folder / "runs"), "--out", str(self.folder / "out")
            )
        finally:
            lra.report.figures.save = keep
        if code != 0 or not re.search(r"\| (linear|softmax)", printed):
            raise Failure(f"the sound records are not reported, code {code}")
        return code

    def status(self, random, folder):
        code, printed, _ = call("status", str(self.folder / "runs"))
        lost = [p for p in (self.folder / "runs").glob("*/*/*/*/record.json")
                if p.is_file() and str(p.parent) not in printed]  # fmt: skip
        if code != 0 or lost:
            raise Failure(f"status leaves out {lost}, code {code}")
        return code

    def compare(self, random, folder):
        sides = random.choice((("softmax", "linear"), (str(folder), "softmax"), ("linear", "x")))
        return call("compare", *sides, "--runs", str(self.folder / "runs"))[0]

    def again(self, random, folder):
        common = [f"cache_dir={self.folder / 'cache'}", f"runs_dir={self.folder / 'runs'}"]
        dry = ["--dry-run"] if random.random() < 0.8 else []
        return call("train", *dry, *RUN, *common, f"attention={folder.parent.name}")[0]

    def evaluate(self, random, folder):
        return call("eval", str(folder))[0]


class Checkpoints:
    """Checkpoints of a cut run and of a finished one: resumed to the same end, or refused."""

    name, share = "checkpoints", 4

    @staticmethod
    def make(folder):
        common = [*RUN, f"cache_dir={folder / 'cache'}", "keep_checkpoint=true"]
        assert call("train", *common, f"runs_dir={folder / 'whole'}")[0] == 0
        taken = lra.train.Trainer._step

        def step(trainer):
            if trainer.state.step == 3:
                trainer.stop.signal = "SIGTERM"
            taken(trainer)

        lra.train.Trainer._step = step
        try:
            assert call("train", *common, f"runs_dir={folder / 'cut'}")[0] == 130
        finally:
            lra.train.Trainer._step = taken

    def __init__(self, good, folder):
        self.good, self.folder = good, folder
        put_back(folder / "cache", good / "cache")

    def case(self, random):
        which = random.choice(("cut", "cut", "whole"))
        put_back(self.folder / "runs", self.good / which)
        [run] = [path.parent for path in (self.folder / "runs").rglob("record.json")]
        [good] = [path.parent for path in (self.good / "whole").rglob("record.json")]
        files = sorted(run.glob("*.pt"))
        edited = random.random() < 0.6  # then the end may be another, as of any whole checkpoint
        for path in files if random.random() < 0.5 else [random.choice(files)]:
            if edited:
                self.change(random, path)
            else:
                put_damaged(random, path)
        if which == "whole":
            code, printed, _ = call("eval", str(run))
            scores = re.findall(r"test ([\d.]+%)", printed)
            if code == 0 and len({*scores}) > 1 and not edited:
                raise Failure(f"other weights are taken for the run's: {printed}")
            return CODES[code]
        code, printed, _ = call(
            "train", *RUN, "keep_checkpoint=true", f"cache_dir={self.folder / 'cache'}",
            f"runs_dir={self.folder / 'runs'}",
        )  # fmt: skip
        done = record.load(run)
        if code == 0 and done.test != record.load(good).test and not edited:
            raise Failure(f"{done.test} is not the end of the uninterrupted run")
        ended = edited and done.status == "diverged"  # of weights that are numbers and no model's
        if code == 1 and not ended and (RAW.search(done.reason) or ".pt" not in done.reason):
            raise Failure(f"no reason for a user: {done.status} {done.reason}")
        return CODES[code]

    @staticmethod
    def change(random, path):
        """Writes a whole checkpoint of which something is another thing."""
        content = torch.load(path, weights_only=True)
        change_tree(random, content)
        with contextlib.suppress(Exception):  # not everything can be pickled
            torch.save(content, path)


class Cells:
    """The file of cells of `lra bench`, read by it and by the report."""

    name, share = "cells", 12

    @staticmethod
    def make(folder):
        model = {"layers": 2, "dim": 64, "heads": 2, "head_dim": 32, "ffn_dim": 128,
                 "vocab_size": 512, "dropout": 0.1, "attention_dropout": 0.0}  # fmt: skip
        device = {"kind": "cpu", "name": "CPU A", "threads": 2}
        given = cells.Conditions(32, True, 1, model, "fp32", device, "2.9.0")
        path = folder / "efficiency-cpu-fp32.jsonl"
        cells.append(path, cells.Ceilings("fp32", device, "2.9.0", 1e11, 1e10, "2025-01-01"))
        for number, (name, mode) in enumerate(
            (n, m) for n in ("softmax", "linear") for m in ("train", "infer", "decode")
        ):
            for length in (64, 128, 256):
                seconds = 1e-6 * length * (number + 1)
                made = None
                if mode == "decode":
                    made = cells.Decoding([4, 64], [seconds, seconds], [9.0, 8.0], [100, 200])
                spread = cells.Spread(seconds, 0.9 * seconds, 1.1 * seconds, 5)
                figures = cells.Figures(spread, 10**6 * length, "set", 100, 1e9, 1e9, made)
                status = ("ok", "oom")[length == 256 and name == "linear"]
                cells.append(path, cells.Measured(
                    cells.Cell(name, {}, mode, length, given), status, "", 8.0, 60.0, "2025-01-01",
                    "lra bench", figures if status == "ok" else None,
                ))  # fmt: skip

    def __init__(self, good, folder):
        self.good, self.folder = good, folder

    def case(self, random):
        path = self.folder / "efficiency-cpu-fp32.jsonl"
        put_back(path, self.good / path.name)
        if random.random() < 0.8:
            put_damaged_line(random, path)
        else:
            put_damaged(random, path)
        keep = lra.report.efficiency.draw
        if random.random() < 0.95:  # figures take a second
            lra.report.efficiency.draw = lambda *_: None
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                lra.report.efficiency.write(path)
        except (ValueError, OSError) as error:
            if path.name not in str(error) or RAW.search(str(error)):
                raise Failure(f"no message for a user: {error!r}") from error
            return "refused"
        finally:
            lra.report.efficiency.draw = keep
        return "accepted"


class Cache:
    """Prepared data: opened as it was, or made again."""

    name, share = "cache", 10

    @staticmethod
    def task(folder):
        options = {"num_train": 30, "num_val": 5, "num_test": 5, "min_length": 5, "max_length": 40}
        return build_task("listops", options, data_dir=folder / "data", cache_dir=folder / "cache")

    @classmethod
    def make(cls, folder):
        cls.task(folder).prepare()

    def __init__(self, good, folder):
        self.good, self.folder = good, folder
        self.whole = contents(self.task(good).prepare())

    def case(self, random):
        put_back(self.folder / "cache", self.good / "cache")
        task = self.task(self.folder)
        path = task.folder / random.choice(("manifest.json", *(f"{n}.arrow" for n in SPLITS)))
        if random.random() < 0.05:
            path = task.folder
            put_back(path, self.good / "cache" / path.name / "manifest.json")  # a file
        elif path.suffix == ".json" and random.random() < 0.7:
            path.write_bytes(damaged_json(random, path.read_text()))
        else:
            put_damaged(random, path)
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                state = task.state()[0]
                if random.random() < 0.3:
                    task.prepare()
                prepared = task.prepare(hashes="splits")
            except ValueError as error:
                if path != task.folder:
                    raise Failure("it is not made again") from error
                return "refused"
        if contents(prepared) != self.whole:
            raise Failure(f"other data than before, which was {state}")
        return state


def contents(prepared):
    """Returns all that a run takes of prepared data, and the hash that names it."""
    arrays = {
        name: [s[i].tobytes() for i in np.ndindex(s.lengths.shape)] + [s.labels.tobytes()]
        for name, s in prepared.splits.items()
    }
    return prepared.manifest["hash"], arrays


class PartFiles:
    """Finished parts of a long build: read as they were, or not there."""

    name, share = "parts", 2

    @staticmethod
    def make(folder):
        arrays = {"tokens": np.arange(60, dtype=np.uint8).reshape(6, 10), "labels": np.ones(6)}
        Parts(folder, "tiny").write(range(6), arrays)

    def __init__(self, good, folder):
        self.good, self.folder = good, folder

    def case(self, random):
        path = self.folder / "0-6.part"
        put_back(path, self.good / path.name)
        path.write_bytes(damaged(random, path.read_bytes()))
        if path.read_bytes() == (self.good / path.name).read_bytes():
            return "accepted"
        if Parts(self.folder, "tiny").has(range(6)):
            raise Failure("a damaged part is taken for whole")
        return "refused"


TARGETS = [Records, Checkpoints, Cells, Cache, PartFiles]
