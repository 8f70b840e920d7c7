"""`lra bench`: cells of a second, their limits, what is kept, and how memory is measured."""

import json
import mmap
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hydra.core.config_store import ConfigStore
from torch.utils.flop_counter import FlopCounterMode

from lra import cells
from lra.bench import cell as bench_cell
from lra.bench.floor import classifier_floor, decoding_floor
from lra.bench.limits import default_memory_gb, limit_own_memory, watch
from lra.bench.plan import plan
from lra.bench.run import PROCESSES, bench
from lra.build import build_classifier
from lra.cli import main
from lra.config import ModelConfig
from lra.measure import failure
from models.attention import ATTENTIONS, capabilities
from models.decoder import Decoder
from models.encoder import EncoderShape

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="limits and peaks are Linux's")

SMALL = (
    "device=cpu",
    "threads=1",
    "model.layers=1",
    "model.dim=16",
    "model.head_dim=8",
    "model.ffn_dim=32",
    "repetitions=[2,3]",
    "measure_seconds=0",
)
TEXT = (*SMALL, "batch=2", "lengths=16,32,64", "model.classifier_dims=[16]")
DECODE = (*SMALL, "mode=decode", "model.heads=2", "batch=3")

PLUGIN = """
import os
import time
from dataclasses import dataclass

import torch

from models.attention import register_attention
from models.attention.linear import Linear


@register_attention("heavy")
class Heavy(Linear):
    @dataclass(frozen=True)
    class Config:
        feature: str = "relu"
        megabytes: int = 0
        nap: float = 0.0
        exit_code: int = 0

    def attend(self, q, k, v, context):
        held = torch.ones(self.config.megabytes * 250_000)
        if self.config.nap:
            with open("pid", "w") as file:
                file.write(str(os.getpid()))
            time.sleep(self.config.nap)
        if self.config.exit_code:
            os._exit(self.config.exit_code)
        return super().attend(q, k, v, context)
"""


def lines(out):
    """Returns the lines of the file of cells in a folder."""
    [path] = out.glob("*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def measured(out):
    """Returns the cells in a folder by name, mode and length."""
    [path] = out.glob("*.jsonl")
    found = cells.load(path).cells.values()
    return {(m.cell.name, m.cell.mode, m.cell.length): m for m in found}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a whole small benchmark."""
    out = tmp_path_factory.mktemp("finished")
    assert bench(["attention=softmax,cosformer", *TEXT, f"out={out}"]) == 0
    return out


@pytest.fixture
def heavy(tmp_path, monkeypatch):
    """Measures the plugin above with some options; returns the exit code and the folder."""
    monkeypatch.setattr("lra.report.efficiency.draw", lambda *_: None)  # figures take a second
    (tmp_path / "heavy_plugin.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"

    def run(*overrides):
        asked = ["plugins=[heavy_plugin]", "mode=infer", *TEXT, "lengths=16", f"out={out}"]
        code = bench([*asked, *overrides])
        return code, out

    yield run
    ATTENTIONS._entries.pop("heavy", None)
    ConfigStore.instance().repo["attention"].pop("heavy.yaml", None)
    sys.modules.pop("heavy_plugin", None)


# What is measured


def test_every_cell_of_the_grid_is_measured(finished):
    found = measured(finished)
    grid = [
        (name, mode, n)
        for name in ("softmax", "cosformer")
        for mode in ("train", "infer")
        for n in (16, 32, 64)
    ]
    assert sorted(found) == sorted(grid)
    for m in found.values():
        assert m.status == "ok"
        step = m.figures.step
        assert 0 < step.low <= step.median <= step.high < 1
        assert step.repetitions == 2
        assert m.figures.flops > 1e4
        assert m.command.startswith("lra bench attention=softmax,cosformer")
    made = [line["cell"] for line in lines(finished)[1:]]
    order = [(one["attention"], one["mode"], one["length"]) for one in made]
    assert order != grid  # shuffled


def test_a_training_step_costs_more_than_a_forward_pass(finished):
    found = measured(finished)
    for name in ("softmax", "cosformer"):
        train, infer = found[name, "train", 64].figures, found[name, "infer", 64].figures
        assert train.step.median > infer.step.median
        assert train.flops == pytest.approx(3 * infer.flops)
        assert train.bytes > infer.bytes


def test_the_ceilings_are_measured_in_the_same_run(finished):
    first, *others = lines(finished)
    assert 1e9 < first["flops_per_second"] < 1e13
    assert 1e8 < first["bytes_per_second"] < 1e12
    assert all("cell" in line for line in others)


def test_tables_and_a_figure_are_written_with_all_conditions(finished):
    names = {path.name for path in finished.iterdir()}
    stem = "efficiency-cpu-fp32"
    assert names == {f"{stem}{end}" for end in (".jsonl", ".md", ".csv", ".tex", "-b2-1x16.png")}
    markdown = (finished / f"{stem}.md").read_text()
    for told in ("1 threads", "fp32", f"torch {torch.__version__}", "batch 2", "1 layers of 16"):
        assert told in markdown
    assert (finished / f"{stem}-b2-1x16.png").read_bytes().startswith(b"\x89PNG")


# What is kept


def test_the_same_command_measures_nothing_and_writes_the_same_bytes(finished):
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    assert bench(["attention=softmax,cosformer", *TEXT, f"out={finished}"]) == 0
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_a_cut_benchmark_goes_on_with_what_is_missing(finished, tmp_path):
    [path] = finished.glob("*.jsonl")
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes()[:-100])  # within the last line
    last = lines(finished)[-1]["cell"]
    assert len(cells.load(copy).cells) == 11
    assert bench(["attention=softmax,cosformer", *TEXT, f"out={tmp_path}"]) == 0
    ours = lines(tmp_path)
    assert len(ours) == 14  # the ceilings again, and one cell
    assert ours[-1]["cell"] == last
    assert ours[:12] == lines(finished)[:12]


def test_reuse_never_measures_again(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    asked = ["attention=softmax", *TEXT, "lengths=16", "mode=infer", f"out={tmp_path}"]
    assert bench([*asked, "reuse=never"]) == 0
    assert len(lines(tmp_path)) == len(lines(finished)) + 2
    old, new = (measured(folder)["softmax", "infer", 16] for folder in (finished, tmp_path))
    assert old.cell == new.cell
    assert old != new


def test_two_benchmarks_do_not_write_to_one_file(finished):
    [path] = finished.glob("*.jsonl")
    holder = f"import fcntl, time\nf = open({str(path)!r}, 'a')\nfcntl.flock(f, fcntl.LOCK_EX)\n"
    holder += "print('held', flush=True)\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"held\n"
            with pytest.raises(ValueError, match="Another lra bench is writing"):
                bench(["attention=softmax", *TEXT, f"out={finished}"])
        finally:
            process.kill()


# Memory and time


@LINUX
def test_the_peak_of_a_cell_is_that_of_a_tensor_of_known_size(heavy):
    for size in (100, 300):
        code, out = heavy("attention=heavy", f"attention.megabytes={size}")
        assert code == 0
    peaks = {name: m.figures.peak_bytes for (name, _, _), m in measured(out).items()}
    small, large = (peaks[f"heavy megabytes={size}"] for size in (100, 300))
    assert large - small == pytest.approx(200e6, rel=0.03)
    assert 100e6 <= small <= 130e6  # and what the layer itself needs


@LINUX
def test_a_cell_beyond_its_memory_is_a_cross_and_the_others_go_on(heavy):
    asked = ("attention=softmax,heavy", "attention.megabytes=1000")
    with pytest.raises(ValueError, match=r"attention\.megabytes"):
        heavy(*asked)  # no option of softmax
    limit = "memory_gb=0.9"
    assert heavy("attention=softmax", limit)[0] == 0
    code, out = heavy("attention=heavy", "attention.megabytes=1000", limit)
    assert code == 0
    found = measured(out)
    assert found["softmax", "infer", 16].status == "ok"
    cell = found["heavy megabytes=1000", "infer", 16]
    assert (cell.status, cell.memory_gb) == ("oom", 0.9)
    markdown = (out / "efficiency-cpu-fp32.md").read_text()
    [row] = [s for s in markdown.splitlines() if s.startswith("| heavy")][:1]
    assert row.count("✗") == 2
    assert "✗: more than 0.9 GB." in markdown
    before = len(lines(out))
    heavy("attention=heavy", "attention.megabytes=1000", "memory_gb=0.8")
    assert len(lines(out)) == before  # it would tell nothing new
    heavy("attention=heavy", "attention.megabytes=1000", "memory_gb=4")
    assert measured(out)["heavy megabytes=1000", "infer", 16].status == "ok"


def hold(megabytes, shared, limited):
    """Touches memory, as tensors or behind the kernel's count of anonymous memory; exits with 7."""
    if limited:
        limit_own_memory(limited)
    try:
        if shared:
            memory = mmap.mmap(-1, megabytes * 1_000_000)
            for i in range(0, len(memory), 4096):
                memory[i] = 1
        else:
            held = torch.ones(megabytes * 250_000)
            del held
    except RuntimeError as error:
        sys.exit(7 if failure(error)[0] == "oom" else 1)
    time.sleep(0.2)


@LINUX
@pytest.mark.parametrize(
    ("megabytes", "shared", "ended"),
    [
        (200, False, 0),
        (900, False, 7),  # refused from inside
        (900, True, "oom"),  # seen from outside
    ],
)
def test_memory_is_limited_from_inside_and_from_outside(megabytes, shared, ended):
    process = PROCESSES.Process(target=hold, args=(megabytes, shared, 0.7))
    process.start()
    outcome = watch(process, 0.7, 30)
    assert (outcome[0] if outcome else process.exitcode) == ended


@LINUX
def test_a_process_ends_when_the_machine_has_no_memory_left(monkeypatch):
    monkeypatch.setattr("lra.bench.limits.RESERVE", 1.0)  # as if all of it were needed
    process = PROCESSES.Process(target=time.sleep, args=(30,))
    process.start()
    status, reason = watch(process, 1000, 30)
    assert status == "oom"
    assert reason.startswith("the machine had less than")


@LINUX
def test_the_default_limit_leaves_a_quarter_of_the_machine():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    assert 0 < default_memory_gb() <= 0.75 * total + 0.1


def test_a_cell_beyond_its_time_is_marked(heavy):
    code, out = heavy("attention=heavy", "attention.nap=60", "seconds=3")
    assert code == 0
    cell = measured(out)["heavy nap=60.0", "infer", 16]
    assert (cell.status, cell.reason) == ("timeout", "more than 3 s")
    assert ">3 s" in (out / "efficiency-cpu-fp32.md").read_text()


def test_a_crash_is_told_and_fails_the_command(heavy):
    code, out = heavy("attention=heavy", "attention.exit_code=3")
    assert code == 1
    cell = measured(out)["heavy exit_code=3", "infer", 16]
    assert cell.status == "failed"
    assert "exit code 3" in cell.reason


@LINUX
def test_a_signal_ends_the_cell_too_and_keeps_what_is_finished(tmp_path, environment):
    (tmp_path / "heavy_plugin.py").write_text(PLUGIN)
    asked = ["plugins=[heavy_plugin]", "attention=heavy", "attention.nap=60", "mode=infer", *TEXT]
    command = [sys.executable, "-m", "lra", "bench", *asked, "lengths=16", "out=out"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE)
    pid = tmp_path / "pid"
    end = time.monotonic() + 60
    while not (pid.exists() and pid.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert not os.path.exists(f"/proc/{pid.read_text()}")
    assert len(lines(tmp_path / "out")) == 1  # the ceilings


@pytest.mark.parametrize(
    ("count", "spent", "again"),
    [
        (0, 0.0, True),
        (2, 0.1, True),  # fewer than asked for
        (3, 0.1, True),  # less time than asked for
        (3, 1.1, False),
        (8, 0.1, False),  # no more than asked for
        (1, 60.0, False),  # another one would not end in time
    ],
)
def test_how_often_a_step_is_repeated(count, spent, again):
    job = bench_cell.Job(None, "cpu", "fp32", 1, None, time.time() + 50, (3, 8), 1.0, [])
    assert bench_cell.more(count, spent, job) is again


# Lengths


def test_all_positions_are_filled_or_lengths_are_those_of_reviews():
    assert set(bench_cell.examples(8, 64, filled=True).lengths) == {64}
    lengths = bench_cell.examples(20_000, 4096, filled=False).lengths
    assert lengths.max() == 4096
    assert lengths.min() >= 32
    assert np.median(lengths) == pytest.approx(1050, rel=0.03)
    assert lengths.mean() == pytest.approx(0.3136 * 4096, rel=0.03)  # of IMDb, cut at 4,096


def test_real_lengths_are_other_conditions(tmp_path):
    asked = ["attention=linear", "mode=infer", *TEXT, "lengths=64", f"out={tmp_path}"]
    bench(asked)
    bench([*asked, "filled=false"])
    markdown = (tmp_path / "efficiency-cpu-fp32.md").read_text()
    assert markdown.count("## Inference step") == 2
    assert "lengths as of IMDb's reviews, cut at N" in markdown
    assert len(list(tmp_path.glob("*.png"))) == 2


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_bf16_is_measured_too_and_stands_in_a_file_of_its_own(mode, tmp_path):
    asked = ["attention=softmax,rfa", *TEXT, "precision=bf16", "lengths=16", f"mode={mode}"]
    assert bench([*asked, f"out={tmp_path}"]) == 0
    assert (tmp_path / "efficiency-cpu-bf16.md").exists()
    assert {m.status for m in measured(tmp_path).values()} == {"ok"}


# Generation


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
    out = tmp_path_factory.mktemp("decoded")
    names = "attention=softmax,cosformer,rfa,local"
    assert bench([names, *DECODE, "lengths=32,64", f"out={out}"]) == 0
    return measured(out), (out / "efficiency-cpu-fp32.md").read_text()


def test_generation_is_told_by_position(decoded):
    found, markdown = decoded
    made = found["cosformer", "decode", 64].figures.decoding
    assert made.positions == [4, 8, 16, 32, 64]
    assert len(made.seconds) == len(made.tokens_per_second) == 5
    # Tokens a second from the start agree with the times of single tokens.
    assert made.tokens_per_second[-1] == pytest.approx(3 / np.median(made.seconds), rel=0.5)
    assert "Milliseconds a token, generating 64 tokens" in markdown


def test_generation_in_bf16_has_a_cache_of_half_the_size(decoded, tmp_path):
    asked = ["attention=softmax", *DECODE, "lengths=64", "precision=bf16", f"out={tmp_path}"]
    assert bench(asked) == 0
    halved = measured(tmp_path)["softmax", "decode", 64].figures.decoding
    whole = decoded[0]["softmax", "decode", 64].figures.decoding
    assert [2 * size for size in halved.state_bytes] == whole.state_bytes


@pytest.mark.parametrize("name", ["softmax", "cosformer", "rfa"])
def test_the_memory_of_the_state_is_what_the_mechanism_declares(decoded, name):
    sizes = {"num_heads": 2, "head_dim": 8, "model_dim": 16}
    for length in (32, 64):
        attention = ATTENTIONS.get(name)(ATTENTIONS.get(name).Config(), max_len=length, **sizes)
        made = decoded[0][name, "decode", length].figures.decoding
        assert set(made.state_bytes) == {3 * 4 * attention.cost(1, 1).state_floats}


# Operations


def shape_of(name):
    sizes = {"layers": 2, "dim": 16, "heads": 2, "head_dim": 8, "ffn_dim": 40, "vocab_size": 20}
    more = {"max_len": 24, "dropout": 0.0, "attention_dropout": 0.0, "positions": "learned"}
    last = {"projection_bias": True, "norm_eps": 1e-5, "init": "normal"}
    if name == "decoder":
        return EncoderShape(**sizes, **more, **last, cls=False)
    pooling = {"pooling": "mean", "zero_is_padding": False, "nli_features": False}
    return ModelConfig(**sizes, **more, **last, **pooling, classifier_dims=(12,))


def counted(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["fnet", "linear"])
def test_operations_around_the_attention_are_those_that_torch_counts(name):
    model = build_classifier(shape_of("text"), name, {}, num_classes=2, dual=False)
    tokens = torch.randint(0, 20, (3, 24))
    mechanisms = [getattr(b.attention, "attention", b.attention) for b in model.encoder.blocks]
    # Torch counts no Fourier transform, but linear attention's two products.
    own = 0 if name == "linear" else 3 * sum(m.cost(24, 24).flops for m in mechanisms)
    forward, _ = classifier_floor(model, [24, 24, 24], train=False, element=4)
    step, _ = classifier_floor(model, [24, 24, 24], train=True, element=4)
    assert forward - own == counted(lambda: model(tokens, None))
    assert step - 3 * own == counted(lambda: model(tokens, None).sum().backward())


def test_operations_of_a_generated_token_are_those_that_torch_counts():
    model = Decoder(shape_of("decoder"), "linear", {})
    state = model.init_state(3, torch.device("cpu"), torch.float32)
    flops, moved = decoding_floor(model, 3, 24, 24)
    # Torch counts the product of the query with the state, and no sum over it.
    assert flops == counted(lambda: model.step(torch.zeros(3, dtype=torch.long), state))
    used = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    used -= sum(table.weight.numel() for table in (model.encoder.tokens, model.encoder.positions))
    assert moved == 4 * (used + 3 * 2 * 2 * 8 * 9)


def test_more_positions_of_a_cache_are_more_to_read():
    model = Decoder(shape_of("decoder"), "softmax", {})
    half, whole = (decoding_floor(model, 3, position, 24)[1] for position in (12, 24))
    assert whole - half == 4 * 3 * 2 * (2 * 12 * 16)


# What is asked for


def test_every_attention_that_fits_the_mode_is_measured_unless_some_are_named(tmp_path):
    for mode, form in (("train", "self"), ("decode", "recurrent")):
        asked = plan([f"mode={mode}", "device=cpu", f"out={tmp_path}"], [])
        able = {name: capabilities(name, {}) for name in ATTENTIONS.names()}
        fits = {n for n, a in able.items() if form in (*a.patterns, a.recurrent and "recurrent")}
        assert {cell.attention for cell in asked.cells} == fits


def test_options_that_are_the_defaults_make_no_row_of_their_own():
    asked = plan(["attention=rfa", "attention.projections=64,32", "lengths=16"], [])
    assert {cell.name for cell in asked.cells} == {"rfa", "rfa projections=32"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lenghts=[16]"], "Unknown key 'lenghts'. Did you mean lengths?"),
        (["model.layer=1"], "Did you mean model.layers"),
        (["shape=txt"], "Unknown shape 'txt'. Did you mean text?"),
        (["mode=trian"], "Did you mean train?"),
        (["mode=decode,train"], "mode=decode is measured by itself"),
        (["mode=decode", "attention=fnet,softmax"], "attention=fnet has no recurrent form"),
        (["mode=decode", "filled=false"], "leave out filled=false"),
        (["attention=cosfomer"], "Did you mean cosformer"),
        (["lengths=[0]", "seconds=0"], "lengths, batch, threads and micro_batches must be"),
        (["repetitions=[3,2]"], "1 <= least <= most"),
        (["device=tpu"], "device=tpu"),
        (["-m"], "lra bench has no option -m"),
    ],
)
def test_a_mistake_is_told_in_words(overrides, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["bench", *overrides])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_help_needs_nothing(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: lra bench")
