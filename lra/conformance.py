"""What every attention owes by its contract, measured: `lra check` and the tests run these checks.

Each check compares the fast form with the quadratic one, or two calls that must agree, on all the
patterns that the capabilities declare. Errors of outputs are relative to what a query could give:
the sum of its absolute weights times the largest value (for weights that are a distribution, the
largest value), times that sum once more where it exceeds 1, as denominators near 0 magnify
rounding; or to the query's largest output, where that is more than weighed values. A query without
any weight must give exactly 0.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lra.measure import allocated_peak
from lra.probe import GARBAGE, LONG, Call, Subject
from lra.text import aligned
from models.attention.base import Attention, Mechanism

EXACT, FLOAT32, BF16 = 1e-10, 2e-5, 3e-2
TOLERANCES = {torch.float64: EXACT, torch.float32: FLOAT32, torch.bfloat16: BF16}
DERIVATIVE, GRADIENT = 1e-6, 1e-9
FLOAT32_GRADIENT = torch.finfo(torch.float32).eps ** 0.5  # gradients are made of differences

LENGTHS = (1, 2, 7, 64, 65, 257)
CROSS = ((1, 7), (7, 1), (64, 65), (65, 3), (2, 257), (257, 64))
HEAD_DIMS = (1, 2, 8, 16, 64)
EXPONENTS = {"N": 1.0, "N log N": 1.1, "N^1.5": 1.5, "N^2": 2.0}


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


def _needs(condition: bool, reason: str) -> None:
    if not condition:
        raise NotApplicable(reason)


def _needs_identity(subject: Subject, identity: str) -> None:
    _needs(identity in subject.able.identities, "not declared")


def _needs_exact_masks(subject: Subject) -> None:
    _needs(subject.able.key_mask != "approximate", "masks are approximate")
    _needs(subject.able.key_mask != "none", "masks are refused")


# --- T1: the fast form is the quadratic form -----------------------------------------------------


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
    attention, exact = (subject.build(heads=1, dtype=t) for t in (torch.float32, torch.float64))
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
        _compare_sums(worst, out, tokens.to(torch.float64, exact), f"{pattern}, N={n}")
    return worst


def _compare_sums(worst: Worst, out: Tensor, exact: Call, where: str) -> None:
    """Notes errors in units of all that is summed up: for a distribution, the output itself."""
    weights, expected = exact.oracle
    unit = torch.maximum(weights.abs() @ exact.v.abs(), expected.abs().amax(-1, True))
    worst.compare(out, expected, unit, where)


# --- T2 to T5: what must not be felt -------------------------------------------------------------


def no_future_is_felt(subject: Subject) -> Worst:
    """Causal outputs stay when later tokens become 30 times larger, or are masked."""
    _needs("causal" in subject.able.patterns, "no causal form")
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
    _needs_exact_masks(subject)
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


# --- T6, T7: recurrence and determinism ----------------------------------------------------------


def recurrent_is_causal(subject: Subject) -> Worst:
    """Token by token, by turns with another sequence, it gives what causal attention gives."""
    _needs(subject.able.recurrent, "no recurrent form")
    worst = Worst(EXACT)
    for d, n, batch in ((1, 65, 3), (8, 1, 3), (8, 2, 1), (8, 300, 2)):
        attention = subject.build(d)
        calls = [subject.call(attention, n, causal=True, batch=batch, seed=i) for i in range(2)]
        for call, out in zip(calls, _by_steps(calls), strict=True):
            worst.compare(out, call.out(), call.unit(), f"N={n}, B={batch}, D={d}")
    return worst


def reduced_steps_are_float64(subject: Subject) -> Worst:
    """In bf16 the state does not lose what the tokens have: sums are in float32."""
    _needs(subject.able.recurrent, "no recurrent form")
    worst = Worst(torch.finfo(torch.bfloat16).eps)
    attention, exact = subject.build(dtype=torch.float32), subject.build()
    call = subject.call(exact, 1024, causal=True, batch=1).similar()
    tokens = replace(call, v=call.v.abs()).to(torch.bfloat16, attention)
    with torch.autocast("cpu", torch.bfloat16):
        [out] = _by_steps([tokens])
    _compare_sums(worst, out, tokens.to(torch.float64, exact), "N=1,024")
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


# --- T9: identities ------------------------------------------------------------------------------


def permuted_tokens_give_permuted_outputs(subject: Subject) -> Worst:
    """The order of tokens is of no consequence."""
    _needs_identity(subject, "permutation")
    _needs("self" in subject.able.patterns, "no bidirectional form")
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
    _needs_identity(subject, "position shift")
    _needs("causal" in subject.able.patterns, "no causal form")
    _needs_exact_masks(subject)
    worst, attention = Worst(EXACT), subject.build()
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
    _needs_identity(subject, identity)
    worst, attention = Worst(EXACT), subject.build()
    for where, call in subject.calls(attention, (33,), ((5, 33),)):
        q, k = change(call.q, call.k)
        k = q if call.k is call.q else k
        worst.compare(replace(call, q=q, k=k).out(), call.out(), call.unit(), where)
    return worst


# --- T11 to T13: gradients, memory, declared sizes -----------------------------------------------


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


def causal_memory_is_that_of_bidirectional(subject: Subject) -> Worst:
    """At 4,096 positions a causal training pass takes less than 4 times the memory."""
    able = subject.able
    _needs({"self", "causal"} <= able.patterns, "needs a causal and a bidirectional form")
    worst = Worst(4.0)
    peaks = {causal: _training_peak(subject, 4096, 64, causal) for causal in (False, True)}
    worst.note(peaks[True] / peaks[False], f"{peaks[True] / 1e6:.1f} MB at N=4,096, D=64")
    return worst


def memory_grows_as_declared(subject: Subject) -> Worst:
    """The exponent of a training pass's memory from 1,024 to 4,096 positions is that declared."""
    worst = Worst(EXPONENTS[subject.able.memory] + 0.1)
    for pattern in ("self", "causal"):
        if pattern in subject.able.patterns:
            causal = pattern == "causal"
            small, large = (_training_peak(subject, n, 16, causal) for n in (1024, 4096))
            worst.note(math.log(large / small, 4), f"{pattern}, declared {subject.able.memory}")
    return worst


def operations_grow_as_declared(subject: Subject) -> Worst:
    """The exponent of matrix products and convolutions from 1,024 to 4,096 is that declared."""
    worst = Worst(EXPONENTS[subject.able.time] + 0.1)
    for pattern in ("self", "causal"):
        if pattern in subject.able.patterns:
            causal = pattern == "causal"
            small, large = (_operations(subject, n, causal) for n in (1024, 4096))
            if small:
                worst.note(math.log(large / small, 4), f"{pattern}, declared {subject.able.time}")
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


# --- T14: refusals -------------------------------------------------------------------------------


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


CHECKS: dict[str, Callable[[Subject], Worst]] = {
    "T1 output is weights @ values": output_is_weights_times_values,
    "T1 float32 is float64": float32_is_float64,
    "T1 bf16 is float64": bf16_is_float64,
    "T1 long bf16 sequences": long_sequences_lose_nothing,
    "T2 no future is felt": no_future_is_felt,
    "T3 masked tokens change nothing": masked_tokens_change_nothing,
    "T4 batch mates change nothing": batch_mates_change_nothing,
    "T5 no key gives zero": no_key_gives_zero,
    "T6 recurrent is causal": recurrent_is_causal,
    "T6 bf16 steps are float64": reduced_steps_are_float64,
    "T7 evaluation is deterministic": evaluation_is_deterministic,
    "T9 permutation": permuted_tokens_give_permuted_outputs,
    "T9 position shift": masked_tokens_before_change_nothing,
    "T9 key shift": one_vector_added_to_all_keys_changes_nothing,
    "T9 query scale": scaled_queries_change_nothing,
    "T9 key scale": scaled_keys_change_nothing,
    "T9 rotation": rotated_queries_and_keys_change_nothing,
    "T11 gradients are derivatives": gradients_are_derivatives,
    "T11 gradients of both forms": gradients_are_those_of_weights,
    "T11 float32 gradients of both": float32_gradients_are_those_of_weights,
    "T12 causal memory": causal_memory_is_that_of_bidirectional,
    "T12 growth of memory": memory_grows_as_declared,
    "T12 growth of operations": operations_grow_as_declared,
    "T13 declared sizes": sizes_are_declared,
    "T14 refusals": what_is_not_defined_is_refused,
}
"""The checks by name. Missing numbers are a mechanism's own: degenerate cases, statistics."""
