"""T2 to T5: what must not be felt, and what queries without any key give."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from lra.conformance.probe import GARBAGE, LONG, Call, Subject
from lra.conformance.worst import EXACT, Worst, needs, needs_exact_masks


def no_future_is_felt(subject: Subject) -> Worst:
    """Causal outputs stay when later tokens become 30 times larger, or are masked."""
    needs("causal" in subject.able.patterns, "no causal form")
    worst = Worst(EXACT)
    for mode, attention in subject.modes():
        for n in (2, 7, 65, 257, LONG):
            for name, mask in subject.masks(n).items():
                call = subject.call(attention, n, mask=mask, causal=True)
                noise = subject.call(attention, n, causal=True, seed=1)
                out, unit = call.out(), call.unit()
                for t in sorted({1, n // 2, n - 1}):
                    past = (torch.arange(n) < t).expand(3, -1)
                    where = f"{mode}, N={n}, {name}, after token {t}"
                    later = call.with_tokens_of(noise, past, 30.0)
                    worst.compare(later.out()[:, :, :t], out[:, :, :t], unit[:, :, :t], where)
                    if subject.able.key_mask == "exact":
                        later = replace(later, key_mask=call.real & past)
                        worst.compare(later.out()[:, :, :t], out[:, :, :t], unit[:, :, :t], where)
    return worst


def masked_tokens_change_nothing(subject: Subject) -> Worst:
    """Neither garbage in holes and padding, nor more padding, changes a real output."""
    needs_exact_masks(subject)
    worst = Worst(EXACT)
    for mode, attention in subject.modes():
        for at, call in subject.calls(attention, (1, 7, 65, LONG), ((9, 7), (3, 65))):
            where, n, s = f"{mode}, {at}", call.q.shape[2], call.k.shape[2]
            rows = torch.ones(3, n, dtype=torch.bool) if call.one_sided else call.real
            rows = rows[:, None, :, None]
            out, unit = call.out() * rows, call.unit() * rows
            other = subject.call(attention, n, s, causal=call.causal, seed=9)
            dirty = replace(call.with_tokens_of(other, call.real, GARBAGE), key_mask=call.real)
            worst.compare(dirty.out() * rows, out, unit, f"{where}: garbage under the mask")
            for extra in (1, 9, 120):
                longer = dirty.followed_by(extra).out()[:, :, :n]
                worst.compare(longer * rows, out, unit, f"{where}: {extra} more masked tokens")
    return worst


def batch_mates_change_nothing(subject: Subject) -> Worst:
    """A sample gives the same alone and between far larger, longer samples."""
    worst = Worst(EXACT)
    sizes = [("self", n, n) for n in (65, LONG)] + [("causal", n, n) for n in (65, LONG)]
    for mode, attention in subject.modes():
        for pattern, n, s in (*sizes, ("cross", 9, 65), ("cross", 65, LONG)):
            if pattern not in subject.able.patterns:
                continue
            where = f"{mode}, {pattern}, S={s}"
            alone = subject.call(attention, n, s, batch=1, causal=pattern == "causal")
            mates = subject.call(attention, n, s, batch=2, seed=1)
            together = alone.combined(mates, _between, queries=True)
            worst.compare(together.out()[1:2], alone.out(), alone.unit(), where)
            if subject.able.key_mask == "exact":
                shorter = replace(alone.followed_by(30), key_mask=None)
                mates = subject.call(attention, n if n != s else n + 30, s + 30, batch=2)
                lengths = torch.tensor([s + 30, s, s + 7])
                together = replace(
                    shorter.combined(mates, _between, queries=True),
                    key_mask=torch.arange(s + 30) < lengths[:, None],
                )
                out = together.out()[1:2, :, :n]
                worst.compare(out, alone.out(), alone.unit(), f"{where}, padded")
    return worst


def _between(own: Tensor, mates: Tensor, _: int) -> Tensor:
    first, last = (GARBAGE * mates).chunk(2)
    return torch.cat([first, own, last])


def no_key_gives_zero(subject: Subject) -> Worst:
    """Queries without an admissible key give exactly 0; gradients are finite all the same."""
    worst = Worst(0.0)
    empty = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 1, 1]], dtype=torch.bool)
    masked = empty if subject.able.key_mask != "none" else None
    sizes = (("self", 4, 4), ("causal", 4, 4), ("cross", 3, 4), ("cross", 3, 0))
    sizes = [size for size in sizes if size[0] in subject.able.patterns]
    for dtype, reduced in (
        (torch.float64, None),
        (torch.float32, None),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
    ):
        dropping = subject.build(dtype=dtype, training=True, dropout=0.5)
        for mode, attention in (*subject.modes(dtype), ("training with dropout", dropping)):
            for pattern, n, s in sizes:
                for tokens in ("normal tokens", "zero tokens"):
                    call = subject.call(attention, n, s, causal=pattern == "causal", dtype=dtype)
                    call = replace(call, key_mask=masked if s else None)
                    where = f"{mode}, {pattern}, S={s}, {reduced or dtype}, {tokens}"
                    _note_empty_rows(worst, call, reduced, tokens == "zero tokens", where)
    return worst


def _note_empty_rows(
    worst: Worst, call: Call, reduced: torch.dtype | None, zero: bool, where: str
) -> None:
    q, k, v = (torch.zeros_like(x) if zero else x for x in (call.q, call.k, call.v))
    q.requires_grad_()
    k = q if call.k is call.q else k.requires_grad_()
    call = replace(call, q=q, k=k, v=v.requires_grad_())
    with torch.autocast("cpu", reduced, enabled=reduced is not None):
        out = call.out()
    n, s = q.shape[2], k.shape[2]
    sees = call.real[:, None, :].expand(-1, n, -1)
    sees = (sees.tril() if call.causal else sees).any(-1)
    worst.note(float(out.detach()[~sees[:, None].expand(out.shape[:3])].abs().sum()), where)
    if not bool(out.isfinite().all()):
        worst.note(math.inf, f"{where}: the output is not finite")
    if s > 0:
        out.float().square().sum().backward()
    leaves = {"q": q, "k": k, "v": v} | dict(call.attention.named_parameters())
    for name, leaf in leaves.items():
        if leaf.grad is not None and not bool(leaf.grad.isfinite().all()):
            worst.note(math.inf, f"{where}: the gradient of {name} is not finite")
    call.attention.zero_grad()
