"""The command line as a user meets it: fast help, one-line errors, no tracebacks."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from lra.cli import main
from lra.compose import load
from lra.conformance import CHECKS
from lra.tasks import TASKS
from models.attention import ATTENTIONS

ROOT = Path(__file__).parents[1]

FORGETFUL = """
from models.attention import register_attention
from models.attention.linear import Linear


@register_attention("forgetful")
class Forgetful(Linear):
    def attend(self, q, k, v, context):
        return super().attend(q, k, v, context._replace(key_mask=None))

    def matrix(self, q, k, context):
        return super().matrix(q, k, context._replace(key_mask=None))
"""

HEAVY = ("torch", "hydra", "omegaconf", "wandb", "datasets", "pandas", "numpy")


@pytest.fixture
def env(tmp_path):
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    return inherited | {
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def lra(tmp_path, env):
    """Runs `lra` in an empty folder."""
    cwd = tmp_path / "cwd"
    cwd.mkdir()

    def run(*arguments, **options):
        return subprocess.run(
            [sys.executable, "-m", "lra", *arguments],
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            **options,
        )

    run.cwd = cwd
    return run


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def called(tmp_path, monkeypatch, capsys):
    """Calls `lra` in this process, where torch is loaded once; a traceback fails the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        return Done(end.value.code, *capsys.readouterr())

    call.cwd = tmp_path
    return call


def mistake(done):
    """Returns what a mistake in the call is answered with."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr


# Fast and light


@pytest.mark.parametrize("arguments", [["--help"], ["ls"], ["train", "--help"]])
def test_help_and_names_are_there_in_half_a_second(lra, arguments):
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        assert lra(*arguments).returncode == 0
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5


@pytest.mark.parametrize("arguments", [["--help"], ["ls"], ["train", "--help"], ["report", "-h"]])
def test_help_and_names_load_none_of_the_large_packages(env, tmp_path, arguments):
    script = (
        "import json, sys\n"
        "from lra.cli import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "except SystemExit as end:\n"
        "    print(json.dumps([end.code, list(sys.modules)]), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    code, modules = json.loads(done.stderr)
    assert code == 0
    assert {"lra.cli"} <= set(modules)
    assert [name for name in HEAVY if name in modules] == []


def test_help_names_every_command(lra):
    text = lra("--help").stdout
    assert [name for name in ("train", "eval", "report", "data", "ls") if name not in text] == []


def test_help_of_train_tells_the_main_keys(lra):
    text = lra("train", "--help").stdout
    assert text.startswith("usage: lra train [-m] [--dry-run] [KEY=VALUE ...]")
    keys = ("task=", "attention=", "protocol=", "seed=", "device=", "precision=", "tracker=")
    assert [key for key in keys if key not in text] == []


def test_ls_lists_every_task_attention_and_protocol_with_a_line_on_each(lra):
    lines = lra("ls").stdout.splitlines()
    starts = [line.split()[0] for line in lines]
    groups = ["task=", "attention=", "protocol=", "sweep="]
    assert [line for line in lines if line.endswith("=")] == groups
    names = {"listops", "softmax", "linear", "cosformer", "nystrom", "quick", "rfa_table3"}
    assert names <= set(starts)
    assert [line for line in lines if line.startswith("  ") and len(line.split()) < 3] == []


def test_ls_attention_shows_what_each_can_do(called):
    heading, *lines = called("ls", "attention").stdout.splitlines()
    columns = ["attention", "patterns", "masks", "growth", "extra parameters", "paper"]
    assert re.split(r"  +", heading) == columns
    lines = lines[: lines.index("")]
    rows = {line.split()[0]: re.split(r"  +", line.strip()) for line in lines if line[0] == " "}
    assert sorted(rows) == ATTENTIONS.names()
    everything = "self, causal, cross, recurrent"
    assert rows["softmax"][1:5] == [everything, "exact", "N^2, memory N", "0"]
    # One number for each dimension: 2 heads of 32.
    assert rows["rfa"][1:] == [everything, "exact", "N", "64", "Peng et al., ICLR 2021"]


def test_ls_attention_groups_them_by_family(called):
    lines = called("ls", "attention").stdout.splitlines()
    lines = lines[1 : lines.index("")]
    families = [line.partition(":")[0] for line in lines if line[0] != " "]
    assert families == ["full", "pattern", "low rank", "kernel", "mixer"]
    family = None
    for line in lines:
        name = line.split()[0]
        if line[0] != " ":
            family = line.partition(":")[0]
        else:
            assert ATTENTIONS.get(name).capabilities.family == family, name


def test_the_table_of_the_readme_is_that_of_ls_attention(called):
    lines = called("ls", "attention").stdout.splitlines()
    listed = [re.split(r"  +", line.strip()) for line in lines[1 : lines.index("")]]
    listed = [[f"`{row[0]}`", row[3], row[1], *row[4:]] for row in listed if len(row) > 1]
    families = [line.partition(":")[0] for line in lines[1 : lines.index("")] if line[0] != " "]
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    _, _, table = readme.partition("| attention | what it computes |")
    rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in table.partition("\n\n")[0].splitlines()[2:]
    ]
    assert [row[0].strip("*") for row in rows if not row[1]] == families
    shown = {row[0]: [row[0], *row[2:]] for row in rows if row[1]}
    assert shown == {row[0]: row for row in listed}


def test_an_attention_that_names_no_family_or_a_new_one_is_listed_all_the_same(lra, tmp_path):
    (tmp_path / "cwd" / "lra_others.py").write_text(
        "from dataclasses import replace\n"
        "from models.attention import register_attention\n"
        "from models.attention.linear import Linear\n"
        "for name, family in (('nameless', 'other'), ('newer', 'novel')):\n"
        "    able = replace(Linear.capabilities, family=family)\n"
        "    register_attention(name)(type(name, (Linear,), {'capabilities': able}))\n"
    )
    text = lra("ls", "attention", "plugins=[lra_others]").stdout
    assert re.search(r"\nother\n  nameless .*\nnovel\n  newer ", text)


@pytest.mark.parametrize("group", ["attention", "task"])
def test_ls_of_a_name_shows_each_option_with_default_and_meaning(called, group):
    registry = {"attention": ATTENTIONS, "task": TASKS}[group]
    for name in registry.names():
        text = called("ls", f"{group}={name}").stdout
        for field in dataclasses.fields(registry.get(name).Config):
            default = field.default
            if default is None or isinstance(default, bool):
                default = json.dumps(default)
            pattern = rf"^{group}\.{field.name}={re.escape(str(default))}    \S.*\n    \S.{{10}}"
            assert re.search(pattern, text, re.MULTILINE), (name, field.name)


def test_ls_of_rfa_tells_the_choices_of_its_kernel(called):
    text = called("ls", "attention=rfa").stdout
    assert "attention.kernel=gaussian    one of gaussian, arccos\n" in text
    assert "attention.gate=false    true or false\n" in text
    assert "Peng et al., ICLR 2021" in text
    assert "With task=listops the defaults are:\n    attention.projections=128\n" in text


OPTIONED = """
from dataclasses import dataclass, field
from models.attention import register_attention
from models.attention.linear import Linear


@register_attention("optioned")
class Optioned(Linear):
    @dataclass(frozen=True)
    class Config:
        feature: str = "relu"
        sizes: list[int] = field(default_factory=lambda: [1, 2])


@register_attention("raising")
class Raising(Linear):
    def __init__(self, config, **sizes):
        raise RuntimeError("not today")
"""


def test_ls_shows_options_of_every_kind_and_survives_an_attention_that_does_not(lra):
    (lra.cwd / "kinds.py").write_text(OPTIONED)
    text = lra("ls", "plugins=[kinds]", "attention=optioned", "attention").stdout
    assert "attention.feature=relu    a text\n" in text
    assert "attention.sizes=[1, 2]    list[int]\n" in text
    assert "raising: RuntimeError: not today" in text
    assert "\n  softmax " in text


def test_a_plugin_with_an_option_without_default_is_one_line_everywhere(lra):
    (lra.cwd / "wanting.py").write_text(
        OPTIONED.replace('= "relu"', "").replace("optioned", "wanting")
    )
    plugin = "plugins=[wanting]"
    for call in (("ls", plugin), ("check", plugin, "attention=linear"), ("train", plugin)):
        assert mistake(lra(*call)) == (
            "lra: plugins: cannot import 'wanting': TypeError: attention 'wanting' must give its "
            "option feature a default.\n"
        )


def test_ls_of_a_task_tells_its_data_once_it_is_prepared(called, cache, tmp_path):
    missing = called(
        "ls", "task=listops", "protocol=smoke", f"cache_dir={tmp_path / 'none'}"
    ).stdout
    assert "Data with protocol=smoke: missing: no folder" in missing
    prepared = load(["protocol=smoke", f"cache_dir={cache}"]).build_task().prepare()
    text = called("ls", "task=listops", "protocol=smoke", f"cache_dir={cache}").stdout
    assert f"Data with protocol=smoke: {prepared.manifest['hash']}, generated, data_seed 0" in text
    [train] = [line.split() for line in text.splitlines() if line.startswith("train ")]
    lengths = prepared.splits["train"].lengths
    assert train[1:5] == ["400", str(lengths.min()), f"{lengths.mean():,.1f}", str(lengths.max())]
    assert sum(map(float, train[5:])) == pytest.approx(100, abs=0.5)
    majority = 100 * prepared.manifest["baselines"]["majority class"]
    assert f"majority class {majority:.2f} %" in text


def test_lra_data_says_of_every_task_where_its_data_would_be_from(called, tmp_path):
    here = tmp_path / "here"
    (here / "aan").mkdir(parents=True)
    (here / "aan" / "papers.parquet").touch()
    (here / "aan" / "citations.tsv").touch()
    lines = called("data", f"data_dir={here}", f"cache_dir={tmp_path / 'none'}").stdout.splitlines()
    states = dict(zip(lines[::2], lines[1::2], strict=True))
    sources = {state.partition(":")[0]: source.strip() for state, source in states.items()}
    assert set(sources) == set(TASKS.names())
    assert all("missing" in state and "; run: lra data task=" in state for state in states)
    assert sources["listops"] == sources["pathfinder"] == "source: it is generated"
    assert sources["citations"] == f"source: files in {here / 'aan'}"
    assert "stanfordnlp/imdb on the hub is asked" in sources["text"]
    assert f"hf download uoft-cs/cifar10 --repo-type dataset --local-dir {here}" in sources["image"]
    assert "OpenNLPLab/lra on the hub" in sources["retrieval"]


def test_ls_of_an_attention_without_options_says_so(called):
    assert "It has no options." in called("ls", "attention=softmax").stdout


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("attentoin", "Unknown listing 'attentoin'. Did you mean attention"),
        ("attention=cosfromer", "Unknown attention 'cosfromer'. Did you mean cosformer"),
        ("protocol=quick", "protocol=quick says which data of a task: name it, as task=NAME"),
        ("plugins=[not_there_at_all]", "not_there_at_all"),
    ],
)
def test_ls_of_what_is_not_there_says_what_is(called, what, told):
    assert told in mistake(called("ls", what))


@pytest.mark.parametrize("arguments", [["ls"], ["--help"], ["train", "--help"]])
def test_a_reader_that_has_gone_is_no_error(env, arguments):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "lra", *arguments],
            env=env,
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_ls_into_head_gives_a_line_and_no_error(env):
    done = subprocess.run(
        f"{shlex.quote(sys.executable)} -m lra ls | head -n 1",
        shell=True,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("task=\n", "")


# Mistakes


def test_typing_errors_of_train_are_told_with_near_matches(called):
    text = mistake(called("train", "task=listopz", "attention=sofmax", "protocol=quik"))
    assert text.startswith("lra: Unknown task 'listopz'. Did you mean listops?")
    assert "Unknown attention 'sofmax'. Did you mean softmax?" in text
    assert "Unknown protocol 'quik'. Did you mean quick?" in text
    assert len(text.splitlines()) == 3
    assert list(called.cwd.iterdir()) == []


def test_one_typing_error_in_a_sweep_is_told_before_anything_runs(lra):
    text = mistake(
        lra("train", "-m", "protocol=smoke", "attention=softmax,cosfomer", "seed=0,1", "device=cpu")
    )
    assert text.startswith("lra: Unknown attention 'cosfomer'. Did you mean cosformer")
    assert list(lra.cwd.iterdir()) == []


def test_several_runs_without_m_are_refused_with_what_to_type(called):
    assert "lra train -m" in mistake(called("train", "protocol=smoke", "seed=0,1"))
    assert list(called.cwd.iterdir()) == []


def test_an_option_that_train_does_not_have_is_told(called):
    text = mistake(called("train", "--epochs", "protocol=smoke"))
    assert text == "lra: lra train has no option --epochs: it takes -m, --dry-run and key=value.\n"


def test_a_device_that_is_not_there_is_told_and_leaves_nothing(called):
    text = mistake(called("train", "protocol=smoke", "device=gpu"))
    assert text.startswith("lra: device=gpu is no device")
    assert list(called.cwd.iterdir()) == []


@pytest.mark.parametrize("arguments", [[], ["trian"], ["trian", "task=listops"], ["check"]])
def test_an_unknown_command_or_argument_is_told_with_what_there_is(lra, arguments):
    text = mistake(lra(*arguments))
    assert text.startswith("usage: lra")
    if arguments[:1] == ["trian"]:
        assert "'trian'" in text
        assert "train" in text.replace("trian", "")


def test_a_report_without_runs_says_what_to_type(called):
    text = mistake(called("report"))
    assert text.startswith("lra: There is no folder runs")
    assert "lra train" in text
    assert list(called.cwd.iterdir()) == []


@pytest.mark.parametrize("folder", [".", "not_there"])
def test_eval_of_a_folder_without_a_run_says_what_is_missing(called, folder):
    text = mistake(called("eval", folder))
    assert text.startswith(f"lra: {folder} has no record.json")


def test_a_runs_folder_that_cannot_be_made_is_told_without_a_traceback(called):
    (called.cwd / "file").write_text("")
    done = called("train", "protocol=smoke", "runs_dir=file/runs", "tracker=none", "device=cpu")
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    assert "file/runs" in done.stdout + done.stderr


def test_a_results_folder_that_cannot_be_made_is_told_without_a_traceback(called):
    (called.cwd / "runs" / "a").mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "records" / "schema1.json", called.cwd / "runs/a/record.json")
    (called.cwd / "file").write_text("")
    done = called("report", "--out", "file/results")
    assert done.returncode in (1, 2)
    assert "file/results" in done.stderr


# Check


def test_check_prints_every_check_with_its_error_and_tolerance_and_succeeds(called):
    done = called("check", "attention=linear", "attention.feature=relu")
    assert (done.returncode, done.stderr) == (0, "")
    title, _, *rows = done.stdout.splitlines()
    assert title == "attention=linear attention.feature=relu"
    assert [row for name in CHECKS for row in rows if row.startswith(f"{name} ")] == rows[:-2]
    assert rows[-2:] == [f"{len(CHECKS)} checks, 0 failed", ""]


def test_check_of_an_attention_that_breaks_the_contract_fails_and_shows_where(lra):
    (lra.cwd / "forgetful.py").write_text(FORGETFUL)
    done = lra("check", "plugins=[forgetful]", "attention=forgetful")
    assert done.returncode == 1
    failed = [line for line in done.stdout.splitlines() if "  fail  " in line]
    assert {line.split()[0] for line in failed} >= {"T3", "T5"}
    assert any("more masked tokens" in line for line in failed)


def test_a_mistake_in_a_check_is_told(called):
    assert "Did you mean rfa?" in mistake(called("check", "attention=raf"))
    assert "Name an attention" in mistake(called("check", "plugins=[]"))
    assert "attention.pool is 1" in mistake(called("check", "attention=rfa", "attention.pool=1"))


# Data


def test_data_tells_what_is_missing_and_the_command_it_names_makes_it(lra, called):
    missing = lra("data", "protocol=smoke")
    assert (missing.returncode, missing.stderr) == (1, "")
    [line] = [line for line in missing.stdout.splitlines() if line.startswith("listops: ")]
    assert line.startswith("listops: missing: no folder ")
    program, *arguments = shlex.split(line.partition("run: ")[2])
    assert (program, arguments) == ("lra", ["data", "task=listops", "protocol=smoke"])
    made = called(*arguments)
    assert made.returncode == 0
    assert made.stdout.startswith("listops: ready in ")
    found = called("data", "protocol=smoke")
    assert "listops: found: " in found.stdout
    assert "run: lra data task=listops" not in found.stdout


def test_data_tells_what_is_damaged_and_the_command_that_mends_it(called):
    assert called("data", "task=listops", "protocol=smoke").returncode == 0
    [file] = (called.cwd / "cache").rglob("val.arrow")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    done = called("data", "protocol=smoke")
    assert done.returncode == 1
    assert "listops: damaged: " in done.stdout
    assert "val.arrow" in done.stdout
    assert "run: lra data task=listops protocol=smoke" in done.stdout


def test_a_typing_error_of_data_is_told(called):
    text = mistake(called("data", "task=listopz"))
    assert text.startswith("lra: Unknown task 'listopz'. Did you mean listops?")
