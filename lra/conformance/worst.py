"""What a check gives: its worst error, or that it does not apply."""

import math

import torch
from torch import Tensor

from lra.conformance.probe import Subject

EXACT = 1e-10
"""Of outputs in float64."""


class NotApplicable(Exception):
    """A check asks for what the attention does not declare."""


class Worst:
    """Keeps the worst error and where it is.

    Args:
        tolerance: The largest error that passes.
    """

    def __init__(self, tolerance: float) -> None:
        self.tolerance, self.error, self.where = tolerance, -1.0, ""

    def note(self, error: float, where: str) -> None:
        """Notes an error; NaN counts as infinite."""
        error = math.inf if math.isnan(error) else error
        if error > self.error:
            self.error, self.where = error, where

    def compare(self, actual: Tensor, expected: Tensor, unit: Tensor, where: str) -> None:
        """Notes the largest difference in units; where the unit is 0 there may be none."""
        if actual.shape != expected.shape:
            self.note(math.inf, f"{where}: shape {tuple(actual.shape)}")
            return
        difference = (actual.detach().double() - expected.detach().double()).abs()
        relative = torch.where(difference == 0, 0.0, difference / unit.detach())
        self.note(float(relative.max()) if relative.numel() else 0.0, where)

    def same(self, actual: Tensor, expected: Tensor, where: str) -> None:
        """Notes an infinite error unless the two are equal to the bit."""
        self.note(0.0 if torch.equal(actual, expected) else math.inf, where)


def needs(condition: bool, reason: str) -> None:
    """Ends a check that does not apply unless a condition holds."""
    if not condition:
        raise NotApplicable(reason)


def needs_identity(subject: Subject, identity: str) -> None:
    """Ends a check of an identity that is not declared."""
    needs(identity in subject.able.identities, "not declared")


def needs_exact_masks(subject: Subject) -> None:
    """Ends a check of masks that are felt a little, or refused."""
    needs(subject.able.key_mask != "approximate", "masks are approximate")
    needs(subject.able.key_mask != "none", "masks are refused")
