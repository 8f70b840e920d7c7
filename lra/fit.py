"""Whether task, model, optimisation and attention of a run go together."""

import logging

from lra.config import RunConfig
from lra.typed import require
from models.attention import build_attention, capabilities

LOG = logging.getLogger("lra")


def check_fit(config: RunConfig) -> None:
    """Refuses a run whose task, model, optimisation and attention do not go together.

    Raises:
        ValueError: One message with every problem.
    """
    import torch

    task = config.build_task()
    name = config.attention["name"]
    sizes = {"num_heads": config.model.heads, "head_dim": config.model.head_dim}
    positions = config.model.max_len + (config.model.pooling == "cls")
    sizes |= {"max_len": positions, "model_dim": config.model.dim}
    try:
        with torch.device("meta"):
            build_attention(name, **sizes, **config.attention_options)
    except ValueError:  # sizes and options that do not go together
        raise
    except Exception as error:  # its crash, or that of a device without numbers: the run will tell
        LOG.debug("attention=%s on the meta device: %s", name, error)
    able = capabilities(name, config.attention_options)
    patterns = able.patterns
    forms = ", ".join(sorted(patterns))
    rotary = config.model.positions == "rotary"
    require(
        {
            f"model.max_len is {config.model.max_len}, but {task.name} has examples of up to "
            f"{task.max_len} tokens": config.model.max_len >= task.max_len,
            f"model.vocab_size is {config.model.vocab_size}, but {task.name} has "
            f"{task.vocab_size} token ids": config.model.vocab_size >= task.vocab_size,
            "the validation split is the test split, so train.tested=best would choose by test "
            "scores: add train.tested=last": config.train.tested == "last"
            or not task.validation_is_test,
            "the validation split is the test split, so tune=lr would choose by test scores: leave "
            "it out": config.tune == "none" or not task.validation_is_test,
            f"attention={name} with these options takes no masks, but model.zero_is_padding=true "
            "masks black pixels": able.key_mask != "none" or not config.model.zero_is_padding,
            f"attention={name} with these options cannot take model.positions=rotary: its "
            "similarity is no function of q.k": able.rotary or not rotary,
            f"model.head_dim is {config.model.head_dim}, but model.positions=rotary turns pairs of "
            "channels: model.head_dim must be at least 2": config.model.head_dim >= 2 or not rotary,
            f"the encoder attends in both directions, but attention={name} with these options "
            f"has only these forms: {forms}": "self" in patterns,
        }
    )
