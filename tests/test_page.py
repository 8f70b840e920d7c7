"""The page of all leaderboards in a headless Chromium: it loads nothing and trusts no name."""

import json

import pytest
from browser import browser, chromium
from conftest import ROOT
from test_html import HOSTILE, ODD, RECORDS, write
from test_report import DATA, TASK


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return write(tmp_path_factory.mktemp("page"), RECORDS)


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    return write(tmp_path_factory.mktemp("odd"), ODD)


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
