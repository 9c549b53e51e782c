"""Operations of a step: megatron-core's own count, and the places where that is not right."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from megatron.training import training as megatron_training

from qwen35_mcore.config.flavors import FLAVORS, VISION_FLAVORS, get_flavor, vision_flavor
from qwen35_mcore.config.flops import (
    BACKWARD_AND_FORWARD,
    attention_layer_flops,
    gdn_layer_flops,
    training_flops,
    vision_flops,
)
from qwen35_mcore.config.layer_pattern import LayerKind
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.config.vision import VisionConfig
from qwen35_mcore.model.transformer_config import architecture_arguments
from tests.helpers.hf_reference import part_class
from tests.helpers.kinds import kinds

LENGTH, BATCH = 4096, 3
TOKENS = LENGTH * BATCH
OTHERS = {
    "num_experts": None,
    "moe_layer_freq": 1,
    "moe_ffn_hidden_size": None,
    "moe_shared_expert_intermediate_size": None,
    "moe_latent_size": None,
    "multi_latent_attention": False,
    "hybrid_layer_pattern": None,
    "seq_length": LENGTH,
}


def megatron_flops(config: Qwen35Config) -> float:
    arguments = SimpleNamespace(**OTHERS | architecture_arguments(config))
    count = megatron_training.num_floating_point_operations
    return count(Namespace(**vars(arguments)), BATCH)


def router_flops(config: Qwen35Config) -> int:
    """Of the routers and the shared experts' gates, which megatron leaves out."""
    layers = config.num_hidden_layers + config.mtp_num_hidden_layers
    each = 2 * TOKENS * config.hidden_size * (config.num_experts + 1)
    return BACKWARD_AND_FORWARD * layers * each if config.is_moe else 0


@pytest.mark.parametrize("flavor", FLAVORS)
def test_without_mtp_the_counts_are_equal(flavor: str) -> None:
    config = replace(get_flavor(flavor), mtp_num_hidden_layers=0)
    ours = training_flops(config, TOKENS, seq_length=LENGTH) - router_flops(config)
    assert ours == pytest.approx(megatron_flops(config), rel=1e-12)


def test_a_pattern_without_interval_counts_the_same() -> None:
    kinds = (LayerKind.ATTENTION, LayerKind.GDN, LayerKind.GDN, LayerKind.ATTENTION)
    config = replace(get_flavor("tiny-moe"), layer_types=kinds, mtp_num_hidden_layers=0)
    ours = training_flops(config, TOKENS, seq_length=LENGTH) - router_flops(config)
    assert ours == pytest.approx(megatron_flops(config), rel=1e-12)


@pytest.mark.parametrize("flavor", FLAVORS)
def test_megatron_takes_the_mtp_layer_for_a_gdn_layer(flavor: str) -> None:
    """It is full attention; and megatron counts three norms of it, as no other norm."""
    config = get_flavor(flavor)
    attention = attention_layer_flops(config, TOKENS, TOKENS * LENGTH)
    mistaken = attention - gdn_layer_flops(config, TOKENS)
    norms = 2 * TOKENS * 3 * config.hidden_size
    ours = training_flops(config, TOKENS, seq_length=LENGTH) - router_flops(config)
    difference = BACKWARD_AND_FORWARD * (mistaken - norms)
    assert ours - difference == pytest.approx(megatron_flops(config), rel=1e-12)


def test_megatron_cannot_count_a_pattern_with_mtp() -> None:
    kinds = (LayerKind.ATTENTION, LayerKind.GDN, LayerKind.GDN, LayerKind.ATTENTION)
    with pytest.raises(AssertionError, match="Invalid length of linear_attention_pattern"):
        megatron_flops(replace(get_flavor("tiny-moe"), layer_types=kinds))


GRIDS = [(1, 8, 8), (1, 4, 6), (3, 8, 2)]
"""Two images and a video of three frames."""


@pytest.mark.parametrize("flavor", kinds(VISION_FLAVORS, ("0.8b",)))
def test_the_towers_count_is_that_of_its_products(flavor: str) -> None:
    """What torch counts in transformers' tower, matrix products and attention alone; two blocks of
    the published widths."""
    from torch.utils.flop_counter import FlopCounterMode

    config = vision_flavor(flavor)
    described = config.carried_outer["vision_config"] | {"depth": 2}
    one = part_class(config, "VisionModel")
    # torch counts no fused attention on a CPU
    tower = one(one.config_class(**described, attn_implementation="eager"))
    patches = torch.zeros(sum(t * h * w for t, h, w in GRIDS), 3 * 2 * 16 * 16)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tower(patches, grid_thw=torch.tensor(GRIDS))
    vision = replace(VisionConfig.of(config), depth=2)
    assert vision_flops(vision, GRIDS) == counter.get_total_flops()


def test_a_step_with_images_counts_both() -> None:
    config = vision_flavor("0.8b")
    tower = vision_flops(VisionConfig.of(config), GRIDS)
    text, both = (
        training_flops(config, TOKENS, seq_length=LENGTH, grids=grids) for grids in ([], GRIDS)
    )
    assert both - text == BACKWARD_AND_FORWARD * tower
    assert text == training_flops(get_flavor("0.8b"), TOKENS, seq_length=LENGTH)
