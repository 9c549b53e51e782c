"""Optimizer state of float32 parameters beside bfloat16 ones (A_log, dt_bias, the GDN norm).

Depends on megatron-core 0.19: its distributed optimizer puts a group's float32 parameters first,
but looks their state up by their order in the gradient buffers, where they come last. With both
kinds in one group it saves and loads one parameter's moments under another one's name.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def install() -> None:
    """Make the two orders one; does nothing when called again."""
    original = DistributedOptimizer._build_optimizer_group_ranges
    if hasattr(original, "float32_first"):
        return

    def float32_first(
        cls: Any, param_groups: list[dict[str, Any]], gbuf_ranges: list[dict[str, Any]]
    ) -> tuple[dict[torch.nn.Parameter, tuple[int, int]], list[dict[str, Any]]]:
        places, groups = original(param_groups, gbuf_ranges)
        for index, group in enumerate(groups):
            group["params"].sort(key=lambda param: param.dtype != torch.float32)
            places |= {param: (index, order) for order, param in enumerate(group["params"])}
        return places, groups

    float32_first.float32_first = True  # type: ignore[attr-defined]
    DistributedOptimizer._build_optimizer_group_ranges = classmethod(float32_first)
