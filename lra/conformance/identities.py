"""T9: declared identities, which are changes of the input that change nothing."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lra.conformance.probe import Subject
from lra.conformance.worst import EXACT, Worst, needs, needs_exact_masks, needs_identity


def permuted_tokens_give_permuted_outputs(subject: Subject) -> Worst:
    """The order of tokens is of no consequence."""
    needs_identity(subject, "permutation")
    needs("self" in subject.able.patterns, "no bidirectional form")
    worst, attention = Worst(EXACT), subject.build()
    order = torch.randperm(33, generator=torch.Generator().manual_seed(0))
    for name, mask in subject.masks(33).items():
        call = subject.call(attention, 33, mask=mask)
        permuted = replace(
            call.with_tokens(lambda x, axis: x.index_select(axis, order)),
            key_mask=None if mask is None else mask[:, order],
        )
        expected = call.out()[:, :, order]
        worst.compare(permuted.out(), expected, call.unit()[:, :, order], name)
    return worst


def masked_tokens_before_change_nothing(subject: Subject) -> Worst:
    """A causal sequence gives the same wherever it begins: only distances count."""
    needs_identity(subject, "position shift")
    needs("causal" in subject.able.patterns, "no causal form")
    needs_exact_masks(subject)
    worst, attention = Worst(EXACT), subject.build(max_len=2048)
    call = subject.call(attention, 65, causal=True)
    out, unit = call.out(), call.unit()
    for shift in (1, 70, 900, 1800):
        later = call.preceded_by(shift).out()[:, :, shift:]
        worst.compare(later, out, unit, f"{shift} masked tokens before")
    return worst


def one_vector_added_to_all_keys_changes_nothing(subject: Subject) -> Worst:
    """Only differences of logits count."""
    return _rescaled(subject, "key shift", lambda q, k: (q, k + torch.linspace(-3, 3, k.shape[-1])))


def scaled_queries_change_nothing(subject: Subject) -> Worst:
    """A positive factor for each query cancels."""
    return _rescaled(
        subject,
        "query scale",
        lambda q, k: (q * torch.linspace(0.5, 20, q.shape[2], dtype=q.dtype)[:, None], k),
    )


def scaled_keys_change_nothing(subject: Subject) -> Worst:
    """One positive factor for all keys cancels."""
    return _rescaled(subject, "key scale", lambda q, k: (q, 7.0 * k))


def rotated_queries_and_keys_change_nothing(subject: Subject) -> Worst:
    """One orthogonal map of all queries and keys leaves their products as they are."""
    normal = torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turn = torch.linalg.qr(normal).Q
    return _rescaled(subject, "rotation", lambda q, k: (q @ turn, k @ turn))


def _rescaled(
    subject: Subject, identity: str, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> Worst:
    needs_identity(subject, identity)
    worst, attention = Worst(EXACT), subject.build()
    for where, call in subject.calls(attention, (33,), ((5, 33),)):
        q, k = change(call.q, call.k)
        k = q if call.k is call.q else k
        worst.compare(replace(call, q=q, k=k).out(), call.out(), call.unit(), where)
    return worst
