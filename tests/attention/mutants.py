"""Attentions that are broken on purpose, one for each class of bug that public code is known for.

``MUTANTS`` says which check must catch each. `Sound` is what they are made of, and passes.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from models.attention.base import Attention, Capabilities, Cost, admissible_keys, at_least_float32
from models.attention.cosformer import Cosformer
from models.attention.engines.kernel import EPS
from models.attention.engines.kernel_attention import Features
from models.attention.linear import Linear
from models.attention.rfa import RandomFeatureAttention
from models.attention.softmax import Softmax

ANY = frozenset({"self", "causal", "cross"})
LINEAR = Capabilities(paper="none", patterns=ANY)
QUADRATIC = Capabilities(paper="none", patterns=ANY, time="N^2", memory="N^2")


class Sound(Attention):
    """Softmax attention by its matrix, in float32 at least; mutants change a line of it."""

    capabilities = QUADRATIC

    def similarity(self, q, k, keep):
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~keep, -torch.inf)
        return (scores - scores.detach().amax(-1, keepdim=True).clamp_min(-1e30)).exp()

    def total(self, similarity):
        return similarity.sum(-1, keepdim=True).clamp_min(EPS)

    def matrix(self, q, k, context):
        with torch.autocast("cpu", enabled=False):
            q, k = at_least_float32(q), at_least_float32(k)
            similarity = self.similarity(q, k, admissible_keys(q, k, context))
            return similarity / self.total(similarity)

    def attend(self, q, k, v, context):
        with torch.autocast("cpu", enabled=False):
            return (self.matrix(q, k, context) @ at_least_float32(v)).to(v.dtype)

    def cost(self, n, s):
        return Cost(flops=0, activation_bytes=0, parameters=0, state_floats=0)


# Masks


class MaskIgnored(Sound):
    def matrix(self, q, k, context):
        return super().matrix(q, k, context._replace(key_mask=None))


class MaskOnValuesOnly(Linear):
    """phi(0) = 1 of masked keys stays in the denominator."""

    def attend(self, q, k, v, context):
        real = True if context.key_mask is None else context.key_mask[:, None, :, None]
        return super().attend(q, k, v * real, context._replace(key_mask=None))


class PaddingInDenominator(Sound):
    def similarity(self, q, k, keep):
        everything = super().similarity(q, k, keep | ~keep)
        self.everything = everything.sum(-1, keepdim=True)
        return everything * keep

    def total(self, similarity):
        return self.everything


class NaNWithoutKeys(Sound):
    def similarity(self, q, k, keep):
        return (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~keep, -torch.inf).softmax(-1)


class MeanWithoutKeys(Sound):
    """An additive mask of -1e9: with nothing to see, a query gets the mean of what it may not."""

    def similarity(self, q, k, keep):
        return (q @ k.mT * q.shape[-1] ** -0.5 - 1e9 * ~keep).softmax(-1)


class MaskIgnoredInTraining(Sound):
    def matrix(self, q, k, context):
        return super().matrix(q, k, context._replace(key_mask=None) if self.training else context)


class PaddedHorizon(Cosformer):
    """The length of the padded batch as cosFormer's horizon, declared as if nobody felt it."""

    def _horizon(self, q, k, context):
        return super()._horizon(q, k, context._replace(key_mask=None))


# What may not be felt


class FutureFarAway(Sound):
    """Right at the lengths that tests like."""

    def similarity(self, q, k, keep):
        far = k.shape[-2] > 300
        return super().similarity(q, k / k.norm(dim=(-2, -1), keepdim=True) if far else k, keep)


class FutureInMaximum(Sound):
    """FAVOR+'s stabiliser: the largest key feature of the sequence, and eps in the features."""

    capabilities = LINEAR

    def similarity(self, q, k, keep):
        fk = (k - k.amax((-2, -1), keepdim=True)).exp() + 1e-4
        return (q - q.amax(-1, keepdim=True)).exp() @ fk.mT * keep


class BatchNorm(Sound):
    """Scaled by a norm over the whole batch, as iterative inverses often start."""

    def similarity(self, q, k, keep):
        return super().similarity(q / q.norm(), k, keep)


# Wrong arithmetic


class WrongScale(Sound):
    def attend(self, q, k, v, context):
        return super().attend(q * q.shape[-1] ** -0.5, k, v, context)


class Comb(Sound):
    """Every eighth token instead of blocks of eight: a reshape over the wrong axis."""

    capabilities = replace(QUADRATIC, patterns=frozenset({"self"}))

    def pattern(self, n):
        return torch.arange(n) // 8

    def matrix(self, q, k, context):
        group = self.pattern(q.shape[-2])
        similarity = self.similarity(q, k, admissible_keys(q, k, context))
        similarity = similarity * (group[:, None] == group)
        return similarity / self.total(similarity)

    def attend(self, q, k, v, context):
        comb = CombPattern(self.config, num_heads=2, head_dim=8, max_len=8, model_dim=8)
        return comb.matrix(q, k, context) @ v


class CombPattern(Comb):
    """The comb alone: consistent in itself, but its stride depends on the padded length."""

    def pattern(self, n):
        return torch.arange(n) % math.ceil(n / 8)

    def attend(self, q, k, v, context):
        return self.matrix(q, k, context) @ v


class WrongWhereValuesAreAsWideAsKeys(Linear):
    def attend(self, q, k, v, context):
        out = super().attend(q, k, v, context)
        return out * 2 if v.shape[-1] == k.shape[-1] else out


class DetachedPastAChunk(Linear):
    def attend(self, q, k, v, context):
        k = k.detach() if k.shape[-2] > 128 else k
        return super().attend(q, k, v, context)


class DetachedInFloat32(Linear):
    def attend(self, q, k, v, context):
        k = k.detach() if k.dtype == torch.float32 else k
        return super().attend(q, k, v, context)


class DetachedDenominator(Sound):
    def total(self, similarity):
        return super().total(similarity).detach()


class ReducedPrecision(Linear):
    def attend(self, q, k, v, context):
        reduced = (x.bfloat16() for x in (q, k, v))
        return super().attend(*reduced, context).to(v.dtype)


class BreaksUnderAutocast(Sound):
    """Weights in float32 times values in bf16."""

    def attend(self, q, k, v, context):
        with torch.autocast("cpu", enabled=False):
            return self.matrix(q, k, context) @ v


class PositionsInTokenDtype(Cosformer):
    """Positions in the type of the tokens: bf16 has 256 integers before it skips some."""

    def attend(self, q, k, v, context):
        self.token_dtype = v.dtype
        return super().attend(q, k, v, context)

    def matrix(self, q, k, context):
        self.token_dtype = q.dtype
        return super().matrix(q, k, context)

    def features(self, q, k, context):
        positions = context.start + torch.arange(max(q.shape[-2], k.shape[-2]))
        angles = positions.to(self.token_dtype) / self._horizon(q, k, context)[:, None]
        angles = (math.pi / 2 * angles)[:, None, :, None].to(q.dtype)
        return Features(*(self._turned(F.relu(x), angles) for x in (q, k)))

    def _turned(self, x, angles):
        angles = angles[:, :, : x.shape[-2]]
        return torch.cat([x * angles.cos(), x * angles.sin()], -1)


class Float16Table(Cosformer):
    """Angles from a float16 table."""

    def features(self, q, k, context):
        n = max(q.shape[-2], k.shape[-2]) + context.start
        horizon = self._horizon(q, k, context)[:, None].half()
        angles = torch.arange(n).half() / horizon * (math.pi / 2)
        angles = angles[:, None, context.start :, None].double()

        def features(x):
            a = angles[:, :, : x.shape[-2]]
            return (F.relu(x)[..., None, :] * torch.stack([a.cos(), a.sin()], -2)).flatten(-2)

        return Features(features(q).to(q.dtype), features(k).to(k.dtype))


class PositionForgotten(Cosformer):
    """Every recurrent step is the first."""

    def features(self, q, k, context):
        return super().features(q, k, context._replace(start=0))


class StateOutsideState(Linear):
    """The state lives in the module: a second sequence goes on where the first is."""

    def advance(self, q, k, v, state, hidden):
        if state.position == 0:
            self.state = state
        out, self.state = super().advance(q, k, v, self.state, hidden)
        return out, state._replace(position=state.position + 1)


class StateInBfloat16(Linear):
    def advance(self, q, k, v, state, hidden):
        out, state = super().advance(q, k, v, state, hidden)
        sums = state.sums.bfloat16() if v.dtype == torch.bfloat16 else state.sums
        return out, state._replace(sums=sums.to(state.sums.dtype))


# Random draws, and what is kept


class DropoutInEvaluation(Sound):
    capabilities = replace(QUADRATIC, dropout="weights")

    def attend(self, q, k, v, context):
        return F.dropout(super().attend(q, k, v, context), self.dropout)


class DropoutForgotten(Sound):
    capabilities = replace(QUADRATIC, dropout="weights")


class DrawsInEvaluation(RandomFeatureAttention):
    def features(self, q, k, context):
        self.pool.normal_()
        return super().features(q, k, context)


class DrawsWithoutGenerator(RandomFeatureAttention):
    def resample(self, generator):
        self.drawn.copy_(torch.randperm(self.config.pool)[: self.num_heads])


class NeverDraws(RandomFeatureAttention):
    def resample(self, generator):
        pass


class TableOutsideState(Sound):
    def __init__(self, config, **sizes):
        super().__init__(config, **sizes)
        self.table = torch.randn(self.head_dim)

    def similarity(self, q, k, keep):
        return super().similarity(q * self.table.to(q.dtype), k, keep)


# Claims that are not true


class QuadraticMemory(Sound):
    capabilities = LINEAR


class OuterProducts(Linear):
    """Causal attention by accumulating all N outer products."""

    def attend(self, q, k, v, context):
        if not context.causal:
            return super().attend(q, k, v, context)
        real = 1.0 if context.key_mask is None else context.key_mask[:, None, :, None]
        fq, fk = ((F.elu(at_least_float32(x)) + 1) for x in (q, k))
        rows = F.pad(at_least_float32(v), (0, 1), value=1.0) * real
        products = (fk[..., :, None] * rows[..., None, :]).cumsum(-3)
        sums = (fq[..., None, :] @ products).squeeze(-2)
        return (sums[..., :-1] / sums[..., -1:].clamp_min(EPS)).to(v.dtype)


class QuadraticTime(Softmax):
    """Fused: linear in memory, and not in time."""

    capabilities = replace(Softmax.capabilities, time="N")


class UselessParameters(Sound):
    def __init__(self, config, **sizes):
        super().__init__(config, **sizes)
        self.table = nn.Parameter(torch.zeros(3))

    def cost(self, n, s):
        return replace(super().cost(n, s), parameters=3)


class HiddenParameters(Sound):
    def __init__(self, config, **sizes):
        super().__init__(config, **sizes)
        self.bias = nn.Parameter(torch.zeros(()))

    def similarity(self, q, k, keep):
        return super().similarity(q, k, keep) * self.bias.exp()


class LargerState(Linear):
    def initial_state(self, batch, device, dtype):
        state = super().initial_state(batch, device, dtype)
        return state._replace(top=torch.zeros(batch, self.num_heads, 1))

    def advance(self, q, k, v, state, hidden):
        out, following = super().advance(q, k, v, state._replace(top=None), hidden)
        return out, following._replace(top=state.top)


class AcceptsAnything(Sound):
    def _check(self, q, k, key_mask, causal, hidden):
        pass

    def matrix(self, q, k, context):
        mask = context.key_mask
        mask = None if mask is None else mask.reshape(-1, k.shape[-2])[:1].bool()
        return super().matrix(q, k, context._replace(key_mask=mask))


class ClaimsPermutation(Cosformer):
    capabilities = replace(Cosformer.capabilities, identities=frozenset({"permutation"}))


class ClaimsScalesShiftAndRotation(Linear):
    capabilities = replace(
        Linear.capabilities,
        identities=frozenset({"key shift", "query scale", "key scale", "rotation"}),
    )


MUTANTS = {
    MaskIgnored: {"T3 masked tokens change nothing", "T5 no key gives zero"},
    MaskOnValuesOnly: {"T3 masked tokens change nothing"},
    PaddingInDenominator: {"T3 masked tokens change nothing"},
    MaskIgnoredInTraining: {"T3 masked tokens change nothing"},
    PaddedHorizon: {"T3 masked tokens change nothing", "T4 batch mates change nothing"},
    NaNWithoutKeys: {"T5 no key gives zero"},
    MeanWithoutKeys: {"T5 no key gives zero"},
    FutureInMaximum: {"T2 no future is felt"},
    FutureFarAway: {"T2 no future is felt"},
    BatchNorm: {"T4 batch mates change nothing"},
    WrongScale: {"T1 output is weights @ values"},
    Comb: {"T1 output is weights @ values"},
    CombPattern: {"T3 masked tokens change nothing"},
    WrongWhereValuesAreAsWideAsKeys: {"T1 output is weights @ values"},
    DetachedPastAChunk: {"T11 gradients of both forms"},
    DetachedInFloat32: {"T11 float32 gradients of both"},
    DetachedDenominator: {"T11 gradients are derivatives"},
    ReducedPrecision: {"T1 float32 is float64"},
    BreaksUnderAutocast: {"T1 bf16 is float64"},
    PositionsInTokenDtype: {"T1 long bf16 sequences"},
    Float16Table: {"T9 position shift"},
    PositionForgotten: {"T6 recurrent is causal"},
    StateOutsideState: {"T6 recurrent is causal"},
    StateInBfloat16: {"T6 bf16 steps are float64"},
    DropoutInEvaluation: {"T7 evaluation is deterministic"},
    DropoutForgotten: {"T7 evaluation is deterministic"},
    DrawsInEvaluation: {"T7 evaluation is deterministic"},
    DrawsWithoutGenerator: {"T7 evaluation is deterministic"},
    NeverDraws: {"T7 evaluation is deterministic"},
    TableOutsideState: {"T7 evaluation is deterministic"},
    QuadraticMemory: {"T12 growth of memory"},
    QuadraticTime: {"T12 growth of operations"},
    UselessParameters: {"T11 gradients are derivatives"},
    OuterProducts: {"T12 causal memory"},
    HiddenParameters: {"T13 declared sizes"},
    LargerState: {"T13 declared sizes"},
    AcceptsAnything: {"T14 refusals"},
    ClaimsPermutation: {"T9 permutation"},
    ClaimsScalesShiftAndRotation: {
        "T9 key shift",
        "T9 query scale",
        "T9 key scale",
        "T9 rotation",
    },
}
"""The checks that must fail for each mutant; others may fail besides."""
