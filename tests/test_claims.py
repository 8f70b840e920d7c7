"""Claims of the seed papers: judged by records and cells alone, by rules that are told."""

import dataclasses
from itertools import groupby
from statistics import mean

import numpy as np
import pytest
from test_compare import saved
from test_efficiency import made
from test_report import DATA, TASK, named, table_of

from lra.cells import Decoding, Store
from lra.report import claims
from lra.report.judging import HELD, MISSING, OPEN, REFUTED, Accuracy, Evidence, Growth, Multiple
from lra.report.leaderboard import Board
from lra.report.panels import panels_of
from lra.report.published import published
from lra.report.scaling import exponent, exponent_interval

N = 400
RFA = "RFA (Peng et al. 2021), Table 3"


def accuracy(better="cosformer", others=("softmax",), tasks=("text",)):
    return Accuracy("B beats A", "Table 1", "+1.00", better, others, tasks)


def judged(claim, runs=(), cells=()):
    groups = groupby(runs, key=lambda run: run.record.protocol)
    boards = [Board(list(its)) for _, its in groups]
    return claim.judged(Evidence(boards, panels_of(Store({m.cell.key: m for m in cells}))))


@pytest.fixture
def trained(tmp_path):
    """Returns a function that makes a run which is right on the first ``count`` of N examples."""

    def make(name, count=300, task="text", **changes):
        attention, *options = name.split(" ")
        options = dict(option.split("=") for option in options)
        changes = {"protocol": "quick", "seed": 0} | changes
        told = [str(told) for told in (changes["protocol"], task, name, changes["seed"])]
        return saved(
            tmp_path.joinpath(*told),
            np.arange(N) < count,
            attention=named(attention, **options),
            task=TASK | DATA | {"name": task},
            hash=name,
            **changes,
        )

    return make


# Differences of accuracy


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict", "difference"),
    [
        (300, 250, HELD, "+12.50"),
        (250, 300, REFUTED, "−12.50"),
        (300, 299, OPEN, "+0.25"),
        (300, 300, OPEN, "+0.00"),
    ],
)
def test_a_difference_is_judged_by_its_interval(trained, ours, theirs, verdict, difference):
    found = judged(accuracy(), [trained("cosformer", ours), trained("softmax", theirs)])
    assert (found.verdict, found.ours) == (verdict, difference)
    assert found.place == "quick: text; seeds 1 and 1; cpu, fp32"
    assert found.commands == ()


def test_a_task_that_is_missing_leaves_the_claim_open_and_names_the_command(trained):
    relu, identity = "linear feature=relu", "linear feature=identity"
    claim = accuracy(relu, (identity,), ("listops", "text"))
    command = "lra train -m protocol=quick task={} attention=linear attention.feature={} seed=0,1,2"
    nothing = judged(claim, [trained("softmax")])
    assert (nothing.verdict, nothing.ours, nothing.place) == (MISSING, "–", "–")
    assert nothing.commands == tuple(
        command.format("listops,text", feature) for feature in ("relu", "identity")
    )
    runs = [trained(name, count) for name, count in ((relu, 300), (identity, 200))]
    partial = judged(claim, runs)
    assert (partial.verdict, partial.ours) == (MISSING, "+25.00")
    assert partial.commands == tuple(
        command.format("listops", feature) for feature in ("relu", "identity")
    )
    runs += [trained(relu, 300, "listops"), trained(identity, 250, "listops")]
    whole = judged(claim, runs)
    assert (whole.verdict, whole.ours, whole.commands) == (HELD, "+18.75", ())


def test_attentions_that_lack_the_same_tasks_share_a_command(trained):
    claim = accuracy(others=("linear", "softmax"))
    [command] = judged(claim, [trained("cosformer")]).commands
    assert command == "lra train -m protocol=quick task=text attention=linear,softmax seed=0,1,2"


def test_the_best_of_others_is_what_must_be_beaten(trained):
    claim = accuracy(others=("linear", "softmax"))
    runs = [trained("cosformer", 300), trained("linear", 250), trained("softmax", 350)]
    found = judged(claim, runs)
    assert (found.verdict, found.ours) == (REFUTED, "−12.50")
    assert "the best other is softmax" in found.place


def test_citations_stand_in_for_retrieval_where_there_is_none(trained):
    claim = accuracy(tasks=("retrieval",))
    runs = [trained(name, task="citations") for name in ("cosformer", "softmax")]
    assert judged(claim, runs).place.startswith("quick: citations;")
    runs += [trained(name, task="retrieval") for name in ("cosformer", "softmax")]
    assert judged(claim, runs).place.startswith("quick: retrieval;")


def test_the_protocol_with_most_tasks_judges_and_of_equals_the_papers(trained):
    both = ("cosformer", "softmax")
    claim = accuracy(tasks=("listops", "text"))
    quick = [trained(name, task=task) for name in both for task in ("listops", "text")]
    google = [trained(name, protocol="google") for name in both]
    assert judged(claim, google + quick).place.startswith("quick: listops, text;")
    google += [trained(name, task="listops", protocol="google") for name in both]
    assert judged(claim, google + quick).place.startswith("google: listops, text;")


def test_a_task_that_neither_has_learned_is_named(trained):
    runs = [trained("cosformer", 60), trained("softmax", 62)]
    assert "not learned: text" in judged(accuracy(), runs).place


def test_seeds_and_runs_without_predictions_are_counted(trained):
    runs = [trained("cosformer", 300, seed=seed) for seed in (0, 1, 2)]
    runs += [trained("softmax", 250, seed=seed) for seed in (0, 1)]
    assert "seeds 3 and 2" in judged(accuracy(), runs).place
    for run in runs[3:]:
        (run.folder / "test_predictions.npy").unlink()
    assert judged(accuracy(), runs).verdict == MISSING


# Growth


def cells_of(name, power, lengths=(1024, 2048, 4096), **changes):
    return [made(name, n, 1e-4 * n**power, 1e-3 * n**power, batch=2, **changes) for n in lengths]


@pytest.mark.parametrize(
    ("power", "verdict"), [(1.0, HELD), (0.5, HELD), (1.09, HELD), (1.2, REFUTED), (2.0, REFUTED)]
)
@pytest.mark.parametrize("quantity", ["train seconds", "train memory"])
def test_growth_is_judged_by_the_fitted_exponent(power, verdict, quantity):
    claim = Growth("time is linear", "abstract", "rfa", quantity, 1)
    found = judged(claim, cells=cells_of("rfa", power))
    assert (found.verdict, found.ours) == (verdict, f"N^{power:.2f}")
    assert found.place == "CPU A, 2 threads, fp32; batch 2, 2 × 64; N = 1,024 to 4,096"


def test_growth_that_scatters_is_not_decided():
    claim = Growth("time is linear", "abstract", "rfa", "train seconds", 1)
    times = {1024: 1.0, 2048: 3.0, 4096: 4.0}
    found = judged(claim, cells=[made("rfa", n, t) for n, t in times.items()])
    assert found.verdict == OPEN


def test_growth_is_that_of_the_widest_range_of_whole_batches():
    claim = Growth("memory is linear", "abstract", "rfa", "train memory", 1)
    cells = cells_of("rfa", 1.0) + cells_of(
        "rfa", 0.5, (512, 1024, 2048, 4096), micro_batches="auto"
    )
    assert judged(claim, cells=cells).ours == "N^1.00"
    cells += cells_of("rfa", 2.0, (1024, 2048, 8192), filled=False)
    assert judged(claim, cells=cells).ours == "N^2.00"


def test_two_lengths_are_no_growth():
    claim = Growth("time is linear", "abstract", "rfa", "train seconds", 1)
    found = judged(claim, cells=cells_of("rfa", 1.0, (1024, 2048)))
    assert found.verdict == MISSING
    assert found.commands == (
        "lra bench attention=softmax,rfa mode=train lengths=1024,4096,16384 batch=2",
    )


def generation(name, seconds, tokens_per_second, state=(8, 8, 8)):
    decoding = Decoding([128, 512, 2048], seconds, tokens_per_second, list(state))
    return made(name, 2048, seconds[-1], mode="decode", decoding=decoding)


def test_generation_is_judged_by_position():
    flat = generation("rfa", [1.0, 1.01, 1.0], [9.0, 9.0, 9.0])
    growing = generation("rfa", [1.0, 2.0, 4.0], [9.0, 6.0, 3.0], (8, 16, 32))
    for quantity in ("decode seconds", "decode state"):
        claim = Growth("constant", "Figure 3", "rfa", quantity, 0)
        assert claim.paper == "constant"
        assert judged(claim, cells=[flat]).verdict == HELD
        assert judged(claim, cells=[growing]).verdict == REFUTED
        [command] = judged(claim).commands
        assert command == "lra bench attention=softmax,rfa mode=decode"


def test_the_interval_of_an_exponent_is_that_of_the_regression():
    # Of logarithms 0, 1, 2 and 0, 1 + e, 2: slope 1, residuals (-1, 2, -1) e / 3, spread 2.
    e = 0.3
    values = {1: 1.0, 2: 2 ** (1 + e), 4: 4.0}
    slope, low, high = exponent_interval(values)
    assert slope == pytest.approx(exponent(values)) == pytest.approx(1.0)
    reach = 12.706 * (6 * (e / 3) ** 2 / 1 / 2) ** 0.5
    assert (low, high) == pytest.approx((1 - reach, 1 + reach))
    assert exponent_interval({1: 1.0, 2: 2.0}) is None


# Multiples of softmax


@pytest.mark.parametrize(("seconds", "verdict"), [(0.5, HELD), (2.0, REFUTED), (1.0, OPEN)])
def test_speed_is_judged_by_the_spread_of_steps(seconds, verdict):
    claim = Multiple("faster", RFA, "rfa", "train steps/s", 4096)
    found = judged(claim, cells=[made("softmax", 4096, 1.0), made("rfa", 4096, seconds)])
    assert (found.verdict, found.ours) == (verdict, f"× {1 / seconds:.2f}")
    # Quartiles 2 % apart, of 5 steps: 1.96 sqrt(2) 0.02 / 1.349 sqrt(pi / 10) = 2.3 %.
    low, high = (float(end) for end in found.interval.split(" to "))
    assert low == pytest.approx(0.977 / seconds, abs=0.006)
    assert high == pytest.approx(1.023 / seconds, abs=0.006)
    assert (claim.paper, claim.source) == ("× 5.30", "Table 3")


@pytest.mark.parametrize(("megabytes", "verdict"), [(50.0, HELD), (150.0, REFUTED)])
def test_memory_is_judged_as_it_was_measured(megabytes, verdict):
    claim = Multiple("less memory", RFA, "rfa", "train GB", 4096)
    cells = [made("softmax", 4096, 1.0, 100.0), made("rfa", 4096, 1.0, megabytes)]
    found = judged(claim, cells=cells)
    assert (found.verdict, found.ours) == (verdict, f"× {megabytes / 100:.2f}")
    assert (found.interval, claim.paper) == ("–", "× 0.16")


def test_out_of_memory_is_a_result():
    claim = Multiple(
        "faster", "cosFormer (Qin et al. 2022), Table 5", "cosformer", "train steps/s", 4096
    )
    assert claim.paper == "softmax ✗"
    fast, out = made("cosformer", 4096, 1.0), made("softmax", 4096, status="oom")
    held = judged(claim, cells=[fast, out])
    assert (held.verdict, held.ours) == (HELD, "✗ softmax")
    cells = [made("cosformer", 4096, status="oom"), made("softmax", 4096, 1.0)]
    assert judged(claim, cells=cells).verdict == REFUTED
    cells = [fast, made("softmax", 4096, status="timeout")]
    assert judged(claim, cells=cells).verdict == MISSING


def test_generation_is_compared_as_a_whole():
    claim = Multiple("faster", "RFA (Peng et al. 2021), Figure 3", "rfa", "decode tokens/s", 2048)
    cells = [
        generation("rfa", [1.0, 1.0, 1.0], [9.0, 9.0, 9.0]),
        generation("softmax", [1.0, 2.0, 4.0], [9.0, 6.0, 3.0]),
    ]
    assert judged(claim, cells=cells).ours == "× 3.00"


def test_a_gpu_judges_before_a_cpu_and_the_largest_batch_before_others():
    claim = Multiple("faster", RFA, "rfa", "train steps/s", 4096)
    gpu = {"kind": "cuda", "name": "GPU B", "threads": 1}
    cells = [made("softmax", 4096, 1.0), made("rfa", 4096, 0.5)]
    cells += [made("softmax", 4096, 1.0, batch=64), made("rfa", 4096, 0.25, batch=64)]
    assert judged(claim, cells=cells).ours == "× 4.00"
    cells += [made("softmax", 4096, 1.0, device=gpu), made("rfa", 4096, 0.2, device=gpu)]
    assert judged(claim, cells=cells).ours == "× 5.00"


# The page


def test_the_page_counts_verdicts_and_has_every_claim_and_command(trained, tmp_path, capsys):
    runs = [trained(name, count) for name, count in (("cosformer", 300), ("softmax", 250))]
    path = claims.write([Board(runs)], [], tmp_path / "results")
    text = path.read_text()
    [line] = capsys.readouterr().out.splitlines()  # in a terminal the leaderboards are looked at
    assert str(path) in line
    every = [claim for its in claims.CLAIMS.values() for claim in its]
    assert f"{len(every)} claims: 0 held, 0 did not hold, 0 not decided, {len(every)} not" in text
    rows = [row for part in text.split("\n## ")[1:-1] for row in table_of(part)]
    assert [row["claim"].partition(" ")[0] for row in rows] == [
        f"{number + 1}." for number in range(len(every))
    ]
    [row] = [row for row in rows if row["claim"].endswith("cosFormer beats softmax")]
    assert (row["ours"], row["verdict"]) == ("+12.50", MISSING)
    told = text.partition("```sh\n")[2].partition("```")[0].splitlines()
    assert any(
        line.startswith(
            "lra train -m protocol=quick task=listops,retrieval,image,pathfinder "
            "attention=cosformer,softmax seed=0,1,2"
        )
        for line in told
    )
    numbers = {number for line in told for number in line.partition("# ")[2].split(", ")}
    assert numbers == {str(number + 1) for number in range(len(every))}
    assert claims.write([Board(runs)], [], tmp_path / "again").read_text() == text


def test_what_the_papers_print_is_what_is_told_of_them():
    def printed(source, attention, tasks, places):
        cells = [
            c.accuracy
            for c in published()
            if c.source.startswith(source) and c.attention == attention and c.task in tasks
        ]
        assert len(cells) == len(tasks)
        return f"{mean(cells):.{places}f}"

    told = 0
    for claim in (claim for its in claims.CLAIMS.values() for claim in its):
        source = {"Table 4": ("cosFormer Table 4", 2), "Table 3": ("RFA Table 3", 1)}.get(
            claim.source
        )
        if isinstance(claim, Accuracy) and source:
            means = [
                printed(source[0], name, claim.tasks, source[1])
                for name in (claim.better, *claim.others)
            ]
            ours, theirs = means[0], max(means[1:], key=float)
            difference = float(ours) - float(theirs)
            assert claim.paper == f"{difference:+.{source[1]}f} ({ours}, {theirs})"
            told += 1
        assert claim.paper
    assert told == 4
    # cosFormer's Table 1: accuracies on QQP, SST-2 and MNLI.
    relu, leaky, identity = (
        mean(row) for row in ((88.86, 89.90, 77.86), (84.46, 78.21, 74.26), (84.23, 76.26, 58.27))
    )
    papers = [claim.paper for claim in claims.CLAIMS["cosFormer (Qin et al., ICLR 2022)"]]
    assert papers[1].startswith(f"{relu - identity:+.2f} ")
    assert papers[2].startswith(f"{relu - leaky:+.2f} ")


def test_every_row_of_a_claim_can_be_named():
    from models.attention import ATTENTIONS

    for claim in (claim for its in claims.CLAIMS.values() for claim in its):
        labels = (claim.better, *claim.others) if isinstance(claim, Accuracy) else (claim.row,)
        for label in labels:
            name, *options = label.split(" ")
            fields = {field.name for field in dataclasses.fields(ATTENTIONS.get(name).Config)}
            assert {option.partition("=")[0] for option in options} <= fields
