"""T11: gradients are derivatives, and those of the quadratic form."""

import math

import torch
from torch import Tensor

from lra.conformance.probe import Call, Subject
from lra.conformance.worst import Worst

DERIVATIVE, GRADIENT = 1e-6, 1e-9
FLOAT32_GRADIENT = torch.finfo(torch.float32).eps ** 0.5  # gradients are made of differences


def gradients_are_derivatives(subject: Subject) -> Worst:
    """Against central differences along random directions, of each input and parameter."""
    worst = Worst(DERIVATIVE)
    attention = subject.build(3, heads=1)
    useless = dict(attention.named_parameters())
    for where, call in subject.calls(attention, (6,), ((4, 6),)):
        call = call.similar()
        leaves = {"q": call.q, "k": call.k, "v": call.v}
        if call.hidden is not None:
            leaves["hidden"] = call.hidden
        for leaf in leaves.values():
            leaf.requires_grad_()
        leaves |= dict(attention.named_parameters())
        generator = torch.Generator().manual_seed(4)
        out = call.out()
        to = torch.randn(out.shape, generator=generator, dtype=out.dtype)
        gradients = torch.autograd.grad((out * to).sum(), list(leaves.values()), allow_unused=True)
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            gradient = torch.zeros_like(leaf) if gradient is None else gradient
            if bool(gradient.any()):
                useless.pop(name, None)
            direction = torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
            expected = _derivative(call, leaf.data, direction, to)
            size = max(1.0, abs(expected), float(gradient.norm() * direction.norm()))
            error = abs(float((gradient * direction).sum()) - expected) / size
            worst.note(error, f"{where}: {name}")
    if useless:
        # Six tokens may leave a parameter nothing to decide.
        for _, call in subject.calls(attention, (300,), ((65, 300),)):
            call.out().square().sum().backward()
        for name, parameter in useless.items():
            if parameter.grad is None or not bool(parameter.grad.any()):
                worst.note(math.inf, f"{name} never has a gradient")
    return worst


@torch.no_grad()
def _derivative(call: Call, leaf: Tensor, direction: Tensor, to: Tensor) -> float:
    """Returns the derivative of (out * to).sum() along a direction, by a fourth-order stencil."""
    kept, step, total = leaf.clone(), 1e-5, 0.0
    for times, weight in ((-2, 1), (-1, -8), (1, 8), (2, -1)):
        leaf.copy_(kept + times * step * direction)
        total += weight * float((call.out() * to).sum())
    leaf.copy_(kept)
    return total / (12 * step)


def gradients_are_those_of_weights(subject: Subject) -> Worst:
    """In float64, at a length past any chunk, in both modes: the two forms' gradients agree."""
    return _gradients(subject, torch.float64, GRADIENT)


def float32_gradients_are_those_of_weights(subject: Subject) -> Worst:
    """The same in float32, in which models are trained."""
    return _gradients(subject, torch.float32, FLOAT32_GRADIENT)


def _gradients(subject: Subject, dtype: torch.dtype, tolerance: float) -> Worst:
    worst = Worst(tolerance)
    for mode, attention in subject.modes(dtype):
        for where, call in subject.calls(attention, (300,), ((65, 300),)):
            call = call.to(dtype, attention).similar()
            leaves = [x for x in (call.q, call.k, call.v, call.hidden) if x is not None]
            for leaf in leaves:
                leaf.requires_grad_()
            leaves += attention.parameters()
            forms = call.out(), call.reference()
            to = torch.randn_like(forms[0])
            fast, exact = (
                torch.autograd.grad((form * to).sum(), leaves, allow_unused=True) for form in forms
            )
            for ours, theirs in zip(fast, exact, strict=True):
                if theirs is not None:
                    ours = torch.zeros_like(theirs) if ours is None else ours
                    error = (ours - theirs).norm() / theirs.norm().clamp_min(1e-30)
                    worst.note(float(error), f"{mode}, {where}")
    return worst
