"""The page of all leaderboards: what it is made of; test_page.py looks at it in a browser."""

import base64
import dataclasses
import hashlib
import json
import re

import pytest
from conftest import ROOT
from test_report import failed, named, on, run, sound, table_of

from lra.files import write_text
from lra.record import Score
from lra.report import html, pages, store
from lra.report.leaderboard import Board

HOSTILE = "<img src=x onerror=alert(1)></script><script>hacked=1</script>&amp;\u2028'`${1}{{data}}"

CURVE = [
    {"step": 10 * k, "seconds": 6.0 * k, "val_accuracy": 0.1 * k, "val_loss": 2.0 / k}
    for k in (1, 2, 3)
]

RECORDS = [
    run(500, seed=0),
    run(600, seed=1),
    run(620, hash="bbbbbbbb", attention=named("linear", feature="relu"), peak_memory_bytes=9**9),
    run(180, hash="cccccccc", attention=named("cosformer"), modified={"train.steps": [9, 7]}),
    failed(hash="dddddddd", attention=named("rfa")),
    on("text", 700),
    on("text", 650, attention=named("linear", feature="relu")),
    run(350, hash="eeeeeeee", protocol="nystrom", seed=2**62),
    run(300, hash="ffffffff", protocol="nystrom", attention=named("performer")),
]

ODD = [
    run(510, hash="aaaaaaa1", attention=named(HOSTILE, **{HOSTILE: HOSTILE}), command=HOSTILE),
    run(520, hash="aaaaaaa2", modified={HOSTILE: [HOSTILE, HOSTILE]}),
    on(HOSTILE, 530, versions={"torch": HOSTILE}, commit={"commit": HOSTILE, "dirty": True}),
    failed("failed", hash="aaaaaaa3", attention=named("linear")),
]


def write(folder, records):
    """Reports records that have a learning curve each, without figures; returns the results."""
    for i, one in enumerate(records):
        sound(one).save(folder / "runs" / f"{i:02}")
        lines = "".join(json.dumps(line) + "\n" for line in CURVE)
        (folder / "runs" / f"{i:02}" / "metrics.jsonl").write_text(lines)
    found = store.read([folder / "runs"])
    protocols = sorted({one.record.protocol for one in found})
    boards = [Board([one for one in found if one.record.protocol == name]) for name in protocols]
    write_text(folder / "results" / "leaderboard.html", html.page(boards))
    for board in boards:
        write_text(folder / "results" / f"leaderboard-{board.protocol}.md", pages.markdown(board))
    return folder / "results"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return write(tmp_path_factory.mktemp("page"), RECORDS)


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    return write(tmp_path_factory.mktemp("odd"), ODD)


def data_of(results):
    """Returns the data in a page as a browser reads them."""
    page = (results / "leaderboard.html").read_text()
    [text] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(text)


def test_its_tables_are_those_of_the_markdown(results):
    for protocol in data_of(results)["protocols"]:
        markdown = (results / f"leaderboard-{protocol['name']}.md").read_text()
        views = {view["title"]: view for view in [*protocol["views"], protocol["beside"]] if view}
        titles = re.findall(r"^## (.*)$", markdown, re.M)
        assert sorted(views) == sorted(titles)
        for title, text in zip(titles, markdown.split("\n## ")[1:], strict=True):
            expected = [[cell.strip() for cell in row.values()] for row in table_of(text)]
            kept = [row for row in views[title]["rows"] if not row.get("published")]
            width = len(expected[0])  # means of speed and memory follow in the table of all tasks
            shown = [row["cells"][:width] for row in kept]
            assert shown == [[name.strip("*"), *cells] for name, *cells in expected]


def test_it_holds_the_whole_record_of_every_run(results):
    data = data_of(results)
    folders = sorted((results.parent / "runs").iterdir())
    assert len(data["runs"]) == len(folders)

    def whole(value):
        place = value.get("section") if isinstance(value, dict) else None
        return value if place is None else data["sections"][place]

    told = []
    for one in data["runs"]:
        record = {name: whole(value) for name, value in one["record"].items()}
        record["config"] = {name: whole(value) for name, value in record["config"].items()}
        told.append(record | {"seed": int(record["seed"])})  # a browser would round a large one
    saved = [json.loads((folder / "record.json").read_text()) for folder in folders]
    assert sorted(map(json.dumps, told)) == sorted(map(json.dumps, saved))


def test_rows_of_papers_have_their_source_and_are_of_this_protocol_alone(results):
    nystrom, quick = data_of(results)["protocols"]
    [view] = nystrom["views"]
    printed = {row["label"]: row for row in view["rows"] if row.get("published")}
    assert printed["softmax"]["cells"][view["columns"].index("test accuracy %")] == "37.10"
    assert printed["softmax"]["cells"][view["columns"].index("rank")] == "–"
    assert {row["group"] for row in printed.values()} == {
        "Published: Nyströmformer Table 3 (Xiong et al., AAAI 2021), protocol nystrom; not ranked"
    }
    assert not any(row.get("published") for view in quick["views"] for row in view["rows"])


def test_speed_memory_and_size_over_all_tasks_are_means_of_those_with_all_tasks(results):
    _, quick = data_of(results)["protocols"]
    rows = {row.get("label"): row["cells"][-3:] for row in quick["views"][0]["rows"]}
    assert rows["softmax"] == ["1.00", "123.0", "1.000"]
    assert rows["linear feature=relu"] == ["1.00", "255.2", "1.000"]  # of 387.4 and 123.0 MB
    assert rows["cosformer (train.steps=7)"] == ["–", "–", "–"]


def test_numbers_that_json_lacks_are_text(tmp_path):
    diverged = dataclasses.replace(run(500), validation=Score.of(5, 10, float("inf"), 600))
    [one] = data_of(write(tmp_path, [diverged]))["runs"]
    assert one["record"]["validation"]["loss"] == "inf"


def test_its_policy_allows_the_page_nothing_but_its_own_script_and_style(odd):
    page = (odd / "leaderboard.html").read_text()
    [policy] = re.findall(r'http-equiv="Content-Security-Policy" content="(.*?)"', page)
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy
    assert "http" not in policy
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    [style] = re.findall(r"<style>(.*?)</style>", page, re.S)
    assert len(scripts) == 2
    for text in (style, *scripts):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    tags = re.sub(r"<(script|style)[^>]*>.*?</\1>", "", page, flags=re.S)
    assert re.findall(r'(?:src|href)="(.*?)"', tags) == ["data:,"]
    assert "sourceMappingURL" not in page


def test_no_name_can_end_the_data_of_the_page(odd):
    page = (odd / "leaderboard.html").read_text()
    [text] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert not set("<>&\u2028\u2029") & set(text)
    names = {row["attention"] for row in data_of(odd)["protocols"][0]["runs"]["rows"]}
    assert HOSTILE in names


def test_it_stays_small(tmp_path, results):
    committed = (ROOT / "results" / "leaderboard.html").stat().st_size
    assert committed < 2_000_000
    more = write(tmp_path, [run(500, seed=seed) for seed in range(40)])
    few = write(tmp_path / "few", [run(500, seed=seed) for seed in range(20)])
    sizes = [(folder / "leaderboard.html").stat().st_size for folder in (more, few)]
    assert (sizes[0] - sizes[1]) / 20 < 2_500  # bytes a run
