"""Every attention passes the checks of the contract, and every check catches broken ones."""

import pytest
from attention_cases import MECHANISMS
from mutants import MUTANTS, Sound

from lra.conformance import CHECKS, Result, check, table
from models.attention import ATTENTIONS

PUBLISHED_HORIZON = "cosformer-padded"
"""It takes the padded length, as published, so padding and batch mates must show."""


def failed(results):
    return {r.check for r in results if r.outcome == "fail"}


def checked(mechanism):
    name, options = MECHANISMS[mechanism]
    return check(ATTENTIONS.get(name), options)


@pytest.mark.parametrize("mechanism", sorted(MECHANISMS.keys() - {PUBLISHED_HORIZON}))
def test_every_registered_attention_passes(mechanism):
    results = checked(mechanism)
    assert [r.check for r in results] == list(CHECKS)
    assert failed(results) == set(), table(results)


@pytest.mark.parametrize("kernel", ["gaussian", "arccos"])
def test_rfa_passes_with_gate_and_unnormalised_keys_together(kernel):
    options = {"kernel": kernel, "gate": True, "normalise": False}
    results = check(ATTENTIONS.get("rfa"), options)
    assert failed(results) == set(), table(results)


def test_the_published_horizon_of_cosformer_feels_padding_and_batch_mates_and_nothing_else():
    expected = {"T3 masked tokens change nothing", "T4 batch mates change nothing"}
    assert failed(checked(PUBLISHED_HORIZON)) == expected


def test_a_sound_attention_passes():
    results = check(Sound)
    assert failed(results) == set(), table(results)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_broken_attention_is_caught_by_the_check_that_names_its_bug(mutant):
    results = check(mutant, names=MUTANTS[mutant])
    assert failed(results) == MUTANTS[mutant], table(results)


def test_every_check_catches_something():
    assert set().union(*MUTANTS.values()) == set(CHECKS)


def test_what_is_not_declared_is_not_applicable_and_says_why():
    results = {r.check: r for r in check(ATTENTIONS.get("rfa"), {"gate": True})}
    assert results["T9 permutation"] == Result("T9 permutation", "n/a", detail="not declared")
    assert results["T12 causal memory"].outcome == "n/a"
    assert "bidirectional" in results["T12 causal memory"].detail


def test_an_attention_that_crashes_fails_with_its_error():
    class Crashes(Sound):
        def attend(self, *_):
            raise RuntimeError("boom")

    [result] = check(Crashes, names=["T2 no future is felt"])
    assert (result.outcome, result.detail) == ("fail", "RuntimeError: boom")


def test_options_are_as_strict_as_everywhere():
    with pytest.raises(ValueError, match=r"Did you mean attention.kernel"):
        check(ATTENTIONS.get("rfa"), {"kernal": "arccos"})


def test_the_table_has_a_line_for_each_result_with_error_and_tolerance():
    text = table([Result("T1 x", "pass", 1.5e-12, 1e-10, "N=7"), Result("T2", "n/a", detail="no")])
    heading, first, second = text.splitlines()
    assert heading.split()[:2] == ["check", "outcome"]
    assert first.split() == ["T1", "x", "pass", "1.5e-12", "1.0e-10", "N=7"]
    assert second.split() == ["T2", "n/a", "no"]
