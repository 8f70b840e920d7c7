"""An attention under test in any size, and calls of it on inputs made for checks.

A mixer is looked at as an attention of one head that feels its values alone.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lra.typed import from_mapping
from models.attention.base import Attention, Capabilities, Context, Mechanism, Mixer

GARBAGE = 1e4
"""How much larger than real tokens those are that nobody may feel."""

LONG = 400
"""A length past any chunk or block; from there on, only two kinds of masks are tried."""

ROOM = 640
"""Positions of an instance: `LONG`, and what checks append. A table of more costs time alone."""


class MixerAsAttention(nn.Module):
    """A mixer of the values, called as an attention of one head whose queries and keys are idle.

    What a call may be is for the mixer to check.
    """

    def __init__(self, mixer: Mixer) -> None:
        super().__init__()
        self.mixer = mixer
        self.num_heads, self.head_dim, self.model_dim = 1, mixer.model_dim, mixer.model_dim
        self.cost, self.resample = mixer.cost, mixer.resample

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *given: Any) -> Tensor:
        """Mixes the values, under what is given of a mask and causality."""
        return self.mixer(v[:, 0], *given[:2])[:, None]

    def quadratic(self, q: Tensor, k: Tensor, v: Tensor, *given: Any) -> Tensor:
        """Mixes them by definition."""
        return self.mixer.quadratic(v[:, 0], *given[:2])[:, None]

    def weights(self, q: Tensor, k: Tensor, *given: Any) -> Tensor:
        """Returns equal weights: errors are relative to the largest value or output."""
        return q.new_full((*q.shape[:3], k.shape[2]), 1 / max(k.shape[2], 1))

    def combine(self, weights: Tensor, v: Tensor, context: Context) -> Tensor:
        """Mixes the values by definition, whatever the weights."""
        return self.quadratic(v, v, v, *context)

    def init_state(self, *given: Any) -> Any:
        """Refuses: a mixer has no recurrent form."""
        raise ValueError("A mixer has no recurrent form.")


class Subject:
    """Builds the attention under test in any size."""

    def __init__(self, cls: type[Mechanism], options: Mapping[str, Any]) -> None:
        self.cls, self.options = cls, dict(options)
        self.config = from_mapping(cls.Config, self.options, "attention")

    @property
    def able(self) -> Capabilities:
        """The capabilities under the options."""
        return self.cls.capabilities_with(self.config)

    @property
    def mixes(self) -> bool:
        """Whether it is a mixer: of one head, as wide as the layer's input."""
        return issubclass(self.cls, Mixer)

    def build(
        self,
        head_dim: int = 8,
        *,
        heads: int = 2,
        max_len: int = ROOM,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        training: bool = False,
        dropout: float = 0.0,
    ) -> Attention:
        """Returns an instance with parameters away from their initial values.

        In training it has drawn, where it is stochastic; otherwise it is in evaluation.
        """
        torch.manual_seed(seed)
        mechanism = self.cls(
            self.config,
            num_heads=heads,
            head_dim=head_dim,
            max_len=max_len,
            model_dim=head_dim if self.mixes else 12,
            dropout=dropout,
        )
        attention: Any = MixerAsAttention(mechanism) if self.mixes else mechanism
        for parameter in attention.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
        if training:
            attention.resample(torch.Generator().manual_seed(seed + 1))
        return attention.to(dtype).train(training)

    def modes(self, dtype: torch.dtype = torch.float64) -> Iterator[tuple[str, Attention]]:
        """Yields the same instance in evaluation and in training, and what it is in."""
        for training in (False, True):
            mode = "training" if training else "evaluation"
            yield mode, self.build(dtype=dtype, training=training)

    def call(
        self,
        attention: Attention,
        n: int,
        s: int | None = None,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        batch: int = 3,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        wider: int = 0,
    ) -> "Call":
        """Returns a call of the attention on normal inputs with E = D + ``wider``."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            # Heads beside positions in memory, as projections of a layer lie.
            x = torch.randn(batch, *shape, generator=generator, dtype=torch.float64).to(dtype)
            return x.transpose(1, 2) if x.ndim == 4 else x

        s = n if s is None else s
        heads, d = attention.num_heads, attention.head_dim
        q, k, v = normal(n, heads, d), normal(s, heads, d), normal(s, heads, d + wider)
        if self.able.shared_query_key:
            k = q
        hidden = normal(n, attention.model_dim) if self.able.needs_hidden else None
        return Call(attention, q, k, v, mask, causal, hidden)

    def calls(
        self,
        attention: Attention,
        lengths: Iterable[int],
        cross: Iterable[tuple[int, int]] = (),
        wider: int = 0,
    ) -> Iterator[tuple[str, "Call"]]:
        """Yields calls in every pattern, length and mask, and what each is."""
        patterns = [p for p in ("self", "causal") if p in self.able.patterns]
        sizes = [(pattern, n, n) for pattern in patterns for n in lengths]
        if "cross" in self.able.patterns:
            sizes += [("cross", n, s) for n, s in cross]
        for pattern, n, s in sizes:
            for name, mask in self.masks(s).items():
                where = f"{pattern}, N={n}" + (f", S={s}" if s != n else "")
                where += f", D={attention.head_dim}, {name}"
                causal = pattern == "causal"
                yield where, self.call(attention, n, s, mask=mask, causal=causal, wider=wider)

    def masks(self, s: int) -> dict[str, Tensor | None]:
        """Returns key masks (3, s) by kind; each sample has a real token."""
        if self.able.key_mask == "none":
            return {"no mask": None}
        at = torch.arange(s)
        both = torch.stack([at % 3 != 1, (at == 0) | (at == s // 2 - 1), at < 1])
        if s >= LONG:
            return {"no mask": None, "holes and padding": both}
        suffix = at < torch.tensor([s, (s + 1) // 2, 1])[:, None]
        holes = torch.stack([at % 3 != 1, (at == 0) | (at == s - 1), at >= 0])
        start = at >= torch.tensor([0, s // 2, s - 1])[:, None]
        return {
            "no mask": None,
            "padding": suffix,
            "interior holes": holes,
            "holes at the start": start,
            "holes and padding": both,
        }


class Oracle(NamedTuple):
    """What the quadratic form gives: its matrix, and the output by way of it."""

    weights: Tensor
    output: Tensor


@dataclass(frozen=True)
class Call:
    """Arguments of an attention; ``out`` and ``reference`` are its two forms on them."""

    attention: Attention
    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None = None
    causal: bool = False
    hidden: Tensor | None = None

    @property
    def real(self) -> Tensor:
        """The key mask, True everywhere if there is none."""
        if self.key_mask is not None:
            return self.key_mask
        return torch.ones(self.k.shape[0], self.k.shape[2], dtype=torch.bool)

    @property
    def one_sided(self) -> bool:
        """Whether queries are tokens of their own, as in cross attention."""
        return self.q.shape[2] != self.k.shape[2]

    def out(self) -> Tensor:
        """Returns the fast form's output."""
        return self.attention(self.q, self.k, self.v, self.key_mask, self.causal, self.hidden)

    def reference(self) -> Tensor:
        """Returns the output by way of the quadratic form."""
        call = (self.q, self.k, self.v, self.key_mask, self.causal, self.hidden)
        return self.attention.quadratic(*call)

    @cached_property
    def oracle(self) -> Oracle:
        """The quadratic form, without gradients; made once, as most of a check's time is here."""
        context = Context(self.key_mask, self.causal, self.hidden)
        with torch.no_grad():
            weights = self.attention.weights(self.q, self.k, *context[:3])
            return Oracle(weights, self.attention.combine(weights, self.v, context))

    def unit(self) -> Tensor:
        """Returns what errors are relative to, for each query (B, H, N, 1)."""
        total = self.oracle.weights.abs().sum(-1, keepdim=True).double()
        largest = self.v.detach().double().abs().amax((-2, -1), keepdim=True)
        weighed = total * total.clamp_min(1.0) * largest
        # Larger than that where the output is more than the weighed values.
        return torch.maximum(weighed, self.oracle.output.double().abs().amax(-1, True))

    def similar(self) -> "Call":
        """Returns the call with queries and keys that have much in common.

        Then random features estimate similarities well above their noise. Signed sums near 0
        magnify rounding without bound, and have no usable differences.
        """
        q = 0.4 + 0.3 * self.q
        return replace(self, q=q, k=q if self.k is self.q else 0.4 + 0.3 * self.k)

    def combined(
        self,
        other: "Call",
        pick: Callable[[Tensor, Tensor, int], Tensor],
        *,
        queries: bool,
    ) -> "Call":
        """Returns a call with ``pick`` (own tensor, the other's, axis of positions) of each.

        Args:
            other: The call to combine with.
            pick: Makes a tensor of the two.
            queries: Also of the queries and the layer's input, not of keys and values alone.
        """
        k, v = pick(self.k, other.k, 2), pick(self.v, other.v, 2)
        if not queries:
            return replace(self, k=k, v=v)
        q = k if self.q is self.k else pick(self.q, other.q, 2)
        hidden = self.hidden
        if hidden is not None and other.hidden is not None:
            hidden = pick(hidden, other.hidden, 1)
        return replace(self, q=q, k=k, v=v, hidden=hidden)

    def with_tokens(self, change: Callable[[Tensor, int], Tensor]) -> "Call":
        """Applies ``change`` (tensor, axis of positions) to all that a token of the keys has."""
        queries = not self.one_sided
        return self.combined(self, lambda own, _, axis: change(own, axis), queries=queries)

    def with_tokens_of(self, other: "Call", kept: Tensor, factor: float) -> "Call":
        """Takes tokens that are not ``kept`` (B, S) from another, ``factor`` times as large."""

        def pick(own: Tensor, others: Tensor, axis: int) -> Tensor:
            keep = kept[:, None, :, None] if axis == 2 else kept[:, :, None]
            return torch.where(keep, own, factor * others)

        return self.combined(other, pick, queries=not self.one_sided)

    def followed_by(self, extra: int) -> "Call":
        """Appends ``extra`` tokens of garbage, under the mask."""
        more = torch.zeros(len(self.k), extra, dtype=torch.bool)
        longer = self.with_tokens(lambda x, axis: torch.cat([x, _garbage(x, axis, extra)], axis))
        return replace(longer, key_mask=torch.cat([self.real, more], 1))

    def preceded_by(self, extra: int) -> "Call":
        """Puts ``extra`` tokens of garbage before, under the mask."""
        more = torch.zeros(len(self.k), extra, dtype=torch.bool)
        longer = self.with_tokens(lambda x, axis: torch.cat([_garbage(x, axis, extra), x], axis))
        return replace(longer, key_mask=torch.cat([more, self.real], 1))

    def to(self, dtype: torch.dtype, attention: Attention) -> "Call":
        """Returns the call in another precision, of another instance."""
        q, v = self.q.to(dtype), self.v.to(dtype)
        k = q if self.k is self.q else self.k.to(dtype)
        hidden = None if self.hidden is None else self.hidden.to(dtype)
        return replace(self, attention=attention, q=q, k=k, v=v, hidden=hidden)


def _garbage(like: Tensor, axis: int, extra: int) -> Tensor:
    shape = list(like.shape)
    shape[axis] = extra
    return GARBAGE * torch.randn(shape, dtype=like.dtype)
