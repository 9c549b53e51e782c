"""What is read of ``vision_config`` and what is refused; the tower's parameters, operations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qwen35_mcore.config.counts import count_parameters, vision_parameters
from qwen35_mcore.config.flavors import get_flavor
from qwen35_mcore.config.flops import vision_flops
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.config.vision import VisionConfig
from qwen35_mcore.errors import ConfigError
from tests.helpers.hf_configs import vision_language
from tests.helpers.hf_toy import toy_hf_config

PUBLISHED = VisionConfig(out_hidden_size=4096)
"""The tower of every published size but the width of its output."""


def with_vision(**changes: Any) -> Qwen35Config:
    raw = vision_language()
    raw["vision_config"] |= {"out_hidden_size": raw["text_config"]["hidden_size"]} | changes
    return Qwen35Config.from_hf(raw)


def test_keys_that_are_left_out_have_transformers_defaults() -> None:
    vision = VisionConfig.of(with_vision(num_heads=2))
    assert (vision.depth, vision.hidden_size) == (2, 32)
    assert (vision.patch_size, vision.temporal_patch_size) == (16, 2)
    assert (vision.image_token_id, vision.video_token_id) == (501, 502)


def test_derived_widths() -> None:
    assert PUBLISHED.head_dim == 72
    assert PUBLISHED.positions_per_side == 48
    assert PUBLISHED.patch_values == 1536
    assert PUBLISHED.merged_width == 4608


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_heads": 2, "out_hidden_size": 32}, "out_hidden_size must be the language model's"),
        ({"depth": 0}, "depth must be a positive integer"),
        ({"depth": True}, "depth must be a positive integer"),
        ({"patch_size": [16, 16]}, "patch_size must be a positive integer"),
        ({"initializer_range": 0}, "initializer_range must be a positive number"),
        ({"hidden_act": "silu"}, "hidden_act"),
        ({"deepstack_visual_indexes": [5]}, "deepstack_visual_indexes"),
        ({"num_heads": 3}, "multiple of 4 channels"),
        ({"num_heads": 16}, "multiple of 4 channels"),
        ({"num_heads": 2, "num_position_embeddings": 2000}, "must be a square"),
        ({"num_heads": 2, "window_size": 7}, "unknown key in vision_config: window_size"),
        ({"num_heads": 2, "rope_parameters": {"rope_type": "yarn"}}, "must be axial"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_contradiction_is_named(changes: dict[str, Any], says: str) -> None:
    config = with_vision(**changes)  # a run of text alone carries it unread
    with pytest.raises(ConfigError, match=says):
        VisionConfig.of(config)


def test_token_ids_lie_in_the_vocabulary_and_differ() -> None:
    config = with_vision(num_heads=2)
    for ids, says in (
        ({"image_token_id": 640}, "image_token_id is outside the vocabulary"),
        ({"image_token_id": 502}, "are the same"),
        ({"video_token_id": None}, "video_token_id is outside"),  # transformers' default
    ):
        with pytest.raises(ConfigError, match=says):
            VisionConfig.of(replace(config, carried_outer=config.carried_outer | ids))


def test_a_model_of_text_has_no_tower() -> None:
    with pytest.raises(ConfigError, match="no vision tower"):
        VisionConfig.of(get_flavor("tiny-moe"))


def test_sections_of_mrope_are_needed() -> None:
    config = with_vision(num_heads=2)
    rope = replace(config.rope_parameters, mrope_section=None)
    with pytest.raises(ConfigError, match="mrope_section"):
        VisionConfig.of(replace(config, rope_parameters=rope))


def test_the_tower_of_the_397b_makes_its_name() -> None:
    """0.45 B parameters, as tests/unit/test_counts.py says of the text model's 396."""
    assert vision_parameters(PUBLISHED) == pytest.approx(0.45e9, rel=0.02)


def test_a_model_counts_its_tower_where_the_run_trains_it() -> None:
    config = toy_hf_config("qwen3_5_moe")
    text, whole = count_parameters(config), count_parameters(config, vision=True)
    assert "vision" not in text.by_component()
    tower = whole.by_component()["vision"]
    assert (tower.total, tower.active) == (vision_parameters(VisionConfig.of(config)), 0)
    assert whole.total - text.total == tower.total
    assert whole.active == text.active
    with pytest.raises(ConfigError, match="no vision tower"):
        count_parameters(toy_hf_config("qwen3_5_moe_text"), vision=True)


def test_operations_of_the_tower() -> None:
    """Two per weight and patch, biases, norms and positions apart; and attention's two products of
    every pair of patches of a frame, whose square alone makes two images less than one."""
    products = vision_parameters(PUBLISHED) - PUBLISHED.hidden_size * (1 + 2304)
    merged = PUBLISHED.merged_width * (PUBLISHED.merged_width + 4096)
    assert vision_flops(PUBLISHED, [(1, 32, 32)]) == pytest.approx(
        2 * 1024 * (products - merged * 3 / 4) + 27 * 4 * 1024**2 * 1152, rel=1e-3
    )
    one, two = vision_flops(PUBLISHED, [(1, 32, 32)]), vision_flops(PUBLISHED, [(1, 32, 16)] * 2)
    assert one - two == 27 * 4 * 1152 * (1024**2 - 2 * 512**2)
    assert vision_flops(PUBLISHED, [(3, 8, 8)]) == 3 * vision_flops(PUBLISHED, [(1, 8, 8)])
