"""Data files of every task that `tests/fuzz.py` damages: prepared properly, or refused by name."""

import contextlib
import io
import random as randomness
import shutil
from types import MappingProxyType

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
from fuzz_commands import RAW, Failure
from fuzz_files import contents
from fuzz_mutations import damaged, put_back, put_damaged

from lra.tasks import build_task
from lra.tasks._listops import decode
from lra.tasks._listops_generator import generate


class DataFiles:
    """A task's source files, below a folder ``data``."""

    task: str
    options = MappingProxyType({})
    share = 7
    followed = True
    """Whether a change of any of the files is noticed, and so prepared data is made again."""

    @classmethod
    def build(cls, folder):
        places = {"data_dir": folder / "data", "cache_dir": folder / "cache"}
        return build_task(cls.task, cls.options, **places)

    @classmethod
    def make(cls, folder):
        cls.write(folder / "data")
        with contextlib.redirect_stderr(io.StringIO()):
            cls.build(folder).prepare()

    def __init__(self, good, folder):
        self.good, self.folder = good, folder
        self.whole = contents(self.build(good).prepare())
        self.files = [p.relative_to(good) for p in sorted((good / "data").rglob("*"))]
        self.files = [path for path in self.files if (good / path).is_file()]

    def case(self, random):
        for name in ("data", "cache"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        put_back(self.folder / "data", self.good / "data")
        path = self.folder / random.choice(self.files)
        if random.random() < 0.5:
            self.change(random, path)
        else:
            put_damaged(random, path)
        task, outcome = self.build(self.folder), "accepted"
        told = io.StringIO()
        with contextlib.redirect_stderr(told):
            try:
                task.state("all"), task.origin()
                contents(task.prepare())
            except ValueError as error:
                outcome = "refused"
                named = {path.name, path.parent.name, *self.also_named}
                if RAW.search(str(error)) or not any(name in str(error) for name in named):
                    raise Failure(f"no message for a user: {error}") from error
                left = [p.name for p in task.cache_dir.glob("*") if p.suffix != ".lock"]
                if left:
                    raise Failure(f"{left} is left in the cache") from error
            put_back(path, self.good / path.relative_to(self.folder))
            if outcome == "accepted" and not self.followed:
                shutil.rmtree(task.folder)
            if contents(task.prepare(hashes="all")) != self.whole:
                raise Failure("the good files do not make the same data again")
        return outcome

    also_named = ()

    def change(self, random, path):
        """Writes a whole file with wrong content."""
        put_damaged(random, path)


class ListOpsFiles(DataFiles):
    name = "listops files"
    task, options = "listops", {"source": "official"}

    @staticmethod
    def write(data):
        folder = data / "listops"
        folder.mkdir(parents=True)
        tokens, offsets, labels = generate(
            24, min_length=3, max_length=30, max_depth=4, max_args=4, seed=0, processes=1,
            progress=lambda count: None,
        )  # fmt: skip
        for i, name in enumerate(("train", "val", "test")):
            rows = [
                f"{decode(tokens[offsets[j] : offsets[j + 1]])}\t{labels[j]}"
                for j in range(8 * i, 8 * i + 8)
            ]
            (folder / f"basic_{name}.tsv").write_text("\r\n".join(["Source\tTarget", *rows, ""]))

    def change(self, random, path):
        lines = path.read_bytes().split(b"\r\n")
        place = random.randrange(len(lines))
        cells = lines[place].split(b"\t")
        cells[random.randrange(len(cells))] = random.choice(
            (b"", b"10", b"-1", b"x", b"7.0", b"[MAX", b"]", b"( 1", b") 2", b"[MAX 1 2 ] ]",
             b"[" * 9000, b"[MAX " * 3000 + b"1" + b" ]" * 3000, b"1 2", "\u0663".encode(), b"\xff")
        )  # fmt: skip
        lines[place] = random.choice((b"\t", b"\t", b" ", b"\t\t")).join(cells)
        path.write_bytes(b"\r\n".join(lines))


class PairFiles(DataFiles):
    name, task = "retrieval files", "retrieval"

    @staticmethod
    def write(data):
        (data / "aan").mkdir(parents=True)
        for name in ("train", "eval", "test"):
            rows = [f"{i % 2}.0\tA{i}\tB{i}\ttext é {i}\tother {name}" for i in range(6)]
            (data / "aan" / f"new_aan_pairs.{name}.tsv").write_text("\n".join([*rows, ""]))

    def change(self, random, path):
        lines = path.read_bytes().split(b"\n")
        place = random.randrange(len(lines))
        cells = lines[place].split(b"\t")
        cells[random.randrange(len(cells))] = random.choice(
            (b"", b"2", b"nan", b"1e0", b" 1", b"x" * 300_000, b"\xff\xfe", b"\xf5", b'"', b"\t\t")
        )
        lines[place] = b"\t".join(cells)
        path.write_bytes(b"\n".join(lines))


class Papers(DataFiles):
    name, task, options = "citations files", "citations", {"max_length": 50}
    also_named = ("The train split", "The val split", "The test split")

    @staticmethod
    def write(data):
        (data / "aan").mkdir(parents=True)
        random = randomness.Random(0)
        ids = [f"P{i}" for i in range(60)]
        links = sorted({tuple(random.sample(ids, 2)) for _ in range(400)})
        table = pa.table({"id": ids, "text": [f"text {i} é" * (i % 9 + 1) for i in range(60)]})
        pq.write_table(table, data / "aan" / "papers.parquet", row_group_size=25)
        rows = ["citing\tcited", *map("\t".join, links), ""]
        (data / "aan" / "citations.tsv").write_text("\n".join(rows))

    def change(self, random, path):
        if path.suffix == ".parquet":
            write_table(random, pq.read_table(path), path)
            return
        lines = path.read_bytes().split(b"\n")
        lines[random.randrange(len(lines))] = random.choice(
            (b"", b"P1", b"P1\tP1", b"P1\tP2\tP3", b"\t", b"P1\t", b"p1\tP2", b"P1\tP2 ", b"\xff\t",
             b"x" * 100_000, b"citing\tcited", b"P1\tP2\r")
        )  # fmt: skip
        path.write_bytes(b"\n".join(lines))


def write_table(random, table, path):
    """Writes a table of which a column is another, as a whole parquet file."""
    name = random.choice(table.column_names)
    count = len(table)
    place = table.column_names.index(name)
    columns = {
        "of nulls": pa.array([None] * count, table.column(name).type),
        "of null type": pa.nulls(count),
        "of numbers": pa.array(np.linspace(-3, 300, count)),
        "of large integers": pa.array([2**62 + i for i in range(count)]),
        "of negative integers": pa.array([-i for i in range(count)]),
        "of bytes": pa.array([b"\xff\x00" * i for i in range(count)]),
        "of texts": pa.array([f"t{i}" for i in range(count)]),
        "of empty texts": pa.array([""] * count),
        "of spaces": pa.array(["  "] * count),
        "of lists": pa.array([[i] for i in range(count)]),
        "of structs": pa.array([{"bytes": b"x", "path": None}] * count),
        "of other structs": pa.array([{"other": i} for i in range(count)]),
        "of booleans": pa.array([i % 2 == 0 for i in range(count)]),
        "of words of a dictionary": pa.array(["a", "b"] * count)[:count].dictionary_encode(),
        "of times": pa.array(range(count), pa.timestamp("s")),
        "of decimals": pa.array(range(count), pa.decimal128(38, 2)),
    }
    kind = random.choice((*columns, "missing", "twice", "empty", "shorter", "renamed", "one null"))
    if kind in columns:
        table = table.set_column(place, name, columns[kind])
    elif kind == "missing":
        table = table.drop_columns([name])
    elif kind == "twice":
        table = table.append_column(name, table.column(name))
    elif kind in ("empty", "shorter"):
        table = table.slice(0, 0 if kind == "empty" else random.randrange(count))
    elif kind == "renamed":
        table = table.rename_columns([n.upper() if n == name else n for n in table.column_names])
    else:
        values = table.column(name).to_pylist()
        values[random.randrange(count)] = None
        table = table.set_column(place, name, pa.array(values, table.column(name).type))
    compression = random.choice(("snappy", "zstd", "none", "gzip"))
    pq.write_table(table, path, compression=compression, row_group_size=random.choice((7, 1000)))


class Reviews(DataFiles):
    name, task = "text parquet files", "text"
    also_named = ("There is no example for",)

    @staticmethod
    def write(data):
        (data / "imdb").mkdir(parents=True)
        for name, count in (("train", 30), ("test", 10)):
            table = pa.table({
                "text": [f"review {i} é of {name}" for i in range(count)],
                "label": [i % 2 for i in range(count)],
            })  # fmt: skip
            pq.write_table(table, data / "imdb" / f"{name}-00000-of-00001.parquet")

    def change(self, random, path):
        write_table(random, pq.read_table(path), path)


class ReviewFolder(DataFiles):
    name, task = "text folder", "text"
    followed = False
    also_named = ("aclImdb",)

    @staticmethod
    def write(data):
        for name in ("train", "test"):
            for label in ("neg", "pos"):
                folder = data / "aclImdb" / name / label
                folder.mkdir(parents=True)
                for i in range(6):
                    (folder / f"{i}_1.txt").write_text(f"{name} {label} é {i}")


class Pictures(DataFiles):
    name, task = "image parquet files", "image"
    also_named = ("There is no example for",)

    @staticmethod
    def write(data):
        (data / "cifar10").mkdir(parents=True)
        draws = np.random.default_rng(0)
        for name, count in (("train", 20), ("test", 5)):
            images = [
                {"bytes": png(draws.integers(0, 256, (32, 32, 3), np.uint8)), "path": None}
                for _ in range(count)
            ]
            table = pa.table({"img": images, "label": [i % 10 for i in range(count)]})
            pq.write_table(table, data / "cifar10" / f"{name}-00000-of-00001.parquet")

    def change(self, random, path):
        table = pq.read_table(path)
        if random.random() < 0.5:
            write_table(random, table, path)
            return
        images = table.column("img").to_pylist()
        image = random.choice(images)
        image["bytes"] = damaged(random, image["bytes"])
        pq.write_table(table.set_column(0, "img", pa.array(images)), path)


def png(pixels):
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


class Curves(DataFiles):
    name, task, options = "pathfinder files", "pathfinder", {"source": "official"}
    followed = False

    @staticmethod
    def write(data):
        folder = data / "pathfinder32" / "curv_contour_length_14"
        (folder / "metadata").mkdir(parents=True)
        draws = np.random.default_rng(0)
        for batch in (0, 1):
            (folder / "imgs" / str(batch)).mkdir(parents=True)
            lines = []
            for i in range(10):
                file = folder / "imgs" / str(batch) / f"sample_{i}.png"
                file.write_bytes(png(draws.integers(0, 256, (32, 32), np.uint8)))
                lines.append(f"imgs/{batch} sample_{i}.png {i} {i % 2} 1.0 6 2 2 0.5 1 1\n")
            (folder / "metadata" / f"{batch}.npy").write_text("".join(lines))

    also_named = ("curv_contour_length_14",)

    def change(self, random, path):
        if path.suffix == ".png":
            kind = random.choice(("L", "RGB", "RGBA", "1", "I;16", "P", "LA"))
            size = random.choice(((32, 32), (32, 32), (16, 64), (1, 1)))
            form = random.choice(("PNG", "PNG", "JPEG", "GIF", "BMP"))
            with contextlib.suppress(OSError, ValueError):
                PIL.Image.new(kind, size).save(path, form)
            return
        lines = path.read_bytes().split(b"\n")
        place = random.randrange(len(lines))
        cells = lines[place].split(b" ")
        cells[random.randrange(len(cells))] = random.choice(
            (
                b"",
                b"2",
                b"-1",
                b"x y",
                b"..",
                b"../../..",
                b"/",
                b"\xff",
                b"\x00",
                b"a" * 5000,
                b"1.0",
            )
        )
        lines[place] = b" ".join(cells)
        path.write_bytes(b"\n".join(lines))


TARGETS = [ListOpsFiles, PairFiles, Papers, Reviews, ReviewFolder, Pictures, Curves]
