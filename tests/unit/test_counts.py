"""Parameter counts: equal to transformers' own build of every flavor, and to the MTP tensors by
name; active parameters by the convention of names such as 35B-A3B."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen35_mcore.config.counts import Count, count_parameters, layer_parameters, vision_parts
from qwen35_mcore.config.flavors import FLAVORS, VISION_FLAVORS, get_flavor, vision_flavor
from qwen35_mcore.config.layer_pattern import LayerKind
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.config.vision import VisionConfig
from tests.helpers.hf_reference import model_class
from tests.helpers.kinds import examples, kinds

# component of a transformers parameter, by the first of these that its name contains
COMPONENTS = {
    "embed_tokens": "embedding",
    "lm_head": "output",
    "linear_attn": "gdn",
    "self_attn": "attention",
    "shared_expert": "shared_expert",
    "mlp.experts": "experts",
    "mlp.gate.": "router",
    "mlp.": "mlp",
    "norm": "norms",
}


def transformers_sizes(config: Qwen35Config) -> dict[str, int]:
    """Parameters of transformers' model by component, built without memory."""
    one = model_class(config)
    with torch.device("meta"):
        model = one(one.config_class(**config.to_hf()))
    sizes = dict.fromkeys(COMPONENTS.values(), 0)
    for name, parameter in model.named_parameters():
        part = next(part for key, part in COMPONENTS.items() if key in name)
        sizes[part] += parameter.numel()
    return sizes


@pytest.mark.parametrize("name", FLAVORS)
def test_every_component_equals_transformers_build(name: str) -> None:
    config = get_flavor(name)
    counts = count_parameters(config)
    ours = {part: count.total for part, count in counts.by_component().items() if part != "mtp"}
    assert ours == transformers_sizes(config)
    assert counts.total_without_mtp == sum(ours.values())


@pytest.mark.parametrize("name", kinds(VISION_FLAVORS, ("0.8b", "35b-a3b")))
def test_the_vision_language_model_equals_transformers_build(name: str) -> None:
    config = vision_flavor(name)
    one = model_class(config)
    with torch.device("meta"):
        model = one(one.config_class(**config.to_hf()))
    counts = count_parameters(config, vision=True)
    assert counts.total_without_mtp == sum(one.numel() for one in model.parameters())
    assert counts.vision.total == sum(one.numel() for one in model.model.visual.parameters())
    merger = sum(one.numel() for one in model.model.visual.merger.parameters())
    assert vision_parts(VisionConfig.of(config))["merger"] == merger


@examples(15)
@given(
    kinds=st.lists(st.sampled_from(LayerKind), min_size=1, max_size=5),
    ratio=st.integers(1, 4),
    kernel=st.integers(2, 5),
    tied=st.booleans(),
    moe=st.booleans(),
)
def test_any_shape_equals_transformers_build(
    kinds: list[LayerKind], ratio: int, kernel: int, tied: bool, moe: bool
) -> None:
    config = replace(
        get_flavor("tiny-moe" if moe else "tiny-dense"),
        num_hidden_layers=len(kinds),
        layer_types=tuple(kinds),
        linear_num_value_heads=4 * ratio,
        linear_value_head_dim=24,
        linear_conv_kernel_dim=kernel,
        tie_word_embeddings=tied,
    )
    assert count_parameters(config).total_without_mtp == sum(transformers_sizes(config).values())


def mtp_tensors(config: Qwen35Config) -> dict[str, tuple[int, ...]]:
    """Shapes of the ``mtp.*`` tensors of a published checkpoint, written out by hand."""
    h, d = config.hidden_size, config.head_dim
    q, kv = config.num_attention_heads * d, config.num_key_value_heads * d
    shapes: dict[str, Any] = {
        "fc": (h, 2 * h),
        "pre_fc_norm_embedding": (h,),
        "pre_fc_norm_hidden": (h,),
        "norm": (h,),
        "input_layernorm": (h,),
        "post_attention_layernorm": (h,),
        "q_proj": (2 * q, h),
        "k_proj": (kv, h),
        "v_proj": (kv, h),
        "o_proj": (h, q),
        "q_norm": (d,),
        "k_norm": (d,),
    }
    if not config.is_moe:
        ffn = config.intermediate_size
        return shapes | {"gate_proj": (ffn, h), "up_proj": (ffn, h), "down_proj": (h, ffn)}
    e, f, s = (
        config.num_experts,
        config.moe_intermediate_size,
        config.shared_expert_intermediate_size,
    )
    return shapes | {
        "gate": (e, h),
        "experts.gate_up_proj": (e, 2 * f, h),
        "experts.down_proj": (e, h, f),
        "shared.gate_proj": (s, h),
        "shared.up_proj": (s, h),
        "shared.down_proj": (h, s),
        "shared_expert_gate": (1, h),
    }


@pytest.mark.parametrize("name", FLAVORS)
def test_mtp_is_the_sum_of_its_tensors(name: str) -> None:
    config = get_flavor(name)
    counts = count_parameters(config)
    assert counts.mtp == Count(sum(map(prod, mtp_tensors(config).values())), 0)
    assert counts.total == counts.total_without_mtp + counts.mtp.total
    assert count_parameters(replace(config, mtp_num_hidden_layers=0)).mtp == Count(0, 0)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("35b-a3b", 35, 3), ("122b-a10b", 122, 10), ("397b-a17b", 396, 17)],
)
def test_moe_names_say_total_and_active(name: str, total: int, active: int) -> None:
    # the vision tower (0.45 B) makes the 396 the name's 397
    counts = count_parameters(get_flavor(name))
    assert round(counts.total_without_mtp / 1e9) == total
    assert round(counts.active / 1e9) == active


def test_qwen3_next_says_what_its_model_card_says() -> None:
    """80 B in all, 79 B without the two tables, of which 3 B are active; and what the Hub counts in
    the files of Qwen/Qwen3-Next-80B-A3B-Instruct."""
    counts = count_parameters(get_flavor("80b-a3b"))
    tables = counts.embedding.total + counts.output.total
    assert counts.total == 81_324_862_720
    assert round(counts.total_without_mtp / 1e9) == 80
    assert round((counts.total_without_mtp - tables) / 1e9) == 79
    assert round((counts.active - tables) / 1e9) == 3


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("0.8b", 873_438_784),
        ("2b", 2_274_069_824),
        ("4b", 4_659_865_088),
        ("9b", 9_653_104_368),
        ("27b", 27_781_427_952),
        ("35b-a3b", 35_951_822_704),
    ],
)
def test_with_their_towers_they_are_what_the_hub_counts(name: str, published: int) -> None:
    """Parameters in the files of Qwen/Qwen3.5-0.8B and so on, Qwen3.6-27B and -35B-A3B."""
    assert count_parameters(vision_flavor(name), vision=True).total == published


@pytest.mark.parametrize(
    ("name", "total"), [("0.8b", 0.8), ("2b", 2), ("4b", 4), ("9b", 9), ("27b", 27)]
)
def test_dense_names_say_the_total_and_all_of_it_is_active(name: str, total: float) -> None:
    counts = count_parameters(get_flavor(name))
    digits = 1 if total < 1 else 0
    assert round(counts.total_without_mtp / 1e9, digits) == total
    assert counts.active == counts.total_without_mtp


def test_active_leaves_out_the_experts_not_visited_and_mtp() -> None:
    config = get_flavor("tiny-moe")
    counts = count_parameters(config)
    one_expert = 3 * config.hidden_size * config.moe_intermediate_size
    idle = config.num_hidden_layers * (8 - 2) * one_expert
    assert counts.total - counts.active == idle + counts.mtp.total


def test_layers_add_up_to_the_model() -> None:
    for config in FLAVORS.values():
        counts = count_parameters(config)
        layers = sum(
            (layer_parameters(config, kind) for kind in config.layer_types), start=Count(0, 0)
        )
        around = counts.embedding + counts.output + Count(config.hidden_size, config.hidden_size)
        assert layers + around == Count(counts.total_without_mtp, counts.active)
