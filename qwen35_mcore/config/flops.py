"""Floating-point operations of a training step: a multiply-add counts as two.

Megatron's own count raises for a pattern given as a list together with MTP, and counts the MTP
layer as a GDN layer otherwise. The conventions here are Megatron's: the delta rule by its recurrent
form (four products of a key by a value dimension per head and token), causal attention at half its
square, the backward pass at twice the forward pass, recomputation not counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.config.vision import VisionConfig

BACKWARD_AND_FORWARD = 3
Grid = tuple[int, int, int]
"""Frames, rows and columns of an image's patches."""


@dataclass(frozen=True, kw_only=True)
class ForwardFlops:
    """Forward operations by part of the model, for one batch."""

    gdn: int
    attention: int
    feed_forward: int
    output: int
    mtp: int

    @property
    def total(self) -> int:
        return self.gdn + self.attention + self.feed_forward + self.output + self.mtp


def gdn_layer_flops(model_config: Qwen35Config, tokens: int) -> int:
    """Projections, convolution and delta rule of one GatedDeltaNet."""
    gdn = model_config.gdn_shape
    projections = model_config.hidden_size * (gdn.in_proj_width + gdn.value_width)
    convolution = model_config.linear_conv_kernel_dim * gdn.conv_width
    delta_rule = 4 * gdn.value_heads * gdn.key_head_dim * gdn.value_head_dim
    return 2 * tokens * (projections + convolution + delta_rule)


def attention_layer_flops(model_config: Qwen35Config, tokens: int, squared_lengths: int) -> int:
    """Projections (query, gate, key, value, output) and causal attention of one layer."""
    attention = model_config.attention_shape
    projections = model_config.hidden_size * (attention.qkv_width + attention.query_width)
    return 2 * tokens * projections + 2 * squared_lengths * attention.query_width


def feed_forward_flops(model_config: Qwen35Config, tokens: int) -> int:
    """SwiGLU, or router, chosen experts and the gated shared expert, of one layer."""
    hidden = model_config.hidden_size
    if not model_config.is_moe:
        return 6 * tokens * hidden * model_config.intermediate_size
    width = model_config.num_experts_per_tok * model_config.moe_intermediate_size
    width += model_config.shared_expert_intermediate_size
    return 6 * tokens * hidden * width + 2 * tokens * hidden * (model_config.num_experts + 1)


def forward_flops(
    model_config: Qwen35Config,
    tokens: int,
    squared_lengths: int | None = None,
    *,
    seq_length: int = 0,
) -> ForwardFlops:
    """Operations of a forward pass over ``tokens`` tokens.

    Args:
        squared_lengths: sum over sequences of their length squared; for packed data the real
            lengths. None: every sequence has ``seq_length`` tokens.
    """
    if squared_lengths is None:
        squared_lengths = tokens * seq_length
    layers, mtp_layers = model_config.num_hidden_layers, model_config.mtp_num_hidden_layers
    attention = attention_layer_flops(model_config, tokens, squared_lengths)
    feed_forward = feed_forward_flops(model_config, tokens)
    output = 2 * tokens * model_config.hidden_size * model_config.vocab_size
    joining = 2 * tokens * 2 * model_config.hidden_size**2
    return ForwardFlops(
        gdn=model_config.num_gdn_layers * gdn_layer_flops(model_config, tokens),
        attention=model_config.num_attention_layers * attention,
        feed_forward=layers * feed_forward,
        output=output,
        mtp=mtp_layers * (joining + attention + feed_forward + output),
    )


def vision_flops(vision: VisionConfig, grids: Iterable[Grid]) -> int:
    """Operations of a forward pass of the tower over images (or videos) of these grids: patch
    embedding, blocks with attention within each frame, merger."""
    frames = [h * w for t, h, w in grids for _ in range(t)]
    patches, squared = sum(frames), sum(patches**2 for patches in frames)
    h, merged = vision.hidden_size, vision.merged_width
    blocks = 2 * patches * (4 * h**2 + 2 * h * vision.intermediate_size) + 4 * squared * h
    merger = merged * (merged + vision.out_hidden_size) // vision.spatial_merge_size**2
    return 2 * patches * (vision.patch_values * h + merger) + vision.depth * blocks


def training_flops(
    model_config: Qwen35Config,
    tokens: int,
    squared_lengths: int | None = None,
    *,
    seq_length: int = 0,
    grids: Iterable[Grid] = (),
) -> int:
    """Operations of one training step (forward and backward); arguments as `forward_flops`.

    Args:
        grids: of the images and videos that the vision tower reads.

    Raises:
        ConfigError: there are images and the model has no vision tower.
    """
    forward = forward_flops(model_config, tokens, squared_lengths, seq_length=seq_length).total
    if images := list(grids):
        forward += vision_flops(VisionConfig.of(model_config), images)
    return BACKWARD_AND_FORWARD * forward
