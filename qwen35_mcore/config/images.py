"""What the images of a vision-language run cost: parameters of the tower on a rank, operations, and
bytes that autograd keeps.

The bytes are read from the tower of `model/vision`, megatron-core 0.19.2 and Transformer Engine, in
bfloat16: a tensor that two operations keep counts once, views not at all.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from qwen35_mcore.config.counts import vision_parts
from qwen35_mcore.config.flops import vision_flops
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.config.vision import VisionConfig
from qwen35_mcore.errors import ConfigError

PARTS = ("language", "vision", "merger")
"""What can be frozen: all but the tower, the tower without its merger, the merger."""


@dataclass(frozen=True, kw_only=True)
class Images:
    """The images of every sequence, alike, and what of the model trains on them."""

    vision: VisionConfig
    patches: int
    """Of an image."""
    per_sequence: int = 1
    frozen: frozenset[str] = frozenset()
    """Of `PARTS`, those that do not train."""

    @classmethod
    def of(
        cls,
        model_config: Qwen35Config,
        *,
        seq_length: int,
        patches: int,
        per_sequence: int = 1,
        frozen: Collection[str] = (),
    ) -> Images:
        """The images of a run of this model.

        Raises:
            ConfigError: the model has no tower, the merger does not divide an image's patches, a
                sequence is too short for its images, there is no such part, or nothing trains.
        """
        images = cls(
            vision=VisionConfig.of(model_config),
            patches=patches,
            per_sequence=per_sequence,
            frozen=frozenset(frozen),
        )
        block = images.vision.spatial_merge_size**2
        if patches % block:
            raise ConfigError(
                "the merger joins blocks of patches, and an image has not a whole number of them",
                got=f"{patches} patches",
                allowed=f"a multiple of {block}",
                fix=f"count {max(1, round(patches / block)) * block} patches an image",
            )
        tokens = per_sequence * patches // block
        if tokens > seq_length:
            raise ConfigError(
                "the images of a sequence have more tokens than the sequence",
                got=f"{images}: {tokens} tokens",
                allowed=f"up to {seq_length}",
                fix="count fewer images, fewer patches, or a longer sequence",
            )
        if unknown := images.frozen - set(PARTS):
            got, allowed = ", ".join(sorted(unknown)), ", ".join(PARTS)
            raise ConfigError("there is no such part to freeze", got=got, allowed=allowed)
        if images.frozen == set(PARTS):
            raise ConfigError("all parts are frozen", got=", ".join(PARTS), fix="leave one out")
        return images

    def __str__(self) -> str:
        frozen = f", frozen: {', '.join(sorted(self.frozen))}" if self.frozen else ""
        return f"{self.per_sequence} x {self.patches:,} image patches a sequence{frozen}"

    def as_json(self) -> dict[str, object]:
        """What was asked for, as plain values."""
        asked = {"per_sequence": self.per_sequence, "patches": self.patches}
        return {**asked, "frozen": sorted(self.frozen)}

    @property
    def trains_blocks(self) -> bool:
        """Whether a backward pass goes through the tower's blocks."""
        return "vision" not in self.frozen

    @property
    def trains_tower(self) -> bool:
        """Whether a backward pass goes through its merger."""
        return not self.frozen >= {"vision", "merger"}

    @property
    def patches_of_a_sequence(self) -> int:
        return self.per_sequence * self.patches

    @property
    def flops(self) -> int:
        """Operations of a forward pass of the tower over the images of one sequence."""
        return vision_flops(self.vision, [(1, 1, self.patches)] * self.per_sequence)

    def parameters(self, tp: int) -> dict[str, int]:
        """Parameters of the tower and of its merger on each of ``tp`` tensor-parallel ranks."""
        return vision_parts(self.vision, tp)

    def kept_bytes(self, tp: int, *, recomputed: bool) -> tuple[float, float]:
        """Bytes a patch on each of ``tp`` tensor-parallel ranks: kept until the backward pass, and
        alive on top of that in the backward pass of one block.

        Args:
            recomputed: keep the input of every block alone, and run it again.
        """
        if not self.trains_tower:
            return 0.0, 0.0
        h, ffn = self.vision.hidden_size, self.vision.intermediate_size
        # patches; input and normed input of the merger, input and output of its activation
        ends = 2 * self.vision.patch_values + 4 * h + 4 * h / tp
        if not self.trains_blocks:
            return ends - 2 * self.vision.patch_values, 4 * h / tp
        # two inputs and normed inputs; cosines and sines of the queries' and of the keys' angles;
        # query, key, value, output of attention; input and output of the activation
        block = 8 * h + 8 * self.vision.head_dim + (8 * h + 4 * ffn) / tp
        gradients = 4 * h + (8 * h + 4 * ffn) / tp
        if recomputed:
            return self.vision.depth * 2 * h + ends, block + gradients
        return self.vision.depth * block + ends, gradients
