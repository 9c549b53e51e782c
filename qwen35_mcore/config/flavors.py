"""The published sizes as data, and two that train on a CPU in seconds.

Flavors are text-only configs. What a published checkpoint has around the text model (vision tower,
token ids) is in its own config.json, which `Qwen35Config.from_hf` reads; `vision_flavor` has the
part of it that the tower is computed with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

from qwen35_mcore.config.hf_keys import QWEN3_5
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.config.rope import RopeParameters, YarnScaling
from qwen35_mcore.config.vision import VisionConfig
from qwen35_mcore.errors import ConfigError

_ROPE = RopeParameters(rope_theta=10_000_000.0, mrope_section=(11, 11, 10))
_SHARED: dict[str, Any] = {
    "vocab_size": 248320,
    "max_position_embeddings": 262144,
    "rope_parameters": _ROPE,
    "mtp_num_hidden_layers": 1,
}


def _dense(
    hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, gdn_heads: int, *, tied: bool
) -> Qwen35Config:
    return Qwen35Config(
        model_type="qwen3_5_text",
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=ffn,
        linear_num_value_heads=gdn_heads,
        tie_word_embeddings=tied,
        **_SHARED,
    )


def _moe(
    hidden: int,
    layers: int,
    heads: int,
    gdn_heads: int,
    experts: int,
    top_k: int,
    expert_ffn: int,
    model_type: str = "qwen3_5_moe_text",
) -> Qwen35Config:
    return Qwen35Config(
        model_type=model_type,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        linear_num_value_heads=gdn_heads,
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=expert_ffn,
        shared_expert_intermediate_size=expert_ffn,
        **_SHARED,
    )


_80B = replace(
    _moe(2048, 48, 16, 32, experts=512, top_k=10, expert_ffn=512, model_type="qwen3_next"),
    vocab_size=151936,
    rope_parameters=replace(_ROPE, mrope_section=None),
)
_397B = _moe(4096, 60, 32, 64, experts=512, top_k=10, expert_ffn=1024)
_397B_LONG = replace(
    _397B,
    max_position_embeddings=1_000_000,
    rope_parameters=replace(
        _ROPE, yarn=YarnScaling(factor=3.0, original_max_position_embeddings=262144)
    ),
)

_TOKENS = {
    "image_token_id": 248056,
    "video_token_id": 248057,
    "vision_start_token_id": 248053,
    "vision_end_token_id": 248054,
}
_NOT_NESTED = {*_TOKENS, "rope_theta"}  # keys beside vision_config, and one of its default
_TOWER = VisionConfig(out_hidden_size=4096)
_TOWERS = {
    "0.8b": replace(_TOWER, depth=12, hidden_size=768, intermediate_size=3072, num_heads=12),
    "2b": replace(_TOWER, depth=24, hidden_size=1024, intermediate_size=4096),
    "4b": replace(_TOWER, depth=24, hidden_size=1024, intermediate_size=4096),
}
"""The towers that are smaller than that of every other published size."""

# A vocabulary of 512 holds the 256 bytes and an end-of-document token, and TP up to 4 divides it.
# Three GDN layers and one attention layer are one period of the published pattern.
_TINY_DENSE = Qwen35Config(
    model_type="qwen3_5_text",
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    linear_num_key_heads=4,
    linear_num_value_heads=8,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    max_position_embeddings=4096,
    rope_parameters=RopeParameters(rope_theta=10_000.0, mrope_section=(2, 1, 1)),
    mtp_num_hidden_layers=1,
)
_TINY_MOE = replace(
    _TINY_DENSE,
    model_type="qwen3_5_moe_text",
    intermediate_size=0,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    shared_expert_intermediate_size=64,
    router_aux_loss_coef=0.001,
)

FLAVORS: Mapping[str, Qwen35Config] = MappingProxyType(
    {
        "tiny-dense": _TINY_DENSE,
        "tiny-moe": _TINY_MOE,
        "0.8b": _dense(1024, 24, 8, 2, 3584, 16, tied=True),
        "2b": _dense(2048, 24, 8, 2, 6144, 16, tied=True),
        "4b": _dense(2560, 32, 16, 4, 9216, 32, tied=True),
        "9b": _dense(4096, 32, 16, 4, 12288, 32, tied=False),
        "27b": _dense(5120, 64, 24, 4, 17408, 48, tied=False),
        "35b-a3b": _moe(2048, 40, 16, 32, experts=256, top_k=8, expert_ffn=512),
        "80b-a3b": _80B,
        "122b-a10b": _moe(3072, 48, 32, 64, experts=256, top_k=8, expert_ffn=1024),
        "397b-a17b": _397B,
        "397b-a19b": _397B_LONG,
    }
)
"""Every flavor by its canonical name, smallest first."""

VISION_FLAVORS = tuple(
    name
    for name, config in FLAVORS.items()
    if config.family is QWEN3_5 and not name.startswith("tiny")
)
"""Those that are published with a vision tower."""

# the tiny flavors exist here only, never on the Hub
_HUB_NAMES = {
    r"(?:qwen/)?qwen3\.5-(.+?)(?:-base)?": VISION_FLAVORS,
    r"(?:qwen/)?qwen3\.6-(.+?)(?:-base)?": ("35b-a3b",),
    r"(?:qwen/)?qwen3-next-(.+?)(?:-instruct|-thinking)?": ("80b-a3b",),
}


def flavor_name(name: str) -> str:
    """The canonical name of a flavor, from any of its spellings: upper or lower case, ``_`` for
    ``-``, or a Hub name (Qwen/Qwen3.5-35B-A3B, Qwen3.6-35B-A3B, with or without -Base;
    Qwen3-Next-80B-A3B, with or without -Instruct or -Thinking).

    Raises:
        ConfigError: no such flavor; the message has the nearest names and the list.
    """
    stem, names = name.strip().lower().replace("_", "-"), tuple(FLAVORS)
    for pattern, published in _HUB_NAMES.items():
        if hub := re.fullmatch(pattern, stem):
            stem, names = hub.group(1), published
            break
    if stem in names:
        return stem
    near = get_close_matches(stem, FLAVORS, n=3, cutoff=0.4)
    raise ConfigError(
        "there is no such flavor",
        got=name,
        allowed=", ".join(FLAVORS),
        fix=f"did you mean {' or '.join(near)}?" if near else None,
    )


def get_flavor(name: str, **changes: Any) -> Qwen35Config:
    """The config of a flavor; `name` in any spelling that `flavor_name` takes.

    Args:
        changes: as `Qwen35Config.changed` takes them.

    Raises:
        ConfigError: no such flavor, or an impossible value.
    """
    return FLAVORS[flavor_name(name)].changed(**changes)


def vision_flavor(name: str) -> Qwen35Config:
    """The vision-language model that a flavor was published as; `name` as `get_flavor` takes it.

    Raises:
        ConfigError: no such flavor, or one without a vision tower.
    """
    name = flavor_name(name)
    if name not in VISION_FLAVORS:
        raise ConfigError(
            "the flavor has no vision tower", got=name, allowed=", ".join(VISION_FLAVORS)
        )
    text = FLAVORS[name]
    tower = vars(replace(_TOWERS.get(name, _TOWER), out_hidden_size=text.hidden_size))
    vision_config = {key: value for key, value in tower.items() if key not in _NOT_NESTED}
    return replace(
        text,
        model_type=text.model_type.removesuffix("_text"),
        carried_outer={"vision_config": vision_config, **_TOKENS},
    )
