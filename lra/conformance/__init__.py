"""What every attention owes by its contract, measured: `lra check` and the tests run these checks.

Each check compares the fast form with the quadratic one, or two calls that must agree, on all the
patterns that the capabilities declare. Errors of outputs are relative to what a query could give:
the sum of its absolute weights times the largest value (for weights that are a distribution, the
largest value), times that sum once more where it exceeds 1, as denominators near 0 magnify
rounding; or to the query's largest output, where that is more than weighed values. A query without
any weight must give exactly 0.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lra.conformance import (
    costs,
    exactness,
    gradients,
    identities,
    refusals,
    repetition,
    unfelt,
)
from lra.conformance.probe import Subject
from lra.conformance.worst import NotApplicable, Worst
from lra.text import aligned
from models.attention.base import Mechanism

CHECKS: dict[str, Callable[[Subject], Worst]] = {
    "T1 output is weights @ values": exactness.output_is_weights_times_values,
    "T1 float32 is float64": exactness.float32_is_float64,
    "T1 bf16 is float64": exactness.bf16_is_float64,
    "T1 long bf16 sequences": exactness.long_sequences_lose_nothing,
    "T2 no future is felt": unfelt.no_future_is_felt,
    "T3 masked tokens change nothing": unfelt.masked_tokens_change_nothing,
    "T4 batch mates change nothing": unfelt.batch_mates_change_nothing,
    "T5 no key gives zero": unfelt.no_key_gives_zero,
    "T6 recurrent is causal": repetition.recurrent_is_causal,
    "T6 bf16 steps are float64": repetition.reduced_steps_are_float64,
    "T7 evaluation is deterministic": repetition.evaluation_is_deterministic,
    "T9 permutation": identities.permuted_tokens_give_permuted_outputs,
    "T9 position shift": identities.masked_tokens_before_change_nothing,
    "T9 key shift": identities.one_vector_added_to_all_keys_changes_nothing,
    "T9 query scale": identities.scaled_queries_change_nothing,
    "T9 key scale": identities.scaled_keys_change_nothing,
    "T9 rotation": identities.rotated_queries_and_keys_change_nothing,
    "T11 gradients are derivatives": gradients.gradients_are_derivatives,
    "T11 gradients of both forms": gradients.gradients_are_those_of_weights,
    "T11 float32 gradients of both": gradients.float32_gradients_are_those_of_weights,
    "T12 causal memory": costs.causal_memory_is_that_of_bidirectional,
    "T12 growth of memory": costs.memory_grows_as_declared,
    "T12 growth of operations": costs.operations_grow_as_declared,
    "T13 declared sizes": costs.sizes_are_declared,
    "T14 refusals": refusals.what_is_not_defined_is_refused,
}
"""The checks by name. Missing numbers are a mechanism's own: degenerate cases, statistics."""


@dataclass(frozen=True)
class Result:
    """The outcome of one check.

    Attributes:
        check: What was checked; begins with its number in the list of checks.
        outcome: Whether it passed, failed or does not apply.
        error: The worst error, None where nothing was measured.
        tolerance: The largest error that passes.
        detail: Where the error is worst, what went wrong, or why the check does not apply.
    """

    check: str
    outcome: Literal["pass", "fail", "n/a"]
    error: float | None = None
    tolerance: float | None = None
    detail: str = ""


def check(
    cls: type[Mechanism],
    options: Mapping[str, Any] | None = None,
    names: Iterable[str] | None = None,
) -> list[Result]:
    """Runs checks on an attention or a mixer.

    Args:
        cls: Its class; it need not be registered.
        options: Its options.
        names: Names of ``CHECKS``; None for all.

    Raises:
        ValueError: For an option that is unknown, of the wrong type or refused.
    """
    subject = Subject(cls, options or {})
    with torch.random.fork_rng(devices=[]):
        subject.build()  # what cannot be built is no matter of the checks
        return [_run(name, CHECKS[name], subject) for name in (names or CHECKS)]


def table(results: Iterable[Result]) -> str:
    """Returns results as aligned text under a heading."""
    rows = [("check", "outcome", "worst error", "tolerance", "where, or why")]
    for r in results:
        figures = ("" if x is None else f"{x:.1e}" for x in (r.error, r.tolerance))
        rows.append((r.check, r.outcome, *figures, r.detail))
    return aligned(rows)


def _run(name: str, function: Callable[[Subject], Worst], subject: Subject) -> Result:
    try:
        worst = function(subject)
    except NotApplicable as reason:
        return Result(name, "n/a", detail=str(reason))
    except Exception as error:  # whatever the attention under test does
        told = str(error).strip().partition("\n")[0]
        return Result(name, "fail", detail=f"{type(error).__name__}: {told}")
    if not worst.where:
        return Result(name, "n/a", detail="it has no form that this looks at")
    outcome = "fail" if worst.error > worst.tolerance else "pass"
    return Result(name, outcome, worst.error, worst.tolerance, worst.where)
