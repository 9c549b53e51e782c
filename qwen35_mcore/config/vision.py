"""The vision tower's description, read from ``vision_config`` when a run trains the tower.

A text-only run carries ``vision_config`` unread. Field names and defaults are those of
transformers' ``Qwen3_5VisionConfig`` and ``Qwen3_5Config``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import inf, isqrt
from typing import Any

from qwen35_mcore.config.fields import ModelFields
from qwen35_mcore.errors import ConfigError

_TOKENS = ("image_token_id", "video_token_id")
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu_pytorch_tanh",),
    "deepstack_visual_indexes": ([], None),
}
_CARRIED = frozenset(
    {"model_type", "dtype", "torch_dtype", "transformers_version", "architectures"}
)


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """A tower: patch embedding, learned positions, ``depth`` blocks, and the merger behind them.

    Raises:
        ConfigError: from the constructor, when a value is impossible or two values contradict.
    """

    out_hidden_size: int
    """Width of the merger's output: the hidden size of the language model."""
    depth: int = 27
    """Blocks."""
    hidden_size: int = 1152
    """Width of the blocks' residual stream."""
    intermediate_size: int = 4304
    """Width of a block's feed-forward layer."""
    num_heads: int = 16
    """Attention heads of a block, each hidden_size / num_heads wide."""
    in_channels: int = 3
    """Colours of a pixel."""
    patch_size: int = 16
    """Height and width of a patch, in pixels."""
    temporal_patch_size: int = 2
    """Frames of a patch. An image is repeated to fill them."""
    spatial_merge_size: int = 2
    """The merger makes one output of this many rows times this many columns of patches."""
    num_position_embeddings: int = 2304
    """Learned positions: a square grid, interpolated to the grid of each image."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    rope_theta: float = 10000.0
    """Base of the blocks' rotary frequencies."""
    image_token_id: int = 248056
    """The token that stands for one output of the merger, of an image."""
    video_token_id: int = 248057
    """The same, of a video's frames."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            _check_number(name, value)
        if self.hidden_size % self.num_heads or self.head_dim % 4:
            raise ConfigError(
                "vision_config: hidden_size must give every head a multiple of 4 channels, half "
                "of them for rows and half for columns",
                got=f"hidden_size {self.hidden_size}, num_heads {self.num_heads}",
            )
        if self.positions_per_side**2 != self.num_position_embeddings:
            raise ConfigError(
                "vision_config: num_position_embeddings must be a square",
                got=self.num_position_embeddings,
                allowed="2304 (48 x 48) in every published size",
            )
        if self.image_token_id == self.video_token_id:
            raise ConfigError(
                "image_token_id and video_token_id are the same", got=self.image_token_id
            )

    @classmethod
    def of(cls, model_config: ModelFields) -> VisionConfig:
        """The tower of a vision-language model.

        Raises:
            ConfigError: the model is text-only, a key is unknown, or a value is impossible or
                contradicts the language model.
        """
        content = model_config.carried_outer.get("vision_config")
        if not isinstance(content, Mapping):
            raise ConfigError(
                "the model has no vision tower",
                got=f"model_type {model_config.model_type} without vision_config",
                allowed="the config.json of a vision-language model",
                fix="drop --vision, or name the folder of a vision-language model (--hf-config): a "
                "flavor is the text model alone",
            )
        names = {field.name for field in fields(cls)} - {"rope_theta", *_TOKENS}
        given = {name: content[name] for name in names if content.get(name) is not None}
        _account(content, names)
        if "out_hidden_size" not in given:
            raise ConfigError("vision_config lacks out_hidden_size")
        tokens = {
            name: model_config.carried_outer[name]
            for name in _TOKENS
            if model_config.carried_outer.get(name) is not None
        }
        vision = cls(**given, **_rope(content.get("rope_parameters")), **tokens)
        _check_together(vision, model_config)
        return vision

    @property
    def head_dim(self) -> int:
        """Channels of an attention head; all of them rotate."""
        return self.hidden_size // self.num_heads

    @property
    def positions_per_side(self) -> int:
        """Rows, and columns, of the grid of learned positions."""
        return isqrt(self.num_position_embeddings)

    @property
    def patch_values(self) -> int:
        """Numbers in a patch, colour by colour, frame by frame."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merged_width(self) -> int:
        """Channels of the patches that the merger joins."""
        return self.hidden_size * self.spatial_merge_size**2


def tower_differences(a: VisionConfig, b: VisionConfig) -> list[str]:
    """Names of the fields that differ and change what a trained tower computes."""
    names = [field.name for field in fields(VisionConfig) if field.name != "initializer_range"]
    return [name for name in names if getattr(a, name) != getattr(b, name)]


def _check_number(name: str, value: Any) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and value < inf
    is_whole = is_number and isinstance(value, int)
    if name in _TOKENS:
        good, kind = is_whole and value >= 0, "a token id"
    elif name in ("initializer_range", "rope_theta"):
        good, kind = is_number and value > 0, "a positive number"
    else:
        good, kind = is_whole and value > 0, "a positive integer"
    if not good:
        raise ConfigError(f"vision_config: {name} must be {kind}", got=value)


def _account(content: Mapping[str, Any], names: set[str]) -> None:
    for key, value in content.items():
        if key in _FIXED:
            if not any(value == allowed for allowed in _FIXED[key]):
                raise ConfigError(
                    f"vision_config: {key} has a value that Qwen3.5 does not have",
                    got=value,
                    allowed=" or ".join(map(repr, _FIXED[key])),
                )
        elif key not in names | _CARRIED | {"rope_parameters"} and not key.startswith("_"):
            raise ConfigError(
                f"unknown key in vision_config: {key}",
                got=value,
                allowed=", ".join(sorted(names)),
                fix="correct it, or remove it if it does not change the model",
            )


def _rope(parameters: Any) -> dict[str, Any]:
    if parameters is None:
        return {}
    known = isinstance(parameters, Mapping) and parameters.keys() <= {"rope_type", "rope_theta"}
    if not known or parameters.get("rope_type", "axial") != "axial":
        raise ConfigError(
            "vision_config: rope_parameters must be axial",
            got=parameters,
            allowed="rope_type axial and rope_theta",
        )
    return {"rope_theta": parameters["rope_theta"]} if "rope_theta" in parameters else {}


def _check_together(vision: VisionConfig, model_config: ModelFields) -> None:
    if vision.out_hidden_size != model_config.hidden_size:
        raise ConfigError(
            "vision_config: out_hidden_size must be the language model's hidden_size",
            got=vision.out_hidden_size,
            allowed=str(model_config.hidden_size),
        )
    for name in _TOKENS:
        if getattr(vision, name) >= model_config.vocab_size:
            raise ConfigError(
                f"{name} is outside the vocabulary",
                got=getattr(vision, name),
                allowed=f"0 to {model_config.vocab_size - 1}",
                fix=f"set {name} at the top level of config.json",
            )
    if model_config.rope_parameters.mrope_section is None:
        raise ConfigError(
            "a vision-language model needs mrope_section in rope_parameters",
            fix="add it: published sizes have [11, 11, 10]",
        )
