"""Small awkward models and inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from qwen35_mcore.config.flavors import get_flavor
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.config.rope import RopeParameters

NEXT: dict[str, Any] = {
    "model_type": "qwen3_next",
    "rope_parameters": RopeParameters(rope_theta=10000.0),
}
"""Arguments of `toy_config` for Qwen3-Next."""


def toy_config(*, moe: bool = True, **changes: Any) -> Qwen35Config:
    """Three GDN layers and one attention layer of width 64, everything small but nothing absent."""
    fields: dict[str, Any] = {
        "model_type": "qwen3_5_moe_text" if moe else "qwen3_5_text",
        "vocab_size": 256,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "rope_parameters": RopeParameters(rope_theta=10000.0, mrope_section=(2, 1, 1)),
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    }
    if moe:
        fields |= {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
        }
    else:
        fields["intermediate_size"] = 128
    return Qwen35Config(**fields | changes)


def narrow_config(flavor: str = "tiny-moe") -> Qwen35Config:
    """A tiny flavor with the published head sizes, which the fused kernels of a GPU want."""
    return replace(
        get_flavor(flavor),
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        head_dim=256,
        rope_parameters=get_flavor("35b-a3b").rope_parameters,
    )


def random_tokens(config: Qwen35Config, batch: int, length: int, seed: int) -> torch.Tensor:
    """Tokens ``[batch, length + 1]`` with a structure to learn: every second follows the first."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, config.vocab_size, (batch, length + 1), generator=generator)
    tokens[:, 1::2] = (tokens[:, 0 : 2 * (tokens.shape[1] // 2) : 2] * 7 + 3) % config.vocab_size
    return tokens
