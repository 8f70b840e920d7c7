"""Tables of `lra bench` from cells alone: what is compared, growth, crossings, published ratios."""

import csv
import dataclasses
import json
import math
from pathlib import Path

import pytest

from lra import cells
from lra.cells import Ceilings, Cell, Conditions, Decoding, Figures, Measured, Spread
from lra.report import efficiency, published_speed
from lra.report.scaling import crossover, exponent
from lra.report.table import Table
from models.attention import ATTENTIONS

MODEL = {
    "layers": 2,
    "dim": 64,
    "heads": 2,
    "head_dim": 32,
    "ffn_dim": 128,
    "vocab_size": 512,
    "dropout": 0.1,
    "attention_dropout": 0.0,
}
HERE = Conditions(
    batch=32,
    filled=True,
    micro_batches=1,
    model=MODEL,
    precision="fp32",
    device={"kind": "cpu", "name": "CPU A", "threads": 2},
    torch="2.9.0",
)
CEILINGS = Ceilings("fp32", HERE.device, HERE.torch, 100e9, 10e9, "2025-01-01T00:00:00+00:00")
LENGTHS = (1024, 2048, 3072, 4096)


def made(name, length, seconds=None, megabytes=100.0, status="ok", mode="train", **changes):
    """Returns a cell; ``seconds`` is the time of its step, if it has one."""
    decoding = changes.pop("decoding", None)
    options = changes.pop("options", {})
    given = dataclasses.replace(HERE, **changes)
    figures = None
    if seconds is not None:
        spread = Spread(seconds, 0.99 * seconds, 1.01 * seconds, 5)
        peak = round(1e6 * megabytes)
        figures = Figures(spread, peak, "resident set", 1000, 1e9, 1e9, decoding)
    return Measured(
        cell=Cell(name, options, mode, length, given),
        status=status,
        reason="" if status == "ok" else "reason",
        memory_gb=8.0,
        seconds=60.0,
        date="2025-01-01T00:00:00+00:00",
        command="lra bench",
        figures=figures,
    )


class Written:
    """What is written of given cells."""

    def __init__(self, folder, entries):
        self.path = folder / "efficiency-cpu-fp32.jsonl"
        for entry in entries:
            cells.append(self.path, entry)
        efficiency.write(self.path)
        self.markdown = self.path.with_suffix(".md").read_text()
        self.tex = self.path.with_suffix(".tex").read_text()
        with self.path.with_suffix(".csv").open(newline="") as file:
            self.csv = list(csv.DictReader(file))

    def table(self, heading, section=""):
        """Returns the rows of a table, by name, below a section's heading."""
        text = self.markdown[self.markdown.index(section) :]
        lines = text[text.index(f"### {heading}") :].split("\n\n")[1].splitlines()
        split = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        return {row[0]: dict(zip(split[0][1:], row[1:], strict=True)) for row in split[2:]}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes all but the figures, which take longer than the rest."""
    monkeypatch.setattr(efficiency, "draw", lambda *_: None)
    return lambda *entries: Written(tmp_path, entries)


# Tables


def test_figures_stand_beside_their_multiples_of_softmax(write):
    written = write(
        made("softmax", 1024, 0.5, 200),
        made("linear", 1024, 0.25, 50),
        made("softmax", 2048, 2.0, 400),
        made("linear", 2048, 0.5, 100),
    )
    rows = written.table("Steps per second")
    assert list(rows) == ["softmax", "linear"]
    assert rows["softmax"] == {
        "1,024 steps/s": "2.00",
        "2,048 steps/s": "0.5",
        "1,024 MB": "200",
        "2,048 MB": "400",
    }
    assert rows["linear"] == {
        "1,024 steps/s": "4.00 (2.00)",
        "2,048 steps/s": "2.00 (4.00)",
        "1,024 MB": "50.0 (0.25)",
        "2,048 MB": "100 (0.25)",
    }


def test_limits_are_marked_and_leave_the_ratio_out(write):
    written = write(
        made("softmax", 1024, 0.5),
        made("softmax", 2048, status="oom"),
        made("linear", 1024, status="timeout"),
        made("linear", 2048, 0.5),
        made("local", 1024, status="failed"),
    )
    rows = written.table("Steps per second")
    assert rows["softmax"]["2,048 steps/s"] == rows["softmax"]["2,048 MB"] == "✗"
    assert rows["linear"]["1,024 steps/s"] == ">60 s"
    assert rows["linear"]["2,048 steps/s"] == "2.00"
    assert rows["local"]["1,024 steps/s"] == "failed"
    assert rows["local"]["2,048 steps/s"] == "–"
    assert "✗: more than 8 GB." in written.markdown
    assert "local 1,024 failed: reason." in written.markdown


@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 8},
        {"filled": False},
        {"micro_batches": "auto"},
        {"model": MODEL | {"layers": 3}},
        {"device": {"kind": "cpu", "name": "CPU B", "threads": 2}},
        {"device": {"kind": "cpu", "name": "CPU A", "threads": 1}},
        {"torch": "2.8.0"},
    ],
)
def test_other_conditions_are_another_table(write, changes):
    written = write(made("softmax", 1024, 0.5), made("linear", 1024, 0.25, **changes))
    assert written.markdown.count("## Training step") == 2
    assert "(" not in "".join(
        cell for row in written.table("Steps per second").values() for cell in row.values()
    )


def test_a_heading_tells_all_conditions(write):
    [line] = [s for s in write(made("softmax", 1024, 0.5)).markdown.splitlines() if "CPU A" in s]
    assert line == (
        "CPU A, 2 threads, fp32, torch 2.9.0; batch 32, 2 layers of 64 dimensions, 2 heads of 32, "
        "feed-forward 128, vocabulary 512, dropout 0.1, attention dropout 0; all positions filled, "
        "batches whole; memory: resident set, above what was held before the model; 2025-01-01; "
        "`lra bench`."
    )


def test_options_make_a_row_of_their_own(write):
    rfa = [made("rfa", 1024, 0.5, options={"kernel": k}) for k in ("arccos", "gaussian")]
    assert list(write(*rfa).table("Steps per second")) == [
        "rfa kernel=arccos",
        "rfa kernel=gaussian",
    ]


def test_the_same_cells_give_the_same_bytes(tmp_path):
    entries = [made(n, x, 0.5 + x / 1e4) for n in ("softmax", "linear") for x in LENGTHS]
    written = Written(tmp_path, [CEILINGS, *entries])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {Path(name).suffix for name in before} == {".jsonl", ".md", ".csv", ".tex", ".png"}
    efficiency.write(written.path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_csv_has_unrounded_figures(write):
    written = write(CEILINGS, made("softmax", 1024, 0.123456789), made("linear", 1024, 0.1))
    first = written.csv[0]
    assert float(first["seconds"]) == 0.123456789
    assert float(written.csv[1]["speed_vs_softmax"]) == pytest.approx(1.23456789)
    assert float(first["floor_seconds"]) == 0.1


def test_the_share_of_the_floor_is_of_the_slower_of_products_and_memory(write):
    written = write(CEILINGS, made("softmax", 1024, 0.5))  # 0.01 s of products, 0.1 s of memory
    row = written.table("The floor of a step")["softmax"]
    assert row == {"GFLOP": "1.00", "GB": "1.00", "bound by": "memory", "1,024": "20%"}


def test_latex_has_no_character_that_it_would_take_for_a_command():
    table = Table("50 % & more_", ["attention", "N"], [["rfa kernel=a_b", "✗"]], ["≤ 1"])
    tex = table.tex("`lra bench` {x}")
    assert r"\caption{50 \% \& more\_. lra bench \{x\} $\leq$ 1}" in tex
    assert r"rfa kernel=a\_b & $\times$ \\" in tex
    assert "`" not in tex


# Growth and crossings


def test_a_power_law_has_its_exponent():
    assert exponent({n: 3e-6 * n**1.5 for n in LENGTHS}) == pytest.approx(1.5)
    assert exponent({1024: 1.0, 2048: 2.0, 4096: None}) is None


@pytest.mark.parametrize(
    ("ours", "base", "expected"),
    [
        # t = N against t = N^2 / 2,000: equal at N = 2,000.
        ({n: n for n in LENGTHS}, {n: n**2 / 2000 for n in LENGTHS}, 2000.0),
        (dict.fromkeys(LENGTHS, 1.0), dict.fromkeys(LENGTHS, 2.0), 1024),
        (dict.fromkeys(LENGTHS, 2.0), dict.fromkeys(LENGTHS, 1.0), math.inf),
        # Below, above, and below again: the last time counts.
        ({1: 1.0, 2: 4.0, 4: 1.0}, {1: 2.0, 2: 2.0, 4: 2.0}, 2 * 2**0.5),
        # Where softmax has no figure, whatever has one beats it.
        ({1: 2.0, 2: 4.0}, {1: 1.0, 2: None}, 2),
        ({1: 1.0, 2: None}, {1: 2.0, 2: 2.0}, math.inf),
        ({1: 1.0}, {2: 1.0}, None),
        ({2: None}, {2: None}, None),
    ],
)
def test_the_length_from_which_softmax_is_beaten(ours, base, expected):
    found = crossover(ours, base)
    assert found == expected if expected is None else found == pytest.approx(expected)


def test_growth_and_crossings_stand_in_a_table(write):
    softmax = [made("softmax", n, n**2 / 1e6, n) for n in LENGTHS]
    linear = [made("linear", n, n / 500, 2 * n) for n in LENGTHS]
    rows = write(*softmax, *linear).table("Growth")
    assert rows["softmax"]["time ~ N^"] == "2.00"
    assert rows["linear"] == {
        "time ~ N^": "1.00",
        "memory ~ N^": "1.00",
        "faster from N =": "2,000",
        "less memory from N =": "not up to 4,096",
    }


# Generation


def generation(name, seconds, state_bytes, length=64):
    decoding = Decoding([4, 64], seconds, [100.0, 50.0], state_bytes)
    return made(name, length, seconds[-1], mode="decode", decoding=decoding)


def test_generation_is_flat_within_15_percent(write):
    written = write(
        generation("softmax", [0.010, 0.040], [10, 10]),
        generation("linear", [0.010, 0.0114], [10, 10]),
        generation("local", [0.0116, 0.010], [10, 20]),
    )
    rows = written.table("Milliseconds a token, generating 64 tokens")
    assert rows["linear"]["variation"] == "flat, 14%"
    assert rows["local"]["variation"] == "16%"
    assert rows["softmax"]["variation"] == "300%"
    assert rows["linear"]["speed vs softmax"] == "3.51"
    assert rows["linear"]["ms at 4"] == "10"
    assert (rows["linear"]["state"], rows["local"]["state"]) == ("constant", "growing")


def test_a_generation_without_figures_is_marked(write):
    written = write(
        generation("linear", [0.01, 0.01], [10, 10]),
        made("softmax", 64, status="timeout", mode="decode"),
    )
    rows = written.table("Milliseconds a token, generating 64 tokens")
    assert rows["softmax"]["ms at 4"] == ">60 s"


# Published


def test_published_rows_are_ratios_with_source_and_hardware(write):
    written = write(
        *(made("softmax", n, 1.0) for n in LENGTHS), *(made("cosformer", n, 0.5) for n in LENGTHS)
    )
    rows = written.table("Published speed")
    ours, *sources = rows["cosformer"].values()
    assert ours == "2.00 / 2.00 / 2.00 / 2.00"
    paper = "cosFormer (Qin et al. 2022), Table 5; one A6000, JAX"
    assert rows["cosformer"][paper] == "1.77 / 2.57 / – / –"  # 12.27/6.95, 5.72/2.23, softmax: OOM
    assert len(sources) == 3
    assert "5.72" not in written.markdown  # no absolute figure of other hardware


def test_a_published_cross_stays_a_cross(write):
    rows = write(
        *(made(name, 3072, 1.0) for name in ("softmax", "synthesizer")),
    ).table("Published speed")
    [cell] = [v for k, v in rows["synthesizer"].items() if k.startswith("cosFormer")]
    assert cell == "0.92 / 0.90 / ✗ / ✗"


def test_published_rows_carry_our_names_and_whole_rows():
    path = Path(published_speed.__file__).with_name("published_speed.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["model"].split()[0] for row in rows} <= set(ATTENTIONS.names())
    quantities = {q for listed in published_speed.QUANTITIES.values() for q, _ in listed}
    assert {row["quantity"] for row in rows} == quantities
    assert all(row["source"] and row["hardware"] for row in rows)
    assert len({tuple(row.values())[:5] for row in rows}) == len(rows)


# The file of cells


def test_the_latest_line_of_a_cell_counts(tmp_path):
    path = tmp_path / "cells.jsonl"
    for seconds in (1.0, 2.0):
        cells.append(path, made("softmax", 1024, seconds))
    [one] = cells.load(path).cells.values()
    assert one == made("softmax", 1024, 2.0)


def test_a_line_that_was_cut_is_left_out_and_removed(tmp_path):
    path = tmp_path / "cells.jsonl"
    cells.append(path, made("softmax", 1024, 1.0))
    with path.open("a") as file:
        file.write('{"cell": {"atten')
    assert len(cells.load(path).cells) == 1
    cells.append(path, made("linear", 1024, 1.0))
    assert len(cells.load(path).cells) == 2
    assert len(path.read_text().splitlines()) == 2


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "cells.jsonl"
    cells.append(path, made("softmax", 1024, 1.0))
    path.write_text("{}\n" + path.read_text())
    with pytest.raises(ValueError, match=r"(?s)cells\.jsonl, line 1: .*Delete the line"):
        cells.load(path)


@pytest.mark.parametrize(
    ("status", "memory_gb", "seconds", "holds"),
    [
        ("ok", 1.0, 1.0, True),
        ("oom", 8.0, 60.0, True),
        ("oom", 4.0, 60.0, True),
        ("oom", 9.0, 60.0, False),
        ("oom", None, 60.0, False),
        ("timeout", 9.0, 60.0, True),
        ("timeout", 8.0, 61.0, False),
        ("failed", 8.0, 60.0, False),
    ],
)
def test_a_result_holds_under_limits_that_are_not_wider(status, memory_gb, seconds, holds):
    measured = made("softmax", 1024, 1.0 if status == "ok" else None, status=status)
    assert measured.holds(memory_gb, seconds) is holds


def put(change):
    """Returns a line of the file of cells in which something is another thing."""
    values = dataclasses.asdict(generation("softmax", [0.1, 0.1], [100, 200]))
    change(values)
    return json.dumps(values).encode()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b"[]", "no JSON object"),
        (b"\xff{}", "its byte 0 is not UTF-8"),
        (b"[" * 100_000, "nested more than"),
        (put(lambda v: v["figures"]["step"].update(median=0.0)), "figures.step: times must be"),
        (put(lambda v: v["figures"]["step"].update(low=math.nan)), "figures.step: times must be"),
        (put(lambda v: v["figures"]["decoding"].update(seconds=[])), "lists must be of one length"),
        (put(lambda v: v["figures"]["decoding"].update(state_bytes=[0, 10**400])), "state_bytes"),
        (put(lambda v: v["figures"].update(decoding=None)), "mode=decode"),
        (put(lambda v: v["figures"].update(flops=-1)), "numbers must be finite"),
        (put(lambda v: v.update(figures=None)), "a cell has figures if it is ok"),
        (put(lambda v: v["cell"]["conditions"].update(batch=10**30)), "batch and threads must"),
        (put(lambda v: v["cell"].update(length=0)), "length must be at least 1"),
        (put(lambda v: v["cell"]["conditions"]["model"].pop("dim")), "model.dim is not set"),
        (put(lambda v: v["cell"]["conditions"].update(device={})), "device.name is not set"),
    ],
)
def test_a_line_that_tables_cannot_be_made_of_is_named(tmp_path, line, told):
    path = tmp_path / "cells.jsonl"
    cells.append(path, made("softmax", 1024, 1.0))
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(ValueError, match=r"cells\.jsonl, line 2: .*Delete the line") as error:
        cells.load(path)
    assert told in str(error.value)
