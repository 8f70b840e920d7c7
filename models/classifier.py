"""The classifier: encoder, pooling over positions, and a head of two linear layers."""

from typing import Any, Literal

from torch import Tensor, nn

from models.encoder import Encoder, EncoderShape

Pooling = Literal["mean_all", "mean_valid"]


class Classifier(nn.Module):
    """Encoder, pooling and a two-layer ReLU head.

    Args:
        shape: Size of the encoder.
        attention: Registered name of the attention.
        options: Options of the attention.
        num_classes: Number of classes K.
        head_dim: Hidden dimension of the head.
        pooling: ``mean_valid`` averages the real tokens; ``mean_all`` divides their sum by
            ``max_len`` as if the sequence were padded to it with zeros (Nystromformer's code).
    """

    def __init__(
        self,
        shape: EncoderShape,
        attention: str,
        options: dict[str, Any],
        *,
        num_classes: int,
        head_dim: int,
        pooling: Pooling,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(shape, attention, options)
        self.pooling = pooling
        self.max_len = shape.max_len
        self.head = nn.Sequential(
            nn.Linear(shape.dim, head_dim), nn.ReLU(), nn.Linear(head_dim, num_classes)
        )

    def forward(self, tokens: Tensor, key_mask: Tensor | None) -> Tensor:
        """Maps token ids (B, N) to logits (B, K).

        Args:
            tokens: Token ids (B, N), anything where masked.
            key_mask: Bool (B, N), True for real tokens; None where all are real.
        """
        x = self.encoder(tokens, key_mask)
        if key_mask is None:
            total, count = x.sum(1), x.shape[1]
        else:
            total = (x * key_mask[..., None]).sum(1)
            count = key_mask.sum(1, keepdim=True).clamp_min(1)
        return self.head(total / (self.max_len if self.pooling == "mean_all" else count))
