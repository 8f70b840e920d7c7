"""Every attention passes the checks of the contract, and every check catches broken ones."""

from dataclasses import replace

import pytest
from attention_cases import MECHANISMS
from mutants import MUTANTS, Sound

from lra.conformance import CHECKS, Result, check, table
from models.attention import ATTENTIONS


def failed(results):
    return {r.check for r in results if r.outcome == "fail"}


def checked(mechanism):
    name, options = MECHANISMS[mechanism]
    return check(ATTENTIONS.get(name), options)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_every_registered_attention_passes(mechanism):
    results = checked(mechanism)
    assert [r.check for r in results] == list(CHECKS)
    assert failed(results) == set(), table(results)


@pytest.mark.parametrize("kernel", ["gaussian", "arccos"])
def test_rfa_passes_with_gate_and_unnormalised_keys_together(kernel):
    options = {"kernel": kernel, "gate": True, "normalise": False}
    results = check(ATTENTIONS.get("rfa"), options)
    assert failed(results) == set(), table(results)


def test_the_published_horizon_of_cosformer_is_declared_to_be_felt():
    # That it is felt indeed, a mutant shows that declares otherwise.
    names = ["T3 masked tokens change nothing"]
    [result] = check(ATTENTIONS.get("cosformer"), {"horizon": "padded"}, names)
    assert (result.outcome, result.detail) == ("n/a", "masks are approximate")


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
    names = ["T9 permutation", "T12 causal memory"]
    permutation, memory = check(ATTENTIONS.get("rfa"), {"gate": True}, names)
    assert permutation == Result("T9 permutation", "n/a", detail="not declared")
    assert (memory.outcome, memory.detail) == (
        "n/a",
        "needs a causal and a bidirectional form",
    )


@pytest.mark.parametrize(
    "declared",
    [
        {"patterns": frozenset({"self"})},
        {"patterns": frozenset({"causal"})},
        {"patterns": frozenset({"cross"})},
        {"patterns": frozenset({"self", "cross"}), "needs_hidden": True},
        {"key_mask": "none"},
        {"key_mask": "approximate"},
        {"shared_query_key": True, "patterns": frozenset({"self", "causal"})},
        {"needs_max_len": True},
        {"identities": frozenset({"permutation", "position shift", "key shift"})},
        {"identities": frozenset({"position shift"}), "key_mask": "none"},
    ],
    ids=lambda declared: ", ".join(declared),
)
def test_a_sound_attention_passes_whatever_less_it_declares(declared):
    class Declares(Sound):
        capabilities = replace(Sound.capabilities, **declared)

    # Those that look at what is declared, and take no long sequences.
    names = [name for name in CHECKS if name.split()[0] in {"T4", "T5", "T7", "T9", "T13", "T14"}]
    results = check(Declares, names=["T3 masked tokens change nothing", *names])
    assert failed(results) == set(), table(results)


def test_what_cannot_be_built_is_told_and_not_checked():
    with pytest.raises(ValueError, match=r"attention.pool is 1: 2 heads need as many matrices"):
        check(ATTENTIONS.get("rfa"), {"pool": 1})


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
