"""The floor of a step: operations and bytes that its model needs, by the declared costs.

A lower bound of a computation that goes operation by operation: linear layers count their
multiply-adds, an attention what its ``cost`` declares; a backward pass counts as two forward ones.
Every intermediate is written and read once: in training because the backward pass needs it, in
inference because the next operation does. Norms, activations, dropout and embeddings count no
operations.
"""

from collections.abc import Iterable

from torch import nn

from models.attention.base import Attention
from models.classifier import Classifier
from models.decoder import Decoder
from models.encoder import Block, MultiHeadAttention

UPDATE = 10
"""Reads and writes of a parameter in training: by forward and backward pass, its gradient, and
AdamW's reading and writing of weight and both moments."""


def classifier_floor(
    model: Classifier, lengths: Iterable[int], train: bool, element: int
) -> tuple[float, float]:
    """Returns the operations and the bytes of a step.

    Args:
        model: The model.
        lengths: Real tokens of each sequence.
        train: Whether it is a training step.
        element: Bytes of an intermediate outside the attention; within it they are float32.
    """
    flops = moved = 0.0
    for n in lengths:
        for block in model.encoder.blocks:
            cost = _mechanism(block).cost(n, n)
            flops += 2 * n * _weights(block) + cost.flops
            moved += 2 * (element * n * _kept(block) + cost.activation_bytes)
        flops += 2 * sum(linear.weight.numel() for linear in model.head[::2])
    parameters = sum(p.numel() for p in model.parameters())
    if train:
        return 3 * flops, moved + 4 * UPDATE * parameters
    return flops, moved + 4 * parameters


def decoding_floor(model: Decoder, batch: int, position: int, length: int) -> tuple[float, float]:
    """Returns the operations and the bytes of a step that generates a token of each sequence.

    Weights and states are read once, and each of their numbers takes part in a multiply-add. A
    state that grows with time is filled up to the position.
    """
    weights = model.head.weight.numel()
    state = 0.0
    for block in model.encoder.blocks:
        mechanism = _mechanism(block)
        weights += _weights(block)
        grows = isinstance(mechanism, Attention) and mechanism.capabilities.time == "N^2"
        state += mechanism.cost(length, length).state_floats * (position / length if grows else 1)
    return 2 * batch * (weights + state), 4 * (weights + batch * state)


def _mechanism(block: Block) -> nn.Module:
    mixing = block.attention
    return mixing.attention if isinstance(mixing, MultiHeadAttention) else mixing


def _linears(block: Block) -> list[nn.Linear]:
    """Returns the linear layers around the mechanism, whose own are in its cost."""
    linears = [block.ffn[0], block.ffn[3]]
    if isinstance(block.attention, MultiHeadAttention):
        linears += [block.attention.project, block.attention.out]
    return linears


def _weights(block: Block) -> int:
    return sum(linear.weight.numel() for linear in _linears(block))


def _kept(block: Block) -> int:
    """Returns the numbers kept for each token: what goes into norms and into linear layers."""
    inputs = sum(linear.in_features for linear in _linears(block))
    dim, hidden = block.ffn[0].in_features, block.ffn[0].out_features
    if isinstance(block.attention, MultiHeadAttention):
        inputs += block.attention.project.out_features  # q, k, v
    return inputs + 2 * dim + hidden  # inputs of the norms and of the activation
