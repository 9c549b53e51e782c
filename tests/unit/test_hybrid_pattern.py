"""The hybrid layer pattern: what it says of a model's stages, and which ones are refused."""

from __future__ import annotations

from argparse import Namespace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen35_mcore.errors import ConfigError
from qwen35_mcore.parallel.hybrid_pattern import (
    decoder_symbols,
    stages_of_pattern,
    write_hybrid_pattern,
)
from qwen35_mcore.parallel.stages import stage_problems
from qwen35_mcore.training.decoder import OTHER_WAYS, take_hybrid_pattern
from tests.helpers.toys import toy_config

MOE = toy_config(mtp_num_hidden_layers=1)
DENSE = toy_config(
    moe=False, num_hidden_layers=2, layer_types=("full_attention", "linear_attention")
)


def test_symbols_are_two_a_layer() -> None:
    assert decoder_symbols(MOE) == "GEGEGE*E"
    assert decoder_symbols(DENSE) == "*-G-"


def test_whole_layers() -> None:
    assert write_hybrid_pattern(MOE, [4]) == "GEGEGE*E/*E"
    assert write_hybrid_pattern(MOE, [1, 0, 3]) == "GE||GEGE*E/*E"
    assert write_hybrid_pattern(DENSE, [1, 1]) == "*-|G-"


@pytest.mark.parametrize(
    ("pattern", "stages"),
    [
        ("GEGEGE*E/*E", ("EttttmL",)),
        ("GE|GEGE*E/*E", ("Et", "tttmL")),
        ("GEGEG|E*E/*E", ("Ettt", "tmL")),
        ("G|E|GEGE*|E/*E", ("Et", "", "ttt", "mL")),
        ("|GEGEGE*E/*E", ("E", "ttttmL")),
    ],
)
def test_a_cut_layer_counts_where_its_mixer_is(pattern: str, stages: tuple[str, ...]) -> None:
    assert stages_of_pattern(MOE, pattern) == stages


@given(st.lists(st.integers(0, 8), max_size=5))
def test_any_cuts_make_stages_that_megatron_takes(cuts: list[int]) -> None:
    symbols = decoder_symbols(MOE)
    edges = [0, *sorted(cuts), len(symbols)]
    parts = [symbols[a:b] for a, b in pairwise(edges)]
    stages = stages_of_pattern(MOE, "|".join(parts) + "/*E")
    problems = stage_problems(
        stages, num_layers=4, num_mtp_layers=1, standalone_mtp=False, pp=len(stages)
    )
    assert list(problems) == []


@pytest.mark.parametrize("pattern", ["GEGEGE*E", "GEGEGE*-/*E", "GEGE*EGE/*E", "GEGEGE*E/*|E", ""])
def test_the_pattern_of_another_model(pattern: str) -> None:
    with pytest.raises(ConfigError, match="is not this model's") as caught:
        stages_of_pattern(MOE, pattern)
    assert "GEGEGE*E/*E, with |" in str(caught.value)


def run(pattern: str | None, pp: int = 2, **more: Any) -> Namespace:
    others: dict[str, Any] = dict.fromkeys(OTHER_WAYS)
    given = {"hybrid_layer_pattern": pattern, "pipeline_model_parallel_size": pp}
    return Namespace(**others | given | more)


def test_megatron_is_given_a_layout_of_as_many_stages() -> None:
    args = run("GEGEG|E*E/*E")
    take_hybrid_pattern(args, MOE)
    assert args.qwen35_hybrid_pattern == "GEGEG|E*E/*E"
    assert args.hybrid_layer_pattern is None
    assert args.pipeline_model_parallel_layout == "Et*3|tmL"


def test_without_a_pattern_nothing_changes() -> None:
    args = run(None, pipeline_model_parallel_layout="Ett|ttmL")
    take_hybrid_pattern(args, MOE)
    assert args.qwen35_hybrid_pattern is None
    assert args.pipeline_model_parallel_layout == "Ett|ttmL"


def test_one_way_to_share_out_the_layers() -> None:
    with pytest.raises(ConfigError, match="says which stage holds which layer") as caught:
        take_hybrid_pattern(run("GE|GEGE*E/*E", pipeline_model_parallel_layout="Et|tttmL"), MOE)
    assert "--pipeline-model-parallel-layout as well" in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "pp", "allowed"),
    [
        ("GE|GE|GE*E/*E", 2, "2 stages, or a multiple of it"),
        ("GEGEGE*E/*E", 2, "2 stages, or a multiple of it"),
        ("GE|GEGE*E/*E", 1, "one stage: no |"),
    ],
)
def test_as_many_stages_as_the_pipeline_has(pattern: str, pp: int, allowed: str) -> None:
    with pytest.raises(ConfigError, match="does not fit the pipeline") as caught:
        take_hybrid_pattern(run(pattern, pp), MOE)
    assert f"allowed: {allowed}" in str(caught.value)
    assert "GEGEGE*E is the decoder" in str(caught.value)
