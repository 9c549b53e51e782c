"""Pipelines on two GPUs: the whole step as one CUDA graph equals the run without graphs."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.gpu_runs import STEPS, Train, assert_graphed_as_eager, train

__all__ = ["train"]  # a fixture
pytestmark = pytest.mark.gpu

PP2 = ("--pipeline-model-parallel-size", "2", "--global-batch-size", "4")
STAGES = {"PP2": (), "PP2 x VPP2": ("--num-virtual-stages-per-pipeline-rank", "2")}
GRAPH = ("--cuda-graph-impl", "full_iteration", "--cuda-graph-warmup-steps", "1")
EVALUATED = ("--eval-iters", "2")
"""The first batch without a graph, the second in one."""


@pytest.mark.parametrize("stages", STAGES)
def test_one_graph_of_a_pipeline(train: Train, stages: str) -> None:
    """Every pass and every exchange between stages is in it, in training and in evaluation."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    flags = (*PP2, *STAGES[stages], *EVALUATED)
    eager, graphed = train(*flags, gpus=2), train(*flags, *GRAPH, gpus=2)
    assert_graphed_as_eager(graphed, eager)
    # the last event of a run, its test loss, is not always on the disk
    evaluated, expected = (log["lm loss validation"][STEPS][0] for log in (graphed, eager))
    assert evaluated == pytest.approx(expected, rel=1e-2)
