"""Parts of a vision-language model that a run does not train."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

from torch import nn

from qwen35_mcore.errors import ConfigError

Part = Literal["language", "vision", "merger"]
PARTS: tuple[Part, ...] = get_args(Part)


def freeze(model: nn.Module, parts: Iterable[Part]) -> None:
    """Leave parts of a vision-language model (or a pipeline stage of it) out of the training.

    Their parameters get neither gradients nor optimizer state, so this comes before megatron's
    DistributedDataParallel and optimizer are built. Gradients still pass through them.

    Args:
        parts: language (all but the tower), vision (the tower without the merger), merger.

    Raises:
        ConfigError: there is no such part, or nothing is left.
    """
    frozen = set(parts)
    if unknown := frozen - set(PARTS):
        raise ConfigError(
            "there is no such part to freeze",
            got=", ".join(sorted(unknown)),
            allowed=", ".join(PARTS),
        )
    if frozen == set(PARTS):
        raise ConfigError("all parts are frozen", got=", ".join(PARTS), fix="leave one out")
    for name, parameter in model.named_parameters():
        if part_of(name) in frozen:
            parameter.requires_grad = False


def part_of(name: str) -> Part:
    """The part that a parameter of a vision-language model belongs to, by its name there."""
    if name.startswith("vision_model.merger."):
        return "merger"
    return "vision" if name.startswith("vision_model.") else "language"
