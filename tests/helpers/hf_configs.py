"""Small config.json contents in the form of published files, for every model type."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from qwen35_mcore.config.hf_keys import MODEL_TYPES, QWEN3_5


def text_only(model_type: str = "qwen3_5_moe_text") -> dict[str, Any]:
    """A small text-only config.json with every key that published files have."""
    moe, family = MODEL_TYPES[model_type].moe, MODEL_TYPES[model_type].family
    sections = {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
    sizes = (
        {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 40,
            "router_aux_loss_coef": 0.002,
            "output_router_logits": False,
        }
        if moe
        else {"intermediate_size": 160}
    )
    return {
        "architectures": [MODEL_TYPES[model_type].architecture],
        "model_type": model_type,
        "attention_bias": False,
        "attention_dropout": 0.1,
        "bos_token_id": None,
        "dtype": "bfloat16",
        "eos_token_id": 500,
        "full_attention_interval": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 96,
        "initializer_range": 0.03,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_conv_kernel_dim": 3,
        "linear_key_head_dim": 24,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
        "linear_value_head_dim": 40,
        "max_position_embeddings": 8192,
        "mlp_only_layers": [],
        "num_attention_heads": 6,
        "num_hidden_layers": 4,
        "num_key_value_heads": 3,
        "pad_token_id": None,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000000,
            "partial_rotary_factor": 0.5,
            **(sections if family is QWEN3_5 else {}),
        },
        "tie_word_embeddings": False,
        "transformers_version": "5.3.0",
        "use_cache": True,
        "vocab_size": 640,
        family.mtp_key: 1,
        **deepcopy(family.always_written),
        **sizes,
    }


def vision_language(model_type: str = "qwen3_5_moe") -> dict[str, Any]:
    """A config.json in the form of the published checkpoints."""
    text = text_only(MODEL_TYPES[model_type].text_model_type)
    text.pop("architectures")
    return {
        "architectures": [MODEL_TYPES[model_type].architecture],
        "model_type": model_type,
        "image_token_id": 501,
        "video_token_id": 502,
        "vision_start_token_id": 503,
        "vision_end_token_id": 504,
        "text_config": text,
        "tie_word_embeddings": True,
        "transformers_version": "5.3.0",
        "vision_config": {
            "model_type": model_type,
            "depth": 2,
            "hidden_size": 32,
            "deepstack_visual_indexes": [],
        },
    }


def of_type(model_type: str) -> dict[str, Any]:
    nested = MODEL_TYPES[model_type].nested
    return (vision_language if nested else text_only)(model_type)


def text_level(raw: dict[str, Any]) -> dict[str, Any]:
    return raw.get("text_config", raw)


def without(raw: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key not in keys}
