"""T6 and T7: token by token, and once more, an attention gives the same."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from lra.conformance.exactness import compare_sums
from lra.conformance.probe import Call, Subject
from lra.conformance.worst import EXACT, Worst, needs


def recurrent_is_causal(subject: Subject) -> Worst:
    """Token by token, by turns with another sequence, it gives what causal attention gives."""
    needs(subject.able.recurrent, "no recurrent form")
    worst = Worst(EXACT)
    for d, n, batch in ((1, 65, 3), (8, 1, 3), (8, 2, 1), (8, 300, 2)):
        attention = subject.build(d)
        calls = [subject.call(attention, n, causal=True, batch=batch, seed=i) for i in range(2)]
        for call, out in zip(calls, _by_steps(calls), strict=True):
            worst.compare(out, call.out(), call.unit(), f"N={n}, B={batch}, D={d}")
    return worst


def reduced_steps_are_float64(subject: Subject) -> Worst:
    """In bf16 the state does not lose what the tokens have: sums are in float32."""
    needs(subject.able.recurrent, "no recurrent form")
    worst = Worst(torch.finfo(torch.bfloat16).eps)
    n = 1024
    attention, exact = (subject.build(max_len=n, dtype=t) for t in (torch.float32, torch.float64))
    call = subject.call(exact, n, causal=True, batch=1).similar()
    tokens = replace(call, v=call.v.abs()).to(torch.bfloat16, attention)
    with torch.autocast("cpu", torch.bfloat16):
        [out] = _by_steps([tokens])
    compare_sums(worst, out, tokens.to(torch.float64, exact), "N=1,024")
    return worst


@torch.no_grad()
def _by_steps(calls: list[Call]) -> list[Tensor]:
    """Returns the outputs of sequences that take their steps by turns."""
    states, outputs = [], [[] for _ in calls]
    for call in calls:
        batch, device, dtype = len(call.q), call.q.device, call.q.dtype
        states.append(call.attention.init_state(batch, device, dtype))
    for t in range(calls[0].q.shape[2]):
        at = slice(t, t + 1)
        for i, call in enumerate(calls):
            token = (x[:, :, at] for x in (call.q, call.k, call.v))
            hidden = None if call.hidden is None else call.hidden[:, at]
            out, states[i] = call.attention.step(*token, states[i], hidden=hidden)
            outputs[i].append(out)
    return [torch.cat(each, 2) for each in outputs]


def evaluation_is_deterministic(subject: Subject) -> Worst:
    """Equal to the bit: two calls, a loaded copy, before and after training draws.

    Draws change by ``resample`` alone, as its generator says; forward passes draw nothing. Dropout
    is for training alone, where it is declared.
    """
    worst = Worst(0.0)
    attention, copy = (subject.build(dtype=torch.float32, seed=seed) for seed in (0, 1))
    copy.load_state_dict(attention.state_dict())
    dropping = subject.build(dtype=torch.float32, dropout=0.5)
    draws = not subject.able.stochastic
    for where, call in subject.calls(attention, (65,), ((9, 65),)):
        call = call.to(torch.float32, attention)
        generator = torch.get_rng_state()
        out = call.out()
        worst.same(call.out(), out, f"{where}: second call")
        worst.same(replace(call, attention=copy).out(), out, f"{where}: loaded copy")
        worst.same(replace(call, attention=dropping).out(), out, f"{where}: dropout in evaluation")
        attention.resample(torch.Generator().manual_seed(2))
        worst.same(call.out(), out, f"{where}: after resample")
        attention.train()
        trained = call.out()
        worst.same(call.out(), trained, f"{where}: second call in training")
        attention.resample(torch.Generator().manual_seed(3))
        # Not felt in every call: among few tokens there may be nothing to choose.
        draws |= not torch.equal(call.out(), trained)
        attention.resample(torch.Generator().manual_seed(2))
        worst.same(call.out(), trained, f"{where}: the same draw again")
        worst.same(torch.get_rng_state(), generator, f"{where}: state of torch's generator")
        dropping.resample(torch.Generator().manual_seed(2))
        dropped = not torch.equal(replace(call, attention=dropping.train()).out(), trained)
        if dropped != (subject.able.dropout == "weights"):
            worst.note(math.inf, f"{where}: dropout in training, declared {subject.able.dropout}")
        attention.eval()
        dropping.eval()
    if not draws:
        worst.note(math.inf, "resample draws nothing")
    return worst
