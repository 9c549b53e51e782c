"""The table of correspondences: closed, invertible, complete, for any config."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoint_tools.table.names import Naming, hf_to_mcore, mcore_to_hf, rows
from checkpoint_tools.table.row import Row
from checkpoint_tools.table.transforms import Box
from qwen35_mcore.config.flavors import FLAVORS
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.config.rope import RopeParameters
from qwen35_mcore.errors import CheckpointError
from tests.helpers.hf_reference import model_class, modeling
from tests.helpers.kinds import examples
from tests.helpers.random_configs import configs
from tests.helpers.toys import NEXT, toy_config

experts = st.sampled_from(["packed", "per_expert"])
formats = st.sampled_from(["qwen35", "mcore"])


def random_side(table: list[Row], side: str) -> dict[str, torch.Tensor]:
    """Every tensor of one side, each element another number."""
    generator = torch.Generator().manual_seed(0)
    return {
        spec.name: torch.randn(spec.shape, generator=generator, dtype=torch.float64)
        for row in table
        for spec in getattr(row, side)
    }


@examples(60)
@given(config=configs(), experts=experts, checkpoint_format=formats)
def test_every_element_is_in_exactly_one_box_on_both_sides(
    config: Qwen35Config, experts: Any, checkpoint_format: Any
) -> None:
    for row in rows(config, Naming.default(config, experts), checkpoint_format):
        for side in ("hf", "mcore"):
            counts = [torch.zeros(spec.shape, dtype=torch.int32) for spec in getattr(row, side)]
            for copy in row.copies():
                box: Box = getattr(copy, f"{side}_box")
                box.of(counts[getattr(copy, side)]).add_(1)
                assert copy.hf_box.size == copy.mcore_box.size
            assert all(bool((count == 1).all()) for count in counts), row.mcore[0].name


@examples(40)
@given(config=configs(), experts=experts)
def test_there_and_back_is_the_identity_from_both_sides(config: Qwen35Config, experts: Any) -> None:
    table = rows(config, Naming.default(config, experts))
    hf = random_side(table, "hf")
    back = mcore_to_hf(config, hf_to_mcore(config, hf), experts)
    assert back.keys() == hf.keys()
    assert all(torch.equal(back[name], hf[name]) for name in hf)
    mcore = random_side(table, "mcore")
    back = hf_to_mcore(config, mcore_to_hf(config, mcore, experts))
    assert back.keys() == mcore.keys()
    assert all(torch.equal(back[key], mcore[key]) for key in mcore)


@pytest.mark.parametrize("flavor", FLAVORS)
@pytest.mark.parametrize("experts", ["packed", "per_expert"])
def test_no_tensor_is_in_two_rows(flavor: str, experts: Any) -> None:
    table = rows(FLAVORS[flavor], Naming.default(FLAVORS[flavor], experts))
    for side in ("hf", "mcore"):
        names = [spec.name for row in table for spec in getattr(row, side)]
        assert len(names) == len(set(names))


def test_qkv_rows_are_grouped_by_key_value_head() -> None:
    rope = RopeParameters(rope_theta=1e4)
    config = toy_config(num_key_value_heads=2, head_dim=8, rope_parameters=rope)
    table = rows(config, Naming.default(config))
    row = next(r for r in table if r.mcore[0].name.endswith("3.self_attention.linear_qkv.weight"))
    q, k, v = (torch.empty(spec.shape) for spec in row.hf)
    for head in range(4):
        q[16 * head : 16 * head + 8] = head
        q[16 * head + 8 : 16 * head + 16] = 10 + head
    for group in range(2):
        k[8 * group : 8 * group + 8], v[8 * group : 8 * group + 8] = 20 + group, 30 + group
    tensors = dict(zip((spec.name for spec in row.hf), (q, k, v), strict=True))
    (fused,) = row.to_mcore(tensors).values()
    assert fused[::8, 0].tolist() == [0, 1, 10, 11, 20, 30, 2, 3, 12, 13, 21, 31]


def test_projections_by_key_head_are_cut_as_transformers_cuts_them() -> None:
    """Each row of in_proj_qkvz and in_proj_ba has a number of its own."""
    config = toy_config(**NEXT)
    layer = modeling("qwen3_next").Qwen3NextGatedDeltaNet(
        model_class(config).config_class(**config.to_hf()), 0
    )
    hf = {
        name: torch.arange(float(len(getattr(layer, name).weight)))
        for name in ("in_proj_qkvz", "in_proj_ba")
    }
    theirs = layer.fix_query_key_value_ordering(*(rows[None, None] for rows in hf.values()))
    table = rows(config, Naming.default(config))
    prefix = "model.layers.0.linear_attn."
    state = random_side(table, "hf") | {
        f"{prefix}{name}.weight": rows[:, None].expand(-1, config.hidden_size)
        for name, rows in hf.items()
    }
    mcore = hf_to_mcore(config, state)
    for part, expected in zip(("query", "key", "value", "z", "beta", "alpha"), theirs, strict=True):
        weight = mcore[f"decoder.layers.0.self_attention.in_proj.weight.{part}"]
        assert torch.equal(weight[:, 0], expected.flatten()), part


def test_a_state_dict_without_mtp_and_with_vision_tensors() -> None:
    config = toy_config(mtp_num_hidden_layers=1)
    table = rows(config, Naming(prefix="model.language_model.", mtp=False))
    hf = random_side(table, "hf")
    mcore = hf_to_mcore(config, hf | {"model.visual.blocks.0.weight": torch.zeros(2)})
    assert not any(key.startswith("mtp.") for key in mcore)
    assert not any("visual" in key for key in mcore)


def test_the_native_layout_holds_the_gdn_norm_minus_one() -> None:
    config = toy_config()
    hf = random_side(rows(config, Naming.default(config)), "hf")
    native, ours = hf_to_mcore(config, hf, "mcore"), hf_to_mcore(config, hf)
    key = "decoder.layers.0.self_attention."
    assert torch.equal(native[f"{key}out_norm.weight"], ours[f"{key}gated_norm.weight"] - 1)
    assert f"{key}gated_norm.weight" not in native


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_a_wrong_state_dict_is_refused_by_name(change: str) -> None:
    config = toy_config()
    hf = random_side(rows(config, Naming.default(config)), "hf")
    name = "model.layers.0.mlp.gate.weight"
    if change == "missing":
        del hf[name]
    elif change == "unknown":
        name = "model.layers.0.mlp.gate.bias"
        hf[name] = torch.zeros(1)
    else:
        hf[name] = hf[name][:1]
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        hf_to_mcore(config, hf)
