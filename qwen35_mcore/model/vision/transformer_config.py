"""VisionConfig to the TransformerConfig of the tower's blocks, and of its merger."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F

from qwen35_mcore.config.vision import VisionConfig
from qwen35_mcore.errors import ConfigError
from qwen35_mcore.mcore.imports import TransformerConfig

EPSILON = 1e-6
"""Of every LayerNorm of the tower; no config names it."""
_OF_THE_RUN = (
    "attention_backend",
    "bf16",
    "deterministic_mode",
    "gradient_accumulation_fusion",
    "params_dtype",
    "perform_initialization",
    "tensor_model_parallel_size",
    "transformer_impl",
    "use_cpu_initialization",
)


def blocks_config(vision: VisionConfig, config: TransformerConfig) -> TransformerConfig:
    """The blocks' config. The tower's sequences are its own: it has no sequence parallelism, no
    pipeline, and no FP8. Where the run recomputes whole layers, blocks are recomputed one by one;
    where it recomputes the core of attention, that of the blocks is, too.

    Args:
        config: of the language model, which says dtypes, tensor parallelism and the like.

    Raises:
        ConfigError: tensor parallelism divides the tower unevenly.
    """
    check_tensor_parallel(vision, config.tensor_model_parallel_size)
    return _tower_config(
        vision,
        config,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.intermediate_size,
        activation_func=partial(F.gelu, approximate="tanh"),
        **_recompute(config),
    )


def _recompute(config: TransformerConfig) -> dict[str, Any]:
    if config.recompute_granularity == "full":
        method = {"recompute_method": "uniform", "recompute_num_layers": 1}
        return {"recompute_granularity": "full", **method}
    if config.recompute_granularity and "core_attn" in (config.recompute_modules or ()):
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {}


def merger_config(vision: VisionConfig, config: TransformerConfig) -> TransformerConfig:
    """The merger's config: from ``merged_width`` over as many channels to the text's width."""
    return _tower_config(
        vision,
        config,
        hidden_size=vision.out_hidden_size,
        ffn_hidden_size=vision.merged_width,
        activation_func=F.gelu,
    )


def _tower_config(vision: VisionConfig, config: TransformerConfig, **own: Any) -> TransformerConfig:
    return TransformerConfig(
        **{name: getattr(config, name) for name in _OF_THE_RUN},
        num_layers=vision.depth,
        num_attention_heads=vision.num_heads,
        kv_channels=vision.head_dim,
        normalization="LayerNorm",
        layernorm_epsilon=EPSILON,
        add_bias_linear=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=vision.initializer_range,
        # transformers' initial weights: no smaller ones in front of the residual stream
        output_layer_init_method=partial(_normal, std=vision.initializer_range),
        masked_softmax_fusion=False,
        hetereogenous_dist_checkpoint=True,  # a key a layer, as in the language model
        **own,
    )


def _normal(weight: Any, std: float) -> Any:
    return weight.data.normal_(0.0, std)


def check_tensor_parallel(vision: VisionConfig, ranks: int) -> None:
    """Refuse so many tensor-parallel ranks as do not divide the tower.

    Raises:
        ConfigError: naming what they do not divide.
    """
    for name in ("num_heads", "intermediate_size", "merged_width"):
        if getattr(vision, name) % ranks:
            raise ConfigError(
                f"tensor parallelism does not divide the vision tower's {name}",
                got=f"{getattr(vision, name)} over {ranks} ranks",
                fix="take a smaller tensor parallel size",
            )
