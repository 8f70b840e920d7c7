"""T1: the fast form is the quadratic form."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from lra.conformance.probe import LONG, Call, Subject
from lra.conformance.worst import EXACT, Worst

TOLERANCES = {torch.float64: EXACT, torch.float32: 2e-5, torch.bfloat16: 3e-2}

LENGTHS = (1, 2, 7, 64, 65, 257)
CROSS = ((1, 7), (7, 1), (64, 65), (65, 3), (2, 257), (257, 64))
HEAD_DIMS = (1, 2, 8, 16, 64)


def output_is_weights_times_values(subject: Subject) -> Worst:
    """In float64, for every pattern, mask, length and head dimension, E = D and not, both modes."""
    worst = Worst(EXACT)

    def compare(where: str, call: Call) -> None:
        worst.compare(call.out(), call.oracle.output, call.unit(), where)

    for d in HEAD_DIMS:
        for where, call in subject.calls(subject.build(d), (1, 7, 65), ((1, 7), (65, 3))):
            compare(where, call)
    for wider in (0,) if subject.able.own_values or subject.mixes else (0, 3):
        for where, call in subject.calls(subject.build(), LENGTHS, CROSS, wider):
            compare(where, call)
    attention = subject.build(training=True)
    for where, call in subject.calls(attention, (65, LONG), ((9, 65),)):
        compare(f"training, {where}", call)
    return worst


def float32_is_float64(subject: Subject) -> Worst:
    """In float32, against float64 weights of the same instance."""
    return _against_float64(subject, torch.float32, autocast=False)


def bf16_is_float64(subject: Subject) -> Worst:
    """Under bf16 autocast, for q, k, v in bf16 and in float32."""
    return _against_float64(subject, torch.bfloat16, autocast=True)


def _against_float64(subject: Subject, dtype: torch.dtype, autocast: bool) -> Worst:
    worst = Worst(TOLERANCES[dtype])
    attention, exact = subject.build(dtype=torch.float32), subject.build()
    for where, call in subject.calls(exact, (7, 257), ((9, 65),)):
        call = call.similar()
        # What padded queries give is unspecified: where they see few keys, weights that are not
        # normalised may cancel to almost nothing, and so may what errors are relative to.
        rows = torch.tensor(True) if call.one_sided else call.real[:, None, :, None]
        for inputs in sorted({dtype, torch.float32}, key=str):
            rounded = call.to(inputs, attention)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = rounded.out()
            reference = rounded.to(torch.float64, exact)
            expected, unit = reference.oracle.output * rows, reference.unit()
            worst.compare(out * rows, expected, unit, f"{where}, {inputs}")
            if out.dtype != inputs and not autocast:
                worst.note(math.inf, f"{where}: the output is {out.dtype}")
    return worst


def long_sequences_lose_nothing(subject: Subject) -> Worst:
    """At 2,048 positions bf16 tokens lose the rounding of the output, and nothing else.

    An angle, feature or sum in bf16 shows at this length: with values that rise with the position,
    and where only the first or the last 32 tokens are real, so that queries are far from them all.
    """
    worst = Worst(torch.finfo(torch.bfloat16).eps)
    n, at = 2048, torch.arange(2048)
    masks = torch.stack([at >= 0, at < 32, at >= n - 32])
    attention, exact = (
        subject.build(heads=1, max_len=n, dtype=t) for t in (torch.float32, torch.float64)
    )
    for pattern in ("self", "causal"):
        if pattern not in subject.able.patterns:
            continue
        call = subject.call(exact, n, batch=len(masks), causal=pattern == "causal").similar()
        rising = torch.linspace(0, 1, n, dtype=torch.float64)[:, None].pow(4)
        within = torch.linspace(0.5, 1, 32, dtype=torch.float64).repeat(n // 32)[:, None]
        v = torch.stack([rising, within, within])[:, None].expand_as(call.v)
        mask = masks if subject.able.key_mask == "exact" else None
        tokens = replace(call, v=v, key_mask=mask).to(torch.bfloat16, attention)
        with torch.autocast("cpu", torch.bfloat16):
            out = tokens.out()
        compare_sums(worst, out, tokens.to(torch.float64, exact), f"{pattern}, N={n}")
    return worst


def compare_sums(worst: Worst, out: Tensor, exact: Call, where: str) -> None:
    """Notes errors in units of all that is summed up: for a distribution, the output itself."""
    weights, expected = exact.oracle
    unit = torch.maximum(weights.abs() @ exact.v.abs(), expected.abs().amax(-1, True))
    worst.compare(out, expected, unit, where)
