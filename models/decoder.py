"""The decoder: a causal language model that also generates token by token, for any attention.

Shapes: B batch, N positions, C model dimension, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.encoder import Encoder, EncoderShape
from models.linear import Linear


class DecoderState(NamedTuple):
    """What a decoder keeps of the tokens so far.

    Attributes:
        blocks: The state of each block's attention.
        position: Number of tokens seen.
    """

    blocks: tuple[Any, ...]
    position: int


class Decoder(nn.Module):
    """The encoder's blocks with causal attention, and logits of the next token.

    Args:
        shape: Size of the blocks; without a CLS vector, and with learned or sinusoidal positions.
        attention: Registered name of an attention with a recurrent form.
        options: Options of the attention.

    Raises:
        ValueError: If the attention has no recurrent form, or for other positions.
    """

    def __init__(self, shape: EncoderShape, attention: str, options: dict[str, Any]) -> None:
        super().__init__()
        if shape.cls or shape.positions == "rotary":
            raise ValueError("A decoder has no CLS vector, and learned or sinusoidal positions.")
        self.encoder = Encoder(shape, attention, options)
        for mixing in (block.attention for block in self.encoder.blocks):
            able = getattr(mixing, "attention", mixing).capabilities
            if not able.recurrent:
                raise ValueError(f"attention={attention} with these options is not recurrent.")
        self.head = Linear(shape.dim, shape.vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps token ids (B, N) to the logits (B, N, V) of each position's next token."""
        return self.head(self.encoder(tokens, None, causal=True))

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> DecoderState:
        """Returns the state before the first token; arguments as `Attention.init_state`'s."""
        attentions = (block.attention.attention for block in self.encoder.blocks)
        return DecoderState(tuple(a.init_state(batch, device, dtype) for a in attentions), 0)

    def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Takes one token of each sequence and returns what ``forward`` gives at its position.

        Args:
            tokens: Token ids (B,).
            state: As ``init_state`` or the previous step returned it; used up by this step.

        Returns:
            Logits (B, V) of the next token, and the next state.
        """
        encoder = self.encoder
        x = encoder.tokens(tokens[:, None])
        x = encoder.dropout(x + encoder.positions.weight[state.position])
        states = []
        for block, before in zip(encoder.blocks, state.blocks, strict=True):
            x, after = block.step(x, before)
            states.append(after)
        logits = self.head(encoder.norm(x)).squeeze(1)
        return logits, DecoderState(tuple(states), state.position + 1)
