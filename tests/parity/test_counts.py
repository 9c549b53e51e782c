"""The analytic parameter count of every flavor is the one of the model that megatron builds."""

from __future__ import annotations

import pytest
import torch

from qwen35_mcore.config.counts import count_parameters
from qwen35_mcore.config.flavors import FLAVORS
from qwen35_mcore.config.model_config import Qwen35Config
from tests.helpers.distributed import WorkerPool
from tests.helpers.training import Layout, build_chunks, config_for, initialize


def built_parameters(config: Qwen35Config) -> dict[str, int]:
    """Numbers of elements by parameter name, of a model without storage."""
    layout = Layout(
        dtype=torch.bfloat16,
        run={"use_cpu_initialization": True, "perform_initialization": False},
    )
    initialize(layout)
    with torch.device("meta"):
        [model] = build_chunks(config, config_for(config, layout), layout)
    return {name: p.numel() for name, p in model.named_parameters()}


@pytest.mark.parametrize("flavor", FLAVORS)
def test_counts_equal_a_build(flavor: str, pool: WorkerPool) -> None:
    config = FLAVORS[flavor]
    [built] = pool.run(built_parameters, 1, config=config)
    counts = count_parameters(config)
    mtp = sum(n for name, n in built.items() if name.startswith("mtp."))
    assert counts.total == sum(built.values())
    assert counts.total_without_mtp == sum(built.values()) - mtp

    experts = sum(
        n for name, n in built.items() if ".mlp.experts." in name and not name.startswith("mtp.")
    )
    visited = experts * config.num_experts_per_tok // max(config.num_experts, 1)
    assert counts.active == counts.total_without_mtp - experts + visited


@pytest.mark.parametrize(
    ("flavor", "total", "active"),
    [("35b-a3b", 35, 3), ("122b-a10b", 122, 10), ("397b-a17b", 397, 17)],
)
def test_names_tell_the_counts(flavor: str, total: int, active: int) -> None:
    """Within the rounding of a name: half a billion of total per hundred, half of active."""
    counts = count_parameters(FLAVORS[flavor])
    assert counts.total_without_mtp / 1e9 == pytest.approx(total, rel=0.01)
    assert counts.active / 1e9 == pytest.approx(active, abs=0.5)
