"""T14: what is not defined is refused."""

from collections.abc import Callable
from dataclasses import replace

import torch

from lra.conformance.probe import Call, Subject
from lra.conformance.worst import Worst
from models.attention.base import Attention


def what_is_not_defined_is_refused(subject: Subject) -> Worst:
    """Unsupported patterns, masks, lengths, shapes and options raise ValueError."""
    able, attention = subject.able, subject.build(max_len=16)
    causal = not able.patterns & {"self", "cross"}
    sound = subject.call(attention, 5, causal=causal)
    sound.out()  # if this is refused, all below would be for nothing
    ones = torch.ones(3, 5, dtype=torch.bool)
    refused: dict[str, Callable[[], object]] = {}

    def both(name: str, call: Call) -> None:
        refused[name] = call.out
        refused[f"{name} (quadratic)"] = call.reference

    for kind in (torch.float32, torch.uint8, torch.int64):
        both(f"a mask of {kind}", replace(sound, key_mask=ones.to(kind)))
    for shape in ((5,), (1, 5), (3, 4), (3, 1, 1, 5)):
        mask = torch.ones(shape, dtype=torch.bool)
        both(f"a mask of shape {shape}", replace(sound, key_mask=mask))
    if able.key_mask == "none":
        both("a mask", replace(sound, key_mask=ones))
    if not (able.shared_query_key or subject.mixes):
        both("causal with N != S", replace(subject.call(attention, 5, 6), causal=True))
        if "cross" not in able.patterns:
            both("cross attention", subject.call(attention, 5, 6))
    if "causal" not in able.patterns:
        both("causal", replace(sound, causal=True))
    if causal:
        both("bidirectional", replace(sound, causal=False))
    if able.needs_hidden:
        both("a missing layer input", replace(sound, hidden=None))
        both("a layer input of another length", replace(sound, hidden=sound.hidden[:, :4]))
    if able.needs_max_len:
        both("more than max_len tokens", subject.call(attention, 17, causal=causal))
    if subject.mixes:
        both("a narrower layer input", replace(sound, v=sound.v[..., 1:]))
    else:
        both("values of another length", replace(sound, v=sound.v[:, :, :4]))
        both("another number of heads", replace(sound, q=sound.q[:, :1], k=sound.k[:, :1]))
    if able.own_values:
        both("values of another width", subject.call(attention, 5, causal=causal, wider=1))
    refused["an unknown option"] = lambda: Subject(subject.cls, subject.options | {"nonsense": 1})
    refused |= _refused_steps(subject, attention)

    worst = Worst(0.0)
    accepted = [name for name, action in refused.items() if not _refuses(action)]
    told = f"no ValueError for {', '.join(accepted)}" if accepted else f"{len(refused)} refusals"
    worst.note(float(len(accepted)), told)
    return worst


def _refused_steps(subject: Subject, attention: Attention) -> dict[str, Callable[[], object]]:
    """Returns steps that must be refused."""

    def steps(count: int, call: Call, batch: int = 3) -> None:
        state = attention.init_state(batch, torch.device("cpu"), torch.float64)
        for _ in range(count):
            _, state = attention.step(call.q, call.k, call.v, state, hidden=call.hidden)

    one, two = (subject.call(attention, n, causal=True) for n in (1, 2))
    if not subject.able.recurrent:
        return {"a step without a recurrent form": lambda: steps(1, one)}
    refused: dict[str, Callable[[], object]] = {
        "a step of two tokens": lambda: steps(1, two),
        "a step of another batch": lambda: steps(1, one, batch=2),
        "a step with other heads": lambda: steps(1, replace(one, q=one.q[:, :1], k=one.k[:, :1])),
    }
    if subject.able.needs_hidden:
        refused["a step without the layer input"] = lambda: steps(1, replace(one, hidden=None))
    if subject.able.needs_max_len:
        refused["more than max_len steps"] = lambda: steps(17, one)
    return refused


def _refuses(action: Callable[[], object]) -> bool:
    try:
        action()
    except ValueError:
        return True
    except Exception:  # it fails, but by accident
        return False
    return False
