"""Runs of several ranks: the whole step as one CUDA graph, or its parts as several, equals the run
without graphs. Ranks share a GPU where there are fewer."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from tests.helpers.gpu_runs import STEPS, Log, Train, assert_graphed_as_eager, train

__all__ = ["train"]  # a fixture
pytestmark = pytest.mark.gpu

LAYOUTS = {
    # the step behind an evaluation is the captured one
    "DP2": ("--overlap-grad-reduce", "--overlap-param-gather", "--eval-interval", "1"),
    "PP2": ("--pipeline-model-parallel-size", "2"),
    "PP2 x VPP2": (
        *("--pipeline-model-parallel-size", "2"),
        *("--num-virtual-stages-per-pipeline-rank", "2"),
    ),
    "TP2": (
        *("--tensor-model-parallel-size", "2", "--sequence-parallel"),
        *("--expert-tensor-parallel-size", "1"),
    ),
    "CP2": ("--context-parallel-size", "2", "--gdn-context-parallel", "all_to_all"),
    "CP2 states": ("--context-parallel-size", "2", "--gdn-context-parallel", "state_passing"),
}
GRAPHS = {
    "whole": ("--cuda-graph-impl", "full_iteration"),
    "parts": (
        *("--cuda-graph-impl", "transformer_engine"),
        *("--cuda-graph-modules", "attn", "moe_router", "moe_preprocess"),
    ),
}
EVALUATED = ("--global-batch-size", "4", "--eval-iters", "2")
"""The first batch without a graph, the second in one."""


@pytest.fixture(scope="module")
def eager(train: Train) -> Callable[[str], Log]:
    """What a run without graphs logs in a layout."""
    return functools.cache(lambda layout: train(*LAYOUTS[layout], *EVALUATED, gpus=2))


@pytest.mark.parametrize("kind", GRAPHS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_graphs_of_ranks(train: Train, eager: Callable[[str], Log], layout: str, kind: str) -> None:
    """Every pass and every exchange between ranks is in it, in training and in evaluation."""
    graph = (*GRAPHS[kind], "--cuda-graph-warmup-steps", "1")
    graphed, expected = train(*LAYOUTS[layout], *EVALUATED, *graph, gpus=2), eager(layout)
    assert_graphed_as_eager(graphed, expected)
    # the last event of a run, its test loss, is not always on the disk
    name = "lm loss validation"
    assert graphed[name][STEPS][0] == pytest.approx(expected[name][STEPS][0], rel=1e-2)
