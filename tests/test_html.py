"""The page of all leaderboards: it loads nothing, trusts no name and says what the tables say."""

import base64
import dataclasses
import hashlib
import json
import re

import pytest
from browser import browser, chromium
from conftest import ROOT
from test_report import DATA, TASK, failed, named, on, run, sound, table_of

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


# What it is made of


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


# In a browser


@pytest.fixture(scope="module")
def window():
    if chromium() is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    with browser() as page:
        yield page


@pytest.fixture
def page(window, results):
    """Opens the page; whatever a test does, nothing is asked for and nothing complained of."""

    def opened(address="", folder=results, **size):
        window.open("about:blank")
        window.requests.clear()
        window.complaints.clear()
        file = (folder / "leaderboard.html").as_uri()
        window.open(f"{file}#{address}", **size)
        return Shown(window, file)

    yield opened
    assert {address.partition("#")[0][:5] for address in window.requests} <= {"file:"}
    assert len([one for one in window.requests if one.startswith("file:")]) == 1
    assert window.complaints == []


class Shown:
    """What an open page shows."""

    def __init__(self, window, file):
        self.window, self.file, self.run = window, file, window.run

    def rows(self, section="main", column=0):
        """Returns the cells of a column, without those of rules and papers."""
        place = f"#{section} tr.ours > :nth-child({column + 1})"
        return self.run(f"[...document.querySelectorAll('{place}')].map(c => c.textContent)")

    def texts(self, selector):
        return self.run(f"[...document.querySelectorAll('{selector}')].map(c => c.innerText)")

    def click(self, selector, text=None):
        """Clicks, as a mouse does, on the element with this text."""
        found = (
            f"[...document.querySelectorAll({json.dumps(selector)})].find(e => "
            f"{json.dumps(text)} === null || e.textContent === {json.dumps(text)})"
        )
        x, y = self.run(
            f"(() => {{ const e = {found}; e.scrollIntoView({{block: 'center', inline: 'center'}});"
            f"const b = e.getBoundingClientRect();"
            f"return [b.x + b.width / 2, b.y + b.height / 2]; }})()"
        )
        self.window.click(x, y)

    def sorting(self, section="main"):
        return self.run(
            f"Object.fromEntries([...document.querySelectorAll('#{section} thead th')]"
            f".filter(h => h.ariaSort !== 'none').map(h => [h.textContent, h.ariaSort]))"
        )

    def drawn(self):
        """Returns the labels in each figure, by its title."""
        return self.run(
            "Object.fromEntries(charts.map(c => [c.options.plugins.title.text.split(':')[0] + "
            "(c.config.type === 'bubble' ? '*' : ''), c.data.datasets.filter(d => !d.rule)"
            ".map(d => d.label)]))"
        )


def test_it_opens_on_the_first_protocol_and_changes_to_others(page):
    shown = page()
    assert shown.texts("#protocols [aria-pressed=true]") == ["nystrom"]
    assert shown.rows() == ["softmax", "performer"]
    shown.click("#protocols button", "quick")
    assert shown.texts("#tasks button") == ["all tasks", "listops", "text"]
    assert shown.rows() == ["linear feature=relu", "softmax", "cosformer (train.steps=7)", "rfa"]
    shown.click("#tasks button", "text")
    assert shown.rows() == ["softmax", "linear feature=relu"]
    assert shown.rows("runs", column=1) == ["text", "text"]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_no_window_is_too_narrow_for_it(page, width, dark):
    shown = page("protocol=quick", width=width, dark=dark)
    assert shown.run("document.documentElement.scrollWidth <= innerWidth")
    assert shown.run("getComputedStyle(document.body).backgroundColor") == (
        "rgb(18, 22, 27)" if dark else "rgb(255, 255, 255)"
    )


def test_a_click_on_a_column_sorts_by_it_and_the_next_one_turns_it_round(page):
    shown = page("protocol=quick&task=listops")
    assert shown.sorting() == {}
    shown.click("#main thead button", "peak\u00a0MB")
    assert shown.sorting() == {"peak\u00a0MB": "descending"}
    assert shown.rows()[0] == "linear feature=relu"
    assert shown.rows()[-1] == "rfa"  # out of memory, hence without a figure
    shown.click("#main thead button", "peak\u00a0MB")
    assert shown.sorting() == {"peak\u00a0MB": "ascending"}
    assert shown.rows()[-2:] == ["linear feature=relu", "rfa"]


def test_columns_are_sorted_by_the_keyboard_too_and_names_by_the_alphabet(page):
    shown = page("protocol=quick&task=listops")
    shown.run("document.querySelector('#main thead button').focus()")
    shown.window.press("Enter", 13)
    names = ["cosformer (train.steps=7)*¶†", "linear feature=relu", "rfa", "softmax"]
    assert shown.rows() == names
    shown.window.press("Enter", 13)  # the focus has stayed
    assert shown.rows() == names[::-1]


def test_numbers_dates_and_missing_cells_are_told_apart(page):
    shown = page()
    cells = ["1,280.5", "33.47 ± 0.96 (3)", "−2.40", "35.25‡", "33.2 to 37.4", "2026-11-28", "7e1"]
    cells += ["–", "✗ oom", "76a03cbd"]
    assert shown.run(f"{json.dumps(cells)}.map(number)") == [
        *(1280.5, 33.47, -2.4, 35.25, 33.2, None, None),
        *(None, None, None),
    ]


def test_rows_are_found_by_name_and_by_option(page):
    shown = page("protocol=quick&task=listops")
    shown.click("#search")
    shown.window.write("RELU")
    assert shown.rows() == ["linear feature=relu"]
    assert shown.rows("runs") == ["linear feature=relu"]
    found = ["linear feature=relu"]
    assert shown.drawn() == {"listops*": found, "listops": found}
    assert shown.texts("#count") == ["1 of 4 rows"]


def test_attentions_are_chosen_from_a_list(page):
    shown = page("protocol=quick&task=listops")
    shown.click("#attentions summary")
    assert shown.texts("#attention-list label") == ["cosformer", "linear", "rfa", "softmax"]
    shown.click("#attention-list label", "linear")
    shown.click("#attention-list label", "rfa")
    assert shown.rows() == ["softmax", "cosformer (train.steps=7)*¶†"]
    assert shown.texts("#attentions summary") == ["Attentions: 2 of 4"]
    shown.click("#none")
    assert shown.rows() == []
    shown.click("#every")
    assert len(shown.rows()) == 4


def test_rows_that_depart_from_the_protocol_can_be_left_out(page):
    shown = page("protocol=quick&task=listops")
    shown.click("#modified")
    assert shown.rows() == ["linear feature=relu", "softmax", "rfa"]


def test_published_rows_can_be_left_out(page):
    shown = page("protocol=nystrom")
    assert any(text.startswith("Published: Nyströmformer") for text in shown.texts("#main .group"))
    assert shown.texts("#beside h2") == ["beside published figures"]
    shown.click("#published")
    assert shown.texts("#main .group") == ["Rules that learn nothing"]
    assert shown.texts("#beside h2") == []
    assert len(shown.rows()) == 2


def test_a_click_on_a_row_shows_the_records_of_its_runs(page):
    shown = page("protocol=quick&task=listops")
    shown.click("#main tr.ours td:nth-child(2)")
    assert shown.texts("#record-title") == ["linear feature=relu"]
    shown.window.press("Escape", 27)
    assert not shown.run("document.getElementById('record').open")
    shown.click("#main .open", "softmax")
    assert shown.texts("#record-runs button") == ["listops seed 0", "listops seed 1"]
    shown.click("#record-runs button", "listops seed 1")
    names, values = (shown.texts(f"#record-body > dl > {kind}") for kind in ("dt", "dd"))
    facts = dict(zip(names, values, strict=True))
    assert facts["test accuracy"].startswith("60.00 % of 1,000 (95 % interval 56.9 to 63.0)")
    assert facts["training"] == "10.00 steps/s, 64,000 tokens/s"
    assert facts["measured on"] == "CPU A, 2 threads, fp32"
    told = json.loads(shown.run("document.querySelector('#record-body pre').textContent"))
    assert told["task"] == TASK | DATA
    assert (told["seed"], told["config"]["train"]["steps"]) == (1, 600)


def test_a_cell_of_the_table_of_all_tasks_shows_the_records_of_its_task(page):
    shown = page("protocol=quick")
    shown.click("#main tr.ours td .open", "65.00")
    assert shown.texts("#record-runs button") == ["text seed 0"]


def test_figures_tell_run_and_value_and_show_a_run_by_a_click(page):
    shown = page("protocol=quick&task=text")
    assert shown.drawn()["text"] == ["softmax", "linear feature=relu"]
    shown.click("#clocks button", "minutes")
    shown.click("#metrics button", "loss")
    x, y = shown.run(
        "(() => { const chart = charts.at(-1); chart.canvas.scrollIntoView({block: 'center'});"
        "const box = chart.canvas.getBoundingClientRect();"
        "const point = chart.getDatasetMeta(0).data[1];"
        "return [box.x + point.x, box.y + point.y]; })()"
    )
    shown.window.move(x, y)
    told = shown.run(
        "new Promise(done => { const look = () => charts.at(-1).tooltip.body"
        " ? done(charts.at(-1).tooltip.body[0].lines[0]) : requestAnimationFrame(look); look(); })"
    )
    assert told == "softmax, seed 0: 1.0000 at step 20"
    shown.window.click(x, y)
    assert shown.texts("#record-runs button") == ["text seed 0"]


def test_the_key_takes_a_row_out_of_all_figures(page):
    shown = page("protocol=quick")
    both = ["linear feature=relu", "softmax"]
    assert sorted(shown.drawn()["average of 2 tasks*"]) == both
    shown.click("#key button", "softmax")
    drawn = shown.drawn()
    assert drawn["average of 2 tasks*"] == ["linear feature=relu"]
    assert "softmax" not in drawn["listops"] + drawn["text"]
    assert "softmax" in shown.rows()


def test_the_address_keeps_what_is_shown(page):
    shown = page("protocol=quick&task=listops")
    shown.click("#modified")
    shown.click("#main thead button", "seeds")
    shown.click("#metrics button", "loss")
    address, rows = shown.run("location.hash"), shown.rows()
    again = page(address[1:])
    assert again.rows() == rows
    assert again.sorting() == {"seeds": "descending"}
    assert again.texts("#metrics [aria-pressed=true]") == ["loss"]


def test_an_address_of_what_is_no_longer_there_shows_what_there_is(page):
    assert page("protocol=gone&task=gone&sort=gone&without=gone").rows() == ["softmax", "performer"]


def test_names_are_text_whatever_they_are_made_of(page, odd):
    shown = page(folder=odd)
    names = shown.rows("runs")
    assert f"{HOSTILE} {HOSTILE}={HOSTILE}" in names
    for place in range(len(names)):
        shown.run(f"document.querySelectorAll('#runs .open')[{place}].click()")
        assert shown.run("document.getElementById('record').open")
        shown.run("document.getElementById('close').click()")
    assert shown.run("document.querySelectorAll('img').length") == 0
    assert shown.run("document.querySelectorAll('script').length") == 3
    assert shown.run("typeof hacked") == "undefined"


def test_the_page_in_the_repository_opens(page):
    shown = page("protocol=quick", folder=ROOT / "results")
    assert len(shown.rows()) > 15
    assert len(shown.drawn()) > 5
