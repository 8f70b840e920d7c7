"""What is trained: attention mechanisms, the encoder around them and the classifier on top."""

from models.attention import build_attention, register_attention, register_mixer

__all__ = ["build_attention", "register_attention", "register_mixer"]
