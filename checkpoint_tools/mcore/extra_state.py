"""The ``_extra_state`` objects that a model's modules look for in a checkpoint.

Each linear and each norm stores one (its FP8 scaling state), releases of megatron-core older than
ours one per ``core_attention`` too, and Megatron refuses to load a checkpoint that lacks one it
asks for. So a checkpoint that is not written by such a model must hold them all, empty; a model
that has no use for one ignores it.
"""

from __future__ import annotations

from checkpoint_tools.table.names import Format
from checkpoint_tools.table.vision import MCORE_VISION_PREFIX
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.config.vision import VisionConfig


def extra_state_keys(config: Qwen35Config, checkpoint_format: Format) -> list[str]:
    """Unique keys (``<name>/shard_<index>_<count>``) of all objects, one per expert for experts."""
    keys: list[str] = []
    for layer in range(config.num_hidden_layers):
        prefix = f"decoder.layers.{layer}."
        if config.is_gdn(layer):
            names = ["in_proj", "out_proj"] + (["out_norm"] if checkpoint_format == "mcore" else [])
            keys += [_single(f"{prefix}self_attention.{name}") for name in names]
        else:
            keys += _attention(prefix)
        keys += _feed_forward(config, prefix)
    keys.append(_single("decoder.final_layernorm"))
    if config.mtp_num_hidden_layers:
        prefix = "mtp.layers.0."
        keys += [
            _single(f"{prefix}{name}") for name in ("enorm", "hnorm", "eh_proj", "final_layernorm")
        ]
        keys += _attention(f"{prefix}transformer_layer.")
        keys += _feed_forward(config, f"{prefix}transformer_layer.")
    return keys


def vision_extra_state_keys(vision: VisionConfig) -> list[str]:
    """The same of the vision tower."""
    linears = ("linear_fc1", "linear_fc2")
    modules = ["merger.norm", *(f"merger.mlp.{name}" for name in linears)]
    for block in range(vision.depth):
        prefix = f"decoder.layers.{block}."
        attention = ("linear_qkv", "linear_proj", "core_attention")
        modules += [f"{prefix}self_attention.{name}" for name in attention]
        modules += [f"{prefix}mlp.{name}" for name in linears]
    return [_single(f"{MCORE_VISION_PREFIX}{module}") for module in modules]


def _attention(prefix: str) -> list[str]:
    names = ("linear_qkv", "linear_proj", "core_attention", "q_layernorm", "k_layernorm")
    return [_single(f"{prefix}self_attention.{name}") for name in names]


def _feed_forward(config: Qwen35Config, prefix: str) -> list[str]:
    linears = ("linear_fc1", "linear_fc2")
    if not config.is_moe:
        return [_single(f"{prefix}mlp.{linear}") for linear in linears]
    return [
        _single(f"{prefix}pre_mlp_layernorm"),
        *(_single(f"{prefix}mlp.shared_experts.{linear}") for linear in linears),
        *(
            f"{prefix}mlp.experts.experts.{linear}._extra_state/shard_{expert}_{config.num_experts}"
            for linear in linears
            for expert in range(config.num_experts)
        ),
    ]


def _single(module: str) -> str:
    return f"{module}._extra_state/shard_0_1"
