"""`lra compare`: the paired bootstrap agrees with exact results, and pairs only what pairs."""

import dataclasses
import math

import numpy as np
import pytest
from test_report import DATA, TASK, named, run, sound

from lra.record import Score, save_predictions
from lra.report.compare import bootstrap, compare
from lra.report.store import Run, predictions


def saved(folder, right, **changes):
    """Saves a run that answers as ``right`` (n,) says; returns it with its folder."""
    score = Score.of(int(right.sum()), len(right), 1.0, 600)
    record = sound(dataclasses.replace(run(), test=score, **changes))
    record.save(folder)
    save_predictions(folder, right, np.ones(len(right)))
    return Run(record, folder)


def answers(*counts):
    """Returns what A and B answer right, given how often: both, A alone, B alone, neither."""
    patterns = np.array([[1, 1], [1, 0], [0, 1], [0, 0]], dtype=bool)
    return np.repeat(patterns, counts, axis=0).T


def compared(tmp_path, a, b, task="listops"):
    runs = [
        [saved(tmp_path / f"{side}{i}", right, seed=i) for i, right in enumerate(seeds)]
        for side, seeds in (("a", a), ("b", b))
    ]
    return bootstrap([(task, *runs)])


def test_the_interval_is_that_of_the_normal_approximation_for_many_examples(tmp_path):
    a, b = answers(1200, 250, 350, 200)
    [found] = compared(tmp_path, [a], [b])
    assert (found.n, found.seeds) == (2000, (1, 1))
    assert (found.a, found.b) == pytest.approx((72.5, 77.5))
    # The difference of an example has variance P(A alone) + P(B alone) - difference^2.
    error = 100 * math.sqrt((0.125 + 0.175 - 0.05**2) / 2000)
    # A 2.5 % quantile of 10,000 samples is off by sqrt(0.025 0.975) / (100 0.0584) of the error.
    sampling = 4 * math.sqrt(0.025 * 0.975) / (100 * 0.0584) * error
    assert found.low == pytest.approx(5 - 1.96 * error, abs=sampling)
    assert found.high == pytest.approx(5 + 1.96 * error, abs=sampling)
    assert found.p < 1e-3


def test_the_p_value_is_that_of_mcnemars_test_for_many_examples(tmp_path):
    a, b = answers(1000, 300, 340, 360)
    [found] = compared(tmp_path, [a], [b])
    z = (340 - 300) / math.sqrt(640)
    assert found.p == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.015)


def test_equal_answers_differ_by_nothing(tmp_path):
    a, b = answers(70, 0, 0, 30)
    [found] = compared(tmp_path, [a], [b])
    assert (found.low, found.high, found.p) == (0.0, 0.0, 1.0)


def test_pairing_makes_the_interval_of_like_models_narrow(tmp_path):
    a, b = answers(980, 0, 10, 1010)
    [paired] = compared(tmp_path, [a], [b])
    [unpaired] = compared(tmp_path / "other order", [a], [np.roll(b, 990)])
    assert paired.high - paired.low < 0.25 * (unpaired.high - unpaired.low)


def test_seeds_that_differ_widen_the_interval(tmp_path):
    rng = np.random.default_rng(0)
    steady = [rng.random(2000) < 0.5 for _ in range(3)]
    apart = [rng.random(2000) < p for p in (0.4, 0.5, 0.6)]
    [alike] = compared(tmp_path / "alike", steady, [rng.random(2000) < 0.5 for _ in range(3)])
    [different] = compared(tmp_path / "different", steady, apart)
    assert different.seeds == (3, 3)
    assert different.high - different.low > 2.5 * (alike.high - alike.low)


def test_over_all_tasks_the_mean_difference_has_its_own_interval(tmp_path):
    pairs = []
    for task, counts in (("listops", (1200, 250, 350, 200)), ("text", (500, 100, 100, 300))):
        a, b = answers(*counts)
        a_run, b_run = (saved(tmp_path / task / side, r) for side, r in (("a", a), ("b", b)))
        pairs.append((task, [a_run], [b_run]))
    listops, text, overall = bootstrap(pairs)
    assert overall.task == "average of 2"
    assert overall.b - overall.a == pytest.approx((5 + 0) / 2)
    widths = [one.high - one.low for one in (listops, text, overall)]
    assert widths[2] == pytest.approx(math.hypot(*widths[:2]) / 2, rel=0.05)


def test_the_command_finds_rows_by_name_and_pairs_them_by_protocol_and_data(tmp_path, capsys):
    a, b = answers(300, 100, 200, 400)
    runs = tmp_path / "runs"
    for protocol in ("quick", "nystrom"):
        saved(runs / protocol / "a", a, protocol=protocol)
        relu = named("linear", feature="relu")
        saved(runs / protocol / "b", b, protocol=protocol, attention=relu, hash="bbbbbbbb")
    other = TASK | DATA | {"name": "text", "fingerprint": "t", "data_hash": "e" * 16}
    saved(runs / "alone", a, task=other)
    assert compare("softmax", "linear feature=relu", [runs]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| listops") == 2
    assert "| text" not in printed
    assert "| listops | 1,000 |       1, 1 | 40.00 | 50.00 | +10.00 |" in printed
    assert compare("softmax", "linear feature=relu", [runs], "quick") == 0
    assert capsys.readouterr().out.count("| listops") == 1


def test_folders_can_be_compared(tmp_path, capsys):
    a, b = answers(300, 100, 200, 400)
    for side, right in (("a", a), ("b", b)):
        saved(tmp_path / side, right)  # one setting, two stores
    assert compare(str(tmp_path / "a"), str(tmp_path / "b"), [tmp_path / "none"]) == 0
    assert "+10.00" in capsys.readouterr().out


def test_what_cannot_be_compared_is_told(tmp_path):
    a, b = answers(300, 100, 200, 400)
    runs = tmp_path / "runs"
    saved(runs / "a", a)
    saved(runs / "b", b, attention=named("linear"), hash="b", protocol="nystrom")
    bf16 = {"precision": {"name": "bf16", "reason": "asked for"}}
    saved(runs / "c", a, attention=named("rfa"), hash="c")
    saved(runs / "d", a, attention=named("rfa"), hash="d", **bf16)
    with pytest.raises(ValueError, match=r"Unknown row 'softmx'. Did you mean softmax\?"):
        compare("softmx", "linear", [runs])
    with pytest.raises(ValueError, match="no finished runs of one protocol"):
        compare("softmax", "linear", [runs])
    with pytest.raises(ValueError, match=r"rfa is more than one setting .*fp32.*bf16.*folder"):
        compare("softmax", "rfa", [runs])
    with pytest.raises(ValueError, match="Unknown row 'linear'"):
        compare("softmax", "linear", [runs], "quick")


def test_missing_predictions_are_named(tmp_path):
    a, b = answers(300, 100, 200, 400)
    runs = [saved(tmp_path / "a", a), saved(tmp_path / "b", b)]
    (tmp_path / "b" / "test_predictions.npy").unlink()
    with pytest.raises(ValueError, match=r"b.test_predictions.npy cannot be read"):
        bootstrap([("listops", runs[:1], runs[1:])])


@pytest.mark.parametrize(
    "content",
    [
        b"PK\x03\x04 no archive",
        b"\x93NUMPY\x01\x00\x10\x00{'descr': (((((",
        b"",
        np.zeros((2, 5)).tobytes(),
    ],
)
def test_damaged_predictions_are_named(tmp_path, content):
    (tmp_path / "test_predictions.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"test_predictions\.npy cannot be read"):
        predictions(tmp_path)


def test_predictions_of_numbers_are_refused(tmp_path):
    np.save(tmp_path / "test_predictions.npy", np.zeros((2, 5)))
    with pytest.raises(ValueError, match="it is of float64, not of bytes"):
        predictions(tmp_path)
