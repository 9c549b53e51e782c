"""Small configs of any proportion, drawn by hypothesis."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.config.rope import RopeParameters
from tests.helpers.toys import toy_config


@st.composite
def configs(draw: st.DrawFn) -> Qwen35Config:
    """Small configs of any proportion."""
    groups, key_heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    layers = draw(st.integers(1, 3))
    kinds = st.sampled_from(["linear_attention", "full_attention"])
    changes: dict[str, Any] = {
        "hidden_size": draw(st.integers(1, 9)),
        "vocab_size": draw(st.integers(1, 9)),
        "num_hidden_layers": layers,
        "layer_types": tuple(draw(st.lists(kinds, min_size=layers, max_size=layers))),
        "num_key_value_heads": groups,
        "num_attention_heads": groups * draw(st.integers(1, 3)),
        "head_dim": draw(st.sampled_from([8, 16])),
        "rope_parameters": RopeParameters(rope_theta=1e4),
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": key_heads * draw(st.integers(1, 3)),
        "linear_key_head_dim": draw(st.integers(1, 4)),
        "linear_value_head_dim": draw(st.integers(1, 4)),
        "linear_conv_kernel_dim": draw(st.integers(1, 4)),
        "tie_word_embeddings": draw(st.booleans()),
        "mtp_num_hidden_layers": draw(st.integers(0, 1)),
    }
    moe = draw(st.booleans())
    if moe:
        changes |= {
            "model_type": draw(st.sampled_from(["qwen3_5_moe_text", "qwen3_next"])),
            "num_experts": draw(st.integers(1, 4)),
            "num_experts_per_tok": 1,
            "moe_intermediate_size": draw(st.integers(1, 5)),
            "shared_expert_intermediate_size": draw(st.integers(1, 5)),
        }
    return toy_config(moe=moe, **changes)
