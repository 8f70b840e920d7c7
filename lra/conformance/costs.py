"""T12 and T13: operations and memory grow as declared, and sizes are those declared."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lra.conformance.probe import Subject
from lra.conformance.worst import Worst, needs
from lra.measure import allocated_peak

EXPONENTS = {"N": 1.0, "N log N": 1.1, "N^1.5": 1.5, "N^2": 2.0}


def causal_memory_is_that_of_bidirectional(subject: Subject) -> Worst:
    """At 2,048 positions a causal training pass takes less than 4 times the memory."""
    able = subject.able
    needs({"self", "causal"} <= able.patterns, "needs a causal and a bidirectional form")
    worst = Worst(4.0)
    peaks = {causal: _training_peak(subject, 2048, 64, causal) for causal in (False, True)}
    worst.note(peaks[True] / peaks[False], f"{peaks[True] / 1e6:.1f} MB at N=2,048, D=64")
    return worst


def memory_grows_as_declared(subject: Subject) -> Worst:
    """The exponent of a training pass's memory from 1,024 to 4,096 positions is that declared."""
    return _growth(subject, subject.able.memory, lambda n, c: _training_peak(subject, n, 16, c))


def operations_grow_as_declared(subject: Subject) -> Worst:
    """The exponent of matrix products and convolutions from 1,024 to 4,096 is that declared."""
    return _growth(subject, subject.able.time, lambda n, causal: _operations(subject, n, causal))


def _growth(subject: Subject, declared: str, measure: Callable[[int, bool], int]) -> Worst:
    """Compares the growth of a figure of N positions, causal or not, with the one declared."""
    worst = Worst(EXPONENTS[declared] + 0.1)
    for pattern in ("self", "causal"):
        if pattern in subject.able.patterns:
            small, large = (measure(n, pattern == "causal") for n in (1024, 4096))
            if small:
                worst.note(math.log(large / small, 4), f"{pattern}, declared {declared}")
    return worst


def _operations(subject: Subject, n: int, causal: bool) -> int:
    """Returns the floating point operations of a forward pass of one head, as torch counts them."""
    attention = subject.build(8, heads=1, max_len=n, dtype=torch.float32)
    call = subject.call(attention, n, causal=causal, batch=1, dtype=torch.float32)
    counter = FlopCounterMode(display=False)
    # The fused kernel is counted on no CPU; the plain one has the same products.
    with torch.no_grad(), counter, sdpa_kernel(SDPBackend.MATH):
        call.out()
    return counter.get_total_flops()


def _training_peak(subject: Subject, n: int, d: int, causal: bool) -> int:
    """Returns the peak bytes that a forward and a backward pass of one head allocate."""
    attention = subject.build(d, heads=1, max_len=n, dtype=torch.float32).train()
    mask = None
    if subject.able.key_mask != "none":
        mask = (torch.arange(n) < n - 5).expand(1, -1)
    call = subject.call(attention, n, mask=mask, causal=causal, batch=1, dtype=torch.float32)
    for leaf in (call.q, call.k, call.v):
        leaf.requires_grad_()
    return allocated_peak(lambda: call.out().sum().backward())


def sizes_are_declared(subject: Subject) -> Worst:
    """``cost`` tells the parameters, and the size of the state of one sequence."""
    worst = Worst(0.0)
    attention = subject.build(8, max_len=64, dtype=torch.float32)
    declared = attention.cost(16, 16)
    parameters = sum(p.numel() for p in attention.parameters())
    worst.note(abs(declared.parameters - parameters), f"{parameters} parameters")
    if not subject.able.recurrent:
        worst.note(declared.state_floats, "a state without a recurrent form")
        return worst
    state = attention.init_state(1, torch.device("cpu"), torch.float32)
    call = subject.call(attention, 1, causal=True, batch=1, dtype=torch.float32)
    for _ in range(3):
        _, state = attention.step(call.q, call.k, call.v, state, hidden=call.hidden)
    tensors = (x for x in tree_leaves(state) if isinstance(x, Tensor) and x.is_floating_point())
    floats = sum(x.numel() for x in tensors)
    worst.note(abs(declared.state_floats - floats), f"{floats} numbers of state")
    return worst
