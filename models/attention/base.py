"""The contract: what every attention, and every mixer beside them, takes, returns and declares.

Shapes: B batch, H heads, N queries, S keys, D query and key dimension, E value dimension, C model
dimension.
"""

import abc
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

Pattern = Literal["self", "causal", "cross"]

Growth = Literal["N", "N log N", "N^1.5", "N^2"]

Family = Literal["full", "pattern", "low rank", "kernel", "mixer", "other"]

Identity = Literal[
    "permutation", "position shift", "key shift", "query scale", "key scale", "rotation"
]


@dataclass(frozen=True)
class Capabilities:
    """What a mechanism can do; static data that drives early errors, listings and tests.

    Attributes:
        paper: The paper the mechanism is from.
        family: What it does about the N x N matrix: computes it (full), parts of it (pattern), a
            product of thin matrices (low rank), sums of features instead (kernel), or mixes tokens
            without queries and keys (mixer).
        patterns: The attention patterns it defines: self (bidirectional), causal, cross.
        time: Growth of time in the sequence length N, of a model made for N tokens.
        memory: Growth of memory beyond q, k, v and the output, in training.
        key_mask: Whether what is masked is felt by nobody, is felt a little, or masks are refused.
        dropout: Where attention dropout applies.
        needs_max_len: It owns tensors or a horizon of size ``max_len``; longer input is refused.
        needs_hidden: It reads the layer's input as well as q, k and v.
        own_values: It has values or gates of its own for each of the D channels, so E must be D.
        shared_query_key: Queries serve as keys, so the layer makes no key projection.
        stochastic: It draws random features, anew at each ``resample``.
        recurrent: It can be evaluated token by token with ``init_state`` and ``step``.
        rotary: Its similarity depends on q.k and norms (with random features, in expectation), so
            that rotating queries and keys by their positions makes it feel distances.
        identities: What changes nothing. ``permutation``: permuted tokens give permuted outputs.
            ``position shift``: masked tokens before a causal sequence. ``key shift``: one vector
            added to all keys. ``query scale``: a positive factor for each query. ``key scale``:
            one positive factor for all keys. ``rotation``: one orthogonal map of all queries and
            keys.
    """

    paper: str
    family: Family = "other"
    patterns: frozenset[Pattern] = frozenset({"self"})
    time: Growth = "N"
    memory: Growth = "N"
    key_mask: Literal["exact", "approximate", "none"] = "exact"
    dropout: Literal["weights", "none"] = "none"
    needs_max_len: bool = False
    needs_hidden: bool = False
    own_values: bool = False
    shared_query_key: bool = False
    stochastic: bool = False
    recurrent: bool = False
    rotary: bool = False
    identities: frozenset[Identity] = frozenset()


@dataclass(frozen=True)
class Cost:
    """Declared cost of one forward pass for one sequence and all heads.

    Attributes:
        flops: Floating point operations, a multiply-add counted as two.
        activation_bytes: Bytes of float32 intermediates beyond q, k, v and the output.
        parameters: Parameters owned by the mechanism itself.
        state_floats: Size of the recurrent state of one sequence; 0 where there is none.
    """

    flops: int
    activation_bytes: int
    parameters: int
    state_floats: int


@dataclass(frozen=True)
class NoOptions:
    """The options of a mechanism that has none."""


class Context(NamedTuple):
    """What attention depends on beside q, k and v.

    Attributes:
        key_mask: Bool (B, S), True for real tokens.
        causal: Whether query i sees keys j <= i only; always so in the recurrent form.
        hidden: The layer's input (B, N, model_dim), where the mechanism needs it.
        start: Position of the first token: 0, or that of the one token of a recurrent step.
    """

    key_mask: Tensor | None
    causal: bool
    hidden: Tensor | None
    start: int = 0


class Mechanism(nn.Module, abc.ABC):
    """What attentions and mixers have in common: options, capabilities, sizes, draws and cost.

    On CPU, threads call one module side by side: computing leaves it as it was.

    Args:
        config: The mechanism's options.
        num_heads: Number of heads H.
        head_dim: Dimension D of queries and keys of a head.
        max_len: The longest sequence the model takes.
        model_dim: Dimension of the layer's input.
        dropout: Attention dropout probability; used as ``capabilities.dropout`` says.
    """

    Config: ClassVar[type] = NoOptions
    capabilities: ClassVar[Capabilities]

    def __init__(
        self,
        config: Any,
        *,
        num_heads: int,
        head_dim: int,
        max_len: int,
        model_dim: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.config = config
        # An instance's capabilities are those under its options.
        self.capabilities = self.capabilities_with(config)  # type: ignore[misc]
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.max_len = max_len
        self.model_dim = model_dim
        self.dropout = dropout

    @classmethod
    def capabilities_with(cls, config: Any) -> Capabilities:
        """Returns the capabilities under options; overridden where an option changes them."""
        return cls.capabilities

    @abc.abstractmethod
    def cost(self, n: int, s: int) -> Cost:
        """Returns the declared cost for ``n`` queries and ``s`` keys, with E = D."""

    def resample(self, generator: torch.Generator) -> None:
        """Draws new random features; nothing to do unless the mechanism is stochastic."""

    @property
    def name(self) -> str:
        """The mechanism's name for messages."""
        return type(self).__name__

    def _check_form(self, n: int, s: int, causal: bool) -> None:
        """Refuses patterns and lengths that are not declared, for n queries and s keys."""
        patterns = self.capabilities.patterns
        forms = ", ".join(sorted(patterns))
        if not causal and not patterns & {"self", "cross"}:
            raise ValueError(f"{self.name} has no bidirectional form; it has {forms}.")
        if causal and "causal" not in patterns:
            raise ValueError(f"{self.name} has no causal form; it has {forms}.")
        if causal and n != s:
            raise ValueError(f"Causal attention needs as many queries as keys, not {n} and {s}.")
        if n != s and "cross" not in patterns:
            raise ValueError(f"{self.name} has no cross form: {n} queries, {s} keys.")
        if self.capabilities.needs_max_len and max(n, s) > self.max_len:
            raise ValueError(f"{self.name} takes {self.max_len} positions, not {max(n, s)}.")

    def _check_mask(self, key_mask: Tensor | None, batch: int, s: int) -> None:
        if key_mask is None:
            return
        if self.capabilities.key_mask == "none":
            raise ValueError(f"{self.name} cannot honour a key_mask: pass whole sequences.")
        if key_mask.dtype != torch.bool or key_mask.shape != (batch, s):
            raise ValueError(
                f"key_mask must be bool of shape {(batch, s)}, True for real tokens, not "
                f"{key_mask.dtype} of shape {tuple(key_mask.shape)}."
            )


class Attention(Mechanism):
    """Base class of every attention.

    An attention sets ``capabilities``, declares its options as a frozen dataclass ``Config``, and
    defines ``attend`` (the fast form), ``matrix`` (the quadratic form, its oracle) and ``cost``.
    `lra check` tells whether it keeps what this class promises.
    """

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None = None,
        causal: bool = False,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Computes attention.

        Args:
            q: Queries (B, H, N, D).
            k: Keys (B, H, S, D).
            v: Values (B, H, S, E).
            key_mask: Bool (B, S), True for a real token; holes are allowed. None: all real. What
                stands under the mask is of no consequence as long as it is finite.
            causal: Query i sees keys j <= i only.
            hidden: The layer's input (B, N, model_dim), for mechanisms that need it.

        Returns:
            (B, H, N, E). A query with no admissible key gives exactly 0. Rows of padded queries
            are finite and otherwise unspecified.

        Raises:
            ValueError: For a pattern, mask or shape that the mechanism cannot honour.
        """
        self._check(q, k, key_mask, causal, hidden)
        self._check_values(k, v)
        if k.shape[-2] == 0:
            return v.new_zeros(*q.shape[:-1], v.shape[-1])
        return self.attend(q, k, v, Context(key_mask, causal, hidden))

    @abc.abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Computes ``forward`` on checked arguments."""

    def weights(
        self,
        q: Tensor,
        k: Tensor,
        key_mask: Tensor | None = None,
        causal: bool = False,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Returns the attention matrix (B, H, N, S); quadratic in memory.

        Random draws are those of ``forward``; there is no dropout. Arguments and errors are those
        of ``forward``.
        """
        self._check(q, k, key_mask, causal, hidden)
        if k.shape[-2] == 0:
            return q.new_zeros(*q.shape[:-1], 0)
        return self.matrix(q, k, Context(key_mask, causal, hidden))

    @abc.abstractmethod
    def matrix(self, q: Tensor, k: Tensor, context: Context) -> Tensor:
        """Computes ``weights`` on checked arguments; written for clarity."""

    def quadratic(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None = None,
        causal: bool = False,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Returns ``forward`` by way of ``weights``: the oracle, ``weights @ v`` for most."""
        weights = self.weights(q, k, key_mask, causal, hidden)
        self._check_values(k, v)
        return self.combine(weights, v, Context(key_mask, causal, hidden))

    def combine(self, weights: Tensor, v: Tensor, context: Context) -> Tensor:
        """Makes ``quadratic``'s output of the matrix; overridden where it is not weights @ v."""
        return weights @ v

    def exact(self, q: Tensor, k: Tensor, context: Context) -> Tensor | None:
        """Returns the matrix (B, H, N, S) that random features estimate; None if none do."""
        return None

    def reweighting(self, q: Tensor, k: Tensor, context: Context) -> Tensor | None:
        """Returns the factors of similarities that positions alone decide; None if none do.

        Their shape is (B, H, N, S), or (B, 1, N, S) where heads share them.
        """
        return None

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> Any:
        """Returns the state before the first token, for ``step``.

        Args:
            batch: Number of sequences B.
            device: Where the state is kept.
            dtype: That of the tokens; what is summed up is kept in float32 at least.

        Returns:
            A tuple of tensors, whose first dimension is B, and of numbers.

        Raises:
            ValueError: If the mechanism has no recurrent form.
        """
        self._check_recurrent()
        return self.initial_state(batch, device, dtype)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, state: Any, hidden: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Takes one token and returns what causal attention gives at its position.

        For generation: gradients are not promised.

        Args:
            q: Query (B, H, 1, D).
            k: Key (B, H, 1, D).
            v: Value (B, H, 1, E).
            state: As ``init_state`` or the previous step returned it; used up by this step.
            hidden: The layer's input (B, 1, model_dim), for mechanisms that need it.

        Returns:
            The output (B, H, 1, E) and the next state.

        Raises:
            ValueError: If the mechanism has no recurrent form, for shapes that are not those above,
                or after ``max_len`` tokens where that is its limit.
        """
        self._check_recurrent()
        self._check(q, k, None, True, hidden)
        batch = next(len(x) for x in state if isinstance(x, Tensor))
        if (len(q), q.shape[2]) != (batch, 1) or v.shape[:-1] != k.shape[:-1]:
            raise ValueError(
                f"A step takes one token of each of the state's {batch} sequences, not queries of "
                f"shape {tuple(q.shape)} and values of shape {tuple(v.shape)}."
            )
        return self.advance(q, k, v, state, hidden)

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> Any:
        """Makes ``init_state``'s state; defined by mechanisms with a recurrent form."""
        raise NotImplementedError(f"{self.name} is declared recurrent: define initial_state.")

    def advance(
        self, q: Tensor, k: Tensor, v: Tensor, state: Any, hidden: Tensor | None
    ) -> tuple[Tensor, Any]:
        """Computes ``step`` on checked arguments; defined by mechanisms with a recurrent form."""
        raise NotImplementedError(f"{self.name} is declared recurrent: define advance.")

    def _check_recurrent(self) -> None:
        if not self.capabilities.recurrent:
            raise ValueError(f"{self.name} has no recurrent form.")

    def _check_values(self, k: Tensor, v: Tensor) -> None:
        own = self.capabilities.own_values
        if v.shape[:-1] != k.shape[:-1] or (own and v.shape[-1] != self.head_dim):
            shape = (*map(str, k.shape[:-1]), str(self.head_dim) if own else "E")
            raise ValueError(
                f"Values must be of shape ({', '.join(shape)}), as the keys, not {tuple(v.shape)}."
            )

    def _check(
        self, q: Tensor, k: Tensor, key_mask: Tensor | None, causal: bool, hidden: Tensor | None
    ) -> None:
        expected = (k.shape[0], self.num_heads, self.head_dim)
        for name, x in (("Queries", q), ("Keys", k)):
            if x.ndim != 4 or (*x.shape[:2], x.shape[3]) != expected:
                raise ValueError(
                    f"{name} must be of shape ({expected[0]}, {self.num_heads}, N, "
                    f"{self.head_dim}), not {tuple(x.shape)}."
                )
        n, s = q.shape[-2], k.shape[-2]
        self._check_form(n, s, causal)
        self._check_mask(key_mask, k.shape[0], s)
        if self.capabilities.needs_hidden:
            if hidden is None:
                raise ValueError(f"{self.name} needs the layer's input: pass hidden=.")
            if hidden.shape != (q.shape[0], n, self.model_dim):
                raise ValueError(
                    f"hidden must be of shape {(q.shape[0], n, self.model_dim)}, not "
                    f"{tuple(hidden.shape)}."
                )


class Mixer(Mechanism):
    """Base class of token mixers that are no attention: x -> x, without q, k, v and projections.

    A mixer sets ``capabilities`` and ``Config`` as an attention does, and defines ``mix`` (the fast
    form), ``mix_quadratic`` (its oracle) and ``cost``.
    """

    def forward(self, x: Tensor, key_mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Mixes tokens.

        Args:
            x: The layer's input (B, N, C).
            key_mask: Bool (B, N), True for a real token; holes are allowed. None: all real.
            causal: Token i feels tokens j <= i only.

        Returns:
            (B, N, C). Where no token is real, exactly 0.

        Raises:
            ValueError: For a pattern, mask or shape that the mixer cannot honour.
        """
        self._check(x, key_mask, causal)
        return self.mix(x, Context(key_mask, causal, None))

    @abc.abstractmethod
    def mix(self, x: Tensor, context: Context) -> Tensor:
        """Computes ``forward`` on checked arguments."""

    def quadratic(self, x: Tensor, key_mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Returns ``forward`` by its definition, in quadratic time: the oracle."""
        self._check(x, key_mask, causal)
        return self.mix_quadratic(x, Context(key_mask, causal, None))

    @abc.abstractmethod
    def mix_quadratic(self, x: Tensor, context: Context) -> Tensor:
        """Computes ``quadratic`` on checked arguments; written for clarity."""

    def _check(self, x: Tensor, key_mask: Tensor | None, causal: bool) -> None:
        if x.ndim != 3 or x.shape[2] != self.model_dim:
            raise ValueError(
                f"The layer's input must be of shape (B, N, {self.model_dim}), not "
                f"{tuple(x.shape)}."
            )
        self._check_form(x.shape[1], x.shape[1], causal)
        self._check_mask(key_mask, *x.shape[:2])


def at_least_float32(x: Tensor) -> Tensor:
    """Returns ``x`` in float32 if it is of lower precision, else as it is."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def admissible_keys(q: Tensor, k: Tensor, context: Context) -> Tensor:
    """Returns which keys each query may see, bool, (N, S) or with a mask (B, 1, N, S)."""
    keep = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device)
    if context.causal:
        keep = keep.tril()
    return keep if context.key_mask is None else keep & context.key_mask[:, None, None, :]


def own_lengths(key_mask: Tensor | None, keys: Tensor) -> Tensor:
    """Returns each sequence's own length: the index of its last real token + 1, shape (B,).

    Holes before the last real token count, as positions are those of the unpadded input.
    """
    batch, positions = keys.shape[0], keys.shape[-2]
    if key_mask is None:
        return torch.full((batch,), positions, device=keys.device)
    return (key_mask * torch.arange(1, positions + 1, device=keys.device)).amax(-1)


def masked_softmax(scores: Tensor, keep: Tensor) -> Tensor:
    """Returns the softmax of ``scores`` over what ``keep`` admits; 0 elsewhere and without any."""
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(~keep, lowest).softmax(-1).masked_fill(~keep, 0.0)
