"""RoPE parameters: both styles of config.json, YaRN, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import Qwen3_5MoeTextConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.config.rope import RopeParameters, YarnScaling
from qwen35_mcore.errors import ConfigError
from tests.helpers.hf_configs import text_only, without

YARN = YarnScaling(factor=4.0, original_max_position_embeddings=2048, beta_fast=16.0)
SCALING = {"factor": 4.0, "original_max_position_embeddings": 2048, "beta_fast": 16}


def read(**keys: Any) -> RopeParameters:
    raw = without(text_only(), "rope_parameters", "partial_rotary_factor")
    return Qwen35Config.from_hf(raw | keys).rope_parameters


def test_old_style_reads_like_new_style() -> None:
    new = read(rope_parameters={"rope_theta": 5e5, "partial_rotary_factor": 0.5})
    assert new == read(rope_theta=5e5, partial_rotary_factor=0.5)
    assert new == read(rope_theta=5e5, partial_rotary_factor=0.5, rope_scaling=None)
    assert new == RopeParameters(rope_theta=5e5, partial_rotary_factor=0.5)


@pytest.mark.parametrize("type_key", ["type", "rope_type"])
def test_yarn_in_either_style(type_key: str) -> None:
    scaling = SCALING | {type_key: "yarn"}
    assert read(rope_theta=1e6, rope_scaling=scaling).yarn == YARN
    assert read(rope_parameters=scaling | {"rope_theta": 1e6}).yarn == YARN


def test_every_yarn_parameter_is_read_and_written() -> None:
    every = {
        "factor": 2.0,
        "original_max_position_embeddings": 1024,
        "beta_fast": 24.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 0.9,
        "attention_factor": 1.1,
        "truncate": False,
    }
    rope = read(rope_parameters={"rope_type": "yarn", "rope_theta": 1e6, **every})
    assert rope.yarn == YarnScaling(**every)
    assert rope.to_hf() | every == rope.to_hf()


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"mscale": 0.5, "mscale_all_dim": 0.9},
        {"mscale": 0.5},
        {"attention_factor": 1.5},
        {"factor": 1.0},
    ],
)
def test_the_attention_factor_is_transformers(extra: dict[str, float]) -> None:
    raw = text_only() | {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "partial_rotary_factor": 0.5,
            **SCALING,
            **extra,
        }
    }
    config = Qwen35Config.from_hf(raw)
    _, expected = ROPE_INIT_FUNCTIONS["yarn"](Qwen3_5MoeTextConfig(**config.to_hf()))
    assert config.yarn is not None
    assert config.yarn.resolved_attention_factor == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "no rope_theta"),
        ({"rope_parameters": {"rope_type": "default"}}, "no rope_theta"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta must be a positive number"),
        ({"rope_parameters": {"rope_theta": "1e7"}}, "rope_theta must be a positive number"),
        ({"rope_parameters": {"rope_theta": 1e6}, "rope_theta": 1e7}, "two values for rope_t"),
        (
            {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}
            | {"partial_rotary_factor": 0.25},
            "two values for partial_rotary_factor",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"rope_theta": 1e5}},
            "two values for rope_theta",
        ),
        ({"rope_theta": 1e6, "rope_scaling": {"type": "linear"}}, "rope_type is not supported"),
        (
            {"rope_parameters": {"rope_theta": 1e6, "rope_type": "llama3"}},
            "rope_type is not supported",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e6, "type": "yarn", "rope_type": "default"}},
            "rope_type is not supported",
        ),
        ({"rope_parameters": {"rope_theta": 1e6, "factor": 2.0}}, "unknown .*: factor"),
        (
            {"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn", "factor": 2.0}},
            "needs original_max_position_embeddings",
        ),
        (
            {
                "rope_parameters": {
                    "rope_theta": 1e6,
                    "rope_type": "yarn",
                    "original_max_position_embeddings": 8,
                }
            },
            "needs factor",
        ),
        ({"rope_parameters": [1]}, "rope_parameters must be an object"),
        (
            {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 1.5}},
            r"partial_rotary_factor must be in \(0, 1\]",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e6, "mrope_section": [4, 4]}},
            "mrope_section must be three integers",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e6, "mrope_section": [11, 11, 10]}},
            "mrope_section must add up",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e6, "mrope_interleaved": False}},
            "mrope_interleaved must be true",
        ),
    ],
)
def test_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(**keys)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"factor": 0.5}, "factor must be at least 1"),
        ({"factor": None}, "factor must be a positive number"),
        ({"beta_fast": 0.5}, "beta_fast must not be below"),
        ({"original_max_position_embeddings": 0}, "must be a positive integer"),
        ({"truncate": 1}, "truncate must be true or false"),
        ({"mscale": -1}, "mscale must be a positive number"),
    ],
)
def test_impossible_yarn(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        YarnScaling(**{"factor": 2.0, "original_max_position_embeddings": 64} | values)
