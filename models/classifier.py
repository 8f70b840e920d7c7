"""The classifier: encoder, pooling over positions, and a head of linear layers.

Shapes: B batch, N positions, C model dimension, K classes.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.encoder import Encoder, EncoderShape

Pooling = Literal["mean_all", "mean_valid", "mean", "first", "cls"]


class Classifier(nn.Module):
    """Encoder, pooling and a ReLU head, for one sequence an example or for two (a dual task).

    The two sequences of a dual task go through the same encoder, and the head sees both.

    Args:
        shape: Size of the encoder.
        attention: Registered name of the attention.
        options: Options of the attention.
        num_classes: Number of classes K.
        head_dims: Hidden dimensions of the head.
        pooling: ``mean_valid`` averages what may be attended to; ``mean_all`` divides its sum by
            ``max_len`` as if the sequence were padded to it with zeros (Nystromformer's code);
            ``mean`` averages all positions but right padding; ``first`` takes the first position;
            ``cls`` takes that of the encoder's CLS vector.
        zero_is_padding: Whether token 0 is masked wherever it stands, as a black pixel is in the
            arena's code.
        dual: Whether an example has two sequences.
        nli_features: Whether the head of a dual task sees product and difference of the two
            encodings beside both: [x1, x2, x1 x2, x1 - x2].
    """

    def __init__(
        self,
        shape: EncoderShape,
        attention: str,
        options: dict[str, Any],
        *,
        num_classes: int,
        head_dims: Sequence[int],
        pooling: Pooling,
        zero_is_padding: bool,
        dual: bool,
        nli_features: bool,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(shape, attention, options)
        self.pooling = pooling
        self.zero_is_padding = zero_is_padding
        self.nli_features = nli_features
        self.max_len = shape.max_len
        encodings = (4 if nli_features else 2) if dual else 1
        sizes = (encodings * shape.dim, *head_dims, num_classes)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.head = nn.Sequential(*layers[:-1])
        if shape.init == "xavier":
            for layer in self.head[::2]:  # LeCun-normal, the default of the arena's JAX layers
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
                nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor, key_mask: Tensor | None) -> Tensor:
        """Maps token ids to logits (B, K).

        Args:
            tokens: Token ids (B, N), or (B, 2, N) in a dual task; anything where masked.
            key_mask: Bool of the same shape, True for real tokens; None where all are real.
        """
        if tokens.ndim == 2:
            return self.head(self._encode(tokens, key_mask))
        flat = None if key_mask is None else key_mask.flatten(0, 1)
        x1, x2 = self._encode(tokens.flatten(0, 1), flat).unflatten(0, tokens.shape[:2]).unbind(1)
        features = [x1, x2, x1 * x2, x1 - x2] if self.nli_features else [x1, x2]
        return self.head(torch.cat(features, -1))

    def _encode(self, tokens: Tensor, key_mask: Tensor | None) -> Tensor:
        """Maps token ids (B, N) to one vector a sequence, (B, C)."""
        attended = key_mask
        if self.zero_is_padding:
            attended = tokens != 0 if key_mask is None else key_mask & (tokens != 0)
        x = self.encoder(tokens, attended)
        if self.pooling in ("first", "cls"):
            return x[:, 0]
        averaged = key_mask if self.pooling == "mean" else attended
        if averaged is None:
            total, count = x.sum(1), x.shape[1]
        else:
            total = (x * averaged[..., None]).sum(1)
            count = averaged.sum(1, keepdim=True).clamp_min(1)
        return total / (self.max_len if self.pooling == "mean_all" else count)
