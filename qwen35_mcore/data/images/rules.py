"""What preparing data and reading them have in common: the rule for bad samples, and lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from qwen35_mcore.config.vision import VisionConfig
from qwen35_mcore.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from qwen35_mcore.data.images.chat import Encoded

BadSamples = Literal["error", "skip"]
Positions = Callable[["Tensor", VisionConfig, "Tensor | None", "Tensor | None"], "Tensor"]
"""`qwen35_mcore.model.vision.rope.rope_index`: tokens, tower, grids of images and of videos."""


def image_tokens(encoded: Encoded) -> int:
    """Patches of images and videos; a fraction of them are tokens."""
    return sum(len(value) for key, value in encoded.media.items() if key.startswith("pixel"))


def check_length(encoded: Encoded, most: int | None, flag: str) -> None:
    """Raise DataError where a conversation has more tokens than a sequence holds."""
    if most is not None and len(encoded.tokens) > most:
        raise DataError(
            "a conversation has more tokens than a sequence holds",
            got=f"{len(encoded.tokens):,} tokens, with {image_tokens(encoded):,} patches of images",
            allowed=f"up to {most:,}",
            fix=f"raise {flag}, make its images smaller, or shorten it",
        )
